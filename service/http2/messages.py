"""gRPC's use of HTTP/2: metadata, timeouts, statuses, compressed messages.

Source: github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md and doc/compression.md.
"""

from __future__ import annotations

import base64
import binascii
import functools
import re
import zlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

from service.http2.headers import Head, encode_field

Metadata = Sequence[tuple[str, str | bytes]]

# gRPC status codes that the front itself answers with.
OK, CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED = 0, 1, 3, 4
RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 8, 12, 13, 14

PREFIX_BYTES = 5
# Headers of a call; through two proxies it has some forty. Each takes memory and time of its own.
MAX_FIELDS = 128
FIELD_BYTES = 256
# Memory of a call beside its headers and message.
CALL_BYTES = 2048
CONTENT_TYPE = b"application/grpc"
ENCODINGS = ("identity", "gzip", "deflate")
# An answer of fewer bytes gains nothing from compression.
MIN_COMPRESSED_BYTES = 1024
# Fast: the network is faster than a thorough compressor.
COMPRESSION_LEVEL = 1
WINDOW_BITS = {"gzip": 31, "deflate": 15}
# What of a status message is sent at most: a peer may refuse long header lists.
MAX_STATUS_MESSAGE = 2048
# Entry 8 and 31 of HPACK's static table: ":status" of 200, "content-type".
STATUS_200 = b"\x88"
RESPONSE_HEAD = STATUS_200 + b"\x0f\x10" + bytes((len(CONTENT_TYPE),)) + CONTENT_TYPE
OK_TRAILERS = encode_field(b"grpc-status", b"0")
# Trailers of RESOURCE_EXHAUSTED, by which callers tell what is too large for ever from what may fit
# a second later. Source: gRFC A6, server pushback.
NEVER_RETRY: Metadata = (("grpc-retry-pushback-ms", "-1"),)
RETRY_LATER: Metadata = (("grpc-retry-pushback-ms", "1000"),)
# Headers that are HTTP/2's and gRPC's own, no metadata of the caller's.
OWN_HEADERS = frozenset(
    (b"te", b"content-type", b"content-length", b"grpc-timeout", b"grpc-encoding")
) | {b"grpc-accept-encoding", b"grpc-message-type"}
TIMEOUT = re.compile(rb"([0-9]{1,8})([HMSmun])")
UNITS = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}
# Printable ASCII but "%". Source: "Percent-Encoded" in PROTOCOL-HTTP2.md.
UNESCAPED = "".join(map(chr, range(0x20, 0x7F))).replace("%", "")


class GrpcError(Exception):
    """A call that ends here with a status other than OK.

    Attributes:
        code: gRPC status code.
        message: For people.
        trailers: Trailing metadata.
    """

    def __init__(self, code: int, message: str, trailers: Metadata = ()) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.trailers = trailers


class RequestInfo:
    """What gRPC reads in a request's headers. Shared by every request with the same headers.

    Attributes:
        path: Of the method.
        metadata: The caller's.
        timeout_s: From now on, or None.
        encoding: What compressed messages are compressed with.
        http_status: The HTTP status to refuse it with, for it is no gRPC; None where it is.
        error: How else to end it, or None.
        response_head: Encoded headers of its answer.
        route: What answers its path; None for an unknown one.
        memory_bytes: What a call with these headers takes before its message has come.
    """

    __slots__ = (
        "encoding", "error", "http_status", "memory_bytes", "metadata", "path", "response_head",
        "route", "timeout_s",
    )  # fmt: skip

    def __init__(self, head: Head, routes: dict[str, Any], max_list_bytes: int) -> None:
        self.path = head.path.decode("latin-1")
        self.route: Any = routes.get(self.path)
        self.metadata: Metadata = ()
        self.timeout_s: float | None = None
        self.encoding = "identity"
        self.response_head = RESPONSE_HEAD
        self.error: GrpcError | None = None
        self.http_status = _http_status(head)
        if self.http_status is None:
            try:
                self._read(head, max_list_bytes)
            except GrpcError as error:
                self.error = error
        head.fields = []  # a call that never comes whole keeps its headers once, not twice
        self.memory_bytes = CALL_BYTES + 2 * head.size + FIELD_BYTES * len(self.metadata)

    def _read(self, head: Head, max_list_bytes: int) -> None:
        if head.size > max_list_bytes:
            message = f"metadata: expected at most {max_list_bytes} bytes, got {head.size}"
            raise GrpcError(RESOURCE_EXHAUSTED, message, NEVER_RETRY)
        if len(head.fields) > MAX_FIELDS:
            message = f"metadata: expected at most {MAX_FIELDS} headers, got {len(head.fields)}"
            raise GrpcError(RESOURCE_EXHAUSTED, message, NEVER_RETRY)
        fields = dict(head.fields)
        if b"grpc-timeout" in fields:
            self.timeout_s = _timeout_s(fields[b"grpc-timeout"])
        self.metadata = tuple(
            (name.decode("ascii"), value)
            for name, raw in head.fields
            if name not in OWN_HEADERS
            for value in _values(name, raw)
        )
        if self.route is None:
            raise GrpcError(UNIMPLEMENTED, "this server has no such method")
        self.encoding = fields.get(b"grpc-encoding", b"identity").decode("latin-1")
        if self.encoding not in ENCODINGS:
            raise GrpcError(
                UNIMPLEMENTED,
                f"grpc-encoding: expected one of {', '.join(ENCODINGS)}, got another",
                (("grpc-accept-encoding", ",".join(ENCODINGS)),),
            )
        if self.encoding != "identity":
            encoding = encode_field(b"grpc-encoding", self.encoding.encode())
            self.response_head = RESPONSE_HEAD + encoding


