"""TLS for connections: the handshakes on a thread of their own, then encryption without sockets."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)

READ_BYTES = 2**16
ALPN = "h2"
# OpenSSL takes memory for as much as a message claims to have, before it comes. A caller's first
# one has less than 4 KiB, all of a handshake with its certificates less than 20.
MAX_HELLO_BYTES, MAX_HANDSHAKE_BYTES = 2**14, 2**16
# The headers of a record and of the message in it.
HELLO_HEAD_BYTES = 9


class TlsStream:
    """The TLS layer of one connection, between the bytes of a socket and those of HTTP/2.

    Not thread-safe: its connection's lock guards it.

    Args:
        context: Certificate, key and rules.
    """

    def __init__(self, context: ssl.SSLContext) -> None:
        self._received, self._to_send = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._to_send, server_side=True)

    def handshake(self, data: bytes) -> bool:
        """Goes on with the handshake; True when it is done.

        Raises:
            ssl.SSLError: If it fails.
        """
        self._received.write(data)
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        if self._tls.selected_alpn_protocol() != ALPN:
            raise ssl.SSLError("the caller does not speak HTTP/2 (ALPN)")
        return True

    def take_output(self) -> bytes:
        """What is to be sent: handshake, alerts, encrypted data."""
        return self._to_send.read() if self._to_send.pending else b""

    def decrypt(self, data: bytes) -> bytes:
        """What the peer's bytes say.

        Raises:
            ssl.SSLError: If they are damaged, or the peer has closed the connection.
        """
        if data:
            self._received.write(data)
        parts = []
        try:
            while part := self._tls.read(READ_BYTES):
                parts.append(part)
        except ssl.SSLWantReadError:
            return b"".join(parts)
        except ssl.SSLZeroReturnError:
            if parts:
                return b"".join(parts)
            raise
        raise ssl.SSLZeroReturnError("the caller has closed the connection")

    def encrypt(self, data: bytes) -> bytes:
        """What is to be sent so that the peer gets ``data``."""
        if data:
            self._tls.write(data)
        return self.take_output()

    def farewell(self) -> bytes:
        """What tells the peer that nothing follows."""
        with contextlib.suppress(ssl.SSLError):  # it wants the peer's, which nobody waits for
            self._tls.unwrap()
        return self.take_output()


@dataclass
class _Pending:
    """A connection whose handshake is not done.

    Attributes:
        began: Monotonic seconds.
        hello: What came before it could be judged.
        size: Bytes that came.
        is_ending: Another one needs its place.
    """

    sock: socket.socket
    tls: TlsStream
    began: float
    hello: bytes = b""
    size: int = 0
    is_ending: bool = False

    def take(self, data: bytes) -> bool:
        """Goes on with the handshake; True when it is done.

        Raises:
            ssl.SSLError: If it fails, or would take much memory.
        """
        if len(self.hello) < HELLO_HEAD_BYTES:
            data = self.hello = self.hello + data
            if len(data) < HELLO_HEAD_BYTES:
                return False
            in_record = int.from_bytes(data[3:5], "big") >= HELLO_HEAD_BYTES
            if not in_record or int.from_bytes(data[6:9], "big") > MAX_HELLO_BYTES:
                raise ssl.SSLError("a first message that is too large, or in pieces")
            self.hello = data[:HELLO_HEAD_BYTES]
        self.size += len(data)
        if self.size > MAX_HANDSHAKE_BYTES:
            raise ssl.SSLError("a handshake that is too large")
        return self.tls.handshake(data)


class Handshakes:
    """Shakes hands on a thread of its own, so that no connection that is open waits for it.

    Args:
        context: Makes or finds the context for a new connection.
        adopt: Takes sockets whose handshake is done.
        timeout_s: For a handshake.
        limit: Handshakes at the same time; beyond it the one that began first makes room.
    """

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        adopt: Callable[[socket.socket, TlsStream], None],
        timeout_s: float,
        limit: int,
    ) -> None:
        self._context = context
        self._limit = limit
        self._adopt = adopt
        self._timeout_s = timeout_s
        self._epoll = select.epoll()
        self._pending: dict[int, _Pending] = {}
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name="tls-handshakes", daemon=True)
        self._stopped = False

    @property
    def count(self) -> int:
        """Handshakes that are not done; those beyond the limit are about to end."""
        return min(len(self._pending), self._limit)

    def start(self, sock: socket.socket) -> None:
        """Takes over a connection that was just accepted."""
        try:
            pending = _Pending(sock, TlsStream(self._context()), time.monotonic())
        except ssl.SSLError:
            logger.exception("no TLS for a new connection")
            sock.close()
            return
        with self._lock:
            if len(self._pending) >= self._limit:
                self._end_first()
            self._pending[sock.fileno()] = pending
        self._epoll.register(sock.fileno(), select.EPOLLIN)

    def _end_first(self) -> None:
        """Its thread closes it, which may be at it now; the lock must be held."""
        first = next((one for one in self._pending.values() if not one.is_ending), None)
        if first is not None:
            first.is_ending = True
            with contextlib.suppress(OSError):
                first.sock.shutdown(socket.SHUT_RDWR)

    def stop(self) -> None:
        """Ends the thread and what it is at."""
        self._stopped = True

    def _run(self) -> None:
        checked = time.monotonic()
        while not self._stopped:
            for descriptor, _ in self._epoll.poll(min(0.5, self._timeout_s / 4)):
                pending = self._pending.get(descriptor)
                if pending is not None:
                    self._go_on(pending)
            now = time.monotonic()
            if now - checked > self._timeout_s / 4:
                checked = now
                with self._lock:
                    late = [p for p in self._pending.values() if now - p.began > self._timeout_s]
                for pending in late:
                    self._drop(pending)
        for pending in list(self._pending.values()):
            self._drop(pending)
        self._epoll.close()

    def _go_on(self, pending: _Pending) -> None:
        try:
            data = pending.sock.recv(READ_BYTES)
            done = bool(data) and pending.take(data)
        except BlockingIOError:
            return
        except (OSError, ssl.SSLError):
            data, done = b"", False
        try:
            output = pending.tls.take_output()
            if output:
                # A few kilobytes into an empty socket: what does not fit is a caller that is gone.
                pending.sock.send(output)
        except OSError:
            data = b""
        if not data:
            self._drop(pending)
        elif done:
            self._forget(pending)
            self._adopt(pending.sock, pending.tls)

    def _forget(self, pending: _Pending) -> None:
        descriptor = pending.sock.fileno()
        with self._lock:
            self._pending.pop(descriptor, None)
        self._epoll.unregister(descriptor)

    def _drop(self, pending: _Pending) -> None:
        self._forget(pending)
        pending.sock.close()
