"""Reads ModelInfer requests: small ones at once, large ones on a thread of its own."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from digits.v1 import digits_pb2
from service.classify import Classify
from service.oip.messages import Infer, read_infer

# One value of typed contents takes some 50 ns to read.
SMALL_BYTES = 64 * 1024
# Of those that wait for the thread, in all.
MAX_WAITING_BYTES = 64 * 2**20


class LoadingError(Exception):
    """No model serves yet."""


class Reader:
    """Thread-safe.

    Args:
        classify: The model in service.
        max_images: Images in one request at most.
    """

    def __init__(self, classify: Classify, max_images: int) -> None:
        self._classify = classify
        self._max_images = max_images
        self._thread = ThreadPoolExecutor(1, "oip-reader")
        self._lock = threading.Lock()
        self._waiting_bytes = 0

    def ref(self) -> digits_pb2.ModelRef:
        """The model in service.

        Raises:
            LoadingError: If there is none yet.
        """
        model = self._classify.model
        if model is None:
            raise LoadingError
        return model.ref

    def read(self, request: bytes) -> Infer:
        """Reads a request here and now.

        Raises:
            InvalidRequestError: Naming what is wrong.
            LoadingError: If no model serves yet.
        """
        return read_infer(request, self.ref(), self._max_images)

    def read_aside(self, request: bytes) -> Future[Infer] | None:
        """Reads a large request on the thread; None if too many wait for that."""
        size = len(request)
        with self._lock:
            if self._waiting_bytes + size > MAX_WAITING_BYTES:
                return None
            self._waiting_bytes += size
        reading = self._thread.submit(self.read, request)
        reading.add_done_callback(lambda _: self._leave(size))
        return reading

    def _leave(self, size: int) -> None:
        with self._lock:
            self._waiting_bytes -= size
