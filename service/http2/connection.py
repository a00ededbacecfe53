"""One HTTP/2 connection of a server, without I/O: bytes in, events out; answers in, bytes out.

``Connection.receive`` takes what came from the peer and returns what happened; ``take_output``
gives what is to be sent. Not thread-safe. Source of every rule: RFC 9113.
"""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from service.http2 import frames
from service.http2.frames import (
    DEFAULT_FRAME_BYTES,
    DEFAULT_WINDOW,
    END_HEADERS,
    END_STREAM,
    FRAME_HEADER,
    FRAME_HEADER_BYTES,
    MAX_STREAM_ID,
    MAX_WINDOW,
    PADDED,
    PREFACE,
    PRIORITY_FLAG,
    ErrorCode,
    Http2Error,
    Setting,
    frame,
    settings_payload,
)
from service.http2.headers import Head, HeaderDecoder, trailers_problem
from service.http2.sending import DATA, END, REQUEST, RESET, Event, Sender, Stream

# Streams that were reset here and of which the peer may still be sending: their frames are ignored.
MAX_RESET_REMEMBERED = 1024
# Ranges of stream identifiers that the peer passed over; none of them may be used later.
MAX_GAPS_REMEMBERED = 256
# Frames that one header block may be spread over.
MAX_CONTINUATIONS = 32
# Frames handled before other connections get a turn, about 0.3 ms of work. A header field that has
# to be decoded takes as long as four of them.
MAX_FRAMES_AT_ONCE = 256
FRAMES_PER_FIELD = 4
# DATA of fewer bytes, and WINDOW_UPDATE of less, count as a nuisance: work for next to nothing.
TINY_BYTES = 64
# The payload of the PING that tells when the peer has seen the first GOAWAY.
DRAIN_PING = b"goodbye\0"


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What one peer may ask of the connection.

    Attributes:
        streams: Requests at the same time (SETTINGS_MAX_CONCURRENT_STREAMS).
        window_bytes: On their way on the whole connection (flow control). What is here already does
            not count: windows of streams bound that, and streams do not wait for each other.
        header_list_bytes: Of one request's headers, as announced; requests with more have to be
            refused by the layer above.
        header_block_bytes: Headers of one request, encoded or expanded: more ends the connection,
            since what follows could not be decoded without them.
    """

    streams: int = 256
    window_bytes: int = 2**24
    header_list_bytes: int = 2**14
    header_block_bytes: int = 2**16


class Connection(Sender):
    """The server's side of one connection.

    Args:
        limits: What the peer may do.
        make_stream: Makes the object that stands for a stream.

    Attributes:
        streams: The open ones, by identifier.
        last_stream_id: The highest that the peer has begun.
        closed: The connection has ended with GOAWAY; there may be output left.
        has_more: Whole frames may be buffered; ``receive(b"")`` continues with them.
        error: Why it has, where that was the peer's fault.
    """

    def __init__(
        self, limits: ConnectionLimits, make_stream: Callable[[int, Head], Any] = Stream
    ) -> None:
        super().__init__()
        self.streams: dict[int, Any] = {}
        self.last_stream_id = 0
        self.closed = self.has_more = False
        self.error: Http2Error | None = None
        self._limits = limits
        self._make_stream = make_stream
        self._decoder = HeaderDecoder(limits.header_block_bytes)
        self._buffer = b""
        self._greeted = False  # the preface came
        self._settled = False  # and the SETTINGS behind it
        self._receive_window = limits.window_bytes
        self._unacknowledged = 0
        # HEADERS whose block goes on in CONTINUATION frames: stream, flags, parts of the block.
        self._unfinished: tuple[int, int, list[bytes]] | None = None
        self._reset: dict[int, None] = {}
        self._gaps: deque[tuple[int, int]] = deque(maxlen=MAX_GAPS_REMEMBERED)
        self._refuse_after = MAX_STREAM_ID
        self._draining = self._peer_leaves = False
        settings = {
            Setting.MAX_CONCURRENT_STREAMS: limits.streams,
            Setting.MAX_HEADER_LIST_SIZE: limits.header_list_bytes,
        }
        self._out += [
            frame(frames.SETTINGS, 0, 0, settings_payload(settings)),
            _window_update(0, limits.window_bytes - DEFAULT_WINDOW),
        ]
        self._unsettled = 1  # SETTINGS that the peer has not acknowledged
        self._handlers: dict[int, Callable[[int, int, bytes], None]] = {
            frames.DATA: self._on_data,
            frames.HEADERS: self._on_headers,
            frames.PRIORITY: self._on_priority,
            frames.RST_STREAM: self._on_reset,
            frames.SETTINGS: self._on_settings,
            frames.PUSH_PROMISE: self._on_push_promise,
            frames.PING: self._on_ping,
            frames.GOAWAY: self._on_goaway,
            frames.WINDOW_UPDATE: self._on_window_update,
            frames.CONTINUATION: self._on_continuation,
        }

    @property
    def is_greeted(self) -> bool:
        """Whether the peer's preface and first SETTINGS have come."""
        return self._settled

    @property
    def buffered_bytes(self) -> int:
        """Of a frame or a header block that has not come whole."""
        parts = self._unfinished[2] if self._unfinished else ()
        return len(self._buffer) + sum([len(part) for part in parts])

    def receive(self, data: bytes, now: float) -> list[Event]:
        """What the peer's bytes mean.

        When the peer breaks a rule of the connection, this is closed: its streams are reset, and
        GOAWAY is the last of its output.

        Args:
            data: As they came; may end anywhere inside a frame.
            now: Monotonic seconds.
        """
        if self.closed:
            return []
        events = self._events
        try:
            self._flood.refill(now)
            self._receive(self._buffer + data if self._buffer else data)
            self._flood.check()
        except Http2Error as error:
            self.error = error
            self._close(error.code, str(error))
        self._events = []
        return events

    def _receive(self, data: bytes) -> None:
        position, size = 0, len(data)
        if not self._greeted:
            position = self._greet(data)
        unpack, handlers = FRAME_HEADER.unpack_from, self._handlers
        left = MAX_FRAMES_AT_ONCE
        decoded = self._decoder.decoded
        while self._greeted and left > 0 and size - position >= FRAME_HEADER_BYTES:
            high, low, kind, flags, stream_id = unpack(data, position)
            length = high << 16 | low
            if length > DEFAULT_FRAME_BYTES:
                message = f"a frame of {length} bytes; {DEFAULT_FRAME_BYTES} are allowed"
                raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, message)
            start = position + FRAME_HEADER_BYTES
            end = start + length
            if end > size:
                break
            position = end
            left -= 1
            if not self._settled:
                self._settle(kind, flags)
            if self._unfinished is not None and kind != frames.CONTINUATION:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "expected a CONTINUATION frame")
            handler = handlers.get(kind)
            if handler is None:  # a type that an extension may define
                self._flood.nuisance()
            else:
                handler(flags, stream_id & MAX_STREAM_ID, data[start:end])
            if self._decoder.decoded != decoded:
                left -= FRAMES_PER_FIELD * (self._decoder.decoded - decoded)
                decoded = self._decoder.decoded
            if self._flood.is_spent:  # not to work through the rest of a flood
                break
        self._buffer = data[position:]
        self.has_more = left <= 0

    def _greet(self, data: bytes) -> int:
        """Where the frames begin: behind the preface, once that has come."""
        if data[: len(PREFACE)] != PREFACE[: len(data)]:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "expected the preface of HTTP/2")
        self._greeted = len(data) >= len(PREFACE)
        return len(PREFACE) if self._greeted else 0

    def _settle(self, kind: int, flags: int) -> None:
        if kind != frames.SETTINGS or flags & frames.ACK:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "expected SETTINGS as the first frame")
        self._settled = True

    def _on_data(self, flags: int, stream_id: int, payload: bytes) -> None:
        length = len(payload)
        self._take_connection_window(length)
        if flags & PADDED:
            payload = _unpadded(payload)
        stream = self.streams.get(stream_id)
        if stream is None or stream.remote_closed:
            self._refuse_data(stream_id, stream)
            return
        stream.receive_window -= length
        if stream.receive_window < 0:
            self._fail_stream(stream, ErrorCode.FLOW_CONTROL_ERROR)
            return
        stream.body_bytes += len(payload)
        if flags & END_STREAM:
            self._on_end(stream, payload)
            return
        if length < TINY_BYTES:
            self._flood.nuisance()
        expected = stream.head.content_length
        if expected is not None and stream.body_bytes > expected:
            self._fail_stream(stream, ErrorCode.PROTOCOL_ERROR)
            return
        if payload:
            self._events.append((DATA, stream, payload))

    def _on_end(self, stream: Any, payload: bytes) -> None:
        expected = stream.head.content_length
        if expected is not None and stream.body_bytes != expected:
            self._fail_stream(stream, ErrorCode.PROTOCOL_ERROR)
            return
        stream.remote_closed = True
        if stream.local_closed and not stream.pending_bytes:
            self._forget(stream)
        self._events.append((END, stream, payload))

    def _take_connection_window(self, length: int) -> None:
        """Counts what came against the connection's window, and opens that again by halves."""
        self._receive_window -= length
        if self._receive_window < 0:
            raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "the connection's window is exceeded")
        self._unacknowledged += length
        if self._unacknowledged * 2 > self._limits.window_bytes:
            self._out.append(_window_update(0, self._unacknowledged))
            self._receive_window += self._unacknowledged
            self._unacknowledged = 0

    def _refuse_data(self, stream_id: int, stream: Any) -> None:
        """DATA on a stream that takes none."""
        if stream is not None:
            self._fail_stream(stream, ErrorCode.STREAM_CLOSED)
        elif stream_id not in self._reset:
            self._check_known(stream_id)
            raise Http2Error(ErrorCode.STREAM_CLOSED, "DATA on a closed stream")
        else:
            self._flood.nuisance()

    def _check_known(self, stream_id: int) -> None:
        """An idle stream takes no frame but HEADERS and PRIORITY."""
        if stream_id == 0 or stream_id > self.last_stream_id or stream_id % 2 == 0:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"a frame on idle stream {stream_id}")
        if any(first <= stream_id <= last for first, last in self._gaps):
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"a frame on idle stream {stream_id}")

    def _on_headers(self, flags: int, stream_id: int, payload: bytes) -> None:
        if flags & PADDED:
            payload = _unpadded(payload)
        if flags & PRIORITY_FLAG:
            self._check_dependency(stream_id, payload)
            payload = payload[5:]
        if flags & END_HEADERS:
            self._on_block(stream_id, flags, payload)
            return
        if stream_id == 0:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "HEADERS on stream 0")
        self._unfinished = (stream_id, flags, [payload])

    def _on_continuation(self, flags: int, stream_id: int, payload: bytes) -> None:
        if self._unfinished is None or self._unfinished[0] != stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "a CONTINUATION frame of no header block")
        _, first_flags, parts = self._unfinished
        parts.append(payload)
        size = sum([len(part) for part in parts])
        if len(parts) > MAX_CONTINUATIONS or size > self._limits.header_block_bytes:
            raise Http2Error(ErrorCode.ENHANCE_YOUR_CALM, "a header block that is too long")
        if flags & END_HEADERS:
            self._unfinished = None
            self._on_block(stream_id, first_flags, b"".join(parts))

    def _on_block(self, stream_id: int, flags: int, block: bytes) -> None:
        """A whole header block: of a new request, or its trailers."""
        if stream_id <= self.last_stream_id:
            self._on_trailers(stream_id, flags, block)
            return
        if stream_id % 2 == 0:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, f"a request on stream {stream_id}")
        if stream_id > self.last_stream_id + 2:
            self._gaps.append((self.last_stream_id + 1, stream_id - 1))
        self.last_stream_id = stream_id
        head = self._decoder.head(block)
        if stream_id > self._refuse_after or len(self.streams) >= self._limits.streams:
            self._flood.nuisance()
            self._reset_unknown(stream_id, ErrorCode.REFUSED_STREAM)
            return
        if head.malformed:
            self._flood.nuisance()
            self._reset_unknown(stream_id, ErrorCode.PROTOCOL_ERROR)
            return
        stream = self._make_stream(stream_id, head)
        self.streams[stream_id] = stream
        self._events.append((REQUEST, stream, b""))
        if flags & END_STREAM:
            self._on_end(stream, b"")

    def _on_trailers(self, stream_id: int, flags: int, block: bytes) -> None:
        fields = self._decoder.fields(block)  # whatever becomes of them, the table must follow
        stream = self.streams.get(stream_id)
        if stream is None:
            if stream_id in self._reset:
                self._flood.nuisance()
                return
            self._check_known(stream_id)
            raise Http2Error(ErrorCode.STREAM_CLOSED, "HEADERS on a closed stream")
        if stream.remote_closed:
            self._fail_stream(stream, ErrorCode.STREAM_CLOSED)
        elif not flags & END_STREAM or trailers_problem(fields):
            self._fail_stream(stream, ErrorCode.PROTOCOL_ERROR)
        else:
            self._on_end(stream, b"")

    def _check_dependency(self, stream_id: int, payload: bytes) -> None:
        if len(payload) < 5:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "a priority of less than 5 bytes")
        if int.from_bytes(payload[:4], "big") & MAX_STREAM_ID == stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "a stream that depends on itself")

    def _on_priority(self, _: int, stream_id: int, payload: bytes) -> None:
        self._flood.nuisance()
        if stream_id == 0:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "PRIORITY on stream 0")
        if len(payload) != 5:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "PRIORITY of other than 5 bytes")
        self._check_dependency(stream_id, payload)

    def _on_reset(self, _: int, stream_id: int, payload: bytes) -> None:
        self._flood.nuisance()
        if len(payload) != 4:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "RST_STREAM of other than 4 bytes")
        self._check_known(stream_id)
        self._reset.pop(stream_id, None)  # the peer knows that it is closed
        stream = self.streams.get(stream_id)
        if stream is not None:
            self._forget(stream)
            self._events.append((RESET, stream, b""))

    def _on_settings(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "SETTINGS on a stream")
        if len(payload) % 6 or (flags & frames.ACK and payload):
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "SETTINGS of a wrong size")
        if flags & frames.ACK:
            self._unsettled -= 1
            if self._unsettled < 0:
                self._unsettled = 0
                self._flood.nuisance()
            return
        self._flood.nuisance(1 + len(payload) // 600)
        self._out.append(frame(frames.SETTINGS, frames.ACK, 0))  # before what it lets out
        for key, value in struct.iter_unpack(">HI", payload):
            self._apply(key, value)

    def _apply(self, key: int, value: int) -> None:
        if key == Setting.INITIAL_WINDOW_SIZE:
            largest = max([s.send_extra for s in self.streams.values()], default=0)
            if value > MAX_WINDOW or value + largest > MAX_WINDOW:
                raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "an initial window that is too big")
            self._peer_window = value
            self._flush_blocked()
        elif key == Setting.MAX_FRAME_SIZE:
            if not DEFAULT_FRAME_BYTES <= value <= frames.MAX_FRAME_BYTES:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "a maximum frame size out of bounds")
            self._peer_frame_bytes = value
        elif key == Setting.ENABLE_PUSH and value > 1:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "ENABLE_PUSH that is neither 0 nor 1")

    def _on_push_promise(self, _: int, __: int, ___: bytes) -> None:
        raise Http2Error(ErrorCode.PROTOCOL_ERROR, "PUSH_PROMISE of a client")

    def _on_ping(self, flags: int, stream_id: int, payload: bytes) -> None:
        if stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "PING on a stream")
        if len(payload) != 8:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "PING of other than 8 bytes")
        if not flags & frames.ACK:
            self._flood.nuisance()
            self._out.append(frame(frames.PING, frames.ACK, 0, payload))
            return
        if payload == DRAIN_PING and self._draining:
            self.refuse_new()

    def _on_goaway(self, _: int, stream_id: int, payload: bytes) -> None:
        """The peer begins no further streams; those that are open go on."""
        if stream_id:
            raise Http2Error(ErrorCode.PROTOCOL_ERROR, "GOAWAY on a stream")
        if len(payload) < 8:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "GOAWAY of less than 8 bytes")
        self._flood.nuisance()
        self._peer_leaves = True

    def _on_window_update(self, _: int, stream_id: int, payload: bytes) -> None:
        if len(payload) != 4:
            raise Http2Error(ErrorCode.FRAME_SIZE_ERROR, "WINDOW_UPDATE of other than 4 bytes")
        increment = int.from_bytes(payload, "big") & MAX_WINDOW
        if increment < TINY_BYTES:
            self._flood.nuisance()
        if stream_id == 0:
            if not increment:
                raise Http2Error(ErrorCode.PROTOCOL_ERROR, "WINDOW_UPDATE of 0")
            self._send_window += increment
            if self._send_window > MAX_WINDOW:
                raise Http2Error(ErrorCode.FLOW_CONTROL_ERROR, "a window that is too large")
            self._flush_blocked()
            return
        stream = self.streams.get(stream_id)
        if stream is None:
            self._check_known(stream_id)
        elif not increment:
            self._fail_stream(stream, ErrorCode.PROTOCOL_ERROR)
        elif self._peer_window + stream.send_extra + increment > MAX_WINDOW:
            self._fail_stream(stream, ErrorCode.FLOW_CONTROL_ERROR)
        else:
            stream.send_extra += increment
            if stream.pending_bytes:
                self._go_on(stream)

    def grant(self, stream: Any, increment: int) -> None:
        """Lets the peer send more of a request."""
        if not (stream.closed or stream.remote_closed) and increment > 0:
            stream.receive_window += increment
            self._out.append(_window_update(stream.id, increment))

    def reset(self, stream: Any, code: ErrorCode) -> None:
        """Ends a stream at once. Its RESET is no event: whoever calls this knows."""
        if stream.closed:
            return
        self._forget(stream)
        self._reset_unknown(stream.id, code)

    def ping(self, payload: bytes = b"\0" * 8) -> None:
        """Asks the peer for a sign of life."""
        self._out.append(frame(frames.PING, 0, 0, payload))

    def drain(self) -> None:
        """Asks the peer to begin no further streams, those on their way excepted.

        What it begins until it has seen that is still answered: ``refuse_new`` ends this time, by
        itself when the peer acknowledges. Source: section 6.8.
        """
        if not self._draining and not self.closed:
            self._draining = True
            self._out.append(_goaway(MAX_STREAM_ID, ErrorCode.NO_ERROR))
            self.ping(DRAIN_PING)

    def refuse_new(self) -> None:
        """From here on new streams are refused; the peer knows that it can try them elsewhere."""
        if self._refuse_after == MAX_STREAM_ID and not self.closed:
            self._draining = True
            self._refuse_after = self.last_stream_id
            self._out.append(_goaway(self.last_stream_id, ErrorCode.NO_ERROR))

    @property
    def is_finished(self) -> bool:
        """Whether no further stream will be opened: either side has said so for good."""
        return self._refuse_after != MAX_STREAM_ID or self._peer_leaves

    def close(self, code: ErrorCode, message: str = "") -> list[Event]:
        """Ends the connection; returns the RESET events of its streams."""
        if not self.closed:
            self._close(code, message)
        events, self._events = self._events, []
        return events

    def _end_local(self, stream: Any) -> None:
        """This side has ended; a peer that goes on sending is told not to. Source: section 8.1."""
        stream.local_closed = True
        if stream.remote_closed:
            stream.closed = True
            self.streams.pop(stream.id, None)
        else:
            self.reset(stream, ErrorCode.NO_ERROR)

    def _forget(self, stream: Any) -> None:
        stream.closed = True
        self.streams.pop(stream.id, None)
        if stream.pending_bytes:
            self.drop_waiting(stream)

    def _fail_stream(self, stream: Any, code: ErrorCode) -> None:
        """The peer broke a rule of one stream."""
        self._flood.nuisance()
        self.reset(stream, code)
        self._events.append((RESET, stream, b""))

    def _reset_unknown(self, stream_id: int, code: ErrorCode) -> None:
        self._out.append(frame(frames.RST_STREAM, 0, stream_id, code.to_bytes(4, "big")))
        self._reset[stream_id] = None
        if len(self._reset) > MAX_RESET_REMEMBERED:
            del self._reset[next(iter(self._reset))]

    def _close(self, code: ErrorCode, message: str) -> None:
        self.closed, self.has_more = True, False
        self._buffer, self._unfinished = b"", None
        for stream in list(self.streams.values()):
            self._forget(stream)
            self._events.append((RESET, stream, b""))
        self._out.append(_goaway(self.last_stream_id, code, message.encode()))


def _goaway(last_stream_id: int, code: ErrorCode, message: bytes = b"") -> bytes:
    return frame(frames.GOAWAY, 0, 0, struct.pack(">II", last_stream_id, code) + message)


def _window_update(stream_id: int, increment: int) -> bytes:
    return frame(frames.WINDOW_UPDATE, 0, stream_id, increment.to_bytes(4, "big"))


def _unpadded(payload: bytes) -> bytes:
    """A payload without its padding. Source: section 6.1."""
    if not payload or payload[0] >= len(payload):
        raise Http2Error(ErrorCode.PROTOCOL_ERROR, "padding that is longer than its frame")
    return payload[1 : len(payload) - payload[0]]
