"""How long one caller waits, and how far the slowest calls are from the usual ones."""

from __future__ import annotations

from benchmarks import limit
from benchmarks.figures import Figure, medians, ratios
from benchmarks.harness import running_echo, running_server
from benchmarks.load import Run, h2load
from benchmarks.throughput import SINGLES, scaled

ONE_CALLER = Run(1, 1, 2_000)


def measure(rounds: int, scale: float) -> list[Figure]:
    """One caller, then half of the peak load."""
    return [_one_caller(rounds, scale), _half_load(rounds, scale)]


def _one_caller(rounds: int, scale: float) -> Figure:
    run, rows = scaled(ONE_CALLER, scale), []
    with running_server("--transport=http2") as server, running_echo() as echo:
        for _ in range(rounds):
            row = {
                "p50_us": h2load(server, run, latencies=True).quantile_s(0.5) * 1e6,
                "echo_p50_us": h2load(echo, run, latencies=True).quantile_s(0.5) * 1e6,
                "inference_us": limit.seconds_per_image(1) * 1e6,
            }
            rows.append(row | {"parts_us": row["echo_p50_us"] + row["inference_us"]})
    name = "one caller, one image: p50, over an empty handler's and raw inference"
    shares = ratios(rows, "p50_us", "parts_us")
    return Figure("one_caller", name, shares, 1.3, at_least=False, details=medians(rows))


def _half_load(rounds: int, scale: float) -> Figure:
    run, rows = scaled(SINGLES, scale), []
    with running_server("--transport=http2") as server:
        for _ in range(rounds):
            peak = h2load(server, run).calls_per_s
            half = Run(1, 512, run.calls, rate=peak / 2)
            load = h2load(server, half, latencies=True)
            rows.append(
                {
                    "peak_calls_per_s": peak,
                    "p50_ms": load.quantile_s(0.5) * 1e3,
                    "p99_ms": load.quantile_s(0.99) * 1e3,
                }
            )
    name = "half of the peak load: p99 over p50"
    shares = ratios(rows, "p99_ms", "p50_ms")
    return Figure(
        "half_load", name, shares, 4.0, at_least=False, tolerance=1.0, details=medians(rows)
    )
