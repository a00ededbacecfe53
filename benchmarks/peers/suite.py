"""This server beside others from PyPI, on the same model, load and cores.

Every peer has an environment of its own and two worker processes or what it has instead. It is
measured with several settings of its dynamic batching, and the best one of each case counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.figures import Figure, medians, ratios
from benchmarks.harness import running_server
from benchmarks.load import Run, h2load
from benchmarks.machine import by_vnni
from benchmarks.peers.peer import PEERS, Peer, running_peer
from benchmarks.throughput import scaled, title

CASES = {"singles": Run(1, 64, 20_000), "bulk": Run(64, 8, 1_500)}
OURS = "digits_images_per_s"


def mosec(rounds: int, scale: float) -> list[Figure]:
    """The fastest of them."""
    targets = {"singles": by_vnni(without=1.7, having=2.5), "bulk": 1.0}
    return _measure([PEERS["mosec"]], rounds, scale, targets)


def others(rounds: int, scale: float) -> list[Figure]:
    """The rest: several times slower, and slow to measure."""
    peers = [peer for name, peer in PEERS.items() if name != "mosec"]
    return _measure(peers, rounds, scale, {})


def _measure(
    peers: Sequence[Peer], rounds: int, scale: float, targets: dict[str, float]
) -> list[Figure]:
    for peer in peers:
        peer.environment.install()
    rows = [_round(peers, scale) for _ in range(rounds)]
    return [
        _figure(peer, case, [row[case] for row in rows], targets)
        for peer in peers
        for case in CASES
    ]


def _figure(
    peer: Peer, case: str, rows: list[dict[str, float]], targets: dict[str, float]
) -> Figure:
    theirs = f"{peer.name}_images_per_s"
    return Figure(
        f"{peer.name}_{case}",
        f"{title(CASES[case])}, over {peer.requirement.replace('==', ' ')}",
        ratios(rows, OURS, theirs),
        targets.get(case),
        details={name: value for name, value in medians(rows).items() if name in (OURS, theirs)},
    )


def _round(peers: Sequence[Peer], scale: float) -> dict[str, dict[str, float]]:
    """Images/s of every server in every case, one server at a time."""
    rates: dict[str, dict[str, float]] = {name: {} for name in CASES}
    with running_server("--transport=http2") as server:
        for name, run in CASES.items():
            h2load(server, scaled(run, scale / 4))  # warm-up, not counted
            rates[name][OURS] = h2load(server, scaled(run, scale)).calls_per_s * run.images
    for peer in peers:
        column = f"{peer.name}_images_per_s"
        for batch in peer.batches:
            with running_peer(peer, batch) as running:
                running.check_answers()
                for name, run in CASES.items():
                    calls = scaled(run, scale * peer.share).calls
                    running.calls_per_s(run.images, run.in_flight, max(run.in_flight, calls // 4))
                    rate = running.calls_per_s(run.images, run.in_flight, calls) * run.images
                    rates[name][column] = max(rate, rates[name].get(column, 0.0))
    return rates
