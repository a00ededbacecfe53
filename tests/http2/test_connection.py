"""The protocol without sockets: frames in, events and frames out."""

from __future__ import annotations

import itertools
import struct
from typing import Any

import h2.config
import h2.connection
import h2.events
import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.http2.connection import (
    DRAIN_PING,
    MAX_FRAMES_AT_ONCE,
    Connection,
    ConnectionLimits,
)
from service.http2.frames import (
    ACK,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PADDED,
    PING,
    PRIORITY,
    PRIORITY_FLAG,
    RST_STREAM,
    SETTINGS,
    WINDOW_UPDATE,
    ErrorCode,
    Setting,
    frame,
    settings_payload,
)
from service.http2.headers import encode_field
from service.http2.messages import OK_TRAILERS, RESPONSE_HEAD
from service.http2.sending import DATA as DATA_EVENT
from service.http2.sending import END, FLUSHED, REQUEST, RESET
from tests.http2.peer import (
    BLOCK,
    HELLO,
    REQUEST_FIELDS,
    block,
    goaway_of,
    greeted,
    kinds,
    request,
    resets,
    sent,
)


def test_request_and_answer() -> None:
    connection = greeted()
    events = connection.receive(request() + frame(DATA, END_STREAM, 1, b"body"), 0.0)
    assert kinds(events) == [(REQUEST, 1, b""), (END, 1, b"body")]
    stream = events[0][1]
    assert (stream.head.method, stream.head.path) == (b"POST", b"/a.B/C")
    assert connection.respond(stream, RESPONSE_HEAD, b"answer", OK_TRAILERS)
    assert [f[:3] for f in sent(connection)] == [
        (HEADERS, END_HEADERS, 1),
        (DATA, 0, 1),
        (HEADERS, END_HEADERS | END_STREAM, 1),
    ]
    assert not connection.streams
    assert not connection.respond(stream, RESPONSE_HEAD, b"again", OK_TRAILERS)


def test_padding_and_priority_are_taken_off() -> None:
    padded = b"\x03" + struct.pack(">IB", 0, 7) + BLOCK + b"\0\0\0"
    connection = greeted()
    events = connection.receive(
        frame(HEADERS, END_HEADERS | PADDED | PRIORITY_FLAG, 1, padded)
        + frame(DATA, PADDED | END_STREAM, 1, b"\x02hi\0\0"),
        0.0,
    )
    assert kinds(events) == [(REQUEST, 1, b""), (END, 1, b"hi")]


def test_header_block_may_come_in_pieces() -> None:
    connection = greeted()
    pieces = frame(HEADERS, END_STREAM, 1, BLOCK[:5])
    pieces += frame(CONTINUATION, 0, 1, BLOCK[5:9]) + frame(CONTINUATION, END_HEADERS, 1, BLOCK[9:])
    assert kinds(connection.receive(pieces, 0.0)) == [(REQUEST, 1, b""), (END, 1, b"")]


def test_trailers_of_the_caller_end_its_side() -> None:
    connection = greeted()
    trailers = frame(HEADERS, END_HEADERS | END_STREAM, 1, encode_field(b"x-sum", b"1"))
    events = connection.receive(request() + frame(DATA, 0, 1, b"a" * 100) + trailers, 0.0)
    assert [kind for kind, *_ in events] == [REQUEST, DATA_EVENT, END]


def test_unknown_frames_and_settings_are_ignored() -> None:
    connection = greeted()
    odd = frame(0x77, 0xFF, 1, b"what") + frame(SETTINGS, 0, 0, struct.pack(">HI", 0x99, 5))
    assert connection.receive(odd, 0.0) == []
    assert [f[:2] for f in sent(connection)] == [(SETTINGS, ACK)]


def test_burst_of_frames_is_handled_in_parts() -> None:
    connection = greeted()
    count = 3 * MAX_FRAMES_AT_ONCE + 7
    pings = b"".join(frame(PING, 0, 0, struct.pack(">Q", number)) for number in range(count))
    connection.receive(pings, 0)
    answered = sent(connection)
    assert len(answered) == MAX_FRAMES_AT_ONCE
    while connection.has_more:
        connection.receive(b"", 0)
        answered += sent(connection)
    assert [payload for *_, payload in answered] == [
        struct.pack(">Q", number) for number in range(count)
    ]


def test_ping_is_answered_with_its_payload() -> None:
    connection = greeted()
    connection.receive(frame(PING, 0, 0, b"12345678"), 0.0)
    assert sent(connection) == [(PING, ACK, 0, b"12345678")]


def test_streams_beyond_the_limit_are_refused() -> None:
    connection = greeted(streams=2)
    connection.receive(request(1) + request(3) + request(5), 0.0)
    assert resets(connection) == {5: ErrorCode.REFUSED_STREAM}
    assert set(connection.streams) == {1, 3}


def test_peer_that_sends_more_than_a_streams_window_loses_the_stream() -> None:
    connection = greeted()
    data = b"".join(frame(DATA, 0, 1, bytes(2**14)) for _ in range(4))
    events = connection.receive(request() + data, 0.0)
    assert events[-1][0] == RESET
    assert resets(connection)[1] is ErrorCode.FLOW_CONTROL_ERROR


