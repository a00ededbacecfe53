"""What a transport holds one connection to: real servers with limits small enough to be reached."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections import Counter
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
from service.transports import (
    MESSAGE_SLACK_BYTES,
    Limits,
    TransportError,
    choose_transport,
    grpcio,
    limits_of,
)
from service.transports.arrivals import AT_ONCE, Arrivals, BoundedServer
from service.transports.native import NativeCall, NativeTransport, Route
from service.wire import IMAGE_BYTES

LIMITS = replace(limits_of(ServerConfig()), message_bytes=2**20, connections=100)
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

    def pongs(self):
        return [f for f in self.frames if isinstance(f, PingFrame) and "ACK" in f.flags]


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


def heard_by_grpcio(limits, *arguments):
    async def run():
        async with echoing(limits) as port:
            return await asyncio.to_thread(say, port, *arguments)

    return asyncio.run(run())


def answer_all(calls):
    for call in calls:
        call.respond(call.request)


def heard_by_native(limits, *arguments):
    transport = NativeTransport(
        "127.0.0.1",
        0,
        fallback="",
        routes=[Route(CLASSIFY_PATH, NativeCall, Metrics().started, list, answer_all)],
        refuse=lambda call, status: call.fail(status),
        limits=limits,
    )
    transport.start()
    try:
        return say(transport.port, *arguments)
    finally:
        transport.close()


BOTH = pytest.mark.parametrize("heard_by", [heard_by_native, heard_by_grpcio])


@BOTH
def test_peer_that_does_not_answer_a_ping_is_closed(heard_by):
    assert heard_by(replace(LIMITS, keepalive_s=0.2, keepalive_timeout_s=0.2), GREETING).closed


def test_peer_that_says_nothing_is_closed():
    assert heard_by_grpcio(replace(LIMITS, handshake_s=0.2), b"").closed


def asked_to_go(heard):
    return heard.closed or any(isinstance(frame, GoAwayFrame) for frame in heard.frames)


def pinged(heard_by, ping_interval_s):
    """What a caller hears that pings ten times, on a connection without a call."""
    pings = b"".join(PingFrame(0, bytes([number] * 8)).serialize() for number in range(10))
    return heard_by(
        replace(LIMITS, ping_interval_s=ping_interval_s),
        GREETING + pings,
        lambda heard: asked_to_go(heard) or len(heard.pongs()) == 10,
    )


@BOTH
def test_caller_may_ping_as_often_as_the_setting_says(heard_by):
    heard = pinged(heard_by, 0)
    assert len(heard.pongs()) == 10
    assert not asked_to_go(heard)


def test_caller_that_pings_more_often_is_sent_away():
    (said,) = [f for f in pinged(heard_by_grpcio, 60).frames if isinstance(f, GoAwayFrame)]
    assert said.additional_data == b"too_many_pings"


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


class SilentCaller:
    """The context of a call whose request does not come."""

    async def read(self):
        await asyncio.Event().wait()

    async def abort(self, *_):
        raise asyncio.CancelledError


def silent_calls(arrivals, count):
    return [asyncio.create_task(arrivals.read(SilentCaller())) for _ in range(count)]


def test_of_what_a_burst_left_a_call_gives_up_a_few():
    async def scenario():
        arrivals = Arrivals(limit=4, timeout_s=60, young_s=0.1)
        calls, ended = silent_calls(arrivals, 20), 0
        while not ended:  # until they are old enough
            await asyncio.sleep(0.02)
            calls += silent_calls(arrivals, 1)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            ended = sum(call.done() for call in calls)
        assert ended == AT_ONCE < 10
        for call in asyncio.all_tasks() - {asyncio.current_task()}:
            call.cancel()

    asyncio.run(scenario())


def test_what_is_too_old_is_given_up_a_few_at_a_time():
    async def scenario():
        arrivals = Arrivals(limit=100, timeout_s=0.1, young_s=60)
        ended, turn = Counter(), 0
        calls = silent_calls(arrivals, 20)
        for call in calls:
            call.add_done_callback(lambda _: ended.update([turn]))
        while not all(call.done() for call in calls):
            turn += 1
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # for the last one to be counted
        assert ended.total() == 20
        assert max(ended.values()) <= 10

    asyncio.run(scenario())


def test_call_without_a_request_is_invalid():
    nothing = DataFrame(1, flags=["END_STREAM"]).serialize()
    said = GREETING + headers(Encoder(), 1) + nothing
    heard = heard_by_grpcio(LIMITS, said, lambda heard: heard.statuses())
    assert heard.statuses() == {1: grpc.StatusCode.INVALID_ARGUMENT.value[0]}


@pytest.mark.parametrize("setting", [{"max_connection_age_s": 60}, {"channelz": True}])
def test_what_native_has_not_needs_grpcio(setting):
    config, flag = ServerConfig(**setting), "--" + next(iter(setting)).replace("_", "-")
    assert choose_transport(config) == ("grpcio", f"auto: only grpcio can do {flag}")
    with pytest.raises(TransportError, match=rf"native was asked for, .* {flag}, "):
        choose_transport(replace(config, transport="native"))


def test_settings_are_the_limits():
    config = ServerConfig(
        max_connections=2, max_calls_per_connection=3, keepalive_s=4, keepalive_timeout_s=5,
        min_ping_interval_s=6, max_connection_age_s=7, grace_s=8, max_images_per_request=9,
    )  # fmt: skip
    assert limits_of(config) == Limits(
        connections=2, calls_per_connection=3, keepalive_s=4, keepalive_timeout_s=5,
        ping_interval_s=6, connection_age_s=7, connection_grace_s=8,
        message_bytes=9 * IMAGE_BYTES + MESSAGE_SLACK_BYTES,
    )  # fmt: skip
