"""Two server processes on one host, each with a port of its own, in place of one."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from benchmarks.figures import Figure, medians
from benchmarks.harness import Run, ServerProcess, h2load, running_server

# Images per call, calls in flight.
CASES = {"single images, 64 in flight": (1, 64), "64 images per call, 8 in flight": (64, 8)}
# Calls in one round.
CALLS = {("native", 1): 30_000, ("grpcio", 1): 6_000, ("native", 64): 2_000, ("grpcio", 64): 1_500}


def measure(rounds: int, scale: float) -> list[Figure]:
    """The rate of two, each with half of the slots and half of the load, over that of one."""
    figures = []
    for transport in ("native", "grpcio"):
        flag = f"--transport={transport}"
        with (
            running_server(flag) as alone,
            running_server(flag, "--instances=1") as first,
            running_server(flag, "--instances=1") as second,
        ):
            for name, (images, in_flight) in CASES.items():
                calls = max(2 * in_flight, int(CALLS[transport, images] * scale))
                run = Run(images, in_flight, calls)
                rows = [_round(run, alone, [first, second]) for _ in range(rounds)]
                ratios = [row["two_calls_per_s"] / row["one_calls_per_s"] for row in rows]
                title = f"{transport}, {name}: two processes over one"
                figures.append(Figure(title, ratios, None, details=medians(rows)))
    return figures


def _round(run: Run, alone: ServerProcess, pair: list[ServerProcess]) -> dict[str, float]:
    one = h2load(alone, run)
    half = replace(run, in_flight=run.in_flight // 2, calls=run.calls // 2)
    with ThreadPoolExecutor(len(pair)) as callers:
        loads = list(callers.map(lambda server: h2load(server, half), pair))
    # The slower one tells when all of the work was done.
    two = sum(load.calls for load in loads) / max(load.seconds for load in loads)
    return {"one_calls_per_s": one.calls_per_s, "two_calls_per_s": two}
