"""gRPC: one file for each thing a caller can do, on any transport."""
