"""Calls of grpcio's client over sockets: streams, cancellation, TLS."""

from __future__ import annotations

import contextlib
import itertools
import socket
import ssl
import struct
import threading
from typing import Any

import grpc
import pytest

from service.http2 import Limits
from service.http2.connection import MAX_FRAMES_AT_ONCE
from service.http2.frames import ACK, PING, PREFACE, SETTINGS, WINDOW_UPDATE, frame
from service.http2.messages import OK_TRAILERS, prefixed
from service.http2.server import READY_AT_ONCE
from tests.certificates import Authority
from tests.http2.echo import ROUTES, EchoReceiver, Streaming, Unary
from tests.http2.wire import (
    STREAM,
    UNARY,
    Caller,
    Held,
    call,
    connected,
    data,
    eventually,
    opening,
    running,
)

LONG_S = 60


def test_messages_of_every_size_come_back() -> None:
    with running(ROUTES) as server, connected(server) as channel:
        echo = channel.unary_unary(UNARY)
        for size in (0, 1, 16_379, 16_380, 65_530, 65_531, 100_000, 3_000_000):
            message = bytes([size % 251]) * size
            assert echo(message, timeout=LONG_S) == message


@pytest.mark.parametrize("compression", [grpc.Compression.Gzip, grpc.Compression.Deflate])
def test_compressed_calls_get_compressed_answers(compression: Any) -> None:
    with running(ROUTES) as server, connected(server, compression=compression) as channel:
        message = b"0123456789" * 100_000
        assert channel.unary_unary(UNARY)(message, timeout=LONG_S) == message


def test_unknown_compression_is_told_which_are_known() -> None:
    with running(ROUTES) as server, Caller(server) as caller:
        caller.send(opening(1, UNARY, (b"grpc-encoding", b"snappy")))
        assert b"identity,gzip,deflate" in caller.status()


@pytest.mark.parametrize(
    ("path", "code"),
    [("/test.Echo/Nope", "UNIMPLEMENTED"), ("/", "UNIMPLEMENTED"), ("/x/y/z", "UNIMPLEMENTED")],
)
def test_unknown_method(path: str, code: str) -> None:
    with running(ROUTES) as server, connected(server) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(path)(b"", timeout=LONG_S)
        assert caught.value.code().name == code


def test_metadata_both_ways_and_status_with_details() -> None:
    def refuse(calls: Any) -> None:
        for each in calls:
            shown = dict(each.metadata)
            each.end(
                9, f"é % {shown['x-text']}", (("x-back-bin", shown["x-some-bin"]), ("x-a", "b"))
            )

    with running({UNARY: Unary(refuse)}) as server, connected(server) as channel:
        metadata = (("x-text", "hello"), ("x-some-bin", b"\0\xff\n"))
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(UNARY)(b"", metadata=metadata, timeout=LONG_S)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert caught.value.details() == "é % hello"
        sent: Any = caught.value.trailing_metadata()
        trailers = dict(sent)
        assert trailers == {"x-back-bin": b"\0\xff\n", "x-a": "b"}


def test_stream_comes_back_whole_and_in_order_whatever_is_ahead() -> None:
    messages = [bytes([n % 251]) * (n * 977 % 70_000) for n in range(200)]
    with running(ROUTES) as server, connected(server) as channel:
        assert list(channel.stream_stream(STREAM)(iter(messages), timeout=LONG_S)) == messages
        assert server.held_bytes == 0


def test_stream_ends_at_its_deadline() -> None:
    receivers = []

    def open_one(each: Any) -> Any:
        receivers.append(EchoReceiver(each))
        return receivers[-1]

    with running({STREAM: Streaming(open_one)}) as server, Caller(server) as caller:
        caller.send(opening(1, STREAM, (b"grpc-timeout", b"100m")))
        assert b"deadline" in caller.status()
        eventually(lambda: receivers and receivers[0].ended == "cancelled")


def test_deadlines_of_streams_that_have_ended_are_not_kept() -> None:
    with running(ROUTES) as server, Caller(server) as caller:
        for number in range(3000):
            stream_id = 2 * number + 1
            caller.send(
                opening(stream_id, STREAM, (b"grpc-timeout", b"9999H")) + data(stream_id, b"")
            )
            assert caller.status(stream_id)
        assert len(server._deadlines) <= 1100


def test_receiver_is_told_once_that_its_caller_left() -> None:
    receivers = []

    def open_one(each: Any) -> Any:
        receivers.append(EchoReceiver(each))
        return receivers[-1]

    with running({STREAM: Streaming(open_one)}) as server:
        with Caller(server) as caller:
            caller.send(opening(1, STREAM) + data(1, prefixed(b"x"), end=False))
            assert caller.until(lambda kind, _, stream, __: stream == 1 and kind == 0)
        eventually(lambda: receivers and receivers[0].ended == "cancelled")
        assert not receivers[0].call.send(b"too late")
        assert not receivers[0].call.end()


