"""What one caller can make the server hold, and for how long: each bound on the wire."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from service.http2 import Limits
from service.http2.frames import (
    END_HEADERS,
    HEADERS,
    PING,
    SETTINGS,
    ErrorCode,
    Setting,
    frame,
    settings_payload,
)
from service.http2.messages import prefixed
from tests.http2.echo import ROUTES, EchoReceiver, Streaming, Unary
from tests.http2.wire import (
    KNOWN,
    STREAM,
    UNARY,
    Caller,
    answers,
    call,
    compressed,
    data,
    eventually,
    headers,
    in_frames,
    opening,
    running,
)

MESSAGE_BYTES = Unary.max_message_bytes


def test_message_over_the_limit_is_refused_by_its_length_alone() -> None:
    with running(ROUTES) as server, Caller(server) as caller:
        caller.send(opening() + data(1, b"\0" + struct.pack(">I", MESSAGE_BYTES + 1), end=False))
        assert b"larger than max" in caller.status()
        assert server.held_bytes == 0


def test_message_that_unfolds_over_the_limit_is_read_no_further() -> None:
    bomb = compressed(bytes(64 * 2**20))
    assert len(bomb) < 2**17
    with running(ROUTES) as server:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with Caller(server) as caller:
            fields = headers(UNARY, (b"grpc-encoding", b"gzip"))
            caller.send(frame(HEADERS, END_HEADERS, 1, fields) + in_frames(1, bomb))
            assert b"larger than max" in caller.status()
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert grown_kib < 4 * MESSAGE_BYTES / 1024
        assert answers(server)


@pytest.mark.parametrize("body", [b"\2\0\0\0\1x", b"\0\0\0\0\5abc", b"", b"\0\0\0\0\1ab"])
def test_malformed_message_is_told_what_was_expected(body: bytes) -> None:
    with running(ROUTES) as server, Caller(server) as caller:
        caller.send(opening() + data(1, body))
        assert b"request: expected" in caller.status()
        assert server.held_bytes == 0
        assert answers(server)


def test_metadata_over_the_limit_is_refused_and_far_over_it_ends_the_connection() -> None:
    with running(ROUTES) as server:
        with Caller(server) as caller:
            many = [(b"x-n", b"1")] * 20  # each counts for 36 bytes
            caller.send(opening(1, UNARY, (b"x-big", b"v" * 15_500), *many))
            assert b"metadata: expected at most" in caller.status()
            caller.send(call(3))
            assert b"0" in caller.status(3)
        with Caller(server) as caller:
            block = headers() + b"".join(b"\x00\x01x\x00" for _ in range(4000))
            caller.send(frame(HEADERS, END_HEADERS, 1, block[:16_384]))
            assert caller.goaway() is ErrorCode.ENHANCE_YOUR_CALM


def test_calls_beyond_the_limit_of_a_connection_are_refused_there_alone() -> None:
    with running(ROUTES, limits=Limits(streams=3)) as server, Caller(server) as caller:
        caller.send(b"".join(opening(2 * number + 1) for number in range(4)))
        assert caller.status(7) == "reset REFUSED_STREAM"
        assert answers(server)


def test_connections_over_the_limit_take_the_place_of_the_one_idle_for_longest() -> None:
    with running(ROUTES, limits=Limits(connections=3)) as server:
        busy = Caller(server)
        busy.send(opening())
        eventually(lambda: server.connections == 1)
        idle = []
        for count in (2, 3):
            idle.append(Caller(server))
            eventually(lambda count=count: server.connections == count)
        late = Caller(server)
        assert idle[0].is_closed()
        late.send(call())
        assert b"grpc-status" in late.status()
        busy.send(data(1, b"\0\0\0\0\0"))
        assert b"grpc-status" in busy.status()
        for caller in (busy, *idle, late):
            caller.socket.close()


@pytest.mark.parametrize("path", [UNARY, STREAM])
def test_calls_that_do_not_move_keep_nobody_out(path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Health watches and calls that are never sent whole need no token."""
    monkeypatch.setattr("service.http2.server.UNUSED_S", 0.2)
    with running(ROUTES, limits=Limits(connections=3)) as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            stack.enter_context(Caller(server)).send(opening(1, path))
        eventually(lambda: server.connections == 3)

        def is_let_in() -> Any:
            with Caller(server) as late:
                late.send(call())
                return late.status()

        eventually(is_let_in)


