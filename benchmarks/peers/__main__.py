"""``make peers``: this server beside others from PyPI, on the same model, load and cores.

Every peer gets a virtual environment of its own. It is measured with dynamic batching and without,
and its better rate counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.figures import Figure
from benchmarks.harness import BenchmarkError, Run, h2load, machine, running_server
from benchmarks.peers.peer import PEERS, Peer, running_peer

RESULTS = Path("benchmarks/results/peers.json")
# Images per call, calls in flight, calls in one round.
CASES = {
    "single images, 64 in flight": (1, 64, 20_000),
    "64 images per call, 8 in flight": (64, 8, 1_500),
}
OURS = {"native": "digits-serving, native", "grpcio": "digits-serving, grpcio"}


def main(argv: list[str]) -> int:
    """Measures round after round, prints a table of images/s and of ratios, stores the JSON."""
    parser = argparse.ArgumentParser(prog="make peers", description=__doc__)
    parser.add_argument("peers", nargs="*", metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--rounds", type=int, default=3, help="the median of these counts")
    parser.add_argument("--scale", type=float, default=1.0, help="length of a round")
    arguments = parser.parse_args(argv)
    unknown = set(arguments.peers) - PEERS.keys()
    if unknown:
        parser.error(f"expected some of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
    peers = [PEERS[name] for name in arguments.peers or PEERS]
    for peer in peers:
        peer.install()
    rows = [_round(peers, arguments.scale) for _ in range(arguments.rounds)]
    for name in CASES:
        _print_case(name, [row[name] for row in rows])
    figures = [asdict(figure) for peer in peers for figure in _ratios(peer, rows)]
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps({"machine": machine(), "rounds": rows, "figures": figures}))
    print(f"written to {RESULTS}")
    return 0


def _round(peers: list[Peer], scale: float) -> dict[str, dict[str, float]]:
    """Images/s of every server in every case, one server at a time."""
    rates: dict[str, dict[str, float]] = {name: {} for name in CASES}
    for transport, title in OURS.items():
        with running_server(f"--transport={transport}") as server:
            for name, (images, in_flight, calls) in CASES.items():
                run = Run(images, in_flight, max(in_flight, int(calls * scale)))
                h2load(server, run)
                rates[name][title] = h2load(server, run).calls_per_s * images
    for peer in peers:
        for batch in peer.batches:
            with running_peer(peer, batch) as server:
                server.check_answers()
                for name, (images, in_flight, calls) in CASES.items():
                    count = max(in_flight, int(calls * scale * peer.share))
                    server.calls_per_s(images, in_flight, count)
                    rate = server.calls_per_s(images, in_flight, count) * images
                    rates[name][peer.name] = max(rate, rates[name].get(peer.name, 0.0))
    return rates


def _print_case(name: str, rows: list[dict[str, float]]) -> None:
    print(f"\n{name}")
    ours = OURS["native"]
    for server in rows[0]:
        rate = median(row[server] for row in rows)
        times = median(row[ours] / row[server] for row in rows)
        print(f"  {server:<28}{rate:>10,.0f} images/s   native is {times:.2f} times that")


def _ratios(peer: Peer, rows: list[dict[str, dict[str, float]]]) -> list[Figure]:
    return [
        Figure(
            f"{ours} over {peer.name}, {case}",
            [row[case][ours] / row[case][peer.name] for row in rows],
            None,
        )
        for case in CASES
        for ours in OURS.values()
    ]


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except BenchmarkError as error:
        print(f"peers: {error}", file=sys.stderr)
        sys.exit(1)
