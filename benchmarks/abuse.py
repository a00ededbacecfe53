"""What well-behaved callers notice of callers that misbehave, on both transports."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from benchmarks import attacks
from benchmarks.figures import Figure, medians
from benchmarks.harness import Run, check_answers, h2load, running_server

# Of the well-behaved callers, a load that leaves either transport well below its peak.
CALLS_PER_S = 800
# Frames, on one connection.
FLOOD_PER_S = 20_000

ATTACKS: dict[str, Callable[[str], contextlib.AbstractContextManager[object]]] = {
    "2,000 idle connections": lambda address: attacks.idle(address, 2_000),
    "500 connections that say nothing": lambda address: attacks.half_open(address, 500),
    "200 callers that send a byte at a time": lambda address: attacks.trickled(address, 200),
    "2,000 calls half sent": lambda address: attacks.half_sent(address, 20, 99),
    "calls reset as they begin": lambda address: attacks.reset_flood(address, FLOOD_PER_S),
    "pings": lambda address: attacks.ping_flood(address, FLOOD_PER_S),
    "pings, answers unread": lambda address: attacks.ping_flood(address, FLOOD_PER_S, reads=False),
    "settings": lambda address: attacks.settings_flood(address, FLOOD_PER_S),
}


def measure(rounds: int, scale: float) -> list[Figure]:
    """The 99th percentile of single-image calls beside each attack, over that of quiet.

    What an attack begins with is told apart: how long the golden digits then take. At a scale below
    1 the first calls on new connections are more than one in a hundred.
    """
    run = Run(1, 16, max(800, int(4_000 * scale)), rate=CALLS_PER_S)
    figures = []
    for transport in ("native", "grpcio"):
        with running_server(f"--transport={transport}") as server:
            h2load(server, run)
            for name, attack in ATTACKS.items():
                rows = []
                for _ in range(rounds):
                    quiet = h2load(server, run, latencies=True).quantile_s(0.99)
                    with attack(server.address):
                        began = time.perf_counter()
                        check_answers(server)
                        first = time.perf_counter() - began
                        load = h2load(server, run, latencies=True)
                        check_answers(server)
                        rss = server.rss_bytes()
                    rows.append(
                        {
                            "quiet_p99_ms": quiet * 1e3,
                            "beside_p99_ms": load.quantile_s(0.99) * 1e3,
                            "first_answer_ms": first * 1e3,
                            "rss_mib": rss / 2**20,
                        }
                    )
                ratios = [row["beside_p99_ms"] / row["quiet_p99_ms"] for row in rows]
                title = f"{transport}, {name}: p99 over quiet"
                figures.append(Figure(title, ratios, 3.0, at_least=False, details=medians(rows)))
    return figures