def test_answers_that_nobody_reads_are_bounded_and_the_caller_is_sent_away() -> None:
    # Calls that are read together are answered together: 256 frames, which are 2 MiB of answers.
    answer, unread = bytes(2**14), []

    def respond(calls: Any) -> None:
        for each in calls:
            each.respond(answer)
            unread.append(sum(link.unread_bytes for link in list(server._links.values())))

    routes = {UNARY: Unary(respond)}
    limits = Limits(unread_bytes=2**20, streams=1000)
    with running(routes, limits=limits) as server, Caller(server, receive_buffer=4096) as caller:
        window = frame(SETTINGS, 0, 0, settings_payload({Setting.INITIAL_WINDOW_SIZE: 2**31 - 1}))
        caller.send(window + frame(8, 0, 0, struct.pack(">I", 2**30)))
        for number in range(900):
            caller.send(call(2 * number + 1))
        assert answers_of(server, answer)
        assert max(unread) <= 5 * 2**20


def answers_of(server: Any, answer: Any) -> Any:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        return channel.unary_unary(UNARY)(b"", timeout=30) == answer


TIMES = {
    "handshake": Limits(handshake_s=0.2),
    "request": Limits(request_s=0.2),
    "stall": Limits(stall_s=0.2),
    "idle": Limits(idle_s=0.2),
    "keepalive": Limits(keepalive_s=0.2, keepalive_timeout_s=0.2),
    "age": Limits(connection_age_s=0.2),
}


def test_caller_that_says_nothing_is_disconnected() -> None:
    with (
        running(ROUTES, limits=TIMES["handshake"]) as server,
        Caller(server, greet=False) as caller,
    ):
        assert caller.is_closed()


