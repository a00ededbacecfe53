"""Throughput and CPU per call against raw onnxruntime, and grpcio against an empty handler."""

from __future__ import annotations

from benchmarks.figures import Figure, medians
from benchmarks.harness import (
    Run,
    ServerProcess,
    check_answers,
    h2load,
    raw_limit,
    raw_seconds_per_image,
    running_echo,
    running_server,
)

# Images per call, calls in flight, calls in one round, share of the limit to reach.
CASES = {
    "64 images per call, 8 in flight, of the limit": (64, 8, 2_500, 0.92),
    "1 image per call, 64 in flight, of the limit": (1, 64, 40_000, 0.40),
    "1 image per call, 512 in flight, of the limit": (1, 512, 40_000, 0.50),
}
SINGLES = "1 image per call, 64 in flight, of the limit"


def measure(rounds: int, scale: float) -> list[Figure]:
    """Every case in turn, round after round, each beside a fresh measurement of the limit."""
    rows: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    with running_server("--transport=native") as server:
        check_answers(server)
        for name in CASES:
            _case(server, name, scale / 4)  # warm-up, not counted
        for _ in range(rounds):
            for name in CASES:
                rows[name].append(_case(server, name, scale))
        check_answers(server)
    figures = [
        Figure(name, [row["ratio"] for row in rows[name]], target, details=medians(rows[name]))
        for name, (*_, target) in CASES.items()
    ]
    overhead = [row["server_cpu_us"] - row["raw_cpu_us"] for row in rows[SINGLES]]
    name = "server CPU per single-image call, less raw inference"
    figures.append(Figure(name, overhead, 22.0, at_least=False, unit="us"))
    return [*figures, _against_echo(rounds, scale)]


def _case(server: ServerProcess, name: str, scale: float) -> dict[str, float]:
    images, in_flight, calls, _ = CASES[name]
    limit = raw_limit(2.0 * scale)
    run = Run(images, in_flight, max(in_flight, int(calls * scale)))
    load = h2load(server, run)
    rate = load.calls_per_s * images
    return {
        "images_per_s": rate,
        "limit_images_per_s": limit,
        "ratio": rate / limit,
        "server_cpu_us": load.server_cpu_us,
        "raw_cpu_us": raw_seconds_per_image(64) * 1e6,
    }


def _against_echo(rounds: int, scale: float) -> Figure:
    """How much is left of the rate of grpcio itself, whose own cost is most of a call there."""
    run = Run(1, 64, max(64, int(10_000 * scale)))
    with running_server("--transport=grpcio") as server, running_echo("grpcio") as echo:
        rows = [
            {
                "calls_per_s": h2load(server, run).calls_per_s,
                "echo_calls_per_s": h2load(echo, run).calls_per_s,
            }
            for _ in range(rounds)
        ]
    ratios = [row["calls_per_s"] / row["echo_calls_per_s"] for row in rows]
    name = "grpcio, 1 image per call, 64 in flight, over an empty handler"
    return Figure(name, ratios, 0.90, details=medians(rows))
