"""What a pod of one CPU does: calls per second, and what the autoscaler sees at full load.

The server has one core, as a pod with that limit has. Calls per second are what its CPU time per
call allows, and not what was reached: on a shared machine the neighbours take part of the core.
deploy/README.md computes pods in the same way.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from benchmarks.figures import Figure, medians
from benchmarks.harness import ServerProcess, running_server
from benchmarks.load import Run, h2load
from benchmarks.throughput import scaled, title

SHAPES = (Run(1, 64, 10_000), Run(64, 8, 800), Run(64, 24, 1_600))
WAITS = ("digits_queue_seconds_sum", "digits_queue_seconds_count")


def measure(rounds: int, scale: float) -> list[Figure]:
    """Calls per second of a pod, for each shape of load."""
    with _pod() as server:
        return [_figure(server, scaled(run, scale), rounds) for run in SHAPES]


@contextlib.contextmanager
def _pod() -> Iterator[ServerProcess]:
    """A server on the first core; this process, and what it starts, keeps to the others."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    try:
        with running_server("--transport=http2") as server:
            os.sched_setaffinity(0, cores[1:] or cores)
            yield server
    finally:
        os.sched_setaffinity(0, cores)


def _figure(server: ServerProcess, run: Run, rounds: int) -> Figure:
    h2load(server, run)  # warm-up, not counted
    rows = []
    for _ in range(rounds):
        before = [server.counter(name) for name in WAITS]
        cpu_us = h2load(server, run).server_cpu_us
        seconds, count = (server.counter(n) - b for n, b in zip(WAITS, before, strict=True))
        rows.append(
            {
                "cpu_us": cpu_us,
                "calls_per_s": 1e6 / cpu_us,
                "images_per_s": run.images * 1e6 / cpu_us,
                "wait_ms": seconds / count * 1e3,
            }
        )
    rates = [row["calls_per_s"] for row in rows]
    key, name = f"pod_{run.images}_{run.in_flight}", f"a pod of one CPU, {title(run)}"
    return Figure(key, name, rates, unit="calls/s", tolerance=None, details=medians(rows))