def test_caller_that_speaks_http_1_is_disconnected() -> None:
    with running(ROUTES) as server, Caller(server, greet=False) as caller:
        caller.send(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n")
        assert caller.goaway() is ErrorCode.PROTOCOL_ERROR


def test_request_that_does_not_come_whole_ends_in_time() -> None:
    with running(ROUTES, limits=TIMES["request"]) as server, Caller(server) as caller:
        caller.send(opening() + data(1, b"\0\0\0", end=False))
        assert b"did not come within" in caller.status()
        assert server.held_bytes == 0


def test_answer_that_flow_control_holds_back_is_given_up() -> None:
    with running(ROUTES, limits=TIMES["stall"]) as server, Caller(server) as caller:
        caller.send(frame(SETTINGS, 0, 0, settings_payload({Setting.INITIAL_WINDOW_SIZE: 0})))
        caller.send(call())
        assert caller.status() == "reset CANCEL"


@pytest.mark.parametrize("window", [0, 1000], ids=["flow control", "part of a message"])
def test_stream_whose_answers_are_not_read_ends_in_time_and_so_its_handler_is_told(
    window: int,
) -> None:
    receivers = []
    routes = {STREAM: Streaming(lambda call: receivers.append(EchoReceiver(call)) or receivers[-1])}
    with running(routes, limits=TIMES["stall"]) as server, Caller(server) as caller:
        settings = settings_payload({Setting.INITIAL_WINDOW_SIZE: window})
        caller.send(frame(SETTINGS, 0, 0, settings))
        caller.send(opening(1, STREAM) + data(1, prefixed(bytes(5000)), end=False))
        assert b"no answer was taken for 0.2 s" in caller.status()
        assert eventually(lambda: receivers[0].ended) == "4 no answer was taken for 0.2 s"


class Generous(EchoReceiver):
    """Answers more than a socket holds."""

    def message(self, message: Any) -> None:
        self.call.send(bytes(2**24))


def test_stream_on_a_connection_that_is_not_read_ends_in_time() -> None:
    """The socket is full: there is no way left to tell the caller."""
    receivers = []
    routes = {STREAM: Streaming(lambda call: receivers.append(Generous(call)) or receivers[-1])}
    wide = settings_payload({Setting.INITIAL_WINDOW_SIZE: 2**31 - 1})
    with (
        running(routes, limits=TIMES["stall"]) as server,
        Caller(server, receive_buffer=4096) as caller,
    ):
        caller.send(frame(SETTINGS, 0, 0, wide) + frame(8, 0, 0, struct.pack(">I", 2**30)))
        caller.send(opening(1, STREAM) + data(1, prefixed(b"go on"), end=False))
        ended = eventually(lambda: receivers and receivers[0].ended)
        assert ended == "4 no answer was taken for 0.2 s"


def test_connection_without_calls_is_asked_to_go() -> None:
    with running(ROUTES, limits=TIMES["idle"]) as server, Caller(server) as caller:
        assert caller.goaway() is ErrorCode.NO_ERROR
        assert caller.is_closed()


def test_silent_caller_is_pinged_and_then_disconnected() -> None:
    with running(ROUTES, limits=TIMES["keepalive"]) as server, Caller(server) as caller:
        assert caller.until(lambda kind, flags, *_: kind == PING and not flags)
        assert caller.is_closed()


def test_old_connection_is_asked_to_go_and_no_call_is_lost() -> None:
    with running(ROUTES, limits=TIMES["age"]) as server:
        target = f"127.0.0.1:{server.port}"
        seen: set[Any] = set()
        with grpc.insecure_channel(target) as channel:
            echo = channel.unary_unary(UNARY)
            while len(seen) < 3:
                assert echo(KNOWN, timeout=30) == KNOWN
                seen |= {link.peer for link in list(server._links.values())}


def test_flood_of_resets_leaves_others_served() -> None:
    with running(ROUTES) as server, Caller(server) as caller:
        for number in range(2000):
            stream_id = 2 * number + 1
            caller.send(opening(stream_id) + frame(3, 0, stream_id, struct.pack(">I", 8)))
        assert caller.goaway() is ErrorCode.ENHANCE_YOUR_CALM
        assert answers(server)


def test_bomb_of_headers_leaves_others_served() -> None:
    with running(ROUTES) as server, Caller(server) as caller:
        caller.send(frame(HEADERS, 0, 1, headers()) + frame(9, 0, 1, b"") * 100)
        assert caller.goaway() is ErrorCode.ENHANCE_YOUR_CALM
        assert answers(server)


def test_handler_that_raises_ends_its_calls_and_no_others(caplog: pytest.LogCaptureFixture) -> None:
    def broken(_: Any) -> None:
        raise RuntimeError("not today")

    routes = {**ROUTES, "/test.Echo/Broken": Unary(broken)}
    with running(routes) as server, Caller(server) as caller:
        caller.send(call(1, path="/test.Echo/Broken") + call(3))
        assert b"log says why" in caller.status(1)
        assert answers(server)
    assert "not today" in caplog.text


def test_paused_stream_makes_its_caller_wait() -> None:
    """The receiver takes nothing while its answers are unread: what is held stays bounded."""
    with running(ROUTES) as server, Caller(server, receive_buffer=4096) as caller:
        caller.send(opening(1, STREAM))
        message = b"\0" + struct.pack(">I", 10_000) + bytes(10_000)
        sent = threading.Thread(
            target=lambda: caller.send(b"".join(data(1, message, end=False) for _ in range(6)))
        )
        sent.start()
        sent.join()
        assert server.held_bytes <= 2**16


def test_stream_whose_answers_are_not_read_holds_its_window_and_one_message() -> None:
    """However many messages its caller has: what the receiver has not taken is not let in."""
    window, size = 2**19, 200_000
    routes = {STREAM: Streaming(EchoReceiver, window_bytes=window)}
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 2**16)]
    taken = []

    def messages() -> Iterator[bytes]:
        for number in range(500):
            taken.append(number)
            yield bytes(size)

    with (
        running(routes) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.port}", options=narrow) as channel,
    ):
        stream = channel.stream_stream(STREAM)(messages())
        next(iter(stream))
        settled = [-1, len(taken)]
        while settled[-1] != settled[-2]:
            threading.Event().wait(0.2)
            settled.append(len(taken))
            assert server.held_bytes <= window + size
        assert settled[-1] < 100
        stream.cancel()
        eventually(lambda: server.held_bytes == 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 on this machine")
def test_one_address_for_both_kinds() -> None:
    with running(ROUTES, host="::") as server:
        for host in ("127.0.0.1", "[::1]"):
            with grpc.insecure_channel(f"{host}:{server.port}") as channel:
                assert channel.unary_unary(UNARY)(KNOWN, timeout=30) == KNOWN


def test_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with running(ROUTES, host=f"unix:{path}"), grpc.insecure_channel(f"unix:{path}") as channel:
        assert channel.unary_unary(UNARY)(KNOWN, timeout=30) == KNOWN
    assert not path.exists()