def test_granted_window_can_be_used() -> None:
    connection = greeted()
    ((_, stream, _),) = connection.receive(request(), 0.0)
    connection.grant(stream, 2**16)
    data = b"".join(frame(DATA, 0, 1, bytes(2**14)) for _ in range(7))
    assert len(connection.receive(data, 0.0)) == 7


def test_answer_waits_for_the_window_and_goes_on_when_it_opens() -> None:
    connection = greeted()
    connection.receive(
        frame(SETTINGS, 0, 0, settings_payload({Setting.INITIAL_WINDOW_SIZE: 10})), 0.0
    )
    ((_, stream, _), _) = connection.receive(request(end=True), 0.0)
    connection.respond(stream, RESPONSE_HEAD, b"x" * 25, OK_TRAILERS)
    connection_sent = sent(connection)
    assert [f[3] for f in connection_sent if f[0] == DATA] == [b"x" * 10]
    assert connection.pending_bytes == 15
    connection.receive(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 5)), 0.0)
    assert [f[3] for f in sent(connection)] == [b"x" * 5]
    # A change of the initial window counts for streams that are open.
    larger = frame(SETTINGS, 0, 0, settings_payload({Setting.INITIAL_WINDOW_SIZE: 100}))
    events = connection.receive(larger, 0.0)
    assert [kind for kind, *_ in events] == [FLUSHED]
    assert [(f[0], f[3]) for f in sent(connection)][1:] == [
        (DATA, b"x" * 10),
        (HEADERS, OK_TRAILERS),
    ]
    assert connection.pending_bytes == 0
    assert not connection.streams


def test_initial_window_that_shrinks_below_what_was_sent_holds_back_the_rest() -> None:
    connection = greeted()
    ((_, stream, _), _) = connection.receive(request(end=True), 0.0)
    connection.send_headers(stream, RESPONSE_HEAD)
    connection.send_data(stream, b"x" * 100)
    connection.receive(
        frame(SETTINGS, 0, 0, settings_payload({Setting.INITIAL_WINDOW_SIZE: 50})), 0.0
    )
    connection.take_output()
    connection.send_data(stream, b"y")
    assert not connection.has_output
    connection.receive(frame(WINDOW_UPDATE, 0, 1, struct.pack(">I", 51)), 0.0)
    assert [f[3] for f in sent(connection)] == [b"y"]


def test_reset_by_the_peer_drops_what_waits() -> None:
    connection = greeted()
    connection.receive(
        frame(SETTINGS, 0, 0, settings_payload({Setting.INITIAL_WINDOW_SIZE: 0})), 0.0
    )
    ((_, stream, _), _) = connection.receive(request(end=True), 0.0)
    connection.respond(stream, RESPONSE_HEAD, b"answer", OK_TRAILERS)
    events = connection.receive(frame(RST_STREAM, 0, 1, bytes(4)), 0.0)
    assert [kind for kind, *_ in events] == [RESET]
    assert connection.pending_bytes == 0
    assert not connection.blocked


def test_early_answer_tells_the_peer_to_stop_and_ignores_what_is_on_its_way() -> None:
    connection = greeted()
    ((_, stream, _),) = connection.receive(request(), 0.0)
    connection.send_headers(stream, RESPONSE_HEAD + OK_TRAILERS, end=True)
    assert resets(connection) == {1: ErrorCode.NO_ERROR}
    assert connection.receive(frame(DATA, END_STREAM, 1, b"late"), 0.0) == []
    assert not connection.closed


def test_drain_refuses_nothing_before_the_peer_knows() -> None:
    connection = greeted()
    connection.drain()
    assert [f[0] for f in sent(connection)] == [GOAWAY, PING]
    assert kinds(connection.receive(request(1, end=True), 0.0))[0] == (REQUEST, 1, b"")
    assert not connection.is_finished
    connection.receive(frame(PING, ACK, 0, DRAIN_PING), 0.0)
    (last,) = sent(connection)
    assert struct.unpack(">II", last[3]) == (1, ErrorCode.NO_ERROR)
    assert connection.is_finished
    assert connection.receive(request(3, end=True), 0.0) == []
    assert resets(connection) == {3: ErrorCode.REFUSED_STREAM}


FLOODS = {
    "rapid reset": lambda n: request(2 * n + 1) + frame(RST_STREAM, 0, 2 * n + 1, bytes(4)),
    "ping": lambda _: frame(PING, 0, 0, bytes(8)),
    "settings": lambda _: frame(SETTINGS, 0, 0),
    "empty data": lambda _: frame(DATA, 0, 1, b""),
    "tiny window updates": lambda _: frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1)),
    "priority": lambda _: frame(PRIORITY, 0, 99, bytes(5)),
    "unknown frames": lambda _: frame(0x99, 0, 0, b""),
    "refused streams": lambda n: request(2 * n + 3, fields=block((b"connection", b"close"))),
}


