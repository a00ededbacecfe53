"""What a transport holds one connection to: real servers with limits small enough to be reached."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import grpc
import grpc.aio
import pytest
from hpack import Decoder, Encoder
from hyperframe.frame import DataFrame, Frame, GoAwayFrame, HeadersFrame, PingFrame

from benchmarks.attacks import GREETING, MESSAGE_PREFIX, data, headers
from benchmarks.harness import CLASSIFY_PATH
from service.config import ServerConfig
from service.metrics import Metrics
from service.transports import Limits, TransportError, choose_transport, grpcio
from service.transports.arrivals import Arrivals, BoundedServer
from service.transports.native import NativeTransport

LIMITS = Limits(message_bytes=2**20, connections=100)
# For what should take a fraction of a second.
PATIENCE_S = 20


@dataclass
class Heard:
    """What a server said on one connection until it closed it."""

    closed: bool = False
    frames: list[Frame] = field(default_factory=list)

    def statuses(self):
        """The gRPC status of each call that ended, by stream."""
        decoder, found = Decoder(), {}
        for frame in self.frames:
            if isinstance(frame, HeadersFrame):
                for name, value in decoder.decode(bytes(frame.data)):
                    if name == "grpc-status":
                        found[frame.stream_id] = int(value)
        return found


def say(port, said, until=lambda heard: heard.closed):
    """Says it and listens, without an answer to anything, until enough was heard."""
    heard, pending = Heard(), b""
    give_up = time.monotonic() + PATIENCE_S
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as caller:
        with contextlib.suppress(ConnectionError):
            caller.sendall(said)
            while not until(heard) and time.monotonic() < give_up:
                received = caller.recv(65_536)
                if not received:
                    break
                pending = _parse(pending + received, heard.frames)
            else:
                return heard
        heard.closed = True
    return heard


def _parse(pending, frames):
    while len(pending) >= 9:
        frame, length = Frame.parse_frame_header(memoryview(pending[:9]))
        if len(pending) < 9 + length:
            break
        frame.parse_body(memoryview(pending[9 : 9 + length]))
        frames.append(frame)
        pending = pending[9 + length :]
    return pending


@asynccontextmanager
async def echoing(limits):
    """A grpcio server that answers Classify with the request."""

    async def echo(request, context):
        return request

    server = grpcio.make_server(limits, private=False)
    service, _, method = CLASSIFY_PATH.strip("/").partition("/")
    handlers = {method: grpc.unary_unary_rpc_method_handler(echo)}
    bounded = BoundedServer(server, Arrivals(limits.arriving, limits.arrival_s, limits.young_s))
    bounded.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = grpcio.bind(server, "127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


def heard_by_grpcio(limits, *arguments, by=say):
    async def run():
        async with echoing(limits) as port:
            return await asyncio.to_thread(by, port, *arguments)

    return asyncio.run(run())


def heard_by_native(limits, *arguments, by=say):
    transport = NativeTransport(
        "127.0.0.1",
        0,
        fallback="",
        receive=lambda calls: [call.respond(call.request) for call in calls],
        refuse=lambda call, status: call.fail(status),
        metrics=Metrics(),
        limits=limits,
    )
    transport.start()
    try:
        return by(transport.port, *arguments)
    finally:
        transport.close()


BOTH = pytest.mark.parametrize("heard_by", [heard_by_native, heard_by_grpcio])


@BOTH
def test_peer_that_does_not_answer_a_ping_is_closed(heard_by):
    assert heard_by(replace(LIMITS, keepalive_s=0.2, keepalive_timeout_s=0.2), GREETING).closed


def pinged(port, times, every_s):
    """Pings on a connection with a call under way, each after the answer to the one before."""
    heard, pending, ping = Heard(), b"", PingFrame(0, opaque_data=b"hello!!!").serialize()
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as caller:
        caller.sendall(GREETING + headers(Encoder(), 1))
        for count in range(1, times + 1):
            caller.sendall(ping)
            while sum(isinstance(frame, PingFrame) for frame in heard.frames) < count:
                received = caller.recv(65_536)
                if not received:
                    return heard
                pending = _parse(pending + received, heard.frames)
            time.sleep(every_s)  # what is tried is how often
    return heard


@pytest.mark.parametrize(
    ("heard_by", "ping_interval_s", "is_sent_away"),
    [(heard_by_grpcio, 0.05, False), (heard_by_grpcio, 10.0, True), (heard_by_native, 10.0, False)],
)
def test_caller_may_ping_as_often_as_is_allowed(heard_by, ping_interval_s, is_sent_away):
    heard = heard_by(replace(LIMITS, ping_interval_s=ping_interval_s), 6, 0.3, by=pinged)
    away = [frame for frame in heard.frames if isinstance(frame, GoAwayFrame)]
    assert bool(away) == is_sent_away


def test_peer_that_says_nothing_is_closed():
    assert heard_by_grpcio(replace(LIMITS, handshake_s=0.2), b"").closed


def asked_to_go(heard):
    return heard.closed or any(isinstance(frame, GoAwayFrame) for frame in heard.frames)


@pytest.mark.parametrize("limit", ["idle_s", "connection_age_s"])
def test_connection_that_is_idle_or_old_is_asked_to_go(limit):
    heard = heard_by_grpcio(replace(LIMITS, **{limit: 0.2}), GREETING, asked_to_go)
    assert any(isinstance(frame, GoAwayFrame) for frame in heard.frames)


def test_old_connection_is_exchanged_without_a_failed_call():
    limits = replace(LIMITS, connection_age_s=0.2, connection_grace_s=5)

    async def run():
        async with (
            echoing(limits) as port,
            grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel,
        ):
            call = channel.unary_unary(CLASSIFY_PATH)
            states = set()
            until = time.monotonic() + 2
            while time.monotonic() < until:
                assert await call(b"request", timeout=PATIENCE_S) == b"request"
                states.add(channel.get_state())
            return states

    states = asyncio.run(run())
    assert states - {grpc.ChannelConnectivity.READY}, "the connection was never exchanged"


def test_connections_over_the_limit_are_closed_and_the_next_ones_served():
    async def run():
        async with echoing(replace(LIMITS, connections=2)) as port:
            held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            for reader, writer in held:
                writer.write(GREETING)
                assert await asyncio.wait_for(reader.readexactly(9), PATIENCE_S)
            refused = await asyncio.to_thread(say, port, GREETING)
            assert (refused.closed, refused.frames) == (True, [])
            for _, writer in held:
                writer.close()
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                answer = channel.unary_unary(CLASSIFY_PATH)(
                    b"request", timeout=PATIENCE_S, wait_for_ready=True
                )
                assert await answer == b"request"

    asyncio.run(run())


def half_sent(calls):
    encoder = Encoder()
    streams = range(1, 2 * calls, 2)
    return GREETING + b"".join(
        headers(encoder, stream) + data(stream, MESSAGE_PREFIX) for stream in streams
    )


def test_request_that_does_not_come_whole_is_given_up_in_time():
    heard = heard_by_grpcio(
        replace(LIMITS, arrival_s=0.2), half_sent(2), lambda heard: len(heard.statuses()) == 2
    )
    deadline_exceeded = grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
    assert heard.statuses() == {1: deadline_exceeded, 3: deadline_exceeded}


def test_of_too_many_requests_on_their_way_the_oldest_are_given_up():
    heard = heard_by_grpcio(
        replace(LIMITS, arriving=2, young_s=0),
        half_sent(5),
        lambda heard: len(heard.statuses()) == 3,
    )
    assert heard.statuses() == dict.fromkeys((1, 3, 5), grpc.StatusCode.RESOURCE_EXHAUSTED.value[0])


def test_call_without_a_request_is_invalid():
    nothing = DataFrame(1, flags=["END_STREAM"]).serialize()
    said = GREETING + headers(Encoder(), 1) + nothing
    heard = heard_by_grpcio(LIMITS, said, lambda heard: heard.statuses())
    assert heard.statuses() == {1: grpc.StatusCode.INVALID_ARGUMENT.value[0]}


def test_connection_age_needs_grpcio():
    aged = ServerConfig(max_connection_age_s=60)
    transport, reason = choose_transport(aged)
    assert (transport, reason) == ("grpcio", "auto: only grpcio can do --max-connection-age-s")
    with pytest.raises(TransportError, match=r"native was asked for, .* --max-connection-age-s"):
        choose_transport(replace(aged, transport="native"))
