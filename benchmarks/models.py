"""One setting for every model: what the batcher decides, beside batch sizes set by hand."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace

from benchmarks import limit
from benchmarks.figures import Figure, medians, ratios
from benchmarks.harness import ServerProcess, running_server
from benchmarks.load import h2load
from benchmarks.throughput import SINGLES, title

# What an image costs in the inferences that are compared; the served model is slowed down to that,
# or answers some images without looking at them.
COSTS_US = (10, 30, 100, 300)
BY_HAND = (16, 32, 64)
# Of the cheapest.
CALLS = 40_000
# What the server exports of its decision.
DECIDED = ("digits_batch_target_images", "digits_image_cost_seconds")


def measure(rounds: int, scale: float) -> list[Figure]:
    """Single images, 64 in flight: calls per second over those of the best setting by hand."""
    return [_figure(cost_us, rounds, scale) for cost_us in COSTS_US]


def _figure(cost_us: int, rounds: int, scale: float) -> Figure:
    work = cost_us / (limit.seconds_per_image(64) * 1e6)
    run = replace(SINGLES, calls=max(256, int(CALLS * scale * COSTS_US[0] / cost_us)))
    with ExitStack() as servers:
        running = {
            f"by_hand_{size}": servers.enter_context(_server(work, size)) for size in BY_HAND
        }
        running["measured"] = servers.enter_context(_server(work, 0))
        for server in running.values():
            h2load(server, run)  # warm-up, not counted
        rows = [
            {name: h2load(server, run).calls_per_s for name, server in running.items()}
            for _ in range(rounds)
        ]
        decided = {name: running["measured"].counter(name) for name in DECIDED}
    rates = medians(rows)
    best = max((name for name in rates if name != "measured"), key=rates.__getitem__)
    name = f"model of {cost_us} µs an image, {title(run)}: over the best batch size by hand"
    shares = ratios(rows, "measured", best)
    return Figure(f"cost_{cost_us}", name, shares, 0.95, details=rates | decided)


def _server(work: float, size: int) -> AbstractContextManager[ServerProcess]:
    """With a batch size by hand, or 0 for the server's own decision."""
    flags = [f"--max-batch-size={size}"] if size else []
    module = ("benchmarks.altered", str(work), str(size))
    return running_server("--transport=http2", *flags, module=module)
