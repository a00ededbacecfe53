"""The loop: accepts connections, reads whatever is ready, and hands calls over in bursts.

One thread reads every connection. Calls that one turn of the loop has found go to their methods
together; answers are sent by whichever thread has them.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import logging
import operator
import os
import select
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from service.http2.call import Call
from service.http2.frames import ErrorCode
from service.http2.limits import Limits
from service.http2.link import READABLE, Link
from service.http2.listen import UNIX, listen, peer_of
from service.http2.tls import Handshakes, TlsStream
from service.http2.work import Work

logger = logging.getLogger(__name__)
rank = operator.attrgetter("rank")

# Connections accepted in one turn of the loop.
ACCEPT_AT_ONCE = 64
# Where no file descriptor is left, accepting is tried again after this.
ACCEPT_PAUSE_S = 0.1
# A connection whose calls have not moved for so long makes room for a new one: with health watches,
# or with calls that they never send whole, callers without a token could hold all there are.
UNUSED_S = 1.0
# Connections that one turn of the loop reads. Calls on others wait in their sockets for the next
# turn, a few milliseconds later: all that is read at once while the queue is full is refused.
READY_AT_ONCE = 8
# For what takes long, in one turn of the loop: 4 MB take some 10 ms to decompress.
TURN_S = 0.005
# While calls are refused for overload, the loop works for a third of the time at most.
REST_PER_WORK = 2.0
# How often every connection's bounds in time are checked; more often where one is shorter.
LOOK_S = 1.0
# Deadlines of streams that are kept before those of streams that have ended are looked for.
MIN_TIDY = 1024


class Server:
    """gRPC on one address. Binds when it is made; accepts after ``start``.

    Args:
        host: Address to listen on: a name, an IPv4 or IPv6 address (``::`` takes both kinds), or
            ``unix:`` and a path.
        port: Port; 0 picks a free one.
        routes: What answers each method, by its path. A route has ``is_unary``,
            ``max_message_bytes``, and either ``receive``, which takes bursts of calls, or ``open``,
            which takes a call and returns the receiver of its messages, and ``window_bytes``.
        hooks: ``admit(call)`` decides by metadata whether a call may be read; ``refused(calls,
            code, message)`` is notified of calls that ended before their route saw them;
            ``overload_s()`` tells how many seconds of work wait while calls are refused, else 0.
        limits: What callers may use.
        tls: Returns the context for the next connection; None for plaintext.

    Attributes:
        port: The port really bound; 0 for a Unix socket.

    Raises:
        OSError: If the address can not be had.
    """

    def __init__(
        self,
        host: str,
        port: int,
        routes: Mapping[str, Any],
        *,
        hooks: Any = None,
        limits: Limits | None = None,
        tls: Callable[[], ssl.SSLContext] | None = None,
    ) -> None:
        self.routes = dict(routes)
        self.hooks = hooks
        self.limits = limits or Limits()
        self.is_stopping = False
        self._path = host.removeprefix(UNIX) if host.startswith(UNIX) else ""
        self._listeners = {sock.fileno(): sock for sock in listen(host, port)}
        first = next(iter(self._listeners.values()))
        self.port: int = 0 if self._path else first.getsockname()[1]
        self._epoll = select.epoll()
        self._links: dict[int, Link] = {}
        self._gone = threading.Condition()
        self._soon: deque[tuple[Callable[..., None], tuple[Any, ...]]] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._turns: deque[Link] = deque()
        self._deadlines: list[tuple[float, int, Call]] = []
        self._numbers = itertools.count()
        self._tidy_at = MIN_TIDY
        self._budget = threading.Lock()
        self._held = self._unread = 0
        self._stopped = False
        self._stalled = 0
        self._resume_accepting: float | None = None
        shortest = min(
            self.limits.handshake_s,
            self.limits.request_s,
            self.limits.stall_s,
            self.limits.idle_s,
            self.limits.keepalive_s,
            self.limits.keepalive_timeout_s,
            self.limits.connection_age_s or LOOK_S * 4,
        )
        self._look_s = min(LOOK_S, shortest / 4)
        self._handshakes = None
        if tls:
            at_once = max(1, self.limits.connections // 2)
            self._handshakes = Handshakes(
                tls, self._adopt_encrypted, self.limits.handshake_s, at_once
            )
        self._thread = self._new_thread()

    @property
    def threads(self) -> list[threading.Thread]:
        """The threads that must live while it serves."""
        return [self._thread, *([self._handshakes.thread] if self._handshakes else [])]

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._links)

    @property
    def held_bytes(self) -> int:
        """Of requests that have not come whole, or that a stream has not taken."""
        return self._held

    def start(self) -> None:
        """Accepts connections."""
        self._epoll.register(self._wake, select.EPOLLIN)
        for descriptor in self._listeners:
            self._epoll.register(descriptor, select.EPOLLIN)
        if self._handshakes is not None:
            self._handshakes.thread.start()
        self._thread.start()

    def relieve(self) -> None:
        """Starts another reading thread: the current one may be stuck inside a handler."""
        self._thread = self._new_thread()
        self._thread.start()

    def drain(self, grace_s: float) -> bool:
        """Takes no connection and, after a moment, no call; waits for those that are open.

        A caller that takes nothing of its answers for some seconds is not waited for.

        Returns:
            True if within the grace every call was answered, and every answer taken.
        """
        self.call_soon(self._begin_drain)
        give_up = time.monotonic() + grace_s
        with self._gone:
            self._gone.wait_for(
                lambda: self.is_stopping and not self._links, max(0.0, give_up - time.monotonic())
            )
        now = time.monotonic()
        cut = [link for link in list(self._links.values()) if link.would_lose(now)]
        if self._stalled:
            logger.warning("%d callers did not read their answers", self._stalled)
        return not cut

    def close(self) -> None:
        """Closes everything, at once."""
        self._stopped = True
        self._notify()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)
        if self._handshakes is not None:
            self._handshakes.stop()
        self._close_listeners()
        work = Work(self.hooks)
        for link in list(self._links.values()):
            link.lose(work)
        work.do()

    # For connections

    def watch(self, descriptor: int, events: int) -> None:
        """Waits for these events on a connection's socket. From any thread."""
        with contextlib.suppress(OSError, ValueError):  # it was closed meanwhile
            self._epoll.modify(descriptor, events)

    def call_soon(self, step: Callable[..., None], *args: Any) -> None:
        """Does something on the loop's thread. From any thread."""
        self._soon.append((step, args))
        self._notify()

    def add_turn(self, link: Link) -> None:
        """Lets a connection do what takes long when it is its turn. On the loop's thread."""
        self._turns.append(link)

    def add_deadline(self, call: Call) -> None:
        """Ends a stream when its deadline has passed. On the loop's thread."""
        heapq.heappush(self._deadlines, (call.deadline or 0.0, next(self._numbers), call))
        if len(self._deadlines) > self._tidy_at:  # calls may end long before their deadlines
            self._deadlines = [entry for entry in self._deadlines if not entry[2].closed]
            heapq.heapify(self._deadlines)
            self._tidy_at = max(MIN_TIDY, 2 * len(self._deadlines))

    def hold(self, size: int) -> None:
        """Counts bytes of requests that are not whole; a negative number gives some back."""
        with self._budget:
            self._held += size
            over = size > 0 and self._held > self.limits.held_bytes
        if over:
            self.call_soon(self._relieve_memory)

    def hold_unread(self, size: int) -> None:
        """Counts bytes of answers that are not taken; a negative number gives some back."""
        with self._budget:
            self._unread += size
            over = size > 0 and self._unread > self.limits.all_unread_bytes
        if over:
            self.call_soon(self._relieve_answers)

    def stalled(self, link: Link) -> None:
        """A connection is given up because its caller does not read."""
        self._stalled += 1
        logger.info("%s does not read its answers: disconnected", link.peer)

    def remove(self, link: Link) -> None:
        """A connection is gone; its socket is still open."""
        with contextlib.suppress(OSError, ValueError):
            self._epoll.unregister(link.fileno)
        self._links.pop(link.fileno, None)
        if self.is_stopping and not self._links:
            with self._gone:
                self._gone.notify_all()

    # The loop

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="http2", daemon=True)

    def _run(self) -> None:
        next_look = time.monotonic() + self._look_s
        while not self._stopped and threading.current_thread() is self._thread:
            timeout = self._timeout_s(next_look)
            ready = self._epoll.poll(timeout, READY_AT_ONCE)
            now = time.monotonic()
            work, woken = Work(self.hooks), False
            for descriptor, events in ready:
                link = self._links.get(descriptor)
                if link is not None:
                    self._read(link, events, now, work)
                elif descriptor == self._wake:
                    woken = True
                elif descriptor in self._listeners:
                    self._accept(self._listeners[descriptor], now)
            while self._deadlines and self._deadlines[0][0] <= now:
                call = heapq.heappop(self._deadlines)[2]
                call.link.expire(call, work)
            if now >= next_look:
                next_look = now + self._look_s
                self._look(now, work)
            work.do()
            if woken or self._soon:  # after it: a call is opened before it goes on
                self._do_soon()
            self._take_turns()
            self._rest(now)

    def _take_turns(self) -> None:
        """Does what takes long, one step of each connection after the other."""
        until = time.monotonic() + TURN_S
        while self._turns:
            link = self._turns.popleft()
            step, call = link.turns.popleft()
            if link.turns:
                self._turns.append(link)
            work = Work(self.hooks)
            work.add_step(step, call)
            work.do()
            if time.monotonic() > until:
                break
        if self._turns:
            self._notify()

    def _rest(self, began: float) -> None:
        """Leaves callers waiting in an overload: most of what they send would be refused."""
        overload_s = self.hooks.overload_s() if self.hooks is not None else 0.0
        if overload_s:
            spent_s = time.monotonic() - began
            time.sleep(min(REST_PER_WORK * spent_s, overload_s / 2))

    def _timeout_s(self, next_look: float) -> float:
        """How long the loop may sleep; epoll's -1 is for ever."""
        if not self._links and not self.is_stopping and self._resume_accepting is None:
            return -1.0
        until = min(next_look, self._deadlines[0][0]) if self._deadlines else next_look
        return max(0.0, until - time.monotonic())

    def _read(self, link: Link, events: int, now: float, work: Work) -> None:
        try:
            link.on_ready(events, now, work)
        except Exception:
            logger.exception("reading a connection failed; this is a bug")
            link.lose(work)

    def _notify(self) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_write(self._wake, 1)

    def _do_soon(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        for _ in range(len(self._soon)):
            step, args = self._soon.popleft()
            try:
                step(*args)
            except Exception:
                logger.exception("a step of the loop failed; this is a bug")
        if self._soon:
            self._notify()

    def _look(self, now: float, work: Work) -> None:
        """Checks the bounds in time of every connection, and those of all together."""
        if self._resume_accepting is not None and now >= self._resume_accepting:
            self._resume_accepting = None
            for descriptor in self._listeners:
                self._epoll.register(descriptor, select.EPOLLIN)
        for link in list(self._links.values()):
            try:
                link.check_timeouts(now, work)
            except Exception:
                logger.exception("checking a connection failed; this is a bug")
                link.lose(work)

    def _relieve_answers(self) -> None:
        """Disconnects those who read the least, until the rest is within the bound."""
        work = Work(self.hooks)
        while self._unread > self.limits.all_unread_bytes and self._links:
            largest = max(self._links.values(), key=lambda link: link.unread_bytes)
            if not largest.unread_bytes:
                break
            largest.abandon(ErrorCode.ENHANCE_YOUR_CALM, "answers unread")
            if largest.unread_bytes:  # in its socket's way
                largest.lose(work)
        work.do()

    def _relieve_memory(self) -> None:
        work = Work(self.hooks)
        while self._held > self.limits.held_bytes and self._links:
            largest = max(self._links.values(), key=lambda link: link.intake.held_bytes)
            if not largest.intake.held_bytes:
                break
            with largest.lock:
                dropped = largest.intake.drop_largest(work)
                largest.flush()
            if not dropped:
                largest.abandon(ErrorCode.ENHANCE_YOUR_CALM, "too many unfinished requests")
        work.do()

    def _accept(self, listener: socket.socket, now: float) -> None:
        going = self._going(now)
        for _ in range(ACCEPT_AT_ONCE):
            try:
                sock, address = listener.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._make_room(going)
                    self._pause_accepting(now)
                return
            sock.setblocking(False)
            waiting = self._handshakes.count if self._handshakes else 0
            is_full = len(self._links) + waiting >= self.limits.connections
            if is_full and not self._make_room(going):
                sock.close()
                continue
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._handshakes is not None:
                self._handshakes.start(sock)
            else:
                self._adopt(sock, None, peer_of(sock, address), now)

    def _pause_accepting(self, now: float) -> None:
        """Descriptors are out: a listener that stays ready would keep the loop spinning."""
        if self._resume_accepting is None:
            self._resume_accepting = now + ACCEPT_PAUSE_S
            for descriptor in self._listeners:
                self._epoll.unregister(descriptor)

    def _going(self, now: float) -> Iterator[Link]:
        """Connections that make room for new ones; looked for once, when the first is needed."""
        for link in heapq.nsmallest(ACCEPT_AT_ONCE, self._links.values(), key=rank):
            if link.idle_since is not None or now - link.used > UNUSED_S:
                yield link

    def _make_room(self, going: Iterator[Link]) -> bool:
        """Closes the connection that is missed the least; False if all are in use."""
        link = next(going, None)
        if link is None:
            return False
        link.abandon(ErrorCode.NO_ERROR, "others need the connection")
        work = Work(self.hooks)
        link.lose(work)
        work.do()
        return True

    def _adopt_encrypted(self, sock: socket.socket, tls: TlsStream) -> None:
        """A handshake is done. On the thread that does them."""
        self.call_soon(self._adopt_greeted, sock, tls)

    def _adopt_greeted(self, sock: socket.socket, tls: TlsStream) -> None:
        now = time.monotonic()
        try:
            peer = peer_of(sock, sock.getpeername())
        except OSError:  # the caller has left
            sock.close()
            return
        self._adopt(sock, tls, peer, now)

    def _adopt(self, sock: socket.socket, tls: TlsStream | None, peer: str, now: float) -> None:
        link = Link(self, sock, peer, tls, now)
        self._links[sock.fileno()] = link
        self._epoll.register(sock.fileno(), READABLE)
        work = Work(self.hooks)
        link.take(b"", now, work)  # what came behind a handshake; sends the first frames
        work.do()
        if self.is_stopping:
            link.drain(now)

    def _begin_drain(self) -> None:
        self.is_stopping = True
        self._close_listeners()
        now = time.monotonic()
        for link in list(self._links.values()):
            link.drain(now)
        if not self._links:
            with self._gone:
                self._gone.notify_all()

    def _close_listeners(self) -> None:
        for descriptor, listener in list(self._listeners.items()):
            with contextlib.suppress(OSError, ValueError):
                self._epoll.unregister(descriptor)
            del self._listeners[descriptor]
            listener.close()
        if self._path:
            with contextlib.suppress(OSError):
                Path(self._path).unlink()
