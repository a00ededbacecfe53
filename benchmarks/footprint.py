"""Time to SERVING, and memory after the largest requests there can be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc

from benchmarks.fairness import HUGE, huge_request
from benchmarks.figures import Figure
from benchmarks.harness import ServerProcess, running_server
from benchmarks.load import classify_call

STARTS = 5
STORM_CALLERS, STORM_CALLS = 4, 25
MIB = 2**20


def measure(rounds: int, scale: float) -> list[Figure]:
    """Starts on a warm disk; then resident memory after one storm, and after as many more."""
    seconds = []
    for _ in range(max(2, int(STARTS * scale))):
        with running_server("--transport=http2") as server:
            seconds.append(server.ready_s)
    with running_server("--transport=http2") as server:
        before = server.rss_bytes() / MIB
        sizes = []
        for _ in range(1 + rounds):
            _storm(server, max(2, int(STORM_CALLS * scale)))
            sizes.append(server.rss_bytes() / MIB)
    name = f"resident memory after a storm of requests of {HUGE:,} images"
    growth = [size / sizes[0] for size in sizes[1:]]
    return [
        Figure(
            "start", "start to SERVING, warm disk", seconds[1:], 0.8, at_least=False, unit="s",
            tolerance=None,
        ),
        Figure(
            "storm", name, sizes[:1], 150, at_least=False, unit="MiB",
            details={"before_mib": before},
        ),
        Figure(
            "storms", "memory after more such storms, over the first", growth, 1.1,
            at_least=False, tolerance=0.1,
        ),
    ]  # fmt: skip


def _storm(server: ServerProcess, calls: int) -> None:
    """Maximal requests from several callers at once; whoever is refused goes on.

    Raises:
        grpc.RpcError: If a call ends in another way.
    """
    request = huge_request()

    def call() -> None:
        with grpc.insecure_channel(server.address, [("grpc.enable_retries", 0)]) as channel:
            classify = classify_call(channel)
            for _ in range(calls):
                try:
                    classify(request, timeout=60)
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                        raise

    with ThreadPoolExecutor(STORM_CALLERS) as callers:
        for future in [callers.submit(call) for _ in range(STORM_CALLERS)]:
            future.result()
