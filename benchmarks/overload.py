"""What is left of the peak when far more calls come than can be answered."""

from __future__ import annotations

import math
import threading
import time
from typing import Self

import grpc
import numpy as np

from benchmarks.figures import Figure, medians
from benchmarks.harness import CLASSIFY_PATH, Run, ServerProcess, h2load, running_server
from digits.v1 import digits_pb2

# Calls in flight: for the peak; four times as many, which fill the queue; four times those.
PEAK, LOAD, FLOOD = 512, 2_048, 8_192
PAUSE_S = 0.01
TARGET = 0.9


def measure(rounds: int, scale: float) -> list[Figure]:
    """Goodput beside the peak, and how soon the rest is refused where some must be."""
    rows = []
    with running_server("--transport=native") as server:
        for _ in range(rounds):
            calls = max(LOAD, int(60_000 * scale))
            peak = h2load(server, Run(1, PEAK, calls)).calls_per_s
            load = h2load(server, Run(1, LOAD, calls, all_ok=False)).calls_per_s
            with _Refusals(server) as refusals:
                flood = h2load(server, Run(1, FLOOD, 4 * calls, all_ok=False)).calls_per_s
            rows.append(
                {
                    "peak_calls_per_s": peak,
                    "load_calls_per_s": load,
                    "flood_calls_per_s": flood,
                    "refused_p99_ms": refusals.p99_ms(),
                }
            )
    goodput = [
        Figure(
            f"goodput with {in_flight:,} calls in flight, over the peak with {PEAK}",
            [row[f"{name}_calls_per_s"] / row["peak_calls_per_s"] for row in rows],
            TARGET,
        )
        for name, in_flight in (("load", LOAD), ("flood", FLOOD))
    ]
    refused = [row["refused_p99_ms"] for row in rows]
    name = f"refused with RESOURCE_EXHAUSTED, with {FLOOD:,} calls in flight, p99"
    details = medians(rows)
    return [*goodput, Figure(name, refused, 50.0, at_least=False, unit="ms", details=details)]


class _Refusals:
    """A caller beside the flood that times its refusals."""

    def __init__(self, server: ServerProcess) -> None:
        self._address = server.address
        self._seconds: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._probe)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _probe(self) -> None:
        request = digits_pb2.ClassifyRequest(pixels=bytes(784)).SerializeToString()
        with grpc.insecure_channel(self._address) as channel:
            call = channel.unary_unary(CLASSIFY_PATH)
            while not self._ended.wait(PAUSE_S):
                began = time.perf_counter()
                try:
                    call(request, timeout=10)
                except grpc.RpcError as error:
                    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                        self._seconds.append(time.perf_counter() - began)

    def p99_ms(self) -> float:
        """Of the calls that were refused; infinite when none was, which is no overload."""
        return float(np.quantile(self._seconds, 0.99)) * 1e3 if self._seconds else math.inf