@pytest.mark.parametrize("name", FLOODS)
def test_flood_is_told_to_calm_down(name: str) -> None:
    connection = greeted()
    if name == "empty data":
        connection.receive(request(), 0.0)
    taken = 0
    while not connection.closed and taken < 5000:
        connection.receive(FLOODS[name](taken), 0.0)
        taken += 1
    assert goaway_of(connection) is ErrorCode.ENHANCE_YOUR_CALM
    assert taken >= 500, "a burst that a caller may well send"


def test_empty_continuations_and_long_blocks_are_told_to_calm_down() -> None:
    for part in (b"", b"x" * 16_000):
        connection = greeted()
        pieces = frame(HEADERS, 0, 1, BLOCK) + frame(CONTINUATION, 0, 1, part) * 40
        connection.receive(pieces, 0.0)
        assert goaway_of(connection) is ErrorCode.ENHANCE_YOUR_CALM


def test_small_block_that_expands_is_told_to_calm_down() -> None:
    """One entry of 4,000 bytes in the table, asked for again and again by one byte each."""
    encoder = hpack.Encoder()
    first = encoder.encode([(b"x-big", b"v" * 4000)], huffman=False)
    again = encoder.encode([(b"x-big", b"v" * 4000)])
    assert len(again) < 4
    connection = greeted()
    connection.receive(request(fields=BLOCK + first + again * 100), 0.0)
    assert goaway_of(connection) is ErrorCode.ENHANCE_YOUR_CALM


def test_caller_that_works_may_ping_and_cancel_in_proportion() -> None:
    connection = greeted()
    for number in range(3000):
        stream_id = 4 * number + 1
        frames = request(stream_id, end=True) + frame(PING, 0, 0, bytes(8))
        frames += request(stream_id + 2) + frame(RST_STREAM, 0, stream_id + 2, bytes(4))
        events = connection.receive(frames, 0.0)
        connection.respond(events[0][1], RESPONSE_HEAD, b"x", OK_TRAILERS)
        connection.take_output()
    assert not connection.closed


SCRIPT = (
    HELLO
    + request(1) + frame(DATA, 0, 1, b"a" * 70) + frame(DATA, PADDED, 1, b"\x01b\0")
    + frame(HEADERS, 0, 3, BLOCK[:20]) + frame(CONTINUATION, END_HEADERS, 3, BLOCK[20:])
    + frame(PING, 0, 0, b"abcdefgh") + frame(DATA, END_STREAM, 3, b"c")
    + frame(RST_STREAM, 0, 1, bytes(4)) + frame(0x50, 0, 0, b"new")
    + frame(SETTINGS, 0, 0, settings_payload({Setting.INITIAL_WINDOW_SIZE: 5}))
    + request(5, end=True) + frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1000))
)  # fmt: skip


def run(pieces: Any) -> tuple[list[Any], Any]:
    connection = Connection(ConnectionLimits())
    events = [kinds(connection.receive(piece, 0.0)) for piece in pieces]
    return [*itertools.chain(*events)], connection.take_output()


@given(st.lists(st.integers(0, len(SCRIPT)), max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_split_of_the_same_bytes_means_the_same(cuts: Any) -> None:
    bounds = [0, *sorted(cuts), len(SCRIPT)]
    pieces = [SCRIPT[a:b] for a, b in itertools.pairwise(bounds)]
    assert run(pieces) == run([SCRIPT])


@given(st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_no_bytes_raise(data: Any) -> None:
    connection = greeted()
    connection.receive(data, 0.0)
    connection.take_output()


@given(st.lists(st.tuples(st.integers(1, 40_000), st.integers(1, 40_000)), min_size=1, max_size=6))
@settings(max_examples=50, deadline=None)
def test_another_implementation_gets_every_answer_whole(sizes: Any) -> None:
    """``h2`` as the client: requests and answers of any size, flow control on both sides."""
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    server = Connection(ConnectionLimits())
    server.receive(client.data_to_send(), 0.0)
    client.receive_data(server.take_output())
    for asked, _ in sizes:
        stream_id = client.get_next_available_stream_id()
        client.send_headers(stream_id, REQUEST_FIELDS)
        for first in range(0, asked, 16_000):
            client.send_data(stream_id, b"q" * min(16_000, asked - first))
        client.end_stream(stream_id)
    answers: dict[Any, Any]
    bodies: dict[Any, Any]
    ended: set[Any]
    bodies, answers, ended = {}, {}, set()
    while len(ended) < len(sizes):
        for kind, stream, data in server.receive(client.data_to_send(), 0.0):
            bodies[stream.id] = bodies.get(stream.id, b"") + data
            if kind == END:
                size = sizes[(stream.id - 1) // 2][1]
                server.respond(stream, RESPONSE_HEAD, b"a" * size, OK_TRAILERS)
        for event in client.receive_data(server.take_output()):
            if isinstance(event, h2.events.DataReceived):
                answers[event.stream_id] = answers.get(event.stream_id, b"") + event.data
                client.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded):
                ended.add(event.stream_id)
    for number, (asked, answered) in enumerate(sizes):
        assert bodies[2 * number + 1] == b"q" * asked
        assert answers[2 * number + 1] == b"a" * answered
    assert server.pending_bytes == 0
    assert not server.streams
