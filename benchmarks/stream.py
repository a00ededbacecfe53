"""One ClassifyStream with 64 images in each message."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from benchmarks.figures import Figure, medians
from benchmarks.harness import (
    BenchmarkError,
    Run,
    ServerProcess,
    h2load,
    raw_limit,
    running_server,
    settled,
)
from digits.v1 import digits_pb2

METHOD = "/digits.v1.DigitClassifierService/ClassifyStream"
IMAGES = 64
TARGET = 0.8


def measure(rounds: int, scale: float) -> list[Figure]:
    """Images per second of one stream over the limit, on each transport.

    Native hands streams on to grpcio behind it.
    """
    return [_measure(transport, rounds, scale) for transport in ("native", "grpcio")]


def _measure(transport: str, rounds: int, scale: float) -> Figure:
    messages = max(50, int(2_000 * scale))
    rows = []
    with running_server(f"--transport={transport}") as server:
        _images_per_s(server, messages)  # warm-up, not counted
        for _ in range(rounds):
            limit = raw_limit(2.0 * scale)
            rate = _images_per_s(server, messages)
            rows.append({"images_per_s": rate, "limit_images_per_s": limit, "ratio": rate / limit})
    name = f"ClassifyStream, {transport}, one stream, {IMAGES} images per message, of the limit"
    return Figure(name, [row["ratio"] for row in rows], TARGET, details=medians(rows))


def _images_per_s(server: ServerProcess, messages: int) -> float:
    """One stream from its first byte to its end, the caller as fast as it may.

    Raises:
        BenchmarkError: If an item was not answered with predictions.
    """
    before = _images(server)
    run = Run(IMAGES, 1, 1, path=METHOD, encode=_stream_request, messages=messages)
    load = h2load(server, run)
    images = messages * IMAGES
    counted = settled(lambda: _images(server) - before, images)
    if counted != images:
        raise BenchmarkError(f"expected {images} images classified, the server counts {counted}")
    return images / load.seconds


def _images(server: ServerProcess) -> int:
    return int(server.counter("digits_images_total"))


def _stream_request(images: npt.NDArray[np.uint8]) -> bytes:
    """A serialised ClassifyStreamRequest of uint8[N, 28, 28]."""
    request = digits_pb2.ClassifyRequest(pixels=images.tobytes())
    return digits_pb2.ClassifyStreamRequest(request=request).SerializeToString()