def test_receiver_is_told_why_the_transport_ended_its_call() -> None:
    receivers = []

    def open_one(each: Any) -> Any:
        receivers.append(EchoReceiver(each))
        return receivers[-1]

    with running({STREAM: Streaming(open_one)}) as server, Caller(server) as caller:
        caller.send(opening(1, STREAM) + data(1, b"\0" + struct.pack(">I", 2**30), end=False))
        assert b"larger than max" in caller.status()
        eventually(lambda: receivers and receivers[0].ended.startswith("8 "))


def test_call_that_was_cancelled_is_marked_and_its_answer_reaches_nobody() -> None:
    held = Held()
    with running(held.routes) as server, connected(server) as channel:
        running_call = channel.unary_unary("/test.Echo/Held").future(b"x")
        (each,) = held.wait()
        running_call.cancel()
        eventually(lambda: each.cancelled)
        assert not each.respond(b"too late")


def test_answers_of_many_connections_come_from_one_thread_at_once() -> None:
    held = Held()
    with running(held.routes) as server:
        callers = [Caller(server) for _ in range(5)]
        for caller in callers:
            caller.send(b"".join(call(2 * n + 1, path="/test.Echo/Held") for n in range(10)))
        calls = held.wait(50)
        assert all(calls[0].respond_all([(each, each.message) for each in calls]))
        for caller in callers:
            assert b"grpc-status" in caller.status(19)
            caller.socket.close()


# TLS


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("tls"), "root")


def context_of(authority: Any, *, mutual: bool = False) -> Any:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("server"))
    context.set_alpn_protocols(["h2"])
    if mutual:
        context.load_verify_locations(authority.root)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def secure(server: Any, authority: Any, pair: Any = (None, None)) -> Any:
    key = pair[1] and pair[1].read_bytes()
    certificate = pair[0] and pair[0].read_bytes()
    credentials = grpc.ssl_channel_credentials(authority.root.read_bytes(), key, certificate)
    return grpc.secure_channel(f"localhost:{server.port}", credentials)


def test_tls_carries_calls_of_every_size(authority: Authority) -> None:
    context = context_of(authority)
    with running(ROUTES, tls=lambda: context) as server, secure(server, authority) as channel:
        for size in (0, 100, 3_000_000):
            assert len(channel.unary_unary(UNARY)(bytes(size), timeout=LONG_S)) == size


def test_mutual_tls_asks_for_a_certificate(authority: Authority) -> None:
    context = context_of(authority, mutual=True)
    with running(ROUTES, tls=lambda: context) as server:
        with secure(server, authority, authority.issue("caller")) as channel:
            assert channel.unary_unary(UNARY)(b"x", timeout=LONG_S) == b"x"
        with secure(server, authority) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary(UNARY)(b"x", timeout=LONG_S)


def test_handshakes_that_stall_hold_up_nobody_and_end_in_time(authority: Authority) -> None:
    context = context_of(authority)
    limits = Limits(handshake_s=0.5)
    with running(ROUTES, tls=lambda: context, limits=limits) as server:
        stalled = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        stalled[0].sendall(b"\x16\x03\x01")
        with secure(server, authority) as channel:
            assert channel.unary_unary(UNARY)(b"x", timeout=LONG_S) == b"x"
        for each in stalled:
            each.settimeout(LONG_S)
            assert each.recv(1) == b""
            each.close()


def hello(size: Any, *, record: int = 16_000) -> bytes:
    """The first bytes of a handshake whose message claims a size, in records."""
    message = b"\1" + size.to_bytes(3, "big") + b"\3\3" + bytes(16_000)
    pieces = [message[i : i + record] for i in range(0, 16_000, record)]
    return b"".join(b"\x16\3\1" + len(p).to_bytes(2, "big") + p for p in pieces[:100])


@pytest.mark.parametrize("said", [hello(131_000), hello(131_000, record=1), hello(2000, record=3)])
def test_handshake_that_claims_much_memory_is_ended_at_once(
    authority: Authority, said: bytes
) -> None:
    context = context_of(authority)
    with running(ROUTES, tls=lambda: context) as server:
        for step in (len(said), 4):  # in one packet, and in several
            with socket.create_connection(("127.0.0.1", server.port)) as raw:
                raw.settimeout(Limits().handshake_s / 2)
                with contextlib.suppress(ConnectionError):
                    for start in range(0, 20, step):
                        raw.sendall(said[start : start + step])
                    assert raw.recv(1) == b""
        with secure(server, authority) as channel:
            assert channel.unary_unary(UNARY)(b"x", timeout=LONG_S) == b"x"


