"""The requests of one connection: refused by their headers, or assembled and handed over.

Everything here runs on the loop's thread with the link's lock held, unless a method says otherwise.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from service.http2.call import Call, Packed
from service.http2.connection import Connection
from service.http2.frames import DEFAULT_WINDOW
from service.http2.messages import (
    CANCELLED,
    DEADLINE_EXCEEDED,
    INVALID_ARGUMENT,
    PREFIX_BYTES,
    RESOURCE_EXHAUSTED,
    RESPONSE_HEAD,
    RETRY_LATER,
    UNAVAILABLE,
    GrpcError,
    RequestInfo,
    http_refusal,
    status_trailers,
)
from service.http2.sending import END, FLUSHED, REQUEST, RESET, Event
from service.http2.work import Work

if TYPE_CHECKING:
    from collections.abc import Iterable

    from service.http2.link import Link
    from service.http2.server import Server

# While the server stops: for a request to come whole.
DRAIN_PATIENCE_S = 3.0
# A message of more takes long to read, and so may one that is compressed: it has its turn with
# those of other connections.
LONG_BYTES = 2**16
# Of the body of a request that is no gRPC, before it is answered.
MAX_IGNORED_BYTES = 2**14


class Intake:
    """Takes events of a connection, and finds calls for the loop to hand over.

    Args:
        link: The connection's socket and answers.
        connection: Its protocol.
        server: Knows routes, hooks and limits.

    Attributes:
        held_bytes: Of requests that have not come whole, or that a stream has not taken, with
            their headers, and of frames that have not.
    """

    def __init__(self, link: Link, connection: Connection, server: Server) -> None:
        self.held_bytes = 0
        self._link = link
        self._connection = connection
        self._server = server
        # Unary calls whose request has not come whole, the oldest first.
        self._arriving: dict[int, Call] = {}
        # Counted in ``held_bytes``: of frames; of the calls up to this one, their headers.
        self._buffered = self._counted = 0
        # Calls of which a part of a message came with the present events.
        self._partial: dict[Call, None] = {}
        # Bytes of requests whose callers may send all of them; calls that wait for that.
        self._reserved = 0
        self._unreserved: deque[Call] = deque()

    def take(self, events: Iterable[Event], now: float, work: Work) -> None:
        """Does what events ask for."""
        for kind, call, body in events:
            if kind == REQUEST:
                self._on_request(call, now, work)
            elif kind == RESET:
                self._on_reset(call, work)
            elif kind == FLUSHED:
                self._link.tell_sent(work)
            elif call.closed:
                continue
            elif call.id in self._arriving:
                self._on_unary(call, body, now, work, ended=kind == END)
            elif call.receiver is not None:
                self._on_stream(call, body, work, ended=kind == END)
        # Only now: windows count every event, messages those that were read.
        if self._partial:
            self._let_in_partial()
        self._note_memory()

    def _on_request(self, call: Call, now: float, work: Work) -> None:
        self._link.note_use()
        head, server = call.head, self._server
        info = head.info
        if info is None:
            info = head.info = RequestInfo(head, server.routes, server.limits.metadata_bytes)
        call.info, call.link, call.received = info, self._link, now
        if info.timeout_s is not None:
            call.deadline = now + info.timeout_s
        if info.http_status is not None:
            self._arriving[call.id] = call  # answered at its end: it may yet be malformed
        elif server.hooks is not None and not server.hooks.admit(call):
            pass  # it was ended; who may not call learns nothing, not even which methods there are
        elif info.error is not None:
            self._refuse(call, info.error, work)
        elif self._link.unread_bytes > server.limits.unread_bytes:
            message = "the answers on this connection are not being read; retry later"
            self._refuse(call, GrpcError(RESOURCE_EXHAUSTED, message, RETRY_LATER), work)
        elif info.route.is_unary:
            self._arriving[call.id] = call
        else:
            self._open_stream(call, work)

    def _refuse_http(self, call: Call, status: int) -> None:
        """Ends a request that is no gRPC."""
        fields, body = http_refusal(status)
        self._connection.send_headers(call, fields)
        self._connection.send_data(call, body, end=True)
        self.forget(call)

    def _refuse(self, call: Call, error: GrpcError, work: Work) -> None:
        """Ends a call that no handler has seen."""
        trailers = status_trailers(error.code, error.message, tuple(error.trailers))
        self._connection.send_headers(call, RESPONSE_HEAD + trailers, end=True)
        self.forget(call)
        self._tell_refused(call, error.code, error.message, work)

    def _tell_refused(self, call: Call, code: int, message: str, work: Work) -> None:
        known = call.info.route is not None and call.info.http_status is None
        if known and self._server.hooks is not None:
            work.add_refused(call, code, message)

    def _on_reset(self, call: Call, work: Work) -> None:
        call.cancelled = True
        if self._arriving.get(call.id) is call:
            self._tell_refused(call, CANCELLED, "the caller left", work)
        elif call.receiver is not None:
            work.add_step(cancel, call)
        self.forget(call)

    def _on_unary(self, call: Call, body: bytes, now: float, work: Work, *, ended: bool) -> None:
        if (
            ended
            and call.parts is None
            and not call.messages
            and call.info.http_status is None
            and len(body) >= PREFIX_BYTES
            and not body[0]
            and int.from_bytes(body[1:PREFIX_BYTES], "big") == len(body) - PREFIX_BYTES
            and len(body) - PREFIX_BYTES <= call.info.route.max_message_bytes
        ):
            call.message = body[PREFIX_BYTES:]
        elif call.info.http_status is not None:
            if ended or call.body_bytes > MAX_IGNORED_BYTES:
                self._refuse_http(call, call.info.http_status)
            return
        elif not self._collect(call, body, work, ended=ended):
            return
        call.received = now
        if _is_long(call.message):
            self._link.do_in_turn(self._finish, call)
        else:
            self._hand_over(call, work)

    def _finish(self, call: Call) -> None:
        """The turn of a request that takes long to read. Without the lock."""
        work = Work(self._server.hooks)
        with self._link.lock:
            if self._arriving.get(call.id) is not call:  # it has ended meanwhile
                return
            try:
                call.message = call.unpacked(call.message)
                self._hand_over(call, work)
            except GrpcError as error:
                self._refuse(call, error, work)
                self._link.flush()
        work.do()

    def _hand_over(self, call: Call, work: Work) -> None:
        self._arriving.pop(call.id, None)
        if call.kept:
            self._release(call)
        work.add_call(call)

    def _collect(self, call: Call, body: bytes, work: Work, *, ended: bool) -> bool:
        """Adds to a request that comes in parts; True if that makes it whole."""
        before = call.held
        try:
            whole = call.take(body) if body else []
            call.messages += len(whole)
            if call.messages > 1 or (call.messages and call.held):
                raise GrpcError(INVALID_ARGUMENT, "request: expected 1 message, got more")
            if whole:
                call.message = whole[0]
                self._keep(call, len(call.message))
            if ended and not call.messages:
                got = "a part of one" if call.held else "none"
                raise GrpcError(INVALID_ARGUMENT, f"request: expected 1 message, got {got}")
        except GrpcError as error:
            self._hold(call.held - before)
            self._refuse(call, error, work)
            return False
        self._hold(call.held - before)
        if not ended:
            self._partial[call] = None
        return ended

    # Room for what is not whole

    def _hold(self, size: int) -> None:
        if size:
            self.held_bytes += size
            self._server.hold(size)

    def _keep(self, call: Call, size: int) -> None:
        call.kept += size
        self._hold(size)

    def _note_memory(self) -> None:
        """Counts what has begun with the present events, and did not come whole with them."""
        for call in reversed(self._arriving.values()):
            if call.id <= self._counted:
                break
            self._keep(call, call.info.memory_bytes)
        self._counted = self._connection.last_stream_id
        change = self._connection.buffered_bytes - self._buffered
        self._buffered += change
        self._hold(change)

    def _let_in_partial(self) -> None:
        partial, self._partial = self._partial, {}
        for call in partial:
            if not (call.closed or call.remote_closed) and call.expected:
                self._let_in(call)

    def _let_in(self, call: Call) -> None:
        """Opens a call's window for the rest of its message; of a unary call in turn."""
        rest = call.expected - call.held
        if rest <= call.receive_window or call.reserved:
            return
        if not call.info.route.is_unary:
            self._connection.grant(call, rest - call.receive_window)
            return
        if self._reserved and self._reserved + call.expected > self._server.limits.reserved_bytes:
            if call not in self._unreserved:
                self._unreserved.append(call)
            return
        call.reserved = call.expected
        self._reserved += call.reserved
        self._connection.grant(call, rest - call.receive_window)

    def _release(self, call: Call) -> None:
        """A call holds nothing any more; others may have waited for that."""
        self._hold(-call.release())
        if call.reserved:
            self._reserved -= call.reserved
            call.reserved = 0
            for _ in range(len(self._unreserved)):
                waiting = self._unreserved.popleft()
                if not waiting.closed:
                    self._let_in(waiting)

    def forget(self, call: Call) -> None:
        """A call has ended."""
        self._arriving.pop(call.id, None)
        self._release(call)

    def drop_largest(self, work: Work) -> bool:
        """Ends the unary call that holds the most; False if there is none."""
        held = max(self._arriving.values(), key=lambda call: call.held + call.kept, default=None)
        if held is None:
            return False
        message = "the server holds too many unfinished requests; retry later"
        self._refuse(held, GrpcError(RESOURCE_EXHAUSTED, message, RETRY_LATER), work)
        return True

    def check_timeouts(self, now: float, draining_since: float | None, work: Work) -> None:
        """Ends calls whose request does not come whole in time.

        Args:
            now: Monotonic seconds.
            draining_since: When the server began to stop; None while it does not.
            work: What is to be done about it.
        """
        patience = self._server.limits.request_s
        code, message = DEADLINE_EXCEEDED, f"the request did not come within {patience:g} s"
        if draining_since is not None:
            patience, code = DRAIN_PATIENCE_S, UNAVAILABLE
            message = "the server is shutting down, and the request has not come whole"
        for call in list(self._arriving.values()):
            if now - (draining_since or call.received) > patience:
                self._refuse(call, GrpcError(code, message), work)

    # Streams of messages

    def _open_stream(self, call: Call, work: Work) -> None:
        call.receiver, call.waiting = OPENING, deque()
        self._keep(call, call.info.memory_bytes)
        self._connection.grant(call, call.info.route.window_bytes - DEFAULT_WINDOW)
        if call.deadline is not None:
            self._server.add_deadline(call)
        work.add_step(self._open, call)

    def _open(self, call: Call) -> None:
        """Without the lock."""
        call.receiver = call.info.route.open(call)

    def _on_stream(self, call: Call, body: bytes, work: Work, *, ended: bool) -> None:
        before = call.held
        try:
            whole = call.take(body) if body else []
            if ended and call.held:
                raise GrpcError(INVALID_ARGUMENT, "request: expected a message, got a part of one")
        except GrpcError as error:
            self._hold(call.held - before)
            self._fail(call, error, work)
            return
        call.waiting += whole
        if whole:
            self._link.note_use()
        self._hold(call.held - before + sum([len(message) for message in whole]))
        if not ended:
            self._partial[call] = None
        call.half_closed = ended
        if whole or ended:
            work.add_step(self.deliver, call)

    def _fail(self, call: Call, error: GrpcError, work: Work) -> None:
        """Ends a stream whose messages are no messages."""
        if call.closed:
            return
        call.cancelled = True
        trailers = status_trailers(error.code, error.message, tuple(error.trailers))
        self._link.end_locked(call, trailers)
        work.add_step(fail, call, error.code, error.message)

    def deliver(self, call: Call) -> None:
        """Gives a stream's receiver what waits, until it pauses. Without the lock."""
        while (
            not (call.paused or call.closed) and (message := self._next_message(call)) is not None
        ):
            call.receiver.message(message)
        if call.half_closed and not (call.waiting or call.paused or call.closed):
            call.half_closed = False
            call.receiver.half_closed()

    def _deliver_long(self, call: Call) -> None:
        """The turn of a message that takes long to read. Without the lock."""
        if call.paused or call.closed:
            return
        message = self._next_message(call, in_turn=True)
        if message is not None:
            try:
                message = call.unpacked(message)
            except GrpcError as error:
                work = Work()
                with self._link.lock:
                    self._fail(call, error, work)
                    self._link.flush()
                work.do()
                return
            call.receiver.message(message)
        self.deliver(call)

    def _next_message(self, call: Call, *, in_turn: bool = False) -> bytes | None:
        """Takes a message that waits, and lets the caller send as much again. Without the lock."""
        with self._link.lock:
            if not call.waiting or call.receiver is None:
                return None
            if _is_long(call.waiting[0]) and not in_turn:
                self._link.do_in_turn(self._deliver_long, call)
                return None
            message = call.waiting.popleft()
            self._hold(-len(message))
            window = call.info.route.window_bytes
            room = window - call.held - sum([len(waiting) for waiting in call.waiting])
            if room - call.receive_window > window // 2 and not call.remote_closed:
                self._connection.grant(call, room - call.receive_window)
                self._link.flush()
            return message


def _is_long(message: bytes) -> bool:
    return isinstance(message, Packed) or len(message) > LONG_BYTES


class Opening:
    """Stands for a receiver that is being made: what is told to it is told later, or never."""

    def cancelled(self) -> None:
        """The call ends before it has one; ``Intake._open`` tells it."""

    def sent(self) -> None:
        """Nothing was."""


OPENING = Opening()


def cancel(call: Call) -> None:
    """Tells a stream's receiver that its caller has left."""
    receiver, call.receiver = call.receiver, None
    if receiver is not None:
        receiver.cancelled()


def fail(call: Call, code: int, message: str) -> None:
    """Tells a stream's receiver how the transport has ended it."""
    receiver, call.receiver = call.receiver, None
    if receiver is not None:
        receiver.failed(code, message)
