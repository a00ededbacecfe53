"""What is left of the peak when far more calls come than can be answered."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.figures import Figure, medians, ratios
from benchmarks.harness import running_server
from benchmarks.load import h2load
from benchmarks.throughput import PEAK, scaled

# Enough connections that no bound on the calls of one makes callers wait instead. Four times as
# many calls as at the peak, which fill the queue; four times those.
LOAD = replace(PEAK, in_flight=2_048, connections=64, all_ok=False)
FLOOD = replace(LOAD, in_flight=8_192, calls=4 * LOAD.calls)
RUNS = {"peak_calls_per_s": PEAK, "load_calls_per_s": LOAD, "flood_calls_per_s": FLOOD}
LENGTH = 1.5


def measure(rounds: int, scale: float) -> list[Figure]:
    """Goodput beside the peak."""
    runs = {name: scaled(run, LENGTH * scale) for name, run in RUNS.items()}
    with running_server("--transport=http2") as server:
        rows = [
            {name: h2load(server, run).calls_per_s for name, run in runs.items()}
            for _ in range(rounds)
        ]
    return [
        Figure(
            f"goodput_{run.in_flight}",
            f"goodput with {run.in_flight:,} calls in flight, over the peak with {PEAK.in_flight}",
            ratios(rows, name, "peak_calls_per_s"),
            0.9,
            details=medians(rows),
        )
        for name, run in list(runs.items())[1:]
    ]
