"""The Open Inference Protocol, generated from inference.proto; what servers need, not clients."""
