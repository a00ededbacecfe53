"""``make bench``: throughput and cost per call over gRPC against raw onnxruntime, in one run."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median

from benchmarks.harness import (
    BenchmarkError,
    Load,
    ServerProcess,
    check_answers,
    h2load,
    machine,
    raw_limit,
    running_server,
    served_artifact,
)

RESULTS = Path("benchmarks/results/throughput.json")
# Name, images per call, calls in flight, calls in one round, least share of the limit.
CASES = (
    ("64 images per call, 8 in flight", 64, 8, 2_500, 0.80),
    ("1 image per call, 64 in flight", 1, 64, 40_000, 0.33),
    ("1 image per call, 512 in flight", 1, 512, 40_000, None),
)


def measure_round(server: ServerProcess, scale: float) -> dict[str, dict[str, float]]:
    """Every case once, each beside a fresh measurement of the limit."""
    figures = {}
    for name, images, in_flight, calls, _ in CASES:
        limit = raw_limit(2.0 * scale)
        load: Load = h2load(
            server, images=images, in_flight=in_flight, calls=max(in_flight, int(calls * scale))
        )
        figures[name] = {
            "images_per_s": load.calls_per_s * images,
            "limit_images_per_s": limit,
            "ratio": load.calls_per_s * images / limit,
            "server_cpu_us_per_call": load.server_cpu_us,
        }
    return figures


def main(argv: list[str]) -> int:
    """Measures, prints a table, stores the JSON. Returns 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scale", type=float, default=1.0, help="length of a round")
    parser.add_argument("--transport", default="native", choices=("native", "grpcio"))
    arguments = parser.parse_args(argv)
    with running_server(f"--transport={arguments.transport}") as server:
        check_answers(server)
        measure_round(server, arguments.scale / 4)  # warm-up, not counted
        rounds = [measure_round(server, arguments.scale) for _ in range(arguments.rounds)]
        check_answers(server)
    manifest = served_artifact().manifest
    precision = manifest["precision"]
    print(f"\nmodel {manifest['name']}/{manifest['version']} ({precision}), transport "
          f"{arguments.transport}, median of {arguments.rounds} rounds")  # fmt: skip
    print(f"{'case':<34}{'images/s':>10}{'limit':>10}{'ratio':>8}{'target':>8}{'CPU us/call':>13}")
    met, summary = True, {}
    for name, *_, target in CASES:
        row = {key: median([r[name][key] for r in rounds]) for key in rounds[0][name]}
        summary[name] = {**row, "target": target}
        met = met and (target is None or arguments.transport != "native" or row["ratio"] >= target)
        print(
            f"{name:<34}{row['images_per_s']:>10,.0f}{row['limit_images_per_s']:>10,.0f}"
            f"{row['ratio']:>8.2f}{target or '-':>8}"
            f"{row['server_cpu_us_per_call']:>13.1f}"
        )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine(), "summary": summary, "rounds": rounds}
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {RESULTS}")
    return 0 if met else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BenchmarkError as error:
        print(f"bench: {error}", file=sys.stderr)
        sys.exit(1)
