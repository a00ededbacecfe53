"""The open streams of one kind: bounded for each connection and in all, and closed together."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from service.rpc.call import Receiver, RpcCall
from service.rpc.status import Status, fail, too_many_streams


class Stream(Receiver, Protocol):
    """The receiver of one streaming call."""

    call: RpcCall

    def close(self) -> None:
        """Ends the call once what it is owed is sent: the server shuts down."""


AnyStream = TypeVar("AnyStream", bound=Stream)


class OpenStreams(Generic[AnyStream]):
    """Opens, bounds and closes streams. Thread-safe.

    Args:
        limit: Streams in all.
        per_connection: Streams of one connection, or of one caller by its token.
        rejected: Is notified of calls beyond the bounds, which have ended.
    """

    def __init__(
        self,
        limit: int,
        per_connection: int,
        rejected: Callable[[RpcCall, Status], None] = lambda _, __: None,
    ) -> None:
        self._limit = limit
        self._per_connection = per_connection
        self._rejected = rejected
        self._lock = threading.Lock()
        self._streams: dict[RpcCall, AnyStream] = {}
        # By connection and by token; peers have a colon, names of tokens have none.
        self._held: Counter[str] = Counter()
        self.is_closing = False

    def open(self, call: RpcCall, make: Callable[[RpcCall], AnyStream]) -> AnyStream | None:
        """Makes the stream of a call; beyond a bound it ends the call and returns None."""
        with self._lock:
            limit = self._reached(call)
            if not limit:
                stream = self._streams[call] = make(call)
                self._held.update(_holders(call))
        if limit:
            status = too_many_streams(limit)
            fail(call, status)
            self._rejected(call, status)
            return None
        if self.is_closing:
            stream.close()
        return stream

    def _reached(self, call: RpcCall) -> int:
        """The bound that another stream would exceed; 0 for none."""
        if any(self._held[holder] >= self._per_connection for holder in _holders(call)):
            return self._per_connection
        return self._limit if len(self._streams) >= self._limit else 0

    def current(self) -> list[AnyStream]:
        """Those that are open."""
        with self._lock:
            return list(self._streams.values())

    def remove(self, call: RpcCall) -> None:
        """The stream of a call has ended; more than once is allowed."""
        with self._lock:
            if self._streams.pop(call, None) is None:
                return
            for holder in _holders(call):
                self._held[holder] -= 1
                if not self._held[holder]:
                    del self._held[holder]

    def close(self) -> None:
        """Closes all, and those that are opened later. From any thread."""
        self.is_closing = True
        for stream in self.current():
            stream.close()


def _holders(call: RpcCall) -> list[str]:
    """Who a stream counts for."""
    return [call.peer, call.caller] if call.caller else [call.peer]
