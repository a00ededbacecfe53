"""The memory of a server's process."""

from __future__ import annotations

import threading
from typing import Any, Self

import psutil

MIB = 2**20


class PeakMemory:
    """The most resident memory a server takes meanwhile, over what it had.

    Attributes:
        grown: Bytes.
    """

    def __init__(self, server: Any) -> None:
        self._process = psutil.Process(server.process.pid)
        self._before = self._process.memory_info().rss
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.grown = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.grown = max(self.grown, self._process.memory_info().rss - self._before)
