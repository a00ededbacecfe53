"""What counting costs: single-image calls to one server that counts, and then does not."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

from benchmarks.counting import COUNT, COUNT_NOT
from benchmarks.figures import Figure, medians
from benchmarks.harness import BenchmarkError, Load, Run, ServerProcess, h2load, running_server
from service.metrics import BULK_IMAGES

# Short rounds, and many for each that was asked for: who goes first differs by more than what is
# looked for, and so does one second from the next.
ROUNDS, CALLS = 10, 8_000
# The peak of single-image calls: with fewer in flight some of the CPU is idle, and takes the cost.
IN_FLIGHT = 512


def measure(rounds: int, scale: float) -> list[Figure]:
    """Who goes first in a round is slower, so that alternates."""
    # A little more than a multiple of what is counted at a time, so that little is left at the end.
    bulks = max(1, round(CALLS * scale / BULK_IMAGES))
    run = Run(1, IN_FLIGHT, bulks * BULK_IMAGES + BULK_IMAGES // 4)
    rows = []
    with running_server("--transport=native", module="benchmarks.counting") as server:
        for number in range(ROUNDS * rounds):
            turns = (COUNT, COUNT_NOT) if number % 2 else (COUNT_NOT, COUNT)
            loads = {turn: _load(server, run, turn) for turn in turns}
            rows.append(
                {
                    "counted_calls_per_s": loads[COUNT].calls_per_s,
                    "uncounted_calls_per_s": loads[COUNT_NOT].calls_per_s,
                    "counting_us_per_call": loads[COUNT].server_cpu_us
                    - loads[COUNT_NOT].server_cpu_us,
                }
            )
    ratios = [row["counted_calls_per_s"] / row["uncounted_calls_per_s"] for row in rows]
    name = f"metrics on over off, 1 image per call, {IN_FLIGHT} in flight"
    return [Figure(name, ratios, 0.97, details=medians(rows))]


def _load(server: ServerProcess, run: Run, turn: signal.Signals) -> Load:
    """A run after which the server must have counted every call, or none."""
    os.kill(server.pid, turn)
    before = server.ok_calls()
    cpu = server.cpu_seconds()
    load = h2load(replace(server, http=""), run)
    expected = run.calls if turn == COUNT else 0
    give_up = time.monotonic() + 2  # a call is counted a moment after its answer left
    while (counted := server.ok_calls() - before) != expected:
        if time.monotonic() > give_up:
            raise BenchmarkError(f"expected {expected} calls to be counted, got {counted}")
        time.sleep(0.01)
    # With the scrapes that count what was left, of which there are as many without any.
    return replace(load, server_cpu_us=(server.cpu_seconds() - cpu) / run.calls * 1e6)
