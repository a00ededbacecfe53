"""Owns the thread that turns image files into pixels, beside the hot path.

What a file costs is told by the pixels in its header, not by its bytes: a few hundred bytes can
unfold into 16 million pixels. So the thread reads the headers of what came before it decodes on,
and requests of many pixels wait in a lane of their own. While both lanes wait, each gets half of
the time, one file after the other: a small file waits for one large file at most.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from digits.files import grey, opened, pixels_claimed
from digits.images import Normalised, PictureError, examine_grey
from service.serving.batch import BatchListener
from service.serving.replies import Replies
from service.serving.request import InvalidInputError, Refusal, Request

logger = logging.getLogger(__name__)

# Of this process, whose pictures are strangers': the warning of large pictures would be logged for
# files that are refused in any case.
Image.MAX_IMAGE_PIXELS = None
# Of all files of a request together: a few kilobytes can unfold into as many as one file may have,
# and the files of others wait meanwhile.
MAX_REQUEST_PIXELS = 2**26
# What may wait or be decoded: bytes (the largest request of defaults is 4 MiB), requests, and
# files, whose headers are read in about half a second.
MAX_WAITING_BYTES = 64 * 2**20
MAX_WAITING_REQUESTS = 256
MAX_WAITING_FILES = 2**14
# Pixels that may wait in each lane: two of the largest requests.
MAX_LANE_PIXELS = 2 * MAX_REQUEST_PIXELS
# A request of more waits among the large ones.
SMALL_PIXELS = 2**20
# A file of fewer counts as so many: what is done for any file takes as long.
FILE_PIXELS = 2**13
# After which memory may have come free.
NO_MEMORY_RETRY_S = 1.0
# The share of earlier files in what a pixel is said to cost falls to a third over so many pixels.
MEMORY_PIXELS = 2**24


class PictureReader:
    """Reads the files of one request."""

    def __init__(self) -> None:
        self._images: list[Normalised] = []
        self._pixels_left = MAX_REQUEST_PIXELS

    def read(self, data: bytes, name: str) -> None:
        """Decodes and normalises one file.

        Args:
            data: A PNG, JPEG, WebP or BMP file.
            name: What to call it in errors.

        Raises:
            InvalidInputError: If it is no such file or damaged, or if it is too large, by itself or
                with those before it; that is decided by its header, before memory is taken.
        """
        try:
            with opened(data) as image:
                self._pixels_left -= image.width * image.height
                if self._pixels_left < 0:
                    expected = f"at most {MAX_REQUEST_PIXELS:,} pixels in all files together"
                    raise PictureError(expected, "more")
                levels = grey(image)
        except PictureError as error:
            raise InvalidInputError(name, error.expected, error.got) from None
        self._images.append(examine_grey(levels))

    def give_to(self, request: Request) -> None:
        """Sets the images of a request to what was read."""
        request.images = b"".join(image.pixels.tobytes() for image in self._images)
        request.count = len(self._images)
        request.plausibility = np.array([image.plausibility for image in self._images], np.float32)


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request whose files wait or are being decoded.

    Attributes:
        name: What the files are called in errors, without their index.
        size: Bytes of its files.
        costs: Pixels of each file that is not decoded yet, by their headers.
        decoded: Files that are.
    """

    request: Request
    files: Sequence[bytes]
    name: str
    size: int
    costs: deque[int] = field(default_factory=deque)
    decoded: int = 0
    reader: PictureReader = field(default_factory=PictureReader)


class _PixelLane:
    """Requests of one size class, in order of arrival.

    Attributes:
        requests: Some files of the first may be decoded already.
        pixels: Pixels that wait in them.
    """

    def __init__(self) -> None:
        self.requests: deque[_Waiting] = deque()
        self.pixels = 0


