"""The native transport outlives what goes wrong behind it."""

from __future__ import annotations

import threading

import grpc
import pytest

from service.config import ServerConfig
from service.metrics import Metrics
from service.transports import CLASSIFY, limits_of
from service.transports.native import NativeCall, NativeTransport, Route


def native_on(folder, receivers):
    """A transport that is not started yet, from the path of each method to what takes its calls."""
    count = Metrics().started
    return NativeTransport(
        "127.0.0.1", 0, fallback=str(folder / "nobody"),
        routes=[Route(path, NativeCall, count, list, take) for path, take in receivers.items()],
        refuse=lambda call, status: call.fail(status), limits=limits_of(ServerConfig()),
    )  # fmt: skip


@pytest.fixture
def transport(tmp_path):
    """A transport whose receiver fails on the first call, and answers the next ones."""
    failures = [RuntimeError("a bug")]

    def receive(calls):
        if failures:
            raise failures.pop()
        for call in calls:
            call.respond(b"answered")

    native = native_on(tmp_path, {CLASSIFY: receive})
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


def test_each_method_s_calls_reach_their_own_receiver(tmp_path):
    def answering(text):
        def receive(calls):
            for call in calls:
                call.respond(text)

        return receive

    names = ("First", "Second", "Third")
    native = native_on(tmp_path, {f"/a.Service/{name}": answering(name.encode()) for name in names})
    native.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{native.port}") as channel:
            futures = [
                (name, channel.unary_unary(f"/a.Service/{name}").future(b"", timeout=20))
                for name in names * 20
            ]
            assert all(future.result() == name.encode() for name, future in futures)
    finally:
        native.close()


class Together:
    """A front whose first two calls are taken from it in one trip."""

    def __init__(self, front):
        self._front = front
        self._missing = 2

    def __getattr__(self, name):
        return getattr(self._front, name)

    def recv_batch_details(self, limit):
        events = list(self._front.recv_batch_details(limit) or ())
        while 0 < len(events) < self._missing:
            events += self._front.recv_batch_details(limit)
        self._missing = 0
        return events or None


def test_what_a_relieved_thread_has_left_is_handed_over(tmp_path):
    """The first method's receiver is stuck while a call of the second has come with its call."""
    stuck, free = threading.Event(), threading.Event()

    def get_stuck(calls):
        stuck.set()
        assert free.wait(30)
        for call in calls:
            call.respond(b"late")

    def answer(calls):
        for call in calls:
            call.respond(b"answered")

    native = native_on(tmp_path, {"/a.Service/Stuck": get_stuck, "/a.Service/Free": answer})
    native.front = Together(native.front)
    native.start()
    with grpc.insecure_channel(f"127.0.0.1:{native.port}") as channel:
        calls = [
            channel.unary_unary(f"/a.Service/{name}").future(b"", timeout=30)
            for name in ("Stuck", "Free")
        ]
        assert stuck.wait(20)
        native.relieve()
        assert calls[1].result() == b"answered"
        free.set()
        assert calls[0].result() == b"late"
    native.close()
