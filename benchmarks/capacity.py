"""What a pod of one CPU does: calls per second, and what the autoscaler sees at full load.

    python -m benchmarks.capacity

The server has one core, as a pod with that limit has. Calls per second are what its CPU time per
call allows, and not what was reached: on a shared machine the neighbours take part of the core. The
table of pod sizes in deploy/README.md and the targets of the autoscalers come from here.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
from collections.abc import Iterator

from benchmarks.harness import Run, ServerProcess, h2load, running_server

# Images per call, calls in flight, calls in one round.
SHAPES = {
    "1 image per call, 64 in flight": Run(1, 64, 10_000),
    "64 images per call, 8 in flight": Run(64, 8, 800),
    "64 images per call, 24 in flight": Run(64, 24, 1_600),
}


@contextlib.contextmanager
def pod(transport: str) -> Iterator[ServerProcess]:
    """A server on the first core; this process, and what it starts, keeps to the others."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    with running_server(f"--transport={transport}") as server:
        os.sched_setaffinity(0, cores[1:] or cores)
        try:
            yield server
        finally:
            os.sched_setaffinity(0, cores)


def measure(server: ServerProcess, run: Run) -> tuple[float, float]:
    """CPU seconds per call, and the mean wait in the queue in seconds: the autoscaler's metrics."""
    names = ("digits_queue_seconds_sum", "digits_queue_seconds_count")
    before = [server.counter(name) for name in names]
    cpu_s = h2load(server, run).server_cpu_us / 1e6
    seconds, count = (server.counter(n) - b for n, b in zip(names, before, strict=True))
    return cpu_s, seconds / count


def main(argv: list[str]) -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.capacity", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="times that each figure is taken")
    rounds = parser.parse_args(argv).rounds
    print("| transport | load | CPU per call | calls/s | images/s | wait at full load |")
    print("|---|---|---|---|---|---|")
    for transport in ("grpcio", "native"):
        with pod(transport) as server:
            for title, run in SHAPES.items():
                measure(server, run)  # warm-up
                rows = [measure(server, run) for _ in range(rounds)]
                cpu_s, wait_s = (statistics.median(column) for column in zip(*rows, strict=True))
                cells = [
                    f"{cpu_s * 1e6:,.0f} us",
                    f"{1 / cpu_s:,.0f}",
                    f"{run.images / cpu_s:,.0f}",
                ]
                print(f"| {transport} | {title} | {' | '.join(cells)} | {wait_s * 1e3:.1f} ms |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
