"""gRPC's use of HTTP/2, without sockets."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.http2.headers import Head
from service.http2.messages import (
    GrpcError,
    RequestInfo,
    compressed,
    decompressed,
    status_trailers,
)

CALL = [(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/a.B/C")]
GRPC = (b"content-type", b"application/grpc")


def info(*fields: Any, head: Any = CALL) -> RequestInfo:
    return RequestInfo(Head([*head, *(fields or (GRPC,))]), {"/a.B/C": object()}, 2**14)


@given(st.binary(max_size=20), st.booleans())
def test_binary_metadata_comes_with_and_without_padding(value: Any, padded: Any) -> None:
    encoded = base64.b64encode(value)
    encoded = encoded if padded else encoded.rstrip(b"=")
    assert info(GRPC, (b"x-some-bin", encoded)).metadata == (("x-some-bin", value),)


def test_several_binary_values_may_come_joined() -> None:
    assert info(GRPC, (b"x-bin", b"AA==,AQ")).metadata == (("x-bin", b"\0"), ("x-bin", b"\1"))


@pytest.mark.parametrize("value", [b"!", b"A", b"A=A"])
def test_binary_metadata_that_is_no_base64_is_refused(value: bytes) -> None:
    assert info(GRPC, (b"x-some-bin", value)).error.code == 3


TIMEOUTS = {
    b"1H": 3600,
    b"5M": 300,
    b"20S": 20,
    b"100m": 0.1,
    b"5u": 5e-6,
    b"99999999n": 0.09999999,
}


@pytest.mark.parametrize("text", TIMEOUTS)
def test_timeouts(text: bytes) -> None:
    assert info(GRPC, (b"grpc-timeout", text)).timeout_s == pytest.approx(TIMEOUTS[text])


@pytest.mark.parametrize("text", [b"", b"5", b"S", b"-5S", b"123456789S", b"5 S", b"5s"])
def test_malformed_timeouts_are_refused(text: bytes) -> None:
    assert info(GRPC, (b"grpc-timeout", text)).error.code == 3


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        (b"application/grpc", None),
        (b"application/grpc+proto", None),
        (b"application/grpc;charset=utf-8", None),
        (b"application/grpc-web+proto", 415),
        (b"text/plain", 415),
        (b"application/x-www-form-urlencoded", 415),
        (b"", 415),
    ],
)
def test_what_is_no_grpc_is_told_so_in_http(kind: bytes, status: int | None) -> None:
    assert info((b"content-type", kind)).http_status == status


def test_other_methods_than_post_are_told_so_in_http() -> None:
    assert info(GRPC, head=[(b":method", b"GET"), *CALL[1:]]).http_status == 405


def test_status_messages_are_escaped() -> None:
    assert b"caf%C3%A9 100%25%0A" in status_trailers(3, "caf\u00e9 100%\n", ())


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_messages(encoding: str) -> None:
    message = b"0123456789" * 1000
    wire = compressed(message, encoding)
    assert wire[0] == 1
    assert decompressed(wire[5:], encoding, len(message)) == message
    with pytest.raises(GrpcError, match="larger than max"):
        decompressed(wire[5:], encoding, len(message) - 1)
    with pytest.raises(GrpcError, match="damaged"):
        decompressed(wire[5:-9], encoding, len(message))
    with pytest.raises(GrpcError, match="damaged"):
        decompressed(b"nothing", encoding, len(message))


def test_compressed_message_of_a_call_that_announced_none() -> None:
    with pytest.raises(GrpcError, match="without grpc-encoding"):
        decompressed(b"x", "identity", 10)
