"""What the queue is made of: lanes of requests that wait, and the batches made of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Protocol

import numpy as np

from service.serving.model import Answers, Predictions
from service.serving.request import IMAGE_BYTES, Refusal, Request


class Lane:
    """Requests of one size class, in order of arrival.

    Attributes:
        requests: The first may have given some of its images to a batch already.
        images: Images that wait in them.
    """

    def __init__(self) -> None:
        self.requests: deque[Request] = deque()
        self.images = 0


@dataclass(slots=True, eq=False)
class Batch:
    """One inference.

    Attributes:
        parts: The requests in it, each with the first of its images and how many follow.
        images: Images in all parts.
        split: Whether it holds a part of a request whose other parts are in other batches.
        finished: Requests that have their result by this batch.
        refused: Requests that end with this batch, and without a result: dropped before inference,
            or failed by it.
        predictions: What the model returned, or None.
        seconds: Duration of inference; 0 when nothing was run.
        error: What the model raised, or None.
    """

    parts: list[tuple[Request, int, int]] = field(default_factory=list)
    images: int = 0
    split: bool = False
    finished: list[Request] = field(default_factory=list)
    refused: list[Request] = field(default_factory=list)
    predictions: Predictions | None = None
    seconds: float = 0.0
    error: Exception | None = None

    def take(self, lane: Lane, limit: int, now: float) -> None:
        """Moves images from a lane to this batch until it holds ``limit``.

        Requests that nobody waits for any more are dropped.
        """
        requests, room = lane.requests, limit - self.images
        while requests and room > 0:
            request = requests[0]
            left = request.count - request.taken
            refusal = _dead(request, now)
            if refusal is not None:
                request.refusal = refusal
                self.refused.append(request)
                requests.popleft()
                lane.images -= left
                continue
            if not request.taken:
                request.started = now
            if left <= room:
                requests.popleft()
            else:
                left = room
            self._add(request, left)
            lane.images -= left
            room -= left
        self.images = limit - room

    def _add(self, request: Request, count: int) -> None:
        first = request.taken
        request.taken = first + count
        if first and self.split:  # a lane may be taken from twice
            for place, (other, its_first, its_count) in enumerate(self.parts):
                if other is request:
                    self.parts[place] = (request, its_first, its_count + count)
                    return
        if count != request.count:
            self.split = True
        self.parts.append((request, first, count))

    def pixels(self) -> bytes | memoryview:
        """The images of all parts, back to back."""
        images = [
            request.images
            if count == request.count
            else request.images[first * IMAGE_BYTES : (first + count) * IMAGE_BYTES]
            for request, first, count in self.parts
        ]
        return images[0] if len(images) == 1 else b"".join(images)


def _dead(request: Request, now: float) -> Refusal | None:
    deadline = request.deadline
    if deadline is not None and now >= deadline:
        return Refusal.EXPIRED
    return Refusal.CANCELLED if request.origin.cancelled else None


class Split:
    """What the batches of one request returned so far.

    Attributes:
        returned: Images that came back.
    """

    __slots__ = ("_parts", "returned")

    def __init__(self) -> None:
        self.returned = 0
        # First image of the request, first row of the predictions, number of both.
        self._parts: list[tuple[int, int, int, Predictions]] = []

    def add(self, first: int, row: int, count: int, predictions: Predictions) -> None:
        """Keeps ``count`` predictions from ``row`` on, of the images from ``first`` on."""
        self.returned += count
        self._parts.append((first, row, count, predictions))

    def joined(self) -> Predictions | None:
        """All predictions in the order of the images; None if they are not of one model."""
        model = self._parts[0][3].model
        if any(part[3].model is not model for part in self._parts):
            return None
        parts = [
            (predictions.probabilities[row : row + count], predictions.is_digit[row : row + count])
            for _, row, count, predictions in sorted(self._parts, key=itemgetter(0))
        ]
        return Predictions(Answers(*map(np.concatenate, zip(*parts, strict=True))), model)


class BatchListener(Protocol):
    """Is notified of what happened to requests, from any thread, after they were replied to."""

    def batch(self, batch: Batch) -> None:
        """A batch was run; its ``refused`` were given to ``refused`` before."""

    def refused(self, requests: Sequence[Request]) -> None:
        """Requests ended without a result, each with its ``refusal``."""
