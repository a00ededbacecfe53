"""A caller that may misbehave: frames on a socket, nothing done for it."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
import zlib
from collections.abc import Iterator
from typing import Any, Self

import grpc

from service.http2.frames import (
    END_HEADERS,
    END_STREAM,
    FRAME_HEADER,
    GOAWAY,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    ErrorCode,
    frame,
)
from service.http2.headers import encode_field
from service.http2.messages import prefixed
from service.http2.server import Server
from tests.http2.echo import ROUTES, Unary

PATIENCE_S = 20.0
KNOWN = b"hello"
UNARY, STREAM = "/test.Echo/Unary", "/test.Echo/Stream"


@contextlib.contextmanager
def running(routes: Any, **settings: Any) -> Iterator[Server]:
    """A server on a free port."""
    server = Server(settings.pop("host", "127.0.0.1"), 0, routes, **settings)
    server.start()
    try:
        yield server
    finally:
        server.close()


def connected(server: Any, **options: Any) -> grpc.Channel:
    return grpc.insecure_channel(f"127.0.0.1:{server.port}", **options)


def headers(
    path: Any = UNARY, *fields: Any, method: bytes = b"POST", kind: bytes = b"application/grpc"
) -> bytes:
    """An encoded header block of a call."""
    own = [
        (b":method", method), (b":scheme", b"http"), (b":path", path.encode()),
        (b"te", b"trailers"), (b"content-type", kind),
    ]  # fmt: skip
    return b"".join(encode_field(*field) for field in (*own, *fields))


def opening(stream_id: int = 1, path: Any = UNARY, *fields: Any) -> Any:
    """HEADERS of a call."""
    return frame(HEADERS, END_HEADERS, stream_id, headers(path, *fields))


def data(stream_id: Any, body: Any, *, end: bool = True) -> Any:
    """DATA of a call, in one frame."""
    return frame(0, END_STREAM if end else 0, stream_id, body)


def call(stream_id: int = 1, message: bytes = b"hello", path: Any = UNARY) -> Any:
    """A whole unary call."""
    return opening(stream_id, path) + data(stream_id, prefixed(message))


class Caller:
    """One connection. Reads frames as they come; knows nothing of streams or windows."""

    def __init__(self, server: Any, *, greet: bool = True, receive_buffer: Any = None) -> None:
        self.socket = socket.socket(socket.AF_INET)
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", server.port))
        self.socket.settimeout(PATIENCE_S)
        self._buffer = b""
        if greet:
            self.send(PREFACE + frame(SETTINGS, 0, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, frames: Any) -> None:
        """Sends bytes; a server that has closed is no error here."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(frames)

    def frames(self) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Frames as they come, until the server closes."""
        while True:
            while len(self._buffer) >= 9:
                high, low, kind, flags, stream = FRAME_HEADER.unpack_from(self._buffer)
                end = 9 + (high << 16 | low)
                if len(self._buffer) < end:
                    break
                payload, self._buffer = self._buffer[9:end], self._buffer[end:]
                yield kind, flags, stream, payload
            try:
                received = self.socket.recv(2**16)
            except ConnectionResetError:
                return
            if not received:
                return
            self._buffer += received

    def until(self, condition: Any) -> Any:
        """The first frame of which the condition holds; None if the server closes before."""
        return next((found for found in self.frames() if condition(*found)), None)

    def status(self, stream_id: int = 1) -> Any:
        """How a call ends: its trailers as they were encoded, or the code of a reset."""
        ended = self.until(
            lambda kind, flags, stream, _: (
                stream == stream_id and (kind == RST_STREAM or flags & END_STREAM)
            )
        )
        return ended and (f"reset {code(ended[3]).name}" if ended[0] == RST_STREAM else ended[3])

    def goaway(self) -> Any:
        """Why the server closes the connection."""
        found = self.until(lambda kind, *_: kind == GOAWAY)
        return found and ErrorCode(struct.unpack_from(">II", found[3])[1])

    def is_closed(self) -> bool:
        """Waits until the server closes."""
        return self.until(lambda *_: False) is None


def code(payload: Any) -> ErrorCode:
    """The error code of an RST_STREAM frame."""
    return ErrorCode(int.from_bytes(payload[:4], "big"))


def eventually(condition: Any) -> Any:
    """Polls until the condition holds; its value."""
    give_up = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < give_up, "the condition did not become true in time"
        time.sleep(0.005)
    return value


def answers(server: Any) -> Any:
    """Whether another caller is served."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        return channel.unary_unary(UNARY)(KNOWN, timeout=30) == KNOWN


def compressed(message: Any) -> bytes:
    """A compressed message with its prefix."""
    packer = zlib.compressobj(9, wbits=31)
    body = packer.compress(message) + packer.flush()
    return b"\1" + struct.pack(">I", len(body)) + body


def in_frames(stream_id: Any, body: Any, *, whole: bool = True) -> bytes:
    """DATA frames that end a call, or that do all but that."""
    pieces = [body[i : i + 16_000] for i in range(0, len(body), 16_000)]
    return b"".join(data(stream_id, p, end=whole and p is pieces[-1]) for p in pieces)


class Held:
    """A route whose calls are answered when the test says so."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.routes = {**ROUTES, "/test.Echo/Held": Unary(self.calls.extend)}

    def wait(self, count: int = 1) -> Any:
        eventually(lambda: len(self.calls) >= count)
        return self.calls