class PictureDecoder:
    """Decodes the files of requests, and passes on those that then have images.

    Every other request is given to its reply, on this thread or on the one that submits it.

    Args:
        submit: Takes a request with its images: ``Batcher.submit``.
        listener: Is told of refused requests.

    Attributes:
        thread: What decodes; the lanes are its own.
    """

    def __init__(
        self,
        submit: Callable[[Sequence[Request]], None],
        listener: BatchListener | None = None,
    ) -> None:
        self._submit = submit
        self._replies = Replies(listener)
        self._lock = threading.Lock()
        self._stopping = False
        self._bytes = self._requests = self._files = 0
        self._arrived: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._all_arrived = False
        self._small, self._large = _PixelLane(), _PixelLane()
        # Pixels that the large lane is ahead of the small one since both wait.
        self._lead = 0
        # 0 until measured, which admits every deadline.
        self._seconds_per_pixel = 0.0
        self.thread = threading.Thread(target=self._serve, name="decoder", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self.thread.start()

    def submit(self, request: Request, files: Sequence[bytes], name: str) -> None:
        """Queues a request's files.

        Args:
            request: Its ``count`` is the number of files.
            files: In any of the formats that ``digits.files`` reads.
            name: What they are called in errors, without their index.
        """
        size = sum(len(data) for data in files)
        refusal = self._enter(_Waiting(request, files, name, size))
        if refusal is not None:
            request.refusal = refusal
            self._replies.refuse([request])

    def _enter(self, waiting: _Waiting) -> Refusal | None:
        files, size = len(waiting.files), waiting.size
        with self._lock:
            if self._stopping:
                return Refusal.STOPPED
            if self._requests and (
                self._requests == MAX_WAITING_REQUESTS
                or self._files + files > MAX_WAITING_FILES
                or self._bytes + size > MAX_WAITING_BYTES
            ):
                known = self._small.pixels + self._large.pixels
                pixels = max(known, self._files * FILE_PIXELS)
                waiting.request.retry_after_s = pixels * self._seconds_per_pixel
                return Refusal.QUEUE_FULL
            self._count(1, files, size)
            self._arrived.put(waiting)
        return None

    def stop(self, grace_s: float) -> bool:
        """Takes no more, decodes what waits; True if that was done within the grace."""
        with self._lock:
            self._stopping = True
            self._arrived.put(None)
        if self.thread.ident is None:
            return True
        self.thread.join(grace_s)
        return not self.thread.is_alive()

    def _serve(self) -> None:
        while self._sort():
            self._serve_file()

    def _serve_file(self) -> None:
        """Decodes the file whose turn it is; with the last one of a request, passes that on."""
        lane = self._lane_in_turn()
        waiting = lane.requests[0]
        try:
            refusal = self._decode_next(waiting, lane)
        except InvalidInputError as error:
            waiting.request.violation = error.violation
            refusal = Refusal.INVALID
        except Exception as error:
            refusal = _failed(error, waiting.request, "decoding an image file")
        if refusal is not None or not waiting.costs:
            lane.requests.popleft()
            lane.pixels -= sum(waiting.costs)
            self._end(waiting, refusal)

    def _sort(self) -> bool:
        """Puts what came into the lanes, and waits for it if they are empty; False at the end."""
        while not self._all_arrived:
            try:
                block = not (self._small.requests or self._large.requests)
                waiting = self._arrived.get(block=block)
            except queue.Empty:
                return True
            if waiting is None:
                self._all_arrived = True
                break
            self._sort_in(waiting)
            del waiting
        return bool(self._small.requests or self._large.requests)

    def _sort_in(self, waiting: _Waiting) -> None:
        try:
            refusal = self._admit(waiting)
        except Exception as error:
            refusal = _failed(error, waiting.request, "reading the headers of files")
        if refusal is not None:
            self._end(waiting, refusal)

    def _admit(self, waiting: _Waiting) -> Refusal | None:
        left = MAX_REQUEST_PIXELS  # beyond that the reader refuses
        for data in waiting.files:
            pixels = min(left, pixels_claimed(data))
            left -= pixels
            waiting.costs.append(max(FILE_PIXELS, pixels))
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

    def _decode_next(self, waiting: _Waiting, lane: _PixelLane) -> Refusal | None:
        """Decodes a request's next file.

        Raises:
            InvalidInputError: If it can not be read.
        """
        cost = waiting.costs.popleft()
        lane.pixels -= cost
        self._lead += cost if lane is self._large else -cost
        began, request = time.monotonic(), waiting.request
        if request.deadline is not None and began >= request.deadline:
            return Refusal.EXPIRED
        if request.origin.cancelled:
            return Refusal.CANCELLED
        index = waiting.decoded
        waiting.reader.read(waiting.files[index], f"{waiting.name}[{index}]")
        waiting.decoded += 1
        self._learn(cost, time.monotonic() - began)
        if not waiting.costs:
            waiting.reader.give_to(request)
        return None

    def _learn(self, cost: int, seconds: float) -> None:
        known = self._seconds_per_pixel
        share = cost / (cost + MEMORY_PIXELS) if known else 1.0
        self._seconds_per_pixel += share * (seconds / cost - known)

    def _end(self, waiting: _Waiting, refusal: Refusal | None) -> None:
        """Passes a request on, or replies to it; what it took is free afterwards."""
        request = waiting.request
        request.refusal = refusal
        try:
            if refusal is None:
                self._submit([request])
            else:
                self._replies.refuse([request])
        except Exception:
            logger.exception("passing a request's images on failed; this is a bug")
        with self._lock:
            self._count(-1, -len(waiting.files), -waiting.size)

    def _count(self, requests: int, files: int, size: int) -> None:
        self._requests += requests
        self._files += files
        self._bytes += size


def _failed(error: Exception, request: Request, what: str) -> Refusal:
    """Why a request ends that its files are not to blame for."""
    if isinstance(error, MemoryError):
        logger.error("%s: memory ran out", what)
        request.retry_after_s = NO_MEMORY_RETRY_S
        return Refusal.NO_MEMORY
    logger.error("%s failed; this is a bug", what, exc_info=error)
    return Refusal.FAILED
