"""Owns the thread that makes images of what callers sent in other forms, beside the hot path.

Files and typed tensors take long to read, files for longer than their bytes tell: a few hundred
bytes can unfold into 16 million pixels. So the cost of each piece of work is found out before any
is done, and requests of much work wait in a lane of their own. While both lanes wait, each gets
half of the time, one step after the other: a small file waits for one large file at most.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from service.serving.batch import BatchListener
from service.serving.replies import Replies
from service.serving.request import InvalidInputError, Refusal, Request

logger = logging.getLogger(__name__)

# What may wait or be in work: bytes (the largest request of defaults is 4 MiB), requests, and
# steps, whose costs are found out in about half a second.
MAX_WAITING_BYTES = 64 * 2**20
MAX_WAITING_REQUESTS = 2048
MAX_WAITING_STEPS = 2**14
# Pixels that may wait in each lane: two requests of the most pixels that files may have.
MAX_LANE_PIXELS = 2**27
# A request of more waits among the large ones.
SMALL_PIXELS = 2**20
# A step of fewer counts as so many: what is done for any file takes as long.
STEP_PIXELS = 2**13
# After which memory may have been freed.
NO_MEMORY_RETRY_S = 1.0
# The share of earlier steps in the learned cost of a pixel falls to a third over so many pixels.
MEMORY_PIXELS = 2**24
# Prepared requests are passed on together, as a burst, but none waits for others longer than this.
GATHER_S = 0.0005

# Takes prepared requests.
Submit = Callable[[Sequence[Request]], None]


class Work(Protocol):
    """Makes the images of one request, in steps.

    Attributes:
        size: Bytes that it holds.
        steps: Their number, at least one.
    """

    size: int
    steps: int

    def costs(self) -> list[int]:
        """The cost of each step in decoded pixels, found out without doing it."""

    def do(self, index: int) -> None:
        """Does one step.

        Raises:
            InvalidInputError: If the request can not be classified.
        """

    def give_to(self, request: Request) -> None:
        """Sets the images of the request, after the last step."""


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request whose work waits or is being done.

    Attributes:
        submit: Takes the request afterwards.
        costs: Pixels of each step that is not done yet.
        done: Steps that are.
    """

    request: Request
    work: Work
    submit: Submit
    costs: deque[int] = field(default_factory=deque)
    done: int = 0


class _PixelLane:
    """Requests of one size class, in order of arrival.

    Attributes:
        requests: The first may be in work.
        pixels: What their steps cost that are not done.
    """

    def __init__(self) -> None:
        self.requests: deque[_Waiting] = deque()
        self.pixels = 0


