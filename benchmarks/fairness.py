"""What callers of single images notice of one that sends thousands at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import grpc

from benchmarks.figures import Figure, medians, ratios
from benchmarks.harness import ServerProcess, running_server
from benchmarks.load import Run, classify_call, h2load
from benchmarks.throughput import scaled
from digits.v1 import digits_pb2

HUGE = 4_096
SINGLES = Run(1, 16, 10_000)


def huge_request() -> bytes:
    """A serialised ClassifyRequest with as many images as one may have."""
    return digits_pb2.ClassifyRequest(pixels=bytes(HUGE * 784)).SerializeToString()


def measure(rounds: int, scale: float) -> list[Figure]:
    """The 99th percentile of single-image calls, alone and beside a caller of huge requests."""
    singles, rows = scaled(SINGLES, scale), []
    with running_server("--transport=http2") as server:
        for _ in range(rounds):
            alone = h2load(server, singles, latencies=True)
            with _bulk_caller(server):
                beside = h2load(server, replace(singles, all_ok=False), latencies=True)
            rows.append(
                {
                    "alone_p99_ms": alone.quantile_s(0.99) * 1e3,
                    "beside_p99_ms": beside.quantile_s(0.99) * 1e3,
                    "beside_ok_calls": beside.calls,
                }
            )
    shares = ratios(rows, "beside_p99_ms", "alone_p99_ms")
    name = f"single images beside a caller of {HUGE:,} a call: p99 over p99 alone"
    return [
        Figure("fairness", name, shares, 5.0, at_least=False, tolerance=0.5, details=medians(rows))
    ]


@contextmanager
def _bulk_caller(server: ServerProcess) -> Iterator[None]:
    """Sends the next huge request as soon as the last one is answered."""
    ended, request = threading.Event(), huge_request()

    def call() -> None:
        with grpc.insecure_channel(server.address) as channel:
            classify = classify_call(channel)
            while not ended.is_set():
                classify(request, timeout=30)

    thread = threading.Thread(target=call)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
