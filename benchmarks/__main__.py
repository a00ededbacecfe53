"""``make bench``: every figure with its target, measured side by side in one run."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from benchmarks import (
    abuse,
    access,
    fairness,
    footprint,
    images,
    latency,
    metrics_cost,
    oip,
    overload,
    processes,
    stream,
    throughput,
)
from benchmarks.figures import Figure
from benchmarks.harness import BenchmarkError, machine, served_artifact

RESULTS = Path("benchmarks/results")
SUITES: dict[str, Callable[[int, float], list[Figure]]] = {
    "throughput": throughput.measure,
    "latency": latency.measure,
    "overload": overload.measure,
    "fairness": fairness.measure,
    "stream": stream.measure,
    "processes": processes.measure,
    "metrics": metrics_cost.measure,
    "access": access.measure,
    "footprint": footprint.measure,
    "abuse": abuse.measure,
    "images": images.measure,
    "oip": oip.measure,
}


def main(argv: list[str]) -> int:
    """Measures, prints a table, stores the JSON. Returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(SUITES))
    parser.add_argument("--rounds", type=int, default=5, help="the median of these counts")
    parser.add_argument("--scale", type=float, default=1.0, help="length of a round")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.suites) - SUITES.keys()
    if unknown:
        parser.error(f"expected some of {', '.join(SUITES)}, got {', '.join(sorted(unknown))}")
    manifest = served_artifact().manifest
    model = f"{manifest['name']} version {manifest['version']}, {manifest['precision']}"
    print(f"model {model}; medians of {arguments.rounds} rounds\n")
    figures: list[Figure] = []
    for suite in arguments.suites or SUITES:
        for figure in SUITES[suite](arguments.rounds, arguments.scale):
            print(row(figure), flush=True)
            figures.append(figure)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "bench.json"
    result = {"model": model, "machine": machine(), "figures": [asdict(f) for f in figures]}
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {path}")
    return 0 if all(figure.met for figure in figures) else 1


def row(figure: Figure) -> str:
    """One line of the table."""
    sign = ">=" if figure.at_least else "<="
    target = "-" if figure.target is None else f"{sign} {figure.target:g}"
    details = ", ".join(f"{name} {value:,.4g}" for name, value in figure.details.items())
    missed = "" if figure.met else "  MISSED"
    value = f"{figure.value:.3g} {figure.unit}"
    return f"{figure.name:<72}{value:>12}  {target:<8}{missed}\n      {details}".rstrip()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