class Preparer:
    """Prepares requests and passes them on. Thread-safe.

    Every request is passed on or replied to, once.

    Args:
        listener: Is notified of refused requests.

    Attributes:
        thread: Does the work.
    """

    def __init__(self, listener: BatchListener | None = None) -> None:
        self._replies = Replies(listener)
        self._lock = threading.Lock()
        self._arrived: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._stopping = self._all_arrived = False
        # What waits or is in work.
        self._requests = self._steps = self._bytes = 0
        self._small, self._large = _PixelLane(), _PixelLane()
        # By how many pixels of work the large lane is ahead of the small one.
        self._lead = 0
        self._seconds_per_pixel = 0.0
        self._prepared: dict[Submit, list[Request]] = {}
        self._gathering_since = 0.0
        self.thread = threading.Thread(target=self._serve, name="preparer", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self.thread.start()

    def submit(self, request: Request, work: Work, submit: Submit) -> None:
        """Queues a request.

        Args:
            request: Its images and count are set by the work.
            work: Makes its images.
            submit: Gets the request when it is prepared.
        """
        refusal = self._enter(_Waiting(request, work, submit))
        if refusal is not None:
            request.refusal = refusal
            self._replies.refuse([request])

    def _enter(self, waiting: _Waiting) -> Refusal | None:
        work = waiting.work
        with self._lock:
            if self._stopping:
                return Refusal.STOPPED
            if self._requests and (
                self._requests == MAX_WAITING_REQUESTS
                or self._steps + work.steps > MAX_WAITING_STEPS
                or self._bytes + work.size > MAX_WAITING_BYTES
            ):
                known = self._small.pixels + self._large.pixels
                pixels = max(known, self._steps * STEP_PIXELS)
                waiting.request.retry_after_s = pixels * self._seconds_per_pixel
                return Refusal.QUEUE_FULL
            self._count(1, work)
            self._arrived.put(waiting)
        return None

    def stop(self, grace_s: float) -> bool:
        """Takes no more, prepares what waits; True if that was done within the grace."""
        with self._lock:
            self._stopping = True
            self._arrived.put(None)
        if self.thread.ident is None:
            return True
        self.thread.join(grace_s)
        return not self.thread.is_alive()

    def _serve(self) -> None:
        while self._sort():
            self._serve_step()

    def _serve_step(self) -> None:
        """Does the step whose turn it is; with the last one of a request, passes that on."""
        lane = self._lane_in_turn()
        waiting = lane.requests[0]
        try:
            refusal = self._do_next(waiting, lane)
        except InvalidInputError as error:
            waiting.request.violation = error.violation
            refusal = Refusal.INVALID
        except Exception as error:
            refusal = _failed(error, waiting.request, "preparing a request")
        if refusal is not None or not waiting.costs:
            lane.requests.popleft()
            lane.pixels -= sum(waiting.costs)
            self._end(waiting, refusal)

    def _sort(self) -> bool:
        """Puts what arrived into the lanes, waits for it if they are empty; False at the end."""
        while not self._all_arrived:
            self._pass_on_in_time()
            try:
                waiting = self._arrived.get(block=not self._is_busy())
            except queue.Empty:
                return True
            if waiting is None:
                self._all_arrived = True
                break
            self._sort_in(waiting)
            del waiting
        self._pass_on_in_time()
        return self._is_busy()

    def _is_busy(self) -> bool:
        return bool(self._small.requests or self._large.requests)

    def _sort_in(self, waiting: _Waiting) -> None:
        try:
            refusal = self._admit(waiting)
        except Exception as error:
            refusal = _failed(error, waiting.request, "finding out what a request costs")
        if refusal is not None:
            self._end(waiting, refusal)

    def _admit(self, waiting: _Waiting) -> Refusal | None:
        waiting.costs.extend([max(STEP_PIXELS, cost) for cost in waiting.work.costs()])
        cost = sum(waiting.costs)
        lane = self._small if cost <= SMALL_PIXELS else self._large
        if lane.requests:  # a retry would find nothing better than an empty one
            request = waiting.request
            # Of what waits in the other lane, as much as this one holds gets its turn before.
            ahead = min(self._small.pixels + self._large.pixels, 2 * lane.pixels)
            request.retry_after_s = ahead * self._seconds_per_pixel
            if lane.pixels + cost > MAX_LANE_PIXELS:
                return Refusal.QUEUE_FULL
            wait_s = (ahead + cost) * self._seconds_per_pixel
            if request.deadline is not None and time.monotonic() + wait_s > request.deadline:
                return Refusal.DEADLINE_UNREACHABLE
        lane.requests.append(waiting)
        lane.pixels += cost
        return None

    def _lane_in_turn(self) -> _PixelLane:
        if not self._small.requests or not self._large.requests:
            self._lead = 0
            return self._small if self._small.requests else self._large
        return self._small if self._lead >= 0 else self._large

    def _do_next(self, waiting: _Waiting, lane: _PixelLane) -> Refusal | None:
        """Does a request's next step.

        Raises:
            InvalidInputError: If the request can not be classified.
        """
        cost = waiting.costs.popleft()
        lane.pixels -= cost
        self._lead += cost if lane is self._large else -cost
        began, request = time.monotonic(), waiting.request
        if request.deadline is not None and began >= request.deadline:
            return Refusal.EXPIRED
        if request.origin.cancelled:
            return Refusal.CANCELLED
        waiting.work.do(waiting.done)
        waiting.done += 1
        self._learn(cost, time.monotonic() - began)
        if not waiting.costs:
            waiting.work.give_to(request)
        return None

    def _learn(self, cost: int, seconds: float) -> None:
        known = self._seconds_per_pixel
        share = cost / (cost + MEMORY_PIXELS) if known else 1.0
        self._seconds_per_pixel += share * (seconds / cost - known)

    def _end(self, waiting: _Waiting, refusal: Refusal | None) -> None:
        """Keeps a request to be passed on, or replies to it; what it took is free afterwards."""
        request = waiting.request
        request.refusal = refusal
        if refusal is not None:
            self._replies.refuse([request])
        else:
            if not self._prepared:
                self._gathering_since = time.monotonic()
            self._prepared.setdefault(waiting.submit, []).append(request)
        with self._lock:
            self._count(-1, waiting.work)

    def _pass_on_in_time(self) -> None:
        """Submits what is prepared, unless more will be in a moment."""
        more = self._small.requests and not self._large.requests
        if more and time.monotonic() < self._gathering_since + GATHER_S:
            return
        prepared, self._prepared = self._prepared, {}
        for submit, requests in prepared.items():
            try:
                submit(requests)
            except Exception:
                logger.exception("passing prepared requests on failed; this is a bug")

    def _count(self, sign: int, work: Work) -> None:
        self._requests += sign
        self._steps += sign * work.steps
        self._bytes += sign * work.size


def _failed(error: Exception, request: Request, what: str) -> Refusal:
    """Why a request ends that its caller is not to blame for."""
    if isinstance(error, MemoryError):
        logger.error("%s: memory ran out", what)
        request.retry_after_s = NO_MEMORY_RETRY_S
        return Refusal.NO_MEMORY
    logger.error("%s failed; this is a bug", what, exc_info=error)
    return Refusal.FAILED
