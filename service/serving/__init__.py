"""The core: images and a deadline in, predictions out. Knows neither gRPC, protobuf nor HTTP."""
