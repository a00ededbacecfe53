"""How long one caller waits, and how far the slowest calls are from the usual ones."""

from __future__ import annotations

from benchmarks.figures import Figure, medians
from benchmarks.harness import Run, h2load, raw_seconds_per_image, running_echo, running_server


def measure(rounds: int, scale: float) -> list[Figure]:
    """One caller on each transport, then half of the peak load."""
    figures = [_one_caller(transport, rounds, scale) for transport in ("native", "grpcio")]
    return [*figures, _half_load(rounds, scale)]


def _one_caller(transport: str, rounds: int, scale: float) -> Figure:
    run = Run(1, 1, max(20, int(2_000 * scale)))
    with running_server(f"--transport={transport}") as server, running_echo(transport) as echo:
        rows = [
            {
                "p50_us": h2load(server, run, latencies=True).quantile_s(0.5) * 1e6,
                "echo_p50_us": h2load(echo, run, latencies=True).quantile_s(0.5) * 1e6,
                "inference_us": raw_seconds_per_image(1) * 1e6,
            }
            for _ in range(rounds)
        ]
    ratios = [row["p50_us"] / (row["echo_p50_us"] + row["inference_us"]) for row in rows]
    name = f"{transport}, one caller, one image: p50 over empty handler and inference"
    return Figure(name, ratios, 1.3, at_least=False, details=medians(rows))


def _half_load(rounds: int, scale: float) -> Figure:
    rows = []
    with running_server("--transport=native") as server:
        for _ in range(rounds):
            calls = max(64, int(30_000 * scale))
            peak = h2load(server, Run(1, 64, calls)).calls_per_s
            load = h2load(server, Run(1, 512, calls, rate=peak / 2), latencies=True)
            rows.append(
                {
                    "peak_calls_per_s": peak,
                    "p50_ms": load.quantile_s(0.5) * 1e3,
                    "p99_ms": load.quantile_s(0.99) * 1e3,
                }
            )
    ratios = [row["p99_ms"] / row["p50_ms"] for row in rows]
    name = "half of the peak load: p99 over p50"
    return Figure(name, ratios, 4.0, at_least=False, details=medians(rows))
