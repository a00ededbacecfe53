"""One ClassifyStream with 64 images in each message."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import grpc
import numpy as np

from benchmarks.figures import Figure, medians
from benchmarks.harness import (
    ServerProcess,
    raw_limit,
    running_server,
    served_artifact,
)
from digits.v1 import digits_pb2

METHOD = "/digits.v1.DigitClassifierService/ClassifyStream"
IMAGES = 64
# Messages on their way at the same time; a caller that sends without bound measures its own queue.
AHEAD = 8


def measure(rounds: int, scale: float) -> list[Figure]:
    """Images per second of one stream over the limit, the caller in a process of its own."""
    rows = []
    with running_server("--transport=native") as server:
        _stream(server, 200)  # warm-up, not counted
        for _ in range(rounds):
            limit = raw_limit(2.0 * scale)
            rows.append({"images_per_s": _stream(server, max(50, int(2_000 * scale)))})
            rows[-1] |= {"limit_images_per_s": limit, "ratio": rows[-1]["images_per_s"] / limit}
    name = "ClassifyStream, one stream, 64 images per message, of the limit"
    return [Figure(name, [row["ratio"] for row in rows], 0.8, details=medians(rows))]


def _stream(server: ServerProcess, messages: int) -> float:
    pixels = np.resize(served_artifact().golden.images, (IMAGES, 28, 28)).tobytes()
    request = digits_pb2.ClassifyRequest(pixels=pixels)
    message = digits_pb2.ClassifyStreamRequest(request=request).SerializeToString()
    room = threading.Semaphore(AHEAD)

    def requests() -> Iterator[bytes]:
        for _ in range(messages):
            room.acquire()
            yield message

    began = time.perf_counter()
    with grpc.insecure_channel(server.address) as channel:
        answered = 0
        for _ in channel.stream_stream(METHOD)(requests()):
            room.release()
            answered += 1
    assert answered == messages
    return messages * IMAGES / (time.perf_counter() - began)
