"""What callers of single images notice of one that sends thousands at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import grpc

from benchmarks.figures import Figure, medians
from benchmarks.harness import CLASSIFY_PATH, Run, ServerProcess, h2load, running_server
from digits.v1 import digits_pb2

HUGE = 4_096
OPTIONS = [("grpc.max_receive_message_length", -1)]


def measure(rounds: int, scale: float) -> list[Figure]:
    """The 99th percentile of single-image calls, alone and beside a caller of huge requests."""
    singles = Run(1, 16, max(64, int(10_000 * scale)))
    rows = []
    with running_server("--transport=native") as server:
        for _ in range(rounds):
            alone = h2load(server, singles, latencies=True)
            with _bulk_caller(server):
                beside = h2load(server, Run(1, 16, singles.calls, all_ok=False), latencies=True)
            rows.append(
                {
                    "alone_p99_ms": alone.quantile_s(0.99) * 1e3,
                    "beside_p99_ms": beside.quantile_s(0.99) * 1e3,
                    "beside_ok_calls": beside.calls,
                }
            )
    ratios = [row["beside_p99_ms"] / row["alone_p99_ms"] for row in rows]
    name = f"single images beside a caller of {HUGE} at a time: p99 over p99 alone"
    return [Figure(name, ratios, 5.0, at_least=False, details=medians(rows))]


@contextmanager
def _bulk_caller(server: ServerProcess) -> Iterator[None]:
    """Sends the next huge request as soon as the last one is answered."""
    ended = threading.Event()
    request = digits_pb2.ClassifyRequest(pixels=bytes(HUGE * 784)).SerializeToString()

    def call() -> None:
        with grpc.insecure_channel(server.address, OPTIONS) as channel:
            classify = channel.unary_unary(CLASSIFY_PATH)
            while not ended.is_set():
                classify(request, timeout=30)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
