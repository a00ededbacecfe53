"""One setting for every model: what the batcher decides, beside batch sizes set by hand."""

from __future__ import annotations

import tempfile
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks import limit
from benchmarks.figures import Figure, medians, ratios
from benchmarks.harness import ServerProcess, running_server
from benchmarks.load import h2load
from benchmarks.throughput import SINGLES, title

# Registered networks from 10 to 200 µs an image, and sizes of the kernels of those that have a
# choice. They are not trained: what is compared is time.
NETWORKS = (("conv16-32", 3), ("conv32-64-fc128", 3), ("conv32-64-128", 3), ("conv32-64-128", 5))
BY_HAND = (16, 32, 64)
# In one round, and inference in it: long enough that how a run begins does not decide.
CALLS, INFERENCE_US = 40_000, 2e6
# What the server exports of its decision.
DECIDED = ("digits_batch_target_images", "digits_image_cost_seconds")


def measure(rounds: int, scale: float) -> list[Figure]:
    """Single images, 64 in flight: calls per second over those of the best setting by hand."""
    return [_figure(arch, kernel, rounds, scale) for arch, kernel in NETWORKS]


def _figure(arch: str, kernel: int, rounds: int, scale: float) -> Figure:
    model = _exported(arch, kernel)
    raw_us = limit.seconds_per_image(64, model) * 1e6
    run = replace(SINGLES, calls=max(256, int(scale * min(CALLS, INFERENCE_US / raw_us))))
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file, ExitStack() as servers:
        Path(file.name).write_bytes(model)
        running = {
            f"by_hand_{size}": servers.enter_context(_server(file.name, size)) for size in BY_HAND
        }
        running["measured"] = servers.enter_context(_server(file.name, 0))
        for server in running.values():
            h2load(server, run)  # warm-up, not counted
        rows = [
            {name: h2load(server, run).calls_per_s for name, server in running.items()}
            for _ in range(rounds)
        ]
        decided = {name: running["measured"].counter(name) for name in DECIDED}
    rates = medians(rows)
    best = max((name for name in rates if name != "measured"), key=rates.__getitem__)
    network = f"{arch}, kernels of {kernel}"
    name = f"{network}, {title(run)}: batches as measured, over the best size by hand"
    details = {"raw_us": raw_us} | rates | decided
    key = f"network_{arch}_{kernel}"
    return Figure(key, name, ratios(rows, "measured", best), 0.95, details=details)


def _exported(arch: str, kernel: int) -> bytes:
    """A network with random weights, as ONNX."""
    # torch takes seconds to import, and nothing else here needs it.
    from export.graph import export_model  # noqa: PLC0415
    from training.model import Classifier, Knobs  # noqa: PLC0415

    model = Classifier(arch, Knobs(kernel_size=kernel)).eval()
    return export_model(model, name=arch, labels=())


def _server(model: str, size: int) -> AbstractContextManager[ServerProcess]:
    """With a batch size by hand, or 0 for the server's own decision."""
    flags = [f"--max-batch-size={size}"] if size else []
    module = ("benchmarks.altered", model, str(size))
    return running_server("--transport=http2", *flags, module=module)
