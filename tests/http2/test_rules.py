"""What a peer may not send: one malformed request is reset, a broken connection ends."""

from __future__ import annotations

import struct

import pytest

from service.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    FRAME_HEADER,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PRIORITY,
    PUSH_PROMISE,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ErrorCode,
    Setting,
    frame,
    settings_payload,
)
from service.http2.headers import encode_field
from service.http2.sending import END, REQUEST, RESET
from tests.http2.peer import (
    BLOCK,
    block,
    goaway_of,
    greeted,
    kinds,
    request,
    resets,
)

# What a peer may not send, after the greeting: name, frames, how the connection ends.
BROKEN = {
    "frame too large": (FRAME_HEADER.pack(1, 0, DATA, 0, 1), ErrorCode.FRAME_SIZE_ERROR),
    "data on stream 0": (frame(DATA, 0, 0, b"x"), ErrorCode.PROTOCOL_ERROR),
    "data on an idle stream": (frame(DATA, 0, 1, b"x"), ErrorCode.PROTOCOL_ERROR),
    "headers on stream 0": (request(0), ErrorCode.PROTOCOL_ERROR),
    "headers on an even stream": (request(2), ErrorCode.PROTOCOL_ERROR),
    "identifiers that go back": (request(5) + request(3), ErrorCode.PROTOCOL_ERROR),
    "padding longer than its frame": (
        request() + frame(DATA, PADDED, 1, b"\x05abc"), ErrorCode.PROTOCOL_ERROR),
    "continuation of nothing": (frame(CONTINUATION, 0, 1, b""), ErrorCode.PROTOCOL_ERROR),
    "a frame inside a header block": (
        frame(HEADERS, 0, 1, BLOCK) + frame(PING, 0, 0, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "continuation of another stream": (
        frame(HEADERS, 0, 1, BLOCK) + frame(CONTINUATION, END_HEADERS, 3, b""),
        ErrorCode.PROTOCOL_ERROR),
    "block that is no hpack": (request(fields=b"\xff" * 6), ErrorCode.COMPRESSION_ERROR),
    "index beyond the table": (request(fields=b"\xbe"), ErrorCode.COMPRESSION_ERROR),
    "settings on a stream": (frame(SETTINGS, 0, 1), ErrorCode.PROTOCOL_ERROR),
    "settings of a wrong size": (frame(SETTINGS, 0, 0, b"12345"), ErrorCode.FRAME_SIZE_ERROR),
    "settings acknowledged with a payload": (
        frame(SETTINGS, ACK, 0, bytes(6)), ErrorCode.FRAME_SIZE_ERROR),
    "enable push of 2": (
        frame(SETTINGS, 0, 0, settings_payload({Setting.ENABLE_PUSH: 2})),
        ErrorCode.PROTOCOL_ERROR),
    "initial window too large": (
        frame(SETTINGS, 0, 0, struct.pack(">HI", Setting.INITIAL_WINDOW_SIZE, 2**31)),
        ErrorCode.FLOW_CONTROL_ERROR),
    "frame size too small": (
        frame(SETTINGS, 0, 0, struct.pack(">HI", Setting.MAX_FRAME_SIZE, 100)),
        ErrorCode.PROTOCOL_ERROR),
    "push promise": (frame(PUSH_PROMISE, 0, 1, bytes(4)), ErrorCode.PROTOCOL_ERROR),
    "ping on a stream": (frame(PING, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "ping of 7 bytes": (frame(PING, 0, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR),
    "goaway on a stream": (frame(GOAWAY, 0, 1, bytes(8)), ErrorCode.PROTOCOL_ERROR),
    "goaway of 7 bytes": (frame(GOAWAY, 0, 0, bytes(7)), ErrorCode.FRAME_SIZE_ERROR),
    "priority on stream 0": (frame(PRIORITY, 0, 0, bytes(5)), ErrorCode.PROTOCOL_ERROR),
    "priority of 4 bytes": (frame(PRIORITY, 0, 1, bytes(4)), ErrorCode.FRAME_SIZE_ERROR),
    "priority on itself": (
        frame(PRIORITY, 0, 1, struct.pack(">IB", 1, 0)), ErrorCode.PROTOCOL_ERROR),
    "reset of an idle stream": (frame(RST_STREAM, 0, 1, bytes(4)), ErrorCode.PROTOCOL_ERROR),
    "reset of 3 bytes": (request() + frame(RST_STREAM, 0, 1, bytes(3)), ErrorCode.FRAME_SIZE_ERROR),
    "window update of 0": (frame(WINDOW_UPDATE, 0, 0, bytes(4)), ErrorCode.PROTOCOL_ERROR),
    "window update of 3 bytes": (frame(WINDOW_UPDATE, 0, 0, bytes(3)), ErrorCode.FRAME_SIZE_ERROR),
    "window above its maximum": (
        frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 2**31 - 1)), ErrorCode.FLOW_CONTROL_ERROR),
    "data after the end of a closed stream": (
        request(end=True) + frame(RST_STREAM, 0, 1, bytes(4)) + frame(DATA, 0, 1, b"x"),
        ErrorCode.STREAM_CLOSED),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule_of_the_connection_ends_it(name: str) -> None:
    frames, code = BROKEN[name]
    connection = greeted()
    connection.receive(frames, 0.0)
    assert connection.closed
    assert goaway_of(connection) is code
    assert connection.receive(request(7), 0.0) == []


# What makes one request malformed, and leaves the connection as it is.
MALFORMED = {
    "upper case": block((b"X-Upper", b"1")),
    "no name": block((b"", b"1")),
    "unknown pseudo-header": block((b":version", b"1")),
    "pseudo-header of an answer": block((b":status", b"200")),
    "pseudo-header twice": block((b":path", b"/twice")),
    "pseudo-header behind a header": BLOCK + encode_field(b":authority", b"late"),
    "no method": block(without=(b":method",)),
    "no scheme": block(without=(b":scheme",)),
    "no path": block(without=(b":path",)),
    "empty path": block((b":path", b""), without=(b":path",)),
    "connection": block((b"connection", b"close")),
    "transfer-encoding": block((b"transfer-encoding", b"chunked")),
    "te other than trailers": block((b"te", b"gzip"), without=(b"te",)),
    "line break": block((b"x-bad", b"a\r\nb")),
    "nul": block((b"x-bad", b"a\0b")),
    "space at the end": block((b"x-bad", b"a ")),
    "content-length of words": block((b"content-length", b"many")),
    "two content-lengths": block((b"content-length", b"1"), (b"content-length", b"2")),
    "negative content-length": block((b"content-length", b"-1")),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_request_is_reset_and_its_neighbour_is_served(name: str) -> None:
    connection = greeted()
    events = connection.receive(request(fields=MALFORMED[name]) + request(3, end=True), 0.0)
    assert not connection.closed
    assert kinds(events) == [(REQUEST, 3, b""), (END, 3, b"")]
    assert resets(connection) == {1: ErrorCode.PROTOCOL_ERROR}


@pytest.mark.parametrize("body", [b"1234", b"123456"])
def test_body_of_another_length_than_announced_is_reset(body: bytes) -> None:
    connection = greeted()
    fields = block((b"content-length", b"5"))
    events = connection.receive(request(fields=fields) + frame(DATA, END_STREAM, 1, body), 0.0)
    assert [kind for kind, *_ in events] == [REQUEST, RESET]
    assert resets(connection) == {1: ErrorCode.PROTOCOL_ERROR}
