"""``make soak``: the long form, and what it used."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError
from benchmarks.machine import machine
from tests.soak.soak import FLAT, not_flat, soak, soaked_server

# Not kept by git.
RESULTS = Path("runs")


def main(argv: list[str]) -> int:
    """Soaks a server, prints a table, stores the JSON."""
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--transport", choices=("http2", "grpcio"), default="http2")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args(argv)
    with soaked_server(arguments.transport) as (server, versions):
        result = soak(server, versions, arguments.minutes * 60, arguments.seed)
    result |= {"minutes": arguments.minutes, "transport": arguments.transport, "machine": machine()}
    print(table(result))
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"soak-{arguments.transport}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"\nwritten to {path}")
    grown = not_flat(result["used"])
    if grown:
        print(f"not flat: {', '.join(grown)}; expected at most {FLAT} over the third quarter")
    return 1 if grown else 0


def table(result: dict[str, Any]) -> str:
    """The result, for people."""
    rows = []
    for part in ("calls", "server counts"):
        values: dict[str, int] = result[part]
        rows += [part, *(f"  {name:<34}{value:>10,}" for name, value in values.items())]
    rows.append("used, the median of each quarter")
    for name, quarters in result["used"].items():
        rows.append(f"  {name:<20}" + "".join(f"{value:>10}" for value in quarters))
    rows.append(f"{result['reloads']} reloads, {result['refused versions']} releases rejected")
    return "\n".join(rows)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BenchmarkError as error:
        print(f"soak: {error}", file=sys.stderr)
        sys.exit(1)
