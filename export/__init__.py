"""Converts a checkpoint to ONNX, proves parity, and writes a verified model artifact."""

import os

# Official Linux builds of onnxruntime report home unless told not to before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
