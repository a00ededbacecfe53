"""The Open Inference Protocol v2 over the same core: for KServe, and for Triton's clients."""
