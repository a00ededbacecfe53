"""One caller's connection: its socket, its calls, and what they may hold.

The loop's thread reads; any thread answers, straight to the socket. ``_lock`` guards everything
that both touch. No handler runs under it, ``Hooks.admit`` excepted.
"""

from __future__ import annotations

import contextlib
import random
import select
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from service.http2 import connection as http2
from service.http2.call import Call
from service.http2.connection import Connection, ConnectionLimits
from service.http2.frames import DEFAULT_WINDOW, ErrorCode
from service.http2.messages import (
    CANCELLED,
    DEADLINE_EXCEEDED,
    INVALID_ARGUMENT,
    OK_TRAILERS,
    PREFIX_BYTES,
    RESOURCE_EXHAUSTED,
    RESPONSE_HEAD,
    UNAVAILABLE,
    GrpcError,
    RequestInfo,
    compressed,
    http_refusal,
    status_trailers,
)
from service.http2.work import Work

if TYPE_CHECKING:
    from service.http2.server import Server
    from service.http2.tls import TlsStream

# One read of a socket: some fifty small calls; more would hold up other connections.
READ_BYTES = 2**16
READABLE = select.EPOLLIN | select.EPOLLRDHUP
# For a caller to acknowledge the first GOAWAY, and to close its side at the end.
FAREWELL_S = 1.0
# While the server stops: for a request to come whole, and for a caller to take something.
DRAIN_PATIENCE_S = 3.0


