"""``python -m tests.attacks``: what well-behaved callers notice of callers that misbehave.

The 99th percentile of single-image calls beside each attack, over that of quiet: at most 3. It is a
measurement: run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from statistics import median

from benchmarks.harness import ServerProcess, check_answers, running_server
from benchmarks.load import Run, h2load
from tests.attacks import attacks

BOUND = 3.0
# Of the well-behaved callers: a load far below the peak of either transport.
CALLS_PER_S, CALLS = 800, 4_000
# Frames, on one connection.
FLOOD_PER_S = 20_000
Attack = Callable[[str], contextlib.AbstractContextManager[object]]

ATTACKS: dict[str, Attack] = {
    "2,000 idle connections": lambda address: attacks.idle(address, 2_000),
    "500 connections that say nothing": lambda address: attacks.half_open(address, 500),
    "200 callers that send a byte at a time": lambda address: attacks.trickled(address, 200),
    "2,000 calls half sent": lambda address: attacks.half_sent(address, 20, 99),
    "calls reset as they begin": lambda address: attacks.reset_flood(address, FLOOD_PER_S),
    "pings": lambda address: attacks.ping_flood(address, FLOOD_PER_S),
    "pings, answers unread": lambda address: attacks.ping_flood(address, FLOOD_PER_S, reads=False),
    "settings": lambda address: attacks.settings_flood(address, FLOOD_PER_S),
}


def main(argv: list[str]) -> int:
    """Prints a table; returns 1 if a ratio is beyond the bound."""
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    parser.add_argument("--transport", choices=("http2", "grpcio"), default="http2")
    parser.add_argument("--rounds", type=int, default=3, help="the median of these counts")
    parser.add_argument("--scale", type=float, default=1.0, help="length of a round")
    arguments = parser.parse_args(argv)
    # Fewer than this and the first calls on new connections are more than one in a hundred.
    run = Run(1, 16, max(800, int(CALLS * arguments.scale)), rate=CALLS_PER_S)
    worst = 0.0
    with running_server(f"--transport={arguments.transport}") as server:
        h2load(server, run)  # warm-up, not counted
        for name, attack in ATTACKS.items():
            pairs = [_measure(server, run, attack) for _ in range(arguments.rounds)]
            quiet, beside = (median(column) for column in zip(*pairs, strict=True))
            ratio = median(attacked / alone for alone, attacked in pairs)
            worst = max(worst, ratio)
            print(f"{name:<40} p99 {quiet:6.2f} ms quiet, {beside:6.2f} ms, {ratio:5.2f} times")
    return 1 if worst > BOUND else 0


def _measure(server: ServerProcess, run: Run, attack: Attack) -> tuple[float, float]:
    """The percentile in milliseconds: of quiet, and beside the attack."""
    quiet = h2load(server, run, latencies=True).quantile_s(0.99)
    with attack(server.address):
        check_answers(server)
        beside = h2load(server, run, latencies=True).quantile_s(0.99)
        check_answers(server)
    return quiet * 1e3, beside * 1e3


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