def _http_status(head: Head) -> int | None:
    """How to refuse what is no gRPC call; None for a call."""
    if head.method != b"POST":
        return 405
    content_type = dict(head.fields).get(b"content-type", b"")
    kind, rest = content_type[: len(CONTENT_TYPE)], content_type[len(CONTENT_TYPE) :]
    return None if kind == CONTENT_TYPE and rest[:1] in (b"", b"+", b";") else 415


def http_refusal(status: int) -> tuple[bytes, bytes]:
    """Encoded headers and body of an answer to what is no gRPC."""
    fields = b"\x08\x03" + str(status).encode()  # ":status" is entry 8 of HPACK's static table
    fields += encode_field(b"content-type", b"text/plain")
    if status == 405:
        return fields + encode_field(
            b"allow", b"POST"
        ), b"method: expected POST: this port is for gRPC\n"
    return fields, b"content-type: expected application/grpc: this port is for gRPC\n"


def _timeout_s(text: bytes) -> float:
    found = TIMEOUT.fullmatch(text)
    if found is None:
        raise GrpcError(INVALID_ARGUMENT, "grpc-timeout: expected 1 to 8 digits and a unit")
    return int(found[1]) * UNITS[found[2]]


def _values(name: bytes, raw: bytes) -> list[str | bytes]:
    """The values of a metadata field; several binary ones may come joined by commas."""
    if not name.endswith(b"-bin"):
        return [raw.decode("latin-1")]
    try:
        return [_decoded(part.strip(b" ").rstrip(b"=")) for part in raw.split(b",")]
    except (binascii.Error, ValueError):
        raise GrpcError(INVALID_ARGUMENT, "metadata: a -bin value that is no base64") from None


def _decoded(unpadded: bytes) -> bytes:
    """Base64 whose padding may have been left out."""
    return base64.b64decode(unpadded + b"=" * (-len(unpadded) % 4), validate=True)


@functools.lru_cache(maxsize=1024)  # in an overload, refusing may not cost what answering does
def status_trailers(code: int, message: str, trailers: Metadata) -> bytes:
    """Encoded trailers.

    Args:
        code: gRPC status code.
        message: For people.
        trailers: Trailing metadata, as a tuple.
    """
    if code == OK and not message and not trailers:
        return OK_TRAILERS
    fields = [encode_field(b"grpc-status", str(code).encode())]
    if message:
        shown = quote(message[:MAX_STATUS_MESSAGE], safe=UNESCAPED).encode("ascii")
        fields.append(encode_field(b"grpc-message", shown))
    for name, value in trailers:
        raw = base64.b64encode(value).rstrip(b"=") if isinstance(value, bytes) else value.encode()
        fields.append(encode_field(name.encode(), raw))
    return b"".join(fields)


def prefixed(message: bytes) -> bytes:
    """A message with gRPC's prefix: not compressed, length."""
    return b"\0" + len(message).to_bytes(4, "big") + message


def compressed(message: bytes, encoding: str) -> bytes:
    """A message with its prefix, compressed where that may gain something."""
    if encoding == "identity" or len(message) < MIN_COMPRESSED_BYTES:
        return prefixed(message)
    compressor = zlib.compressobj(COMPRESSION_LEVEL, wbits=WINDOW_BITS[encoding])
    body = compressor.compress(message) + compressor.flush()
    return b"\1" + len(body).to_bytes(4, "big") + body


def decompressed(body: bytes, encoding: str, limit: int) -> bytes:
    """A compressed message; expands no further than its limit.

    Raises:
        GrpcError: If it is damaged, too large, or should not be compressed.
    """
    if encoding == "identity":
        raise GrpcError(INTERNAL, "a compressed message without grpc-encoding")
    inflater = zlib.decompressobj(wbits=WINDOW_BITS[encoding])
    try:
        message = inflater.decompress(body, limit + 1)
    except zlib.error:
        message, damaged = b"", True
    else:
        damaged = not inflater.eof and len(message) <= limit
    if damaged:
        raise GrpcError(INVALID_ARGUMENT, f"request: expected {encoding} data, got damaged data")
    if len(message) > limit:
        raise GrpcError(RESOURCE_EXHAUSTED, too_large(f"more than {limit}", limit), NEVER_RETRY)
    return message


def too_large(received: object, limit: int) -> str:
    """What grpcio says of a message over its limit."""
    return f"SERVER: Received message larger than max ({received} vs. {limit})"