class Link:
    """A connection that is open.

    Args:
        server: Knows routes, limits and the other connections.
        sock: Connected, not blocking.
        peer: The caller's address, as gRPC spells it.
        tls: Encrypts; None for plaintext.
        now: Monotonic seconds.

    Attributes:
        backlog_bytes: Bytes that the socket has not taken.
        held_bytes: Of requests that have not come whole, or that a stream has not taken.
        idle_since: When its last call ended; None while there is one.
    """

    def __init__(
        self, server: Server, sock: socket.socket, peer: str, tls: TlsStream | None, now: float
    ) -> None:
        limits = server.limits
        self.peer = peer
        self.backlog_bytes = 0
        self.held_bytes = 0
        self.idle_since: float | None = now
        self._server = server
        self._socket = sock
        self._tls = tls
        self._lock = threading.RLock()
        window = limits.streams * (DEFAULT_WINDOW + 1) + server.largest_window
        self._connection = Connection(
            ConnectionLimits(
                streams=limits.streams,
                window_bytes=window + limits.reserved_bytes,
                header_list_bytes=limits.metadata_bytes,
            ),
            Call,
        )
        self._backlog: deque[memoryview] = deque()
        self._arriving: dict[int, Call] = {}
        self._reserved = 0
        self._unreserved: deque[Call] = deque()
        self._watched: set[Call] = set()
        self._opened = self._heard = self._moved = now
        self._pinged: float | None = None
        self._pings = 0
        self._closing: float | None = None  # since when nothing follows what is in the backlog
        self._draining: float | None = None
        age = limits.connection_age_s * random.uniform(0.9, 1.1)  # noqa: S311 - spreads load only
        self._expires = now + age if age else None
        self.is_closed = False

    @property
    def fileno(self) -> int:
        """Of the socket."""
        return self._socket.fileno()

    @property
    def unread_bytes(self) -> int:
        """Of answers that the caller has not taken, for whatever reason."""
        return self.backlog_bytes + self._connection.pending_bytes

    @property
    def has_calls(self) -> bool:
        """Whether a call is open, or an answer still on its way."""
        return bool(self._connection.streams) or self.unread_bytes > 0

    def start(self) -> None:
        """Sends the first frames."""
        with self._lock:
            self._flush()

    # Reading, on the loop's thread

    def on_ready(self, events: int, now: float, work: Work) -> None:
        """The socket has something to read, or room to write, or has failed."""
        if events & select.EPOLLOUT:
            self._on_writable(now, work)
        if events & ~select.EPOLLOUT and not self.is_closed:
            self._read(now, work)

    def _read(self, now: float, work: Work) -> None:
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.lose(work)
            return
        self.take(data, now, work)

    def take(self, data: bytes, now: float, work: Work) -> None:
        """What the caller sent."""
        with self._lock:
            self._heard, self._pinged = now, None
            if self._tls is not None:
                try:
                    data = self._tls.decrypt(data)
                except ssl.SSLError:  # also its orderly end, after which nothing may follow
                    self.lose(work)
                    return
            for kind, call, body in self._connection.receive(data, now):
                self._on_event(kind, call, body, now, work)
            if self._connection.has_output or self._tls is not None:
                self._flush()
        if self._connection.closed:
            self._begin_close(now)
        self._note_idle(now)

    def _on_event(self, kind: int, call: Call, body: bytes, now: float, work: Work) -> None:
        if kind == http2.REQUEST:
            self._on_request(call, now, work)
        elif kind == http2.RESET:
            self._on_reset(call, work)
        elif kind == http2.FLUSHED:
            self._tell_sent(work)
        elif call.closed:
            return
        elif call.id in self._arriving:
            self._on_unary(call, body, now, work, ended=kind == http2.END)
        elif call.receiver is not None:
            self._on_stream(call, body, work, ended=kind == http2.END)

    def _on_request(self, call: Call, now: float, work: Work) -> None:
        head, server = call.head, self._server
        info = head.info
        if info is None:
            info = head.info = RequestInfo(head, server.routes, server.limits.metadata_bytes)
        call.info, call.link, call.received = info, self, now
        if info.timeout_s is not None:
            call.deadline = now + info.timeout_s
        if info.http_status is not None:
            fields, body = http_refusal(info.http_status)
            self._connection.send_headers(call, fields)
            self._connection.send_data(call, body, end=True)
            return
        if info.error is not None:
            self._refuse(call, info.error, work)
        elif self.unread_bytes > server.limits.unread_bytes:
            message = "the answers on this connection are not being read; retry later"
            self._refuse(call, GrpcError(RESOURCE_EXHAUSTED, message), work)
        elif server.hooks is not None and not server.hooks.admit(call):
            return
        elif info.route.is_unary:
            self._arriving[call.id] = call
        else:
            self._open_stream(call, work)

    def _refuse(self, call: Call, error: GrpcError, work: Work) -> None:
        """Ends a call that no handler has seen."""
        trailers = status_trailers(error.code, error.message, tuple(error.trailers))
        self._connection.send_headers(call, RESPONSE_HEAD + trailers, end=True)
        self._forget(call)
        if call.info.route is not None and self._server.hooks is not None:
            work.add_step(self._server.hooks.refused, call, error.code, error.message)

    def _on_reset(self, call: Call, work: Work) -> None:
        if not hasattr(call, "link"):  # reset in the burst in which it began
            return
        call.cancelled = True
        if self._arriving.get(call.id) is call:
            self._forget(call)
            if self._server.hooks is not None:
                work.add_step(self._server.hooks.refused, call, CANCELLED, "the caller left")
        elif call.receiver is not None:
            work.add_step(_cancelled, call)
        self._forget(call)

    def _on_unary(self, call: Call, body: bytes, now: float, work: Work, *, ended: bool) -> None:
        if (
            ended
            and call.parts is None
            and len(body) >= PREFIX_BYTES
            and not body[0]
            and int.from_bytes(body[1:PREFIX_BYTES], "big") == len(body) - PREFIX_BYTES
            and len(body) - PREFIX_BYTES <= call.info.route.max_message_bytes
        ):
            call.message = body[PREFIX_BYTES:]
        elif not self._collect(call, body, work, ended=ended):
            return
        self._arriving.pop(call.id, None)
        call.received = now
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
            if ended and not call.messages:
                got = "a part of one" if call.held else "none"
                raise GrpcError(INVALID_ARGUMENT, f"request: expected 1 message, got {got}")
        except GrpcError as error:
            self._hold(call.held - before)
            self._refuse(call, error, work)
            return False
        self._hold(call.held - before)
        if not ended:
            self._reserve(call)
            return False
        self._release(call)
        return True

    # Room for requests

    def _hold(self, size: int) -> None:
        self.held_bytes += size
        self._server.hold(size)

    def _reserve(self, call: Call) -> None:
        """Opens a call's window for the rest of its message, once it is its turn."""
        rest = call.expected - call.held
        if rest <= call.receive_window or call.reserved:
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
        held = call.release()
        if held:
            self._hold(-held)
        if call.reserved:
            self._reserved -= call.reserved
            call.reserved = 0
            for _ in range(len(self._unreserved)):
                waiting = self._unreserved.popleft()
                if not waiting.closed:
                    self._reserve(waiting)

    def _forget(self, call: Call) -> None:
        self._arriving.pop(call.id, None)
        self._watched.discard(call)
        self._release(call)

    # Streams of messages

    def _open_stream(self, call: Call, work: Work) -> None:
        call.receiver = _Opening
        extra = call.info.route.window_bytes - DEFAULT_WINDOW
        if extra > 0:
            self._connection.grant(call, extra)
        if call.deadline is not None:
            self._server.add_deadline(call)
        work.add_step(self._open, call)

    def _open(self, call: Call) -> None:
        call.receiver = call.info.route.open(call)
        if call.cancelled and call.receiver is not None:
            call.receiver.cancelled()

    def _on_stream(self, call: Call, body: bytes, work: Work, *, ended: bool) -> None:
        before = call.held
        try:
            whole = call.take(body) if body else []
            if ended and call.held:
                raise GrpcError(INVALID_ARGUMENT, "request: expected a message, got a part of one")
        except GrpcError as error:
            self._hold(call.held - before)
            trailers = status_trailers(error.code, error.message, ())
            self._end(call, trailers)
            call.cancelled = True
            work.add_step(_failed, call, error.code, error.message)
            return
        self._hold(call.held - before)
        for message in whole:
            self._hold(len(message))
            call.waiting = call.waiting or []
            call.waiting.append(message)
        if not ended and call.expected > call.receive_window + call.held:
            self._connection.grant(call, call.expected - call.held - call.receive_window)
        call.half_closed = ended
        if whole or ended:
            work.add_step(self._deliver, call)

    def _deliver(self, call: Call) -> None:
        """Gives a stream's receiver what waits, until it pauses."""
        while call.waiting and not call.paused and not call.closed:
            with self._lock:
                if not call.waiting:
                    return
                message = call.waiting.pop(0)
                self._hold(-len(message))
                window = call.info.route.window_bytes
                if call.receive_window < window // 2:
                    self._connection.grant(call, window - call.receive_window)
                    self._flush()
            if call.receiver is not None:
                call.receiver.message(message)
        if call.half_closed and not call.waiting and not call.paused and not call.closed:
            call.half_closed = False
            if call.receiver is not None:
                call.receiver.half_closed()

    def resume(self, call: Call) -> None:
        """Delivers again, from the loop's thread."""
        call.paused = False
        self._server.call_soon(self._deliver, call)

    def expire(self, call: Call, work: Work) -> None:
        """A stream's deadline has passed."""
        with self._lock:
            if call.closed:
                return
            self._end(call, status_trailers(DEADLINE_EXCEEDED, "the deadline passed", ()))
            call.cancelled = True
        work.add_step(_cancelled, call)

    # Answers, from any thread

    def respond(self, answers: Sequence[tuple[Call, bytes]]) -> list[bool]:
        """Answers unary calls of this connection, with one write."""
        sent = []
        with self._lock:
            respond = self._connection.respond
            for call, message in answers:
                info = call.info
                body = (
                    b"\0" + len(message).to_bytes(4, "big") + message
                    if info.encoding == "identity"
                    else compressed(message, info.encoding)
                )
                sent.append(respond(call, info.response_head, body, OK_TRAILERS))
            self._flush()
        return sent

    def send(self, call: Call, body: bytes) -> bool:
        """Sends one message, with its prefix, of a stream of answers."""
        with self._lock:
            if call.closed:
                return False
            if not call.began_answer:
                call.began_answer = True
                self._connection.send_headers(call, call.info.response_head)
            self._connection.send_data(call, body)
            self._flush()
            if call.pending_bytes or self.backlog_bytes:
                call.watched = True
                self._watched.add(call)
        return True

    def end(self, call: Call, trailers: bytes) -> bool:
        """Ends a call with encoded trailers; False if its caller has left."""
        with self._lock:
            if call.closed or call.local_closed:
                return False
            self._end(call, trailers)
            self._flush()
        return True

    def _end(self, call: Call, trailers: bytes) -> None:
        if call.began_answer:
            self._connection.send_trailers(call, trailers)
        else:
            self._connection.send_headers(call, RESPONSE_HEAD + trailers, end=True)
        self._forget(call)

    # Writing

    def _flush(self) -> None:
        """Sends what there is; the lock must be held."""
        data = self._connection.take_output()
        if self._tls is not None:
            data = self._tls.encrypt(data)
        if not data or self.is_closed:
            return
        if self._backlog:
            sent = 0
        else:
            self._moved = self._heard
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            except OSError:  # the loop will find out when it reads
                return
            if sent == len(data):
                return
            self._server.watch(self.fileno, READABLE | select.EPOLLOUT)
        self._backlog.append(memoryview(data)[sent:])
        self.backlog_bytes += len(data) - sent
        if self.unread_bytes > 4 * self._server.limits.unread_bytes:
            self._server.call_soon(self.abandon, ErrorCode.ENHANCE_YOUR_CALM, "answers unread")

    def _on_writable(self, now: float, work: Work) -> None:
        with self._lock:
            while self._backlog:
                try:
                    sent = self._socket.send(self._backlog[0])
                except BlockingIOError:
                    return
                except OSError:
                    self.lose(work)
                    return
                self._moved = now
                self.backlog_bytes -= sent
                if sent < len(self._backlog[0]):
                    self._backlog[0] = self._backlog[0][sent:]
                else:
                    self._backlog.popleft()
            if not self.is_closed:
                self._server.watch(self.fileno, READABLE)
            self._tell_sent(work)
        if self._closing is not None:
            self._shut_down(now)

    def _tell_sent(self, work: Work) -> None:
        """Tells those streams of which everything has left."""
        if self.backlog_bytes:
            return
        for call in [call for call in self._watched if not call.pending_bytes]:
            self._watched.discard(call)
            call.watched = False
            if not call.closed:
                work.add_step(_sent, call)

    # The connection's life, on the loop's thread

    def look(self, now: float, work: Work) -> None:
        """Checks every bound in time; called now and then."""
        limits = self._server.limits
        if self.is_closed:
            return
        self._note_idle(now)
        if self._closing is not None:
            if now - self._closing > FAREWELL_S and not self.backlog_bytes:
                self.lose(work)
        elif not self._connection.is_greeted:
            if now - self._opened > limits.handshake_s:
                self.lose(work)
        elif self._pinged is not None:
            if now - self._pinged > limits.keepalive_timeout_s:
                self.lose(work)
        elif now - self._heard > limits.keepalive_s:
            self._pinged = now
            self._do(self._connection.ping)
        self._look_at_requests(now, work)
        self._look_at_answers(now, work)
        self._look_at_age(now, work)

    def _look_at_requests(self, now: float, work: Work) -> None:
        """Ends calls whose request does not come whole."""
        patience = self._server.limits.request_s
        code, message = DEADLINE_EXCEEDED, f"the request did not come within {patience:g} s"
        if self._server.is_stopping and self._draining is not None:
            patience, code = DRAIN_PATIENCE_S, UNAVAILABLE
            message = "the server is shutting down, and the request has not come whole"
        with self._lock:
            for call in list(self._arriving.values()):
                began = call.received
                if self._server.is_stopping and self._draining is not None:
                    began = self._draining
                if now - began <= patience:
                    break
                self._refuse(call, GrpcError(code, message), work)
            self._flush()

    def _look_at_answers(self, now: float, work: Work) -> None:
        """Gives up a caller that takes nothing of what is being sent to it."""
        patience = self._server.limits.stall_s
        if self._server.is_stopping:
            patience = min(patience, DRAIN_PATIENCE_S)
        if self.backlog_bytes and now - self._moved > patience:
            self._server.stalled(self)
            self.lose(work)
            return
        with self._lock:
            for call in self._connection.blocked:
                if call.blocked_bytes != call.pending_bytes:
                    call.blocked_bytes, call.blocked_since = call.pending_bytes, now
                elif now - call.blocked_since > patience:
                    self._connection.reset(call, ErrorCode.CANCEL)
                    self._on_reset(call, work)
            self._flush()

    def _look_at_age(self, now: float, work: Work) -> None:
        limits, connection = self._server.limits, self._connection
        is_old = self._expires is not None and now > self._expires
        is_idle = self.idle_since is not None and now - self.idle_since > limits.idle_s
        if self._draining is None and (is_old or is_idle):
            self.drain(now)
        if self._draining is None and not connection.is_draining:
            return
        if self._draining is not None and now - self._draining > FAREWELL_S:
            self._do(connection.refuse_new)
        if self._draining is not None and is_old:
            grace = limits.connection_grace_s
            if now - self._draining > grace and connection.streams:
                self.abandon(ErrorCode.NO_ERROR, "the connection is too old")
        self._leave_if_done(now)

    def _leave_if_done(self, now: float) -> None:
        """Closes a connection that was asked to go, once nothing is left to do on it."""
        connection = self._connection
        done = connection.refuses_new or (connection.is_draining and self._draining is None)
        if done and not connection.streams and not self.unread_bytes:
            self._begin_close(now)

    def drain(self, now: float) -> None:
        """Asks the caller to go: it may finish its calls, and opens new ones elsewhere."""
        if self._draining is None and self._closing is None:
            self._draining = now
            self._do(self._connection.drain)

    def _do(self, step: Callable[[], None]) -> None:
        with self._lock:
            step()
            self._flush()

    def _note_idle(self, now: float) -> None:
        if self._connection.streams:
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = now
        if self._draining is not None:
            self._leave_if_done(now)

    def abandon(self, code: ErrorCode, message: str) -> None:
        """Ends the connection and its calls, with GOAWAY if the caller still reads."""
        work = Work()
        with self._lock:
            for kind, call, body in self._connection.close(code, message):
                self._on_event(kind, call, body, 0.0, work)
            self._flush()
        self._begin_close(self._heard)
        work.do()

    def _begin_close(self, now: float) -> None:
        """Nothing follows what is in the backlog."""
        if self._closing is None and not self.is_closed:
            self._closing = now
            if not self.backlog_bytes:
                self._shut_down(now)

    def _shut_down(self, now: float) -> None:
        """Ends this side; the other one gets a moment, so that nothing sent is lost.

        To close a socket with unread bytes would reset the connection, and drop what is under way.
        """
        self._closing = now
        with self._lock, contextlib.suppress(OSError, ssl.SSLError):
            if self._tls is not None:
                self._socket.send(self._tls.farewell())
            self._socket.shutdown(socket.SHUT_WR)

    def lose(self, work: Work) -> None:
        """The connection is gone, and with it every call."""
        with self._lock:
            if self.is_closed:
                return
            self.is_closed = True
            for kind, call, body in self._connection.close(ErrorCode.NO_ERROR):
                self._on_event(kind, call, body, 0.0, work)
            for call in list(self._arriving.values()):
                self._forget(call)
            self._backlog.clear()
            self.backlog_bytes = 0
            self._server.remove(self)
            self._socket.close()

    def drop_largest(self, work: Work) -> None:
        """Ends the call whose request holds the most."""
        with self._lock:
            held = max(self._arriving.values(), key=lambda call: call.held, default=None)
            if held is not None and held.held:
                message = "the server holds too many unfinished requests; retry later"
                self._refuse(held, GrpcError(RESOURCE_EXHAUSTED, message), work)
                self._flush()
                return
        self.abandon(ErrorCode.ENHANCE_YOUR_CALM, "too many unfinished requests")


class _Opening:
    """Stands for a receiver that is being made."""


def _cancelled(call: Call) -> None:
    if call.receiver not in (None, _Opening):
        call.receiver.cancelled()


def _failed(call: Call, code: int, message: str) -> None:
    call.receiver.failed(code, message)


def _sent(call: Call) -> None:
    if call.receiver not in (None, _Opening):
        call.receiver.sent()
