"""``make bench``: every figure, measured side by side in one run, beside what is committed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import (
    capacity,
    fairness,
    footprint,
    latency,
    models,
    mosec,
    overload,
    pairs,
    results,
    throughput,
)
from benchmarks.figures import Figure
from benchmarks.harness import BenchmarkError

Suite = Callable[[int, float], list[Figure]]
# What a committed result holds.
SUITES: dict[str, Suite] = {
    "front": pairs.front,
    "mosec": mosec.measure,
    "throughput": throughput.measure,
    "tls": pairs.tls,
    "latency": latency.measure,
    "stream": pairs.stream,
    "overload": overload.measure,
    "fairness": fairness.measure,
    "infer": pairs.infer,
    "metrics": pairs.metrics,
    "models": models.measure,
    "footprint": footprint.measure,
}
# Measured only by name.
OTHERS: dict[str, Suite] = {"capacity": capacity.measure}


def main(argv: list[str]) -> int:
    """Measures, prints and stores; returns 1 if a figure is worse than the committed one."""
    arguments = _arguments(argv)
    suites = SUITES | OTHERS
    figures: list[Figure] = []
    for name in arguments.suites or SUITES:
        for figure in suites[name](arguments.rounds, arguments.scale):
            print(row(figure), flush=True)
            figures.append(figure)
    result = results.new(arguments.rounds, arguments.scale, figures)
    path = results.committed_path()
    # First, since the new result may take the place of the committed one.
    committed = results.read(path) if path.exists() else None
    output = path if arguments.commit else arguments.output or results.LOCAL
    result.write(output)
    print(f"\nwritten to {output}")
    if committed is None:
        print(f"nothing to compare with: {path} does not exist")
        return 0
    regressions = result.regressions(committed)
    for line in regressions:
        print(f"WORSE  {line}")
    return 1 if regressions else 0


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    known = (*SUITES, *OTHERS)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(known))
    parser.add_argument("--rounds", type=int, default=5, help="the median of these counts")
    parser.add_argument("--scale", type=float, default=1.0, help="length of a round")
    parser.add_argument("--output", type=Path, help=f"where the JSON goes; {results.LOCAL}")
    parser.add_argument(
        "--commit",
        action="store_true",
        help=f"write {results.committed_path().name} in {results.COMMITTED.name}/ instead",
    )
    arguments = parser.parse_args(argv)
    unknown = set(arguments.suites) - set(known)
    if unknown:
        parser.error(f"expected some of {', '.join(known)}, got {', '.join(sorted(unknown))}")
    if arguments.commit and arguments.suites and not set(arguments.suites) >= SUITES.keys():
        parser.error("--commit: expected every suite, since all rows of a result are of one run")
    return arguments


def row(figure: Figure) -> str:
    """One figure as text."""
    sign = ">=" if figure.at_least else "<="
    target = "" if figure.target is None else f"{sign} {figure.target:g}"
    missed = "" if figure.met else "  missed"
    details = ", ".join(f"{name} {value:,.4g}" for name, value in figure.details.items())
    value = f"{figure.value:.3g} {figure.unit}"
    return f"{figure.name:<80}{value:>12}  {target:<8}{missed}\n      {details}".rstrip()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
