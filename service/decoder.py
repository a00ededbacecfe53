"""Owns the thread that turns image files into pixels, beside the hot path.

What a file costs is told by the pixels in its header, not by its bytes: a few hundred of those can
unfold into 16 million. So the thread reads the headers of what came before it decodes on, and calls
of many pixels wait in a lane of their own. While both lanes wait, each gets half of the time, one
file after the other: nobody with a small file stands before all of somebody's large ones.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from digits.files import pixels_claimed
from service.images import MAX_REQUEST_PIXELS, Decoded, FileReader
from service.job import Refusal
from service.scheduling import run_patiently
from service.status import InvalidRequestError, Status

if TYPE_CHECKING:
    from service.call import Call

# What became of a call's files.
Outcome: TypeAlias = Decoded | Refusal | Status

logger = logging.getLogger(__name__)

# What may wait or be decoded: bytes (the largest request of defaults is 4 MiB), calls, and files,
# whose headers are read in about half a second.
MAX_WAITING_BYTES = 64 * 2**20
MAX_WAITING_CALLS = 256
MAX_WAITING_FILES = 2**14
# Pixels that may wait in each lane: two of the largest requests.
MAX_LANE_PIXELS = 2 * MAX_REQUEST_PIXELS
# A call of more waits among the large ones.
SMALL_PIXELS = 2**20
# A file of fewer counts as so many: what is done for any file takes as long.
FILE_PIXELS = 2**13
# The share of earlier files in what a pixel is said to cost falls to a third over so many pixels.
MEMORY_PIXELS = 2**24


@dataclass(slots=True, eq=False)
class Waiting:
    """A call whose files wait or are being decoded.

    Attributes:
        size: Bytes of its files.
        costs: Pixels of each file that is not decoded yet, by their headers.
        decoded: Files that are.
    """

    call: Call
    files: Sequence[bytes]
    size: int
    costs: deque[int] = field(default_factory=deque)
    decoded: int = 0
    reader: FileReader = field(default_factory=FileReader)


class Lane:
    """Calls of one size class, in order of arrival.

    Attributes:
        calls: Some files of the first may be decoded already.
        pixels: Pixels that wait in them.
    """

    def __init__(self) -> None:
        self.calls: deque[Waiting] = deque()
        self.pixels = 0


class Decoder:
    """Decodes files, and hands every call that it took to ``done`` once.

    Args:
        done: Takes a call with its images, or with what became of it instead.

    Attributes:
        thread: What decodes; the lanes are its own.
    """

    def __init__(self, done: Callable[[Call, Outcome], None]) -> None:
        self._done = done
        self._lock = threading.Lock()
        self._stopping = False
        self._bytes = self._calls = self._files = 0
        self._arrived: queue.SimpleQueue[Waiting | None] = queue.SimpleQueue()
        self._all_arrived = False
        self._small, self._large = Lane(), Lane()
        # Pixels that the large lane is ahead of the small one since both wait.
        self._lead = 0
        # 0 until measured, which admits every deadline.
        self._seconds_per_pixel = 0.0
        self.thread = threading.Thread(target=self._serve, name="decoder", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self.thread.start()

    def submit(self, call: Call, files: Sequence[bytes]) -> Refusal | None:
        """Queues a call's files, or says why not; ``done`` then never hears of the call."""
        size = sum(len(data) for data in files)
        with self._lock:
            if self._stopping:
                return Refusal.STOPPED
            if self._calls and (
                self._calls == MAX_WAITING_CALLS
                or self._files + len(files) > MAX_WAITING_FILES
                or self._bytes + size > MAX_WAITING_BYTES
            ):
                known = self._small.pixels + self._large.pixels
                call.retry_after_s = self._seconds(max(known, self._files * FILE_PIXELS))
                return Refusal.QUEUE_FULL
            self._count(1, len(files), size)
            self._arrived.put(Waiting(call, files, size))
        return None

    def stop(self, grace_s: float) -> bool:
        """Takes no more, decodes what waits; True if that was done within the grace."""
        with self._lock:
            self._stopping = True
            self._arrived.put(None)
        self.thread.join(grace_s)
        return not self.thread.is_alive()

    def _serve(self) -> None:
        run_patiently()
        while self._sort():
            self._serve_file()

    def _serve_file(self) -> None:
        """Decodes the file whose turn it is; with the last one of a call, ends that."""
        lane = self._lane_in_turn()
        waiting = lane.calls[0]
        outcome = self._try(self._decode_next, waiting, lane)
        if outcome is not None:
            lane.calls.popleft()
            lane.pixels -= sum(waiting.costs)
            self._end(waiting, outcome)

    def _sort(self) -> bool:
        """Puts what came into the lanes, and waits for it if they are empty; False at the end."""
        while not self._all_arrived:
            try:
                waiting = self._arrived.get(block=not (self._small.calls or self._large.calls))
            except queue.Empty:
                return True
            if waiting is None:
                self._all_arrived = True
                break
            refusal = self._try(self._admit, waiting)
            if refusal is not None:
                self._end(waiting, refusal)
            del waiting
        return bool(self._small.calls or self._large.calls)

    def _admit(self, waiting: Waiting) -> Refusal | None:
        left = MAX_REQUEST_PIXELS  # beyond that the reader refuses
        for data in waiting.files:
            pixels = min(left, pixels_claimed(data))
            left -= pixels
            waiting.costs.append(max(FILE_PIXELS, pixels))
        cost = sum(waiting.costs)
        lane = self._small if cost <= SMALL_PIXELS else self._large
        if lane.calls:  # a retry would find nothing better than an empty one
            call = waiting.call
            # Of what waits in the other lane, as much as this one holds gets its turn before.
            ahead = min(self._small.pixels + self._large.pixels, 2 * lane.pixels)
            call.retry_after_s = self._seconds(ahead)
            if lane.pixels + cost > MAX_LANE_PIXELS:
                return Refusal.QUEUE_FULL
            wait_s = self._seconds(ahead + cost)
            if call.deadline is not None and time.monotonic() + wait_s > call.deadline:
                return Refusal.DEADLINE_UNREACHABLE
        lane.calls.append(waiting)
        lane.pixels += cost
        return None

    def _lane_in_turn(self) -> Lane:
        if not self._small.calls or not self._large.calls:
            self._lead = 0
            return self._small if self._small.calls else self._large
        return self._small if self._lead >= 0 else self._large

    def _decode_next(self, waiting: Waiting, lane: Lane) -> Outcome | None:
        """Decodes a call's next file; what became of the call, unless further files wait."""
        cost = waiting.costs.popleft()
        lane.pixels -= cost
        self._lead += cost if lane is self._large else -cost
        began = time.monotonic()
        if waiting.call.deadline is not None and began >= waiting.call.deadline:
            return Refusal.EXPIRED
        if waiting.call.cancelled:
            return Refusal.CANCELLED
        index = waiting.decoded
        try:
            waiting.reader.read(waiting.files[index], f"encoded.files[{index}]")
        except InvalidRequestError as error:
            return error.status()
        waiting.decoded += 1
        self._learn(cost, time.monotonic() - began)
        return None if waiting.costs else waiting.reader.decoded()

    def _learn(self, cost: int, seconds: float) -> None:
        known = self._seconds_per_pixel
        share = cost / (cost + MEMORY_PIXELS) if known else 1.0
        self._seconds_per_pixel += share * (seconds / cost - known)

    def _seconds(self, pixels: int) -> float:
        return pixels * self._seconds_per_pixel

    def _try(self, step: Callable[..., Outcome | None], *args: object) -> Outcome | None:
        try:
            return step(*args)
        except Exception:
            logger.exception("decoding a call's files failed; this is a bug")
            return Refusal.FAILED

    def _end(self, waiting: Waiting, outcome: Outcome) -> None:
        try:
            self._done(waiting.call, outcome)
        except Exception:
            logger.exception("passing a call's images on failed; this is a bug")
            self._done(waiting.call, Refusal.FAILED)
        with self._lock:
            self._count(-1, -len(waiting.files), -waiting.size)

    def _count(self, calls: int, files: int, size: int) -> None:
        self._calls += calls
        self._files += files
        self._bytes += size
