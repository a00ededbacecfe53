"""Open streams: bounded for each connection, each token and in all, and closed together."""

from __future__ import annotations

from typing import Any

import pytest

from service.rpc.open_streams import OpenStreams


class Call:
    def __init__(self, peer: Any, caller: str = "") -> None:
        self.peer, self.caller = peer, caller
        self.ended = ""

    def end_all(self, calls: Any, code: Any, message: str = "", trailers: Any = ()) -> list[bool]:
        self.ended = message
        return [True for _ in calls]


class Stream:
    def __init__(self, call: Any) -> None:
        self.call, self.closed = call, False

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def rejected() -> list[Any]:
    return []


@pytest.fixture
def streams(rejected: list[Any]) -> OpenStreams[Any]:
    return OpenStreams(4, 2, lambda call, _: rejected.append(call))


def test_connection_has_its_share_and_gets_it_back(streams: Any[Any], rejected: list[Any]) -> None:
    first, second, third = (Call("a") for _ in range(3))
    assert streams.open(first, Stream)
    assert streams.open(second, Stream)
    assert streams.open(third, Stream) is None
    assert rejected == [third]
    assert third.ended == "2 streams are open, the most this server takes; retry later"
    for _ in range(2):  # more than once is allowed
        streams.remove(first)
    assert streams.open(third, Stream)
    assert streams.open(Call("a"), Stream) is None


def test_token_has_its_share_over_all_its_connections(streams: Any[Any]) -> None:
    assert all(streams.open(Call(peer, "anna"), Stream) for peer in "ab")
    assert streams.open(Call("c", "anna"), Stream) is None
    assert streams.open(Call("c", "bert"), Stream)


def test_all_together_are_bounded_and_nothing_is_left_of_those_that_ended(
    streams: Any[Any],
) -> None:
    calls = [Call(peer, peer.upper()) for peer in "abcd"]
    assert all(streams.open(call, Stream) for call in calls)
    last = Call("e")
    assert streams.open(last, Stream) is None
    assert last.ended.startswith("4 streams are open")
    for call in calls:
        streams.remove(call)
    assert streams.current() == []
    assert not streams._held


def test_close_ends_those_that_are_open_and_those_that_come(streams: Any[Any]) -> None:
    early = streams.open(Call("a"), Stream)
    streams.close()
    late = streams.open(Call("b"), Stream)
    assert early.closed
    assert late.closed
