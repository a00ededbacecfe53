"""A server that drains: what is in flight is answered, and nothing holds it up for good."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import grpc

from service.http2 import Call
from tests.http2.echo import ROUTES, Unary
from tests.http2.wire import (
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


def drained(server: Any, grace_s: Any = LONG_S) -> tuple[Any, list[Any]]:
    """Drains on a thread; what it returns, and how long it took, come later."""
    outcome = []

    def drain() -> None:
        began = time.monotonic()
        outcome.append((server.drain(grace_s), time.monotonic() - began))

    thread = threading.Thread(target=drain)
    thread.start()
    return thread, outcome


def test_drain_answers_what_is_in_flight_and_closes_every_connection() -> None:
    held = Held()
    with running(held.routes) as server, connected(server) as channel, Caller(server) as idle:
        in_flight = channel.unary_unary("/test.Echo/Held").future(b"x")
        (each,) = held.wait()
        thread, outcome = drained(server)
        assert idle.goaway() is not None
        assert thread.is_alive()
        each.respond(b"done")
        assert in_flight.result(LONG_S) == b"done"
        idle.socket.close()
        thread.join(LONG_S)
        assert outcome[0][0]
        assert server.connections == 0


def test_drain_says_when_a_call_was_cut_off() -> None:
    held = Held()
    with running(held.routes) as server, connected(server) as channel:
        in_flight = channel.unary_unary("/test.Echo/Held").future(b"x")
        held.wait()
        assert server.drain(0.2) is False
        assert not in_flight.done()


def test_half_sent_call_is_refused_and_does_not_hold_the_drain() -> None:
    with running(ROUTES) as server, Caller(server) as caller:
        caller.send(opening() + data(1, b"\0\0\0", end=False))
        eventually(lambda: server.held_bytes)
        thread, outcome = drained(server)
        assert b"shutting down" in caller.status()
        caller.socket.close()
        thread.join(LONG_S)
        assert outcome[0][0]
        assert outcome[0][1] < LONG_S / 2


def test_caller_that_does_not_read_does_not_hold_the_drain() -> None:
    def answer(calls: Sequence[Call]) -> None:
        for each in calls:
            each.respond(bytes(60_000))

    routes = {UNARY: Unary(answer)}
    with running(routes) as server, Caller(server, receive_buffer=2048) as caller:
        for number in range(200):
            caller.send(call(2 * number + 1))
        eventually(lambda: any(link.unread_bytes for link in list(server._links.values())))
        thread, outcome = drained(server)
        thread.join(LONG_S)
        assert outcome[0][1] < LONG_S / 2


def test_no_call_fails_while_a_server_drains_and_another_takes_its_place() -> None:
    """Behind one name: grpcio's client tries what was refused elsewhere by itself."""
    with running(ROUTES) as first, running(ROUTES) as second:
        target = f"ipv4:127.0.0.1:{first.port},127.0.0.1:{second.port}"
        options = [("grpc.lb_policy_name", "round_robin")]
        with grpc.insecure_channel(target, options=options) as channel:
            echo = channel.unary_unary(UNARY)
            for _ in range(50):
                echo(b"x", timeout=LONG_S)
            eventually(lambda: first.connections and second.connections)
            calls = [echo.future(b"y", timeout=LONG_S) for _ in range(100)]
            thread, outcome = drained(first)
            calls += [echo.future(b"y", timeout=LONG_S) for _ in range(300)]
            assert all(each.result() == b"y" for each in calls)
            thread.join(LONG_S)
            assert outcome[0][0]
