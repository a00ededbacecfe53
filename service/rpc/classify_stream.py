"""ClassifyStream: items in, answers in the same order, a bounded number of them on their way."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from grpc import StatusCode

from digits.v1 import digits_pb2
from service.rpc import codec
from service.rpc.call import RpcCall
from service.rpc.classify import FAILED, SERVICE, read_pixels, read_request
from service.rpc.open_streams import OpenStreams
from service.rpc.recorder import CODES, Recorder
from service.rpc.status import (
    REFUSALS,
    Status,
    departed_code,
    fail,
    idle_stream,
    invalid_status,
    refusal_status,
    unavailable,
)
from service.serving.gate import Gate
from service.serving.pictures import Pictures
from service.serving.request import InvalidInputError, Refusal, Request
from service.telemetry.listener import Method

logger = logging.getLogger(__name__)

CLASSIFY_STREAM = Method(SERVICE, "ClassifyStream", "bidi_stream")
# Items of one stream that may be in work or wait for a slow reader: enough to keep every slot busy
# with messages of a full batch, and a bound on what one stream can hold in memory.
WINDOW_ITEMS = 8
# Streams that may be open; a connection, and a token, may have half of them.
MAX_STREAMS = 256
CONNECTION_SHARE = 2
# Seconds in which a stream must send a message or take an answer.
STREAM_IDLE_S = 300.0
SHUTTING_DOWN = unavailable("the server is shutting down")


class StreamEdge:
    """Takes ClassifyStream calls.

    Args:
        gate: The way into the core.
        recorder: Is notified of calls.
        max_streams: Open at the same time; a connection, and a token, may have half of them.
        max_ahead_bytes: Of items that one stream may have in work or unread, if it is not one item.
        idle_s: Seconds in which a stream that waits for its caller must move.
        is_admitted: Whether a call's token is still valid.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        gate: Gate,
        recorder: Recorder,
        *,
        max_streams: int,
        max_ahead_bytes: int,
        idle_s: float,
        is_admitted: Callable[[RpcCall], bool] = lambda _: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.gate = gate
        self.recorder = recorder
        self.max_ahead_bytes = max_ahead_bytes
        self.is_admitted = is_admitted
        self.clock = clock
        self._idle_s = idle_s
        per_connection = max(1, max_streams // CONNECTION_SHARE)
        self._streams: OpenStreams[ClassifyStream] = OpenStreams(
            max_streams, per_connection, self._rejected
        )

    def open(self, call: RpcCall) -> ClassifyStream | None:
        """Begins a stream, unless too many are open."""
        self.recorder.began(CLASSIFY_STREAM)
        return self._streams.open(call, partial(ClassifyStream, self))

    def _rejected(self, call: RpcCall, status: Status) -> None:
        self.recorder.ended(CLASSIFY_STREAM, [call], status.code, status.message)

    def close(self) -> None:
        """Ends streams once what they sent is answered. From any thread."""
        self._streams.close()

    async def watch(self) -> None:
        """Ends streams in which nothing moves, until cancelled."""
        while True:
            await asyncio.sleep(min(1.0, self._idle_s / 4))
            now = self.clock()
            for stream in self._streams.current():
                if stream.idle_for(now) > self._idle_s:
                    stream.end(idle_stream(self._idle_s))

    def forget(self, stream: ClassifyStream) -> None:
        """A stream has ended."""
        self._streams.remove(stream.call)


class Item:
    """One message of a stream and what became of it: the origin of its request.

    Attributes:
        answer: The serialised ClassifyStreamResponse, or None while it is in work.
        size: Bytes of the message.
    """

    __slots__ = ("answer", "size", "stream")

    def __init__(self, stream: ClassifyStream, size: int) -> None:
        self.stream = stream
        self.size = size
        self.answer: bytes | None = None

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.stream.has_ended

    @property
    def caller(self) -> str:
        """Whose token the stream shows."""
        return self.stream.call.caller


class ClassifyStream:
    """One stream: the receiver of its messages.

    Messages come on the transport's thread, answers from slots. ``_lock`` guards the items; it is
    not held while anything is sent but by the thread whose turn it is to send.

    Args:
        edge: Knows the core and the bounds.
        call: Its RPC.

    Attributes:
        has_ended: Nothing is sent or taken any more.
    """

    def __init__(self, edge: StreamEdge, call: RpcCall) -> None:
        self.call = call
        self.has_ended = False
        self._edge = edge
        self._lock = threading.Lock()
        self._items: deque[Item] = deque()
        self._bytes = 0
        self._unread = 0  # answers that were sent and may not have left
        self._sending = False
        self._paused = False
        self._all_came = False
        self._closing: Status | None = None
        self._moved = edge.clock()

    # What the transport tells

    def message(self, message: bytes) -> None:
        """See ``Receiver``."""
        if self._closing is not None or self.has_ended:
            return
        if not self._edge.is_admitted(self.call):  # its token was revoked since the stream began
            self.end(Status(*REFUSALS[Refusal.UNAUTHENTICATED]))
            return
        self._moved = self._edge.clock()
        item = Item(self, len(message))
        with self._lock:
            self._items.append(item)
            self._bytes += item.size
            if not self._has_room():
                self._paused = True
                self.call.pause()
        try:
            self._submit(item, message)
        except InvalidInputError as error:
            self._answer(item, invalid_status(error.violation))
        except Exception:
            logger.exception("reading an item of a stream failed; this is a bug")
            self._answer(item, FAILED)

    def half_closed(self) -> None:
        """See ``Receiver``."""
        self._all_came = True
        self._advance()

    def sent(self) -> None:
        """See ``Receiver``."""
        self._moved = self._edge.clock()
        with self._lock:
            self._unread = 0
        self._advance()

    def cancelled(self) -> None:
        """See ``Receiver``."""
        code = departed_code(self.call.deadline, self._edge.clock())
        self._record_end(code, "the caller left")

    def failed(self, code: int, message: str) -> None:
        """See ``Receiver``."""
        self._record_end(CODES[code], message)

    # What the edge asks for

    def close(self) -> None:
        """Takes nothing further, and ends once everything that came is answered."""
        self._closing = self._closing or SHUTTING_DOWN
        self._advance()

    def idle_for(self, now: float) -> float:
        """Seconds for which the stream has waited for its caller and nothing has moved."""
        with self._lock:
            waits_for_us = bool(self._items) and not self._unread
        return 0.0 if waits_for_us else now - self._moved

    def end(self, status: Status) -> None:
        """Ends the stream with a status other than OK."""
        if not self.has_ended and fail(self.call, status):
            self._record_end(status.code, status.message)

    # Items

    def _submit(self, item: Item, message: bytes) -> None:
        edge, deadline = self._edge, self.call.deadline
        inner = codec.sole_field(message)
        request = None
        if inner is not None:
            request = read_pixels(inner, deadline, edge.gate, _reply, item)
        if request is not None:
            edge.gate.submit([request])
            return
        request, files = read_request(_inner(message), deadline, edge.gate, _reply, item)
        if files is None:
            edge.gate.submit([request])
        else:
            edge.gate.prepare(request, Pictures(files, edge.gate.judge))

    def _has_room(self) -> bool:
        """Whether another item may come; the lock must be held."""
        on_their_way = len(self._items) + self._unread
        return on_their_way < WINDOW_ITEMS and self._bytes < self._edge.max_ahead_bytes

    def _answer(self, item: Item, answer: bytes | Status) -> None:
        item.answer = stream_response(answer)
        self._advance()

    def answered(self, request: Request) -> None:
        """The core has ended the request of an item."""
        item: Item = request.origin  # type: ignore[assignment] # a request here is an item's
        if request.result is None:
            item.answer = stream_response(refusal_status(request))
        else:
            item.answer = stream_response(codec.encode_response(request))
        self._advance()

    def _advance(self) -> None:
        """Sends what is next, if no other thread does; ends the stream after the last.

        If another thread is sending, it checks for more before it stops.
        """
        while True:
            with self._lock:
                if self._sending or self.has_ended:
                    return
                item = self._next()
                if item is None:
                    break
                self._sending = True
            was_sent = self.call.send(item.answer or b"")
            unsent = was_sent and self.call.unsent > 0
            with self._lock:
                self._sending = False
                self._unread = self._unread + 1 if unsent else 0
            self._moved = self._edge.clock()
        self._go_on()

    def _next(self) -> Item | None:
        """Takes the oldest item, if it is answered; the lock must be held."""
        if not self._items or self._items[0].answer is None:
            return None
        item = self._items.popleft()
        self._bytes -= item.size
        return item

    def _go_on(self) -> None:
        """Takes further messages, or ends the stream where there will be none."""
        with self._lock:
            is_empty = not self._items
            resumes = self._paused and self._has_room() and self._closing is None
            if resumes:
                self._paused = False
        if is_empty and self._all_came:
            if not self.has_ended and self.call.end():
                self._record_end(StatusCode.OK, "")
        elif is_empty and self._closing is not None:
            self.end(self._closing)
        elif resumes:
            self.call.resume()

    def _record_end(self, code: StatusCode, message: str) -> None:
        with self._lock:
            if self.has_ended:
                return
            self.has_ended = True
            self._items.clear()
        self._edge.recorder.ended(CLASSIFY_STREAM, [self.call], code, message)
        self._edge.forget(self)


def _reply(requests: Sequence[Request]) -> None:
    """Gives requests back to their streams; see ``Reply``."""
    for request in requests:
        item: Item = request.origin  # type: ignore[assignment] # a request here is an item's
        item.stream.answered(request)


def _inner(message: bytes) -> bytes:
    """The ClassifyRequest inside a ClassifyStreamRequest.

    Raises:
        InvalidInputError: If there is none.
    """
    inner = codec.sole_field(message)
    if inner is not None:
        return bytes(inner)
    parsed = codec.parse(digits_pb2.ClassifyStreamRequest, message)
    return bytes(parsed.request.SerializeToString())


def stream_response(answer: bytes | Status) -> bytes:
    """The answer to one item, or what was wrong with it."""
    if isinstance(answer, bytes):
        return codec.as_field(1, answer)
    error = digits_pb2.StreamError(
        code=answer.code.value[0], message=answer.message, retry_after_ms=answer.retry_after_ms
    )
    return digits_pb2.ClassifyStreamResponse(error=error).SerializeToString()
