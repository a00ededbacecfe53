"""One ClassifyStream: its items, how many of them it may hold, and how long it may stand still."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from google.protobuf.message import DecodeError

from digits.v1 import digits_pb2
from service import wire
from service.status import Status
from service.transports.grpcio import AsyncCall, Mailbox

# Items of one stream that may be in work or wait for a slow reader: enough to keep every slot
# busy with messages of a full batch, and a bound on what one stream can hold in memory.
STREAM_WINDOW = 8
# A tag that does not end: no message of any kind.
MALFORMED = b"\xff"


class StreamItem(AsyncCall):
    """An item of a stream, which is not an RPC of its own."""

    is_rpc = False

    def __init__(self, mailbox: Mailbox, request: bytes, **rest: Any) -> None:
        super().__init__(mailbox, request, **rest)
        self.size = len(request)


class Window:
    """Items that are in work or wait for a slow reader, in order. One task puts, another takes.

    Bounded in items and in bytes; an item that is larger by itself is taken alone.

    Args:
        max_bytes: Of requests.

    Attributes:
        items: The oldest first.
    """

    def __init__(self, max_bytes: int) -> None:
        self.items: deque[StreamItem] = deque()
        self._max_bytes = max_bytes
        self._bytes = 0
        self._ended = False
        self._changed = asyncio.Event()

    async def put(self, item: StreamItem) -> None:
        """Adds an item once there is room."""
        while self.items and not self._has_room(item):
            await self._change()
        self.items.append(item)
        self._bytes += item.size
        self._changed.set()

    async def oldest(self) -> StreamItem | None:
        """The item whose turn it is, once there is one; None at the end."""
        while not self.items:
            if self._ended:
                return None
            await self._change()
        return self.items[0]

    def sent(self) -> None:
        """The caller took the oldest item's answer."""
        self._bytes -= self.items.popleft().size
        self._changed.set()

    def end(self) -> None:
        """Nothing follows."""
        self._ended = True
        self._changed.set()

    def abandon(self) -> None:
        """Nobody waits for an answer any more."""
        for item in self.items:
            item.cancelled = True
        self.items.clear()

    def _has_room(self, item: StreamItem) -> bool:
        return len(self.items) < STREAM_WINDOW and self._bytes + item.size <= self._max_bytes

    async def _change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class Patience:
    """Cancels the running task when nothing has moved in its stream for too long.

    Args:
        idle_s: Seconds that nothing may move; 0 waits for ever.

    Attributes:
        ended: Whether it has lost it.
        ours: Whether the caller waits for us: then nothing is held against it.
    """

    def __init__(self, idle_s: float) -> None:
        self.ended = self.ours = False
        self._idle_s = idle_s
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._moved = self._loop.time()
        self._timer = self._loop.call_later(idle_s, self._look) if idle_s else None

    def moved(self) -> None:
        """A request came or an answer was taken."""
        self._moved = self._loop.time()

    def stop(self) -> None:
        """The stream ended by itself."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        left = self._moved + self._idle_s - self._loop.time()
        if self.ours:
            left = self._idle_s
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        elif self._task is not None:
            self.ended = True
            self._task.cancel()


def item_request(message: bytes) -> bytes:
    """The ClassifyRequest inside a ClassifyStreamRequest; malformed bytes if there is none."""
    view = wire.sole_field(message)
    if view is not None:
        return bytes(view)
    try:
        request = digits_pb2.ClassifyStreamRequest.FromString(message).request
    except DecodeError:
        return MALFORMED  # the item itself may well read as a ClassifyRequest
    return request.SerializeToString()


def stream_response(answer: bytes | Status) -> bytes:
    """The answer to one item, or what was wrong with it."""
    if isinstance(answer, bytes):
        return wire.as_field_1(answer)
    error = digits_pb2.StreamError(
        code=answer.code.value[0], message=answer.message, retry_after_ms=answer.retry_after_ms
    )
    return digits_pb2.ClassifyStreamResponse(error=error).SerializeToString()
