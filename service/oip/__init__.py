"""The Open Inference Protocol v2 over the same batcher: for KServe, and for Triton's clients."""

SERVICE = "inference.GRPCInferenceService"
# Its methods, as ``service.metrics.METHODS`` tells our own.
METHODS = dict.fromkeys(
    (
        *("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata"),
        *("ModelInfer", "ModelConfig", "ModelStatistics"),
    ),
    "unary",
)
