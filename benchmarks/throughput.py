"""Throughput as a share of raw onnxruntime's."""

from __future__ import annotations

from dataclasses import replace

from benchmarks import limit
from benchmarks.figures import Figure, medians, ratios
from benchmarks.harness import ServerProcess, check_answers, running_server
from benchmarks.load import Run, h2load
from benchmarks.machine import by_vnni

SINGLES, BULK = Run(1, 64, 40_000), Run(64, 8, 2_500)
PEAK = replace(SINGLES, in_flight=512)
LIMIT_S = 2.0


def measure(rounds: int, scale: float) -> list[Figure]:
    """Every case in turn, round after round, each beside a fresh measurement of the limit."""
    cases = {"singles_limit": SINGLES, "peak_limit": PEAK, "bulk_limit": BULK}
    rows: dict[str, list[dict[str, float]]] = {key: [] for key in cases}
    with running_server("--transport=http2") as server:
        check_answers(server)
        for run in cases.values():
            h2load(server, scaled(run, scale / 4))  # warm-up, not counted
        for _ in range(rounds):
            for key, run in cases.items():
                rows[key].append(_against_limit(server, scaled(run, scale), LIMIT_S * scale))
        check_answers(server)
    targets = {"singles_limit": by_vnni(without=0.60, having=0.45)}
    limits = [
        Figure(
            key,
            f"{title(run)}, of the limit",
            ratios(rows[key], "images_per_s", "limit_images_per_s"),
            targets.get(key),
            details=medians(rows[key]),
        )
        for key, run in cases.items()
    ]
    return [*limits, _overhead(rows["singles_limit"])]


def scaled(run: Run, scale: float) -> Run:
    """The same for longer or shorter, but every call in flight is made once at least."""
    return replace(run, calls=max(run.in_flight, int(run.calls * scale)))


def title(run: Run) -> str:
    """What a run does, for names of figures."""
    images = "single images" if run.images == 1 else f"{run.images} images a call"
    return f"{images}, {run.in_flight:,} in flight"


def _against_limit(server: ServerProcess, run: Run, limit_s: float) -> dict[str, float]:
    raw = limit.images_per_s(limit_s)
    load = h2load(server, run)
    return {
        "images_per_s": load.calls_per_s * run.images,
        "limit_images_per_s": raw,
        "server_cpu_us": load.server_cpu_us,
        "raw_us": limit.seconds_per_image(64) * 1e6,
    }


def _overhead(rows: list[dict[str, float]]) -> Figure:
    name = "server CPU of a single-image call, less raw inference"
    overhead = [row["server_cpu_us"] - row["raw_us"] for row in rows]
    return Figure("overhead", name, overhead, at_least=False, unit="µs", tolerance=None)
