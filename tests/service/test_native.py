"""The native transport outlives what goes wrong behind it."""

from __future__ import annotations

import grpc
import pytest

from service.config import ServerConfig
from service.metrics import Metrics
from service.transports import CLASSIFY, limits_of
from service.transports.native import NativeCall, NativeTransport, Route


@pytest.fixture
def transport(tmp_path):
    """A transport whose receiver fails on the first call, and answers the next ones."""
    failures = [RuntimeError("a bug")]

    def receive(calls):
        if failures:
            raise failures.pop()
        for call in calls:
            call.respond(b"answered")

    native = NativeTransport(
        "127.0.0.1", 0, fallback=str(tmp_path / "nobody"),
        routes=[Route(CLASSIFY, NativeCall, Metrics().started, receive)],
        refuse=lambda call, status: call.fail(status), limits=limits_of(ServerConfig()),
    )  # fmt: skip
    native.start()
    yield native
    native.close()


def test_error_in_the_receiver_fails_its_calls_and_no_later_ones(transport, caplog):
    with grpc.insecure_channel(f"127.0.0.1:{transport.port}") as channel:
        call = channel.unary_unary(CLASSIFY)
        with pytest.raises(grpc.RpcError) as error:
            call(b"first", timeout=20)
        assert error.value.code() == grpc.StatusCode.INTERNAL
        assert "a bug" not in error.value.details()
        assert call(b"second", timeout=20) == b"answered"
    assert "handing calls over failed" in caplog.text
    assert not transport.calls
