"""The peer of a connection without sockets: what it sends, and what it is sent."""

from __future__ import annotations

import struct
from typing import Any

from service.http2.connection import (
    Connection,
    ConnectionLimits,
)
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

HELLO = PREFACE + frame(SETTINGS, 0, 0)
REQUEST_FIELDS = [
    (b":method", b"POST"),
    (b":scheme", b"http"),
    (b":path", b"/a.B/C"),
    (b":authority", b"here"),
    (b"te", b"trailers"),
    (b"content-type", b"application/grpc"),
]


def block(*fields: Any, without: Any = ()) -> bytes:
    """An encoded header block of a request that no table remembers."""
    kept = [field for field in REQUEST_FIELDS if field[0] not in without]
    pseudo = [f for f in (*kept, *fields) if f[0].startswith(b":")]
    others = [f for f in (*kept, *fields) if not f[0].startswith(b":")]
    return b"".join(encode_field(*field) for field in [*pseudo, *others])


BLOCK = block()


def request(stream_id: int = 1, *, end: bool = False, fields: Any = BLOCK) -> Any:
    return frame(HEADERS, END_HEADERS | (END_STREAM if end else 0), stream_id, fields)


def greeted(**limits: Any) -> Connection:
    connection = Connection(ConnectionLimits(**limits))
    assert connection.receive(HELLO, 0.0) == []
    connection.take_output()
    return connection


def sent(connection: Any) -> Any:
    """The frames that the connection sends: kind, flags, stream, payload."""
    data, position, frames = connection.take_output(), 0, []
    while position < len(data):
        high, low, kind, flags, stream = FRAME_HEADER.unpack_from(data, position)
        end = position + 9 + (high << 16 | low)
        frames.append((kind, flags, stream, data[position + 9 : end]))
        position = end
    return frames


def kinds(events: Any) -> list[tuple[Any, Any, Any]]:
    return [(kind, stream.id, data) for kind, stream, data in events]


def goaway_of(connection: Any) -> ErrorCode:
    (payload,) = [f[3] for f in sent(connection) if f[0] == GOAWAY]
    return ErrorCode(struct.unpack_from(">II", payload)[1])


def resets(connection: Any) -> dict[Any, ErrorCode]:
    return {
        f[2]: ErrorCode(int.from_bytes(f[3], "big")) for f in sent(connection) if f[0] == RST_STREAM
    }