def test_handshakes_that_stall_take_half_of_the_connections_at_most(authority: Authority) -> None:
    context = context_of(authority)
    with contextlib.ExitStack() as stack:
        limits = Limits(connections=8)
        server = stack.enter_context(running(ROUTES, tls=lambda: context, limits=limits))
        with secure(server, authority) as channel:
            assert channel.unary_unary(UNARY)(b"x", timeout=LONG_S) == b"x"
            address = ("127.0.0.1", server.port)
            stalled = [stack.enter_context(socket.create_connection(address)) for _ in range(40)]
            for first in stalled[:36]:
                first.settimeout(LONG_S)
                assert first.recv(1) == b""
            assert server.connections == 1, "which is idle, and gave them no room"
            with secure(server, authority) as late:
                assert late.unary_unary(UNARY)(b"x", timeout=LONG_S) == b"x"


def test_caller_that_does_not_speak_http_2_is_disconnected(authority: Authority) -> None:
    context = context_of(authority)
    plain = ssl.create_default_context(cafile=authority.root)
    plain.set_alpn_protocols(["http/1.1"])
    with running(ROUTES, tls=lambda: context) as server:
        raw = socket.create_connection(("127.0.0.1", server.port))
        raw.settimeout(LONG_S)
        refused = contextlib.suppress(ssl.SSLError, ConnectionResetError)
        with raw, plain.wrap_socket(raw, server_hostname="localhost") as talking, refused:
            assert talking.recv(1) == b""


def test_one_turn_of_the_loop_reads_a_few_connections() -> None:
    """Calls on the others wait in their sockets, not in a queue that would refuse them."""
    bursts, sent = [], threading.Event()

    def receive(calls: Any) -> None:
        bursts.append(len(calls))
        sent.wait(LONG_S)
        calls[0].respond_all([(call, b"") for call in calls])

    with running({UNARY: Unary(receive)}) as server, contextlib.ExitStack() as stack:
        callers = [stack.enter_context(Caller(server)) for _ in range(3 * READY_AT_ONCE)]
        callers[0].send(call())
        eventually(lambda: bursts)
        for caller in callers[1:]:
            caller.send(call())
        sent.set()
        assert all(OK_TRAILERS in caller.status() for caller in callers)
    assert max(bursts) <= READY_AT_ONCE


class Overloaded:
    """Hooks of a server that reports an overload."""

    asked = 0

    def admit(self, call: Any) -> bool:
        return True

    def refused(self, calls: Any, code: Any, message: Any) -> None:
        pass

    def overload_s(self) -> float:
        self.asked += 1
        return 0.002


def test_overloaded_server_goes_on_answering() -> None:
    hooks = Overloaded()
    with running(ROUTES, hooks=hooks) as server, Caller(server) as caller:
        caller.send(call(1) + call(3))
        assert OK_TRAILERS in caller.status(3)
    assert hooks.asked


@pytest.mark.parametrize("encrypted", [False, True])
def test_burst_of_frames_on_one_connection_is_answered_whole(
    encrypted: bool, authority: Authority
) -> None:
    """Nothing comes after it that would wake the loop."""
    context, count = context_of(authority), 3 * MAX_FRAMES_AT_ONCE
    pings = frame(PING, 0, 0, b"01234567") * count
    tls = (lambda: context) if encrypted else None
    with running(ROUTES, tls=tls) as server, Caller(server, greet=False) as caller:
        if encrypted:
            trusting = ssl.create_default_context(cafile=authority.root)
            trusting.set_alpn_protocols(["h2"])
            caller.socket = trusting.wrap_socket(caller.socket, server_hostname="localhost")
        caller.send(PREFACE + frame(SETTINGS, 0, 0) + pings)
        answers = (found for found in caller.frames() if found[0] == PING and found[1] & ACK)
        assert len(list(itertools.islice(answers, count))) == count


def test_stream_is_opened_before_its_messages_come_whatever_else_the_loop_has_to_do() -> None:
    """A connection has so many frames at a time: here the last one opens a stream."""
    pairs, ended = MAX_FRAMES_AT_ONCE // 2, threading.Event()
    with running(ROUTES, limits=Limits(streams=2 * pairs)) as server, Caller(server) as caller:

        def wake() -> None:
            while not ended.is_set():
                server.call_soon(lambda: None)

        waker = threading.Thread(target=wake)
        waker.start()
        try:
            numbers = itertools.count(1, 2)
            for _ in range(30):
                streams = [next(numbers) for _ in range(pairs)]
                calls = b"".join(call(number, b"x", STREAM) for number in streams)
                caller.send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)) + calls)
                assert caller.status(streams[-1]) == OK_TRAILERS
        finally:
            ended.set()
            waker.join()
