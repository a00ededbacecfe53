"""Owns the thread that turns image files into pixels, beside the hot path."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from service.images import Decoded, FileReader
from service.job import Refusal
from service.status import InvalidRequestError

if TYPE_CHECKING:
    from service.call import Call

# What became of a call's files.
Outcome: TypeAlias = Decoded | Refusal | InvalidRequestError

logger = logging.getLogger(__name__)

# Bytes of files that may wait or be decoded; the largest request of defaults is 4 MiB.
MAX_WAITING_BYTES = 64 * 2**20


class Decoder:
    """Decodes the files of one call after the other, in the order of arrival.

    Args:
        done: Takes a call with its images, or with what became of it instead.

    Attributes:
        thread: What decodes.
    """

    def __init__(self, done: Callable[[Call, Outcome], None]) -> None:
        self._done = done
        self._waiting: queue.SimpleQueue[tuple[Call, Sequence[bytes], int] | None]
        self._waiting = queue.SimpleQueue()
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._serve, name="decoder", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self.thread.start()

    def submit(self, call: Call, files: Sequence[bytes]) -> bool:
        """Queues a call's files; False if too much waits already."""
        size = sum(len(data) for data in files)
        with self._lock:
            if self._waiting_bytes and self._waiting_bytes + size > MAX_WAITING_BYTES:
                return False
            self._waiting_bytes += size
        self._waiting.put((call, files, size))
        return True

    def stop(self, grace_s: float) -> bool:
        """Decodes what waits; True if that was done within the grace."""
        self._waiting.put(None)
        self.thread.join(grace_s)
        return not self.thread.is_alive()

    def _serve(self) -> None:
        while (item := self._waiting.get()) is not None:
            call, files, size = item
            try:
                self._done(call, self._decode(call, files))
            except Exception:
                logger.exception("decoding a call's files failed; this is a bug")
                self._done(call, Refusal.FAILED)
            with self._lock:
                self._waiting_bytes -= size

    def _decode(self, call: Call, files: Sequence[bytes]) -> Outcome:
        reader = FileReader()
        for index, data in enumerate(files):
            if call.deadline is not None and time.monotonic() >= call.deadline:
                return Refusal.EXPIRED
            if call.cancelled:
                return Refusal.CANCELLED
            try:
                reader.read(data, f"encoded.files[{index}]")
            except InvalidRequestError as error:
                return error
        return reader.decoded()
