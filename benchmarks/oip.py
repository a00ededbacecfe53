"""The Open Inference Protocol's ModelInfer beside Classify, on both transports."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from benchmarks.figures import Figure, medians
from benchmarks.harness import Run, ServerProcess, h2load, running_server
from digits.oip import inference_pb2
from service.oip import SERVICE

PATH = f"/{SERVICE}/ModelInfer"
CALLS = {"native": 10_000, "grpcio": 4_000}


def infer_request(images: npt.NDArray[np.uint8]) -> bytes:
    """A serialised ModelInferRequest of raw UINT8 contents, as tritonclient sends it."""
    request = inference_pb2.ModelInferRequest(model_name="digits")
    request.inputs.add(name="image", datatype="UINT8", shape=images.shape)
    request.raw_input_contents.append(images.tobytes())
    return request.SerializeToString()


def measure(rounds: int, scale: float) -> list[Figure]:
    """Single images, 64 in flight: calls per second over those of Classify in the same round."""
    return [_figure(transport, rounds, scale) for transport in CALLS]


def _figure(transport: str, rounds: int, scale: float) -> Figure:
    calls = max(64, int(CALLS[transport] * scale))
    rows = []
    with running_server(f"--transport={transport}") as server:
        for _ in range(rounds):
            classify = h2load(server, Run(1, 64, calls))
            before = _batches(server)
            infer = h2load(server, Run(1, 64, calls, path=PATH, encode=infer_request))
            rows.append(
                {
                    "calls_per_s": infer.calls_per_s,
                    "classify_calls_per_s": classify.calls_per_s,
                    "server_cpu_us": infer.server_cpu_us,
                    "images_per_batch": infer.calls / (_batches(server) - before),
                }
            )
    ratios = [row["calls_per_s"] / row["classify_calls_per_s"] for row in rows]
    name = f"ModelInfer over Classify, {transport}, 1 image per call, 64 in flight"
    return Figure(name, ratios, None, details=medians(rows))


def _batches(server: ServerProcess) -> float:
    return server.counter("digits_batch_size_count")
