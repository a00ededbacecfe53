"""What counting costs: single-image calls with metrics and without."""

from __future__ import annotations

from benchmarks.figures import Figure, medians
from benchmarks.harness import Run, h2load, running_server


def measure(rounds: int, scale: float) -> list[Figure]:
    """Both servers in turn, round after round."""
    run = Run(1, 64, max(64, int(40_000 * scale)))
    uncounted = Run(1, 64, run.calls, all_ok=False)
    rows = []
    with (
        running_server("--transport=native") as server,
        running_server("--transport=native", module="benchmarks.unmeasured") as bare,
    ):
        for _ in range(rounds):
            with_metrics = h2load(server, run)
            without = h2load(bare, uncounted)
            rows.append(
                {
                    "calls_per_s": with_metrics.calls_per_s,
                    "uncounted_calls_per_s": run.calls / without.seconds,
                }
            )
    ratios = [row["calls_per_s"] / row["uncounted_calls_per_s"] for row in rows]
    name = "metrics on over off, 1 image per call, 64 in flight"
    return [Figure(name, ratios, 0.97, details=medians(rows))]
