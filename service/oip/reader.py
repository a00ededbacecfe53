"""Reads ModelInfer requests: small ones at once, large ones on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from digits.v1 import digits_pb2
from service.classify import Classify
from service.oip.messages import Infer, read_infer
from service.scheduling import run_patiently

# One value of typed contents takes some 50 ns to read, one parameter about 1 us. To read more than
# this at a time, of one call or of a burst, would hold up the thread that all calls come by.
SMALL_BYTES = 32 * 1024
# Of requests that wait for the thread of large ones, in all.
MAX_WAITING_BYTES = 64 * 2**20

T = TypeVar("T")


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
        self._thread = ThreadPoolExecutor(1, "oip-reader", initializer=run_patiently)
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

    def aside(self, size: int, work: Callable[[], T]) -> Future[T] | None:
        """Does something with requests on the thread; None if too many wait for that.

        Args:
            size: Of the requests, in bytes.
            work: What to do with them.

        Raises:
            RuntimeError: If no thread can be started.
        """
        with self._lock:
            if self._waiting_bytes + size > MAX_WAITING_BYTES:
                return None
            self._waiting_bytes += size
        try:
            working = self._thread.submit(work)
        except RuntimeError:  # no thread can be started
            self._leave(size)
            raise
        working.add_done_callback(lambda _: self._leave(size))
        return working

    def _leave(self, size: int) -> None:
        with self._lock:
            self._waiting_bytes -= size
