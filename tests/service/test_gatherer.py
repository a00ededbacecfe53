"""Bursts of calls on grpcio's event loop, which brings calls one at a time."""

from __future__ import annotations

import asyncio
import time

import pytest

from service.transports import grpcio
from service.transports.grpcio import FEW_CALLS, LARGE_BYTES, AsyncCall, Gatherer, Mailbox


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

    async def arrive_together(self, count: int) -> None:
        """So many calls in one turn of the loop."""
        for _ in range(count):
            call = AsyncCall(self.mailbox, b"", received=time.monotonic(), deadline=None)
            self.tasks.append(asyncio.create_task(self.gatherer.answer(call)))
        await asyncio.sleep(0)

    def large(self) -> AsyncCall:
        return AsyncCall(self.mailbox, bytes(LARGE_BYTES + 1), received=0.0, deadline=None)

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


@pytest.fixture
def waits(monkeypatch):
    """A burst is handed over for what has come, or after a time that no loop's turn takes."""
    monkeypatch.setattr(grpcio, "GATHER_S", 0.3)


@pytest.mark.usefixtures("waits_for_ever")
def test_a_few_callers_wait_for_nobody():
    async def scenario():
        bench = Bench()
        for number in range(1, FEW_CALLS + 1):
            await bench.arrive(1)
            await bench.handed_over(number)
        assert bench.sizes() == [1] * FEW_CALLS
        await bench.answer()

    asyncio.run(scenario())


@pytest.mark.usefixtures("waits_for_ever")
def test_as_many_as_last_time_are_handed_over_at_once():
    async def scenario():
        bench = Bench()
        await bench.arrive_together(8)
        await bench.handed_over(1)
        await bench.answer()
        await bench.arrive(7)
        assert bench.sizes() == [8]
        await bench.arrive(1)
        await bench.handed_over(2)
        assert bench.sizes() == [8, 8]
        await bench.answer()

    asyncio.run(scenario())


@pytest.mark.usefixtures("waits_for_ever")
def test_what_comes_in_the_same_turn_makes_a_burst_larger():
    async def scenario():
        bench = Bench()
        for size in (5, 9):
            await bench.arrive_together(size)
            await bench.handed_over(len(bench.bursts) + 1)
            await bench.answer()
        assert bench.sizes() == [5, 9]

    asyncio.run(scenario())


@pytest.mark.usefixtures("waits_for_ever")
def test_a_large_request_takes_along_what_waits():
    async def scenario():
        bench = Bench()
        await bench.arrive_together(100)
        await bench.handed_over(1)
        await bench.arrive(3)
        await bench.arrive(1, bytes(LARGE_BYTES + 1))
        await bench.handed_over(2)
        assert bench.sizes() == [100, 4]
        await bench.answer()

    asyncio.run(scenario())


@pytest.mark.usefixtures("waits_for_ever")
def test_large_requests_do_not_put_each_other_off():
    async def scenario():
        bench = Bench()
        left_after = []
        loop = asyncio.get_running_loop()

        def arrive(left: int) -> None:
            # Ahead of whatever is to happen in the next turn.
            if left:
                loop.call_soon(arrive, left - 1)
            bench.tasks.append(asyncio.ensure_future(bench.gatherer.answer(bench.large())))
            left_after.append(len(bench.bursts))

        arrive(20)
        await bench.handed_over(1)
        assert len(left_after) < 20
        async with asyncio.timeout(30):
            while sum(bench.sizes()) < 21:
                bench.came.clear()
                await bench.came.wait()
        await bench.answer()

    asyncio.run(scenario())


@pytest.mark.usefixtures("waits")
def test_fewer_than_last_time_wait_no_longer_than_they_may(monkeypatch):
    async def scenario():
        bench = Bench()
        await bench.arrive_together(100)
        await bench.handed_over(1)
        await bench.answer()
        await bench.arrive(FEW_CALLS + 2)
        await bench.handed_over(2)
        await bench.answer()
        monkeypatch.setattr(grpcio, "GATHER_S", 3600.0)
        await bench.arrive(FEW_CALLS + 2)  # as many as last time, now
        await bench.handed_over(3)
        assert bench.sizes() == [100, FEW_CALLS + 2, FEW_CALLS + 2]
        await bench.answer()

    asyncio.run(scenario())


@pytest.mark.usefixtures("waits")
def test_a_caller_that_leaves_while_its_burst_is_gathered_is_marked():
    async def scenario():
        bench = Bench()
        await bench.arrive_together(100)
        await bench.handed_over(1)
        await bench.answer()
        await bench.arrive(2)
        bench.tasks[-2].cancel()
        await bench.handed_over(2)
        assert [call.cancelled for call in bench.bursts[1]] == [True, False]
        bench.bursts[1][1].respond(b"answer")
        assert await bench.tasks[-1] == b"answer"

    asyncio.run(scenario())


@pytest.mark.usefixtures("waits")
def test_a_burst_that_is_whole_as_its_wait_ends_is_handed_over_once():
    async def scenario():
        bench = Bench()
        await bench.arrive_together(6)
        await bench.handed_over(1)
        await bench.answer()
        await bench.arrive(5)
        time.sleep(grpcio.GATHER_S)  # noqa: ASYNC251 - the loop finds the last call and the end
        await bench.arrive(2)
        for _ in range(3):
            await asyncio.sleep(0)
        assert bench.sizes() == [6, 6]
        assert bench.gatherer._last_burst == 6
        await bench.arrive(5)
        await bench.handed_over(3)
        await bench.answer()

    asyncio.run(scenario())


def test_answer_of_a_lone_call_needs_no_turn_of_the_loop_on_whose_thread_it_ran():
    async def scenario():
        bench = Bench()
        calls = [
            AsyncCall(bench.mailbox, b"", received=time.monotonic(), deadline=None)
            for _ in range(2)
        ]
        assert calls[0].respond(b"answer")
        assert calls[0].outcome.result() == b"answer"
        assert await asyncio.to_thread(calls[1].respond, b"answer")
        assert await calls[1].outcome == b"answer"

    asyncio.run(scenario())
