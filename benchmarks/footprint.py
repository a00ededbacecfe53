"""Time to SERVING, and memory after the largest requests there can be."""

from __future__ import annotations

import threading

import grpc

from benchmarks.figures import Figure
from benchmarks.harness import CLASSIFY_PATH, ServerProcess, running_server
from digits.v1 import digits_pb2

STARTS = 5
STORM_CALLERS, STORM_CALLS = 4, 25
MAXIMAL = 4_096
MIB = 2**20


def measure(rounds: int, scale: float) -> list[Figure]:
    """Starts on a warm disk; then resident memory after one storm, and after as many more."""
    seconds = []
    for _ in range(max(2, int(STARTS * scale))):
        with running_server("--transport=native") as server:
            seconds.append(server.ready_s)
    with running_server("--transport=native") as server:
        before = server.rss_bytes()
        sizes = []
        for _ in range(1 + rounds):
            _storm(server, max(2, int(STORM_CALLS * scale)))
            sizes.append(server.rss_bytes())
    name = f"resident memory after a storm of requests of {MAXIMAL} images"
    return [
        Figure("cold start to SERVING, warm disk", seconds[1:], 0.8, at_least=False, unit="s"),
        Figure(
            name,
            [sizes[0] / MIB],
            150,
            at_least=False,
            unit="MiB",
            details={"before": before / MIB},
        ),
        Figure(
            "memory after more such storms, over the first",
            [size / sizes[0] for size in sizes[1:]],
            1.1,
            at_least=False,
        ),
    ]


def _storm(server: ServerProcess, calls: int) -> None:
    request = digits_pb2.ClassifyRequest(pixels=bytes(MAXIMAL * 784)).SerializeToString()

    def call() -> None:
        options = [("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(server.address, options) as channel:
            classify = channel.unary_unary(CLASSIFY_PATH)
            for _ in range(calls):
                try:
                    classify(request, timeout=60)
                except grpc.RpcError as error:
                    if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                        raise

    threads = [threading.Thread(target=call) for _ in range(STORM_CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
