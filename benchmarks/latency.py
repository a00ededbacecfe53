"""Latency of one caller."""

from __future__ import annotations

from benchmarks import limit
from benchmarks.figures import Figure, medians, ratios
from benchmarks.harness import running_echo, running_server
from benchmarks.load import Run, h2load
from benchmarks.throughput import scaled

ONE_CALLER = Run(1, 1, 2_000)


def measure(rounds: int, scale: float) -> list[Figure]:
    """One caller, one image."""
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
    return [Figure("one_caller", name, shares, 1.3, at_least=False, details=medians(rows))]
