"""Bursts of calls on grpcio's event loop, which brings calls one at a time."""

from __future__ import annotations

import asyncio
import time

import pytest

from service.transports import grpcio
from service.transports.grpcio import LARGE_BYTES, AsyncCall, Gatherer, Mailbox


class Bench:
    """A gatherer on the running loop, and the bursts that it handed over."""

    def __init__(self):
        loop = asyncio.get_running_loop()
        self.mailbox = Mailbox(loop)
        self.bursts: list[list[AsyncCall]] = []
        self.came = asyncio.Event()
        self.gatherer = Gatherer(loop, self.take)
        self.tasks: list[asyncio.Task] = []

    def take(self, burst: list[AsyncCall]) -> None:
        self.bursts.append(burst)
        self.came.set()

    async def arrive(self, count: int, request: bytes = b"") -> None:
        """So many calls, each in a turn of the loop."""
        for _ in range(count):
            call = AsyncCall(self.mailbox, request, received=time.monotonic(), deadline=None)
            self.tasks.append(asyncio.create_task(self.gatherer.answer(call)))
            await asyncio.sleep(0)

    async def handed_over(self, count: int) -> None:
        """Waits until there are so many bursts."""
        async with asyncio.timeout(30):
            while len(self.bursts) < count:
                self.came.clear()
                await self.came.wait()

    async def answer(self) -> None:
        for burst in self.bursts:
            for call in burst:
                call.respond(b"answer")
        assert set(await asyncio.gather(*self.tasks)) <= {b"answer"}

    def sizes(self) -> list[int]:
        return [len(burst) for burst in self.bursts]


@pytest.fixture
def waits_for_ever(monkeypatch):
    """A burst is handed over for what has come, or never."""
    monkeypatch.setattr(grpcio, "GATHER_S", 3600.0)


@pytest.mark.usefixtures("waits_for_ever")
def test_a_lone_call_waits_for_nobody():
    async def scenario():
        bench = Bench()
        for number in range(1, 4):
            await bench.arrive(1)
            await bench.handed_over(number)
        assert bench.sizes() == [1, 1, 1]
        await bench.answer()

    asyncio.run(scenario())


@pytest.mark.usefixtures("waits_for_ever")
def test_as_many_as_last_time_are_handed_over_at_once():
    async def scenario():
        bench = Bench()
        bench.gatherer._expected = 8
        await bench.arrive(7)
        assert bench.sizes() == []
        await bench.arrive(1)
        await bench.handed_over(1)
        await bench.arrive(8)
        await bench.handed_over(2)
        assert bench.sizes() == [8, 8]
        await bench.answer()

    asyncio.run(scenario())


@pytest.mark.usefixtures("waits_for_ever")
def test_calls_that_arrive_together_make_the_next_burst_larger():
    async def scenario():
        bench = Bench()
        calls = [AsyncCall(bench.mailbox, b"", received=0.0, deadline=None) for _ in range(5)]
        bench.tasks = [asyncio.create_task(bench.gatherer.answer(call)) for call in calls]
        await bench.handed_over(1)
        assert bench.sizes() == [5]
        await bench.answer()

    asyncio.run(scenario())


@pytest.mark.usefixtures("waits_for_ever")
def test_a_large_request_takes_along_what_waits():
    async def scenario():
        bench = Bench()
        bench.gatherer._expected = 100
        await bench.arrive(3)
        await bench.arrive(1, bytes(LARGE_BYTES + 1))
        await bench.handed_over(1)
        assert bench.sizes() == [4]
        await bench.answer()

    asyncio.run(scenario())


def test_fewer_than_last_time_wait_no_longer_than_they_may(monkeypatch):
    async def scenario():
        bench = Bench()
        bench.gatherer._expected = 100
        await bench.arrive(2)
        await bench.handed_over(1)
        monkeypatch.setattr(grpcio, "GATHER_S", 3600.0)
        await bench.arrive(2)  # as many as last time, now
        await bench.handed_over(2)
        assert bench.sizes() == [2, 2]
        await bench.answer()

    asyncio.run(scenario())


def test_a_caller_that_leaves_while_its_burst_is_gathered_is_marked():
    async def scenario():
        bench = Bench()
        bench.gatherer._expected = 3
        await bench.arrive(2)
        bench.tasks[0].cancel()
        await bench.handed_over(1)
        assert [call.cancelled for call in bench.bursts[0]] == [True, False]
        bench.bursts[0][1].respond(b"answer")
        assert await bench.tasks[1] == b"answer"

    asyncio.run(scenario())
