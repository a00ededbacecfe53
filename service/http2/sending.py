"""The half of a connection that sends: answers, held back by the peer's flow control."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from typing import Any

from service.http2 import frames
from service.http2.flood import FloodGauge
from service.http2.frames import (
    DEFAULT_FRAME_BYTES,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FRAME_HEADER,
    frame,
)
from service.http2.headers import Head

# Kinds of events: a request's headers came (the event's data is None), a part of its body, the end
# of the stream from the peer, its reset by either side; everything that was queued was let out.
REQUEST, DATA, END, RESET, FLUSHED = range(5)
# Kind, stream, bytes of a DATA event.
Event = tuple[int, Any, bytes]


# Memory of a blocked answer beside its body: its call, headers and queue.
WAITING_BYTES = 2048


class Stream:
    """One request and its answer. The layer above may derive its own class from it.

    What few streams need has its default on the class, so that making one stays cheap.

    Attributes:
        id: Stream identifier.
        head: The request's headers.
        receive_window: Bytes that the peer may still send.
        send_extra: What WINDOW_UPDATE has added to the peer's initial window, less what was sent.
        body_bytes: Of its request so far.
        remote_closed: The peer has ended its side.
        local_closed: This side has ended, or will when ``pending`` is empty.
        closed: Nothing is sent or received any more.
        pending: What waits for the peer's flow control: body, then perhaps trailers; None when
            nothing ever did.
        pending_bytes: Of body.
    """

    receive_window = DEFAULT_WINDOW
    send_extra = 0
    body_bytes = 0
    remote_closed = False
    local_closed = False
    closed = False
    pending: deque[memoryview] | None = None
    pending_trailers: bytes | None = None
    pending_bytes = 0

    def __init__(self, stream_id: int, head: Head) -> None:
        self.id = stream_id
        self.head = head


class Sender(ABC):
    """What is sent, and what has to wait. Not thread-safe.

    Attributes:
        pending_bytes: Of bodies, of all streams, that wait for the peer's flow control.
        let_out: Bytes of bodies that went through it, ever.
    """

    def __init__(self) -> None:
        self.pending_bytes = self.let_out = 0
        self._flood = FloodGauge()
        self._out: list[bytes | memoryview] = []
        self._events: list[Event] = []
        self._send_window = DEFAULT_WINDOW
        self._peer_window = DEFAULT_WINDOW
        self._peer_frame_bytes = DEFAULT_FRAME_BYTES
        self._blocked: dict[int, Any] = {}

    @abstractmethod
    def _end_local(self, stream: Any) -> None:
        """This side of a stream has ended."""

    @property
    def waiting_bytes(self) -> int:
        """Memory of answers blocked by flow control, with ``WAITING_BYTES`` of overhead each."""
        return self.pending_bytes + WAITING_BYTES * len(self._blocked)

    @property
    def blocked(self) -> list[Any]:
        """Streams whose answers wait for the peer's flow control."""
        return list(self._blocked.values())

    def respond(self, stream: Any, head: bytes, body: bytes, trailers: bytes) -> bool:
        """Answers a request with one piece of body, all at once; False if it is closed already.

        Args:
            stream: Of the request.
            head: Encoded headers.
            body: With whatever prefix it needs.
            trailers: Encoded trailers.
        """
        if stream.closed:
            return False
        size = len(body)
        fits = (
            size <= self._peer_frame_bytes
            and size <= self._send_window
            and size <= self._peer_window + stream.send_extra
        )
        if not fits:
            self.send_headers(stream, head)
            self.send_data(stream, body)
            return self.send_trailers(stream, trailers)
        self._send_window -= size
        stream.send_extra -= size
        stream_id, pack = stream.id, FRAME_HEADER.pack
        self._out += (
            pack(0, len(head), 1, END_HEADERS, stream_id),
            head,
            pack(size >> 16, size & 0xFFFF, 0, 0, stream_id),
            body,
            pack(0, len(trailers), 1, END_HEADERS | END_STREAM, stream_id),
            trailers,
        )
        self._flood.useful()
        self._end_local(stream)
        return True

    def send_headers(self, stream: Any, block: bytes, *, end: bool = False) -> bool:
        """Begins an answer; with ``end`` that is all of it. False if the stream is closed."""
        if stream.closed:
            return False
        self._out += self._header_frames(stream.id, block, END_STREAM if end else 0)
        self._flood.useful()
        if end:
            self._end_local(stream)
        return True

    def send_data(self, stream: Any, body: bytes, *, end: bool = False) -> bool:
        """Sends a piece of an answer, as soon as flow control lets it; False if it is closed.

        Args:
            stream: Of the request.
            body: The piece, not empty.
            end: Whether it is the last, and no trailers follow.
        """
        if stream.closed:
            return False
        if stream.pending is None:
            stream.pending = deque()
        stream.pending.append(memoryview(body))
        stream.pending_bytes += len(body)
        stream.local_closed = end
        self.pending_bytes += len(body)
        self._flood.useful()
        self._flush(stream)
        return True

    def send_trailers(self, stream: Any, block: bytes) -> bool:
        """Ends an answer, behind what waits of it; False if the stream is closed."""
        if stream.closed:
            return False
        stream.local_closed = True
        if stream.pending_bytes:
            stream.pending_trailers = block
        else:
            self._out += self._header_frames(stream.id, block, END_STREAM)
            self._end_local(stream)
        return True

    def drop_waiting(self, stream: Any) -> None:
        """Gives up what waits of an answer, so that its end is not held back by it."""
        self.pending_bytes -= stream.pending_bytes
        stream.pending_bytes = 0
        stream.pending = None
        self._blocked.pop(stream.id, None)

    def take_output(self) -> bytes:
        """What is to be sent now."""
        out, self._out = self._out, []
        return b"".join(out)

    @property
    def has_output(self) -> bool:
        """Whether ``take_output`` would return anything."""
        return bool(self._out)

    def _header_frames(self, stream_id: int, block: bytes, flags: int) -> list[bytes]:
        size = self._peer_frame_bytes
        if len(block) <= size:
            return [frame(frames.HEADERS, flags | END_HEADERS, stream_id, block)]
        parts = [block[first : first + size] for first in range(0, len(block), size)]
        out = [frame(frames.HEADERS, flags, stream_id, parts[0])]
        out += [frame(frames.CONTINUATION, 0, stream_id, part) for part in parts[1:-1]]
        return [*out, frame(frames.CONTINUATION, END_HEADERS, stream_id, parts[-1])]

    def _flush(self, stream: Any) -> None:
        """Sends what flow control lets out of a stream."""
        pending, stream_id = stream.pending, stream.id
        while pending:
            window = min(self._send_window, self._peer_window + stream.send_extra)
            body = pending[0]
            size = min(len(body), window, self._peer_frame_bytes)
            if size <= 0 and body:
                self._blocked[stream_id] = stream
                return
            self._send_window -= size
            stream.send_extra -= size
            stream.pending_bytes -= size
            self.pending_bytes -= size
            self.let_out += size
            if size == len(body):
                pending.popleft()
            else:
                pending[0] = body[size:]
                body = body[:size]
            is_last = stream.local_closed and not pending and stream.pending_trailers is None
            flags = END_STREAM if is_last else 0
            self._out += (
                FRAME_HEADER.pack(size >> 16, size & 0xFFFF, frames.DATA, flags, stream_id),
                body,
            )
        self._blocked.pop(stream_id, None)
        if stream.pending_trailers is not None:
            self._out += self._header_frames(stream_id, stream.pending_trailers, END_STREAM)
        if stream.local_closed:
            self._end_local(stream)

    def _flush_blocked(self) -> None:
        """Goes on with streams that waited for a window, the one that waited longest first."""
        for stream in list(self._blocked.values()):
            if self._send_window <= 0:
                return
            self._blocked.pop(stream.id)  # behind the others, if it must wait again
            self._go_on(stream)

    def _go_on(self, stream: Any) -> None:
        """Sends more of a stream that had to wait."""
        self._flush(stream)
        if not stream.pending_bytes:
            self._events.append((FLUSHED, stream, b""))
