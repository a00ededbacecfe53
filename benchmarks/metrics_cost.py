"""What counting costs: single-image calls with metrics and without."""

from __future__ import annotations

from benchmarks.figures import Figure, medians
from benchmarks.harness import Run, h2load, running_server


def measure(rounds: int, scale: float) -> list[Figure]:
    """Both servers in turn; who goes first in a round is slower, so that alternates."""
    run = Run(1, 64, max(64, int(40_000 * scale)))
    uncounted = Run(1, 64, run.calls, all_ok=False)
    rows = []
    with (
        running_server("--transport=native") as server,
        running_server("--transport=native", module="benchmarks.unmeasured") as bare,
    ):
        turns = [("calls_per_s", server, run), ("uncounted_calls_per_s", bare, uncounted)]
        for number in range(rounds):
            ordered = turns if number % 2 else turns[::-1]
            rows.append({name: run.calls / h2load(s, r).seconds for name, s, r in ordered})
    ratios = [row["calls_per_s"] / row["uncounted_calls_per_s"] for row in rows]
    name = "metrics on over off, 1 image per call, 64 in flight"
    return [Figure(name, ratios, 0.97, details=medians(rows))]
