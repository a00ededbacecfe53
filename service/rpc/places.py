"""A bound on streams that are open at the same time, of each caller and of all."""

from __future__ import annotations

import threading

from service.rpc.call import RpcCall


class Places:
    """Counts open calls. Thread-safe.

    Args:
        limit: Calls in all.
        per_connection: Calls of one connection.
    """

    def __init__(self, limit: int, per_connection: int) -> None:
        self._limit = limit
        self._per_connection = per_connection
        self._lock = threading.Lock()
        self._taken: dict[str, int] = {}
        self._count = 0

    def take(self, call: RpcCall) -> int:
        """Takes a place for a call; returns 0, or the limit that was reached."""
        with self._lock:
            taken = self._taken.get(call.peer, 0)
            if taken >= self._per_connection:
                return self._per_connection
            if self._count >= self._limit:
                return self._limit
            self._taken[call.peer] = taken + 1
            self._count += 1
            return 0

    def leave(self, call: RpcCall) -> None:
        """Gives a call's place back."""
        with self._lock:
            self._count -= 1
            left = self._taken.pop(call.peer) - 1
            if left:
                self._taken[call.peer] = left
