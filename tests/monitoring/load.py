"""Callers of every kind, so that every panel has something to show."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle

import grpc
import numpy as np
import numpy.typing as npt

from digits.v1 import digits_pb2, digits_pb2_grpc

# Of ``digits serve``: a queue that the crowd below can fill.
FLAGS = ("--max-queue-images=512",)


@dataclass(frozen=True)
class Phase:
    """Callers that call one after another for a while.

    Attributes:
        callers: How many at once.
        images: In each call.
        inverted: Whether the images are, which is drift.
    """

    callers: int
    images: int
    inverted: bool = False


PHASES = (
    Phase(callers=8, images=1),
    Phase(callers=4, images=64),
    Phase(callers=24, images=256),  # more than the queue holds
    Phase(callers=4, images=64, inverted=True),
)


def run_load(address: str, images: npt.NDArray[np.uint8], seconds: float) -> int:
    """Calls a server for so long, in phases; returns how many calls were answered with OK.

    Args:
        address: ``host:port``.
        images: Digits to send, uint8[N, 28, 28].
        seconds: In all.
    """
    answered = 0
    for phase in PHASES:
        give_up = time.monotonic() + seconds / len(PHASES)
        counts = [0] * phase.callers
        callers = [
            threading.Thread(
                target=_call,
                args=(address, phase, images, give_up),
                kwargs={"counts": counts, "place": place},
            )
            for place in range(phase.callers)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        answered += sum(counts)
    return answered


def _call(
    address: str,
    phase: Phase,
    images: npt.NDArray[np.uint8],
    give_up: float,
    *,
    counts: list[int],
    place: int,
) -> None:
    # A refusal is meant to be seen, not to be retried.
    options = [("grpc.enable_retries", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, options=options) as channel:
        stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
        if place == 0:
            stub.Classify.future(digits_pb2.ClassifyRequest(pixels=b"no image")).code()
        for request in _requests(phase, images, place):
            if time.monotonic() >= give_up:
                return
            counts[place] += stub.Classify.future(request).code() is grpc.StatusCode.OK


def _requests(
    phase: Phase, images: npt.NDArray[np.uint8], place: int
) -> Iterator[digits_pb2.ClassifyRequest]:
    """Requests without end, another part of the images in each."""
    shown = 255 - images if phase.inverted else images
    for start in cycle(range(place, len(images) - phase.images + 1, 1 + phase.images // 2)):
        chunk = shown[start : start + phase.images]
        yield digits_pb2.ClassifyRequest(pixels=chunk.tobytes())
