"""One caller's connection: its socket, its answers, and how long it may live.

The loop's thread reads; any thread answers, straight to the socket. ``lock`` guards everything that
both touch. No handler runs under it, ``Hooks.admit`` excepted.
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

from service.http2.call import Call
from service.http2.connection import Connection, ConnectionLimits
from service.http2.frames import ErrorCode
from service.http2.intake import Intake, cancel, fail
from service.http2.messages import (
    DEADLINE_EXCEEDED,
    OK_TRAILERS,
    RESPONSE_HEAD,
    compressed,
    prefixed,
    status_trailers,
)
from service.http2.sending import RESET
from service.http2.work import Work

if TYPE_CHECKING:
    from service.http2.server import Server
    from service.http2.tls import TlsStream

# One read of a socket: some fifty small calls; more would hold up other connections.
READ_BYTES = 2**16
READABLE = select.EPOLLIN | select.EPOLLRDHUP
# For a caller to acknowledge the first GOAWAY, and to close its side at the end.
FAREWELL_S = 1.0
# While the server stops: for a caller to take something of its answers.
DRAIN_PATIENCE_S = 3.0
# Answers a caller has not taken, over the limit at which its calls are refused: it is closed.
ABANDON = 4


class Link:
    """A connection that is open.

    Args:
        server: Knows routes, limits and the other connections.
        sock: Connected, not blocking.
        peer: The caller's address, as gRPC spells it.
        tls: Encrypts; None for plaintext.
        now: Monotonic seconds.

    Attributes:
        peer: The caller's address.
        lock: Guards the connection and what is to be sent.
        intake: Its requests.
        backlog_bytes: Bytes that the socket has not taken.
        idle_since: When its last call ended; None while there is one.
        used: When it last began a call, or sent a whole message of a stream.
        turns: What takes long, and waits for this connection's turns.
        is_closed: It is gone.
    """

    def __init__(
        self, server: Server, sock: socket.socket, peer: str, tls: TlsStream | None, now: float
    ) -> None:
        limits = server.limits
        self.peer = peer
        self.lock = threading.RLock()
        self.backlog_bytes = 0
        self.idle_since: float | None = now
        self.used = now
        self.turns: deque[tuple[Callable[[Call], None], Call]] = deque()
        self.is_closed = False
        self._server = server
        self._socket = sock
        self._tls = tls
        self._connection = Connection(
            ConnectionLimits(streams=limits.streams, header_list_bytes=limits.metadata_bytes), Call
        )
        self.intake = Intake(self, self._connection, server)
        self._backlog: deque[memoryview] = deque()
        self._noted_unread = 0  # in the server's sum
        self._watched: set[Call] = set()
        self._opened = self._heard = self._moved = now
        self._taken: float | None = None  # when the caller last took something that had to wait
        self._pinged: float | None = None
        self._closing: float | None = None  # since when nothing follows what is in the backlog
        self._draining: float | None = None
        age = limits.connection_age_s * random.uniform(0.9, 1.1)  # noqa: S311 - spreads load only
        self._expires = now + age if age else None

    @property
    def fileno(self) -> int:
        """The socket's file descriptor."""
        return self._socket.fileno()

    @property
    def unread_bytes(self) -> int:
        """Of answers that the caller has not taken, for whatever reason."""
        return self.backlog_bytes + self._connection.waiting_bytes

    def note_use(self) -> None:
        """It begins a call, or goes on with a stream."""
        self.used = self._heard

    @property
    def rank(self) -> tuple[bool, float]:
        """Where others need the room, the lowest goes first: without a call, then unused."""
        return self.idle_since is None, self.used if self.idle_since is None else self.idle_since

    def would_lose(self, now: float) -> bool:
        """Whether closing it now would lose something: a call in work, an answer being read.

        What waits for a caller that takes nothing is not lost by the server.
        """
        in_work = any(not call.local_closed for call in list(self._connection.streams.values()))
        is_read = self._taken is not None and now - self._taken < DRAIN_PATIENCE_S
        return in_work or (self.unread_bytes > 0 and is_read)

    # Reading, on the loop's thread

    def on_ready(self, events: int, now: float, work: Work) -> None:
        """The socket has something to read, or room to write, or has failed."""
        if events & select.EPOLLOUT:
            self._on_writable(now, work)
        if events & ~select.EPOLLOUT and not self.is_closed:
            self._read(now, work)

    def _read(self, now: float, work: Work) -> None:
        if self._connection.has_more:  # before it takes any more
            return
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._heard, self._pinged = now, None
            self.take(data, now, work)
        else:
            self.lose(work)

    def take(self, data: bytes, now: float, work: Work) -> None:
        """What the caller sent, or what had come before this link was made; may be nothing."""
        with self.lock:
            if self._tls is not None:
                try:
                    data = self._tls.decrypt(data)
                except ssl.SSLError:  # also its orderly end, after which nothing may follow
                    self.lose(work)
                    return
            let_out = self._connection.let_out
            self.intake.take(self._connection.receive(data, now), now, work)
            if self._connection.let_out != let_out:
                self._taken = now
            self.flush()
        if self._connection.closed:
            self._begin_close(now)
        elif self._connection.has_more:
            self._server.call_soon(self._go_on)
        self._note_idle(now)

    def _go_on(self) -> None:
        """Continues with buffered frames after other connections have had their turn."""
        work = Work(self._server.hooks)
        if not self.is_closed:
            self.take(b"", self._heard, work)
        work.do()

    def resume(self, call: Call) -> None:
        """Delivers the messages of a stream again, from the loop's thread."""
        call.paused = False
        self._server.call_soon(self.intake.deliver, call)

    def do_in_turn(self, step: Callable[[Call], None], call: Call) -> None:
        """Does for a call what takes long, when it is this connection's turn."""
        self.turns.append((step, call))
        if len(self.turns) == 1:
            self._server.add_turn(self)

    # Answers, from any thread

    def respond(self, answers: Sequence[tuple[Call, bytes]]) -> list[bool]:
        """Answers unary calls of this connection, with one write."""
        sent = []
        with self.lock:
            respond = self._connection.respond
            for call, message in answers:
                info = call.info
                plain = info.encoding == "identity"
                body = prefixed(message) if plain else compressed(message, info.encoding)
                sent.append(respond(call, info.response_head, body, OK_TRAILERS))
            self.flush()
        self._leave_soon()
        return sent

    def send(self, call: Call, body: bytes) -> bool:
        """Sends one message, with its prefix, of a stream of answers."""
        with self.lock:
            if call.closed:
                return False
            if not call.began_answer:
                call.began_answer = True
                self._connection.send_headers(call, call.info.response_head)
            self._connection.send_data(call, body)
            self.flush()
            if call.pending_bytes or self.backlog_bytes:
                call.watched = True
                self._watched.add(call)
        return True

    def end(self, calls: Sequence[Call], trailers: bytes) -> list[bool]:
        """Ends calls of this connection with encoded trailers, with one write."""
        ended = []
        with self.lock:
            for call in calls:
                is_open = not (call.closed or call.local_closed)
                if is_open:
                    self.end_locked(call, trailers)
                ended.append(is_open)
            self.flush()
        self._leave_soon()
        return ended

    def end_locked(self, call: Call, trailers: bytes) -> None:
        """The same, with the lock held, and without sending it yet."""
        if call.began_answer:
            self._connection.send_trailers(call, trailers)
        else:
            self._connection.send_headers(call, RESPONSE_HEAD + trailers, end=True)
        self._watched.discard(call)
        self.intake.forget(call)

    def _leave_soon(self) -> None:
        """Where the connection is to go, its last answer is what was waited for."""
        if self._draining is not None and not self._connection.streams:
            self._server.call_soon(self.look_at_end)

    def expire(self, call: Call, work: Work) -> None:
        """A stream's deadline has passed."""
        with self.lock:
            if call.closed or call.local_closed:
                return
            call.cancelled = True
            self.end_locked(call, status_trailers(DEADLINE_EXCEEDED, "the deadline passed", ()))
            self.flush()
        work.add_step(cancel, call)

    # Writing

    def flush(self) -> None:
        """Sends what there is; the lock must be held."""
        self._send_output()
        self._note_unread()

    def _note_unread(self) -> None:
        """Keeps the server's sum; the lock must be held."""
        change = self.unread_bytes - self._noted_unread
        if change:
            self._noted_unread += change
            self._server.hold_unread(change)

    def _send_output(self) -> None:
        data = self._connection.take_output() if self._connection.has_output else b""
        if self._tls is not None:
            try:
                data = self._tls.encrypt(data)
            except ssl.SSLError:  # either side has ended it
                return
        if not data or self.is_closed:
            return
        sent = 0
        if not self._backlog:
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                pass
            except OSError:  # the loop will find out when it reads
                return
            if sent == len(data):
                return
            self._moved = self._heard
            self._server.watch(self.fileno, READABLE | select.EPOLLOUT)
        self._backlog.append(memoryview(data)[sent:])
        self.backlog_bytes += len(data) - sent
        if self.unread_bytes > ABANDON * self._server.limits.unread_bytes:
            self._server.call_soon(self.abandon, ErrorCode.ENHANCE_YOUR_CALM, "answers unread")

    def _on_writable(self, now: float, work: Work) -> None:
        with self.lock:
            while self._backlog:
                try:
                    sent = self._socket.send(self._backlog[0])
                except BlockingIOError:
                    return
                except OSError:
                    self.lose(work)
                    return
                self._moved = self._taken = now
                self.backlog_bytes -= sent
                if sent < len(self._backlog[0]):
                    self._backlog[0] = self._backlog[0][sent:]
                else:
                    self._backlog.popleft()
            self._server.watch(self.fileno, READABLE)
            self._note_unread()
            self.tell_sent(work)
        if self._closing is not None:
            self._shut_down(now)

    def tell_sent(self, work: Work) -> None:
        """Tells those streams of which everything has left; the lock must be held."""
        if self.backlog_bytes:
            return
        for call in [call for call in self._watched if not call.pending_bytes]:
            self._watched.discard(call)
            call.watched = False
            if not call.closed:
                work.add_step(_tell_sent, call)

    # The connection's life, on the loop's thread

    def check_timeouts(self, now: float, work: Work) -> None:
        """Checks every bound in time; called now and then."""
        self._note_idle(now)
        if self._is_late(now):
            self.lose(work)
            return
        stopping = self._draining if self._server.is_stopping else None
        with self.lock:
            self.intake.check_timeouts(now, stopping, work)
            self._look_at_answers(now, work)
            self.flush()
        if not self.is_closed:
            self._look_at_age(now)

    def _is_late(self, now: float) -> bool:
        """Whether the caller has missed a time limit at which it is given up."""
        limits = self._server.limits
        if self._closing is not None:
            return now - self._closing > FAREWELL_S
        if not self._connection.is_greeted:
            return now - self._opened > limits.handshake_s
        if self._pinged is not None:
            return now - self._pinged > limits.keepalive_timeout_s
        if now - self._heard > limits.keepalive_s:
            self._pinged = now
            self._do(self._connection.ping)
        return False

    def _look_at_answers(self, now: float, work: Work) -> None:
        """Gives up a caller, or a stream of it, that takes nothing of what is sent to it."""
        patience = self._server.limits.stall_s
        if self._server.is_stopping:
            patience = min(patience, DRAIN_PATIENCE_S)
        if self.backlog_bytes and now - self._moved > patience:
            self._server.stalled(self)
            for call in self._connection.streams.values():
                work.add_step(fail, call, DEADLINE_EXCEEDED, _unread_for(patience))
            self.lose(work)
            return
        for call in self._connection.blocked:
            if call.blocked_bytes != call.pending_bytes:
                call.blocked_bytes, call.blocked_since = call.pending_bytes, now
            elif now - call.blocked_since > patience:
                self._server.stalled(self)
                self._give_up(call, patience, now, work)

    def _give_up(self, call: Call, patience: float, now: float, work: Work) -> None:
        """Ends a call whose answer is not taken; a stream, whose end is not decided, in time."""
        if call.local_closed:
            self._connection.reset(call, ErrorCode.CANCEL)
            self.intake.take([(RESET, call, b"")], now, work)
            return
        message = _unread_for(patience)
        self._connection.drop_waiting(call)
        self.end_locked(call, status_trailers(DEADLINE_EXCEEDED, message, ()))
        work.add_step(fail, call, DEADLINE_EXCEEDED, message)

    def _look_at_age(self, now: float) -> None:
        limits = self._server.limits
        is_old = self._expires is not None and now > self._expires
        is_idle = self.idle_since is not None and now - self.idle_since > limits.idle_s
        if is_old or is_idle:
            self.drain(now)
        if self._draining is None or self._closing is not None:
            return
        if now - self._draining > FAREWELL_S:
            self._do(self._connection.refuse_new)
        if is_old and now - self._draining > limits.connection_grace_s:
            self.abandon(ErrorCode.NO_ERROR, "the connection is too old")
        self._note_idle(now)

    def look_at_end(self) -> None:
        """Closes the connection if nothing is left to do on it."""
        self._note_idle(self._heard)

    def drain(self, now: float) -> None:
        """Asks the caller to go: it may finish its calls, and opens new ones elsewhere."""
        if self._draining is None and self._closing is None:
            self._draining = now
            self._do(self._connection.drain)

    def _do(self, step: Callable[[], None]) -> None:
        with self.lock:
            step()
            self.flush()

    def _note_idle(self, now: float) -> None:
        """Notes when the last call ended; where the connection is to go, that is the end of it."""
        connection = self._connection
        if connection.streams:
            self.idle_since = None
        elif self.idle_since is None:
            self.idle_since = now
        if connection.is_finished and not connection.streams and not self.unread_bytes:
            self._begin_close(now)

    def abandon(self, code: ErrorCode, message: str) -> None:
        """Ends the connection and its calls, with GOAWAY if the caller still reads."""
        work = Work(self._server.hooks)
        with self.lock:
            self.intake.take(self._connection.close(code, message), self._heard, work)
            self.flush()
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
        with self.lock, contextlib.suppress(OSError, ssl.SSLError):
            if self._tls is not None:
                self._socket.send(self._tls.farewell())
            self._socket.shutdown(socket.SHUT_WR)

    def lose(self, work: Work) -> None:
        """The connection is gone, and with it every call."""
        with self.lock:
            if self.is_closed:
                return
            self.is_closed = True
            events = self._connection.close(ErrorCode.NO_ERROR)
            self.intake.take(events, self._heard, work)
            self._watched.clear()
            self._backlog.clear()
            self.backlog_bytes = 0
            self._note_unread()
            self._server.remove(self)
            self._socket.close()


def _unread_for(patience: float) -> str:
    return f"no answer was taken for {patience:g} s"


def _tell_sent(call: Call) -> None:
    if call.receiver is not None:
        call.receiver.sent()
