"""What counting costs: single-image calls to one server that counts, and then does not."""

from __future__ import annotations

import os
from dataclasses import replace

from benchmarks.counting import COUNT, COUNT_NOT
from benchmarks.figures import Figure, medians
from benchmarks.harness import BenchmarkError, Load, Run, ServerProcess, h2load, running_server


def measure(rounds: int, scale: float) -> list[Figure]:
    """Who goes first in a round is slower, so that alternates."""
    run = Run(1, 64, max(64, int(40_000 * scale)))
    rows = []
    with running_server("--transport=native", module="benchmarks.counting") as server:
        for number in range(rounds):
            row = {}
            for counts in (True, False) if number % 2 else (False, True):
                load = _load(server, run, counts=counts)
                name = "counted" if counts else "uncounted"
                row[f"{name}_calls_per_s"] = run.calls / load.seconds
            rows.append(row)
    ratios = [row["counted_calls_per_s"] / row["uncounted_calls_per_s"] for row in rows]
    name = "metrics on over off, 1 image per call, 64 in flight"
    return [Figure(name, ratios, 0.97, details=medians(rows))]


def _load(server: ServerProcess, run: Run, *, counts: bool) -> Load:
    os.kill(server.pid, COUNT if counts else COUNT_NOT)
    load = h2load(server, replace(run, all_ok=counts))
    if load.calls and not counts:
        raise BenchmarkError(f"expected no call to be counted, got {load.calls}")
    return load
