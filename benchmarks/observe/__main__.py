"""``python -m benchmarks.observe``: looks at a loaded server with a real Prometheus."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.harness import running_server
from benchmarks.observe import tables
from benchmarks.observe.check import problems
from benchmarks.observe.dashboard import RULES
from benchmarks.observe.load import FLAGS, run_load
from benchmarks.observe.picture import draw
from benchmarks.observe.prometheus import PrometheusError, running_prometheus

DIGITS = Path(__file__).parents[2] / "tests/samples/mnist-500.npz"
PICTURE = Path("runs/dashboard.png")


def main(argv: list[str]) -> int:
    """Looks at a loaded server, or writes what is derived; returns the exit code."""
    parser = argparse.ArgumentParser(prog="make observe", description=__doc__)
    parser.add_argument(
        "what",
        nargs="?",
        choices=("look", "write"),
        default="look",
        help="write renews docs/metrics.md and prometheusrule.yaml",
    )
    parser.add_argument("--seconds", type=float, default=60, help="of load")
    parser.add_argument("--picture", type=Path, default=PICTURE, help=f"default {PICTURE}")
    arguments = parser.parse_args(argv)
    if arguments.what == "write":
        tables.write()
        return 0
    try:
        return _look(arguments.seconds, arguments.picture)
    except PrometheusError as error:
        print(f"observe: {error}", file=sys.stderr)
        return 1


def _look(seconds: float, picture: Path) -> int:
    with np.load(DIGITS) as arrays:
        images = arrays["images"]
    with (
        running_server(*FLAGS) as server,
        running_prometheus(server.http.removeprefix("http://"), RULES) as prometheus,
    ):
        start = time.time()
        answered = run_load(server.address, images, seconds)
        end = time.time()
        found = problems(prometheus, f"{server.http}/metrics", start, end)
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(draw(prometheus, start, end))
    print(f"{answered:,} calls answered; the dashboard is drawn in {picture}")
    for problem in found:
        print(f"FAIL  {problem}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
