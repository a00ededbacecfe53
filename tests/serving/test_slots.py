"""The batcher's threads: which slots wake, what runs where, and what a stop waits for."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.serving.batcher import Batcher
from service.serving.model import Predictions
from service.serving.request import Refusal, Request
from tests.conftest import wait_until
from tests.serving.core import (
    Answered,
    Bench,
    Caller,
    GatedBench,
    doubled,
    numbers,
    pixels,
    results,
    twice,
)

# Seconds an image, and how many of them must wait to be worth a second slot.
WORTH = [(10e-6, 130), (20e-6, 65), (80e-6, 17), (300e-6, 5)]


@pytest.mark.parametrize(("image_s", "enough"), WORTH)
def test_second_slot_wakes_when_what_waits_takes_one_slot_too_long(
    image_s: float, enough: int
) -> None:
    bench = GatedBench(max_batch_size=64, expected={1: image_s})
    bench.submit_aside(1)
    assert bench.running.acquire(timeout=30)
    bench.submit(*range(enough - 1))
    # A slot that was woken would have taken what waits.
    assert not bench.running.acquire(timeout=0.1)
    assert bench.batcher.queued_images == enough - 1
    bench.submit(7)
    assert bench.running.acquire(timeout=30)
    bench.gate.release(1000)
    bench.answered.wait_for(enough + 1)
    assert bench.batcher.stop(30)


def test_second_slot_wakes_when_a_queue_shorter_than_that_is_full() -> None:
    bench = GatedBench(max_batch_size=100, max_queue_images=3, expected={1: 20e-6})
    bench.submit_aside(1)
    assert bench.running.acquire(timeout=30)
    bench.submit(2, 3, 4)
    assert bench.running.acquire(timeout=30)
    bench.gate.release(10)
    bench.answered.wait_for(4)
    assert bench.batcher.stop(30)


def test_slot_that_takes_a_batch_wakes_the_next_for_what_is_left() -> None:
    bench = GatedBench(slots=3, max_batch_size=64, expected={1: 80e-6})
    bench.submit(*range(17 + 17 + 8))
    for _ in range(3):
        assert bench.running.acquire(timeout=30)
    bench.gate.release(1000)
    bench.answered.wait_for(42)
    assert bench.batcher.stop(30)


def test_stop_answers_what_was_admitted_and_refuses_the_rest() -> None:
    bench = GatedBench()
    bench.submit(*range(20))
    bench.gate.release(100)
    assert bench.batcher.stop(30)
    assert sorted(results(one)[0] for one in bench.answered) == twice(*range(20))
    bench.submit(1)
    assert bench.answered[-1].refusal is Refusal.STOPPED


def test_stop_reports_what_did_not_finish_within_the_grace() -> None:
    bench = GatedBench()
    bench.submit_aside(1)
    assert bench.running.acquire(timeout=30)
    assert not bench.batcher.stop(0.01)
    bench.gate.release()
    bench.answered.wait_for(1)


def test_lone_small_request_runs_on_the_thread_that_submits_it() -> None:
    bench, threads = Bench(), []
    bench.batcher.start()
    single = bench.request(7, reply=lambda _: threads.append(threading.current_thread()))
    assert bench.submit(single) == []
    assert threads == [threading.current_thread()]
    assert results(single) == [14]
    assert bench.batcher.stop(5)


def test_request_that_a_reply_submits_is_run_by_a_slot() -> None:
    """Else a stream whose every answer brings its next item would never return."""
    bench, threads = Bench(), []
    bench.batcher.start()

    def submit_another(requests: Any) -> None:
        threads.append(threading.current_thread())
        if len(threads) < 3:
            bench.submit(bench.request(8, reply=submit_another))
        bench.answered.reply(requests)

    bench.submit(bench.request(7, reply=submit_another))
    bench.answered.wait_for(3)
    assert threads[0] is threading.current_thread()
    assert threads[1] in bench.batcher.threads
    assert bench.batcher.stop(5)


def test_request_beside_a_lone_one_is_woken_for_when_that_ends() -> None:
    bench = GatedBench(slots=1)
    lone = bench.submit_aside(1)
    assert bench.running.acquire(timeout=30)
    bench.submit(2)
    bench.gate.release(2)
    lone.join(30)
    assert bench.batcher.stop(30)
    assert sorted(results(one)[0] for one in bench.answered) == [2, 4]


def test_what_comes_while_a_slot_replies_is_run_by_another() -> None:
    bench, replying, leave = Bench(), threading.Event(), threading.Event()

    def slow(requests: Any) -> None:
        replying.set()
        assert leave.wait(30)
        bench.answered.reply(requests)

    bench.batcher.start()
    # Two each: neither is a lone one, which would be answered right here.
    early = [bench.request(number, reply=slow) for number in (1, 2)]
    late = [bench.request(number) for number in (3, 4)]
    bench.submit(*early)
    assert replying.wait(30)
    bench.submit(*late)
    bench.answered.wait_for(2)
    assert bench.answered == late
    leave.set()
    assert bench.batcher.stop(30)
    assert bench.answered == late + early


@pytest.mark.parametrize("broken", [False, True])
def test_what_waited_while_a_slot_inferred_is_run_after_its_reply(broken: bool) -> None:
    bench = GatedBench()
    reply = bench.answered.reply

    def failing_at_first(requests: Any) -> None:
        reply(requests)
        if broken and len(bench.answered) == 2:
            raise RuntimeError("a bug")

    bench.answered.reply = failing_at_first
    bench.submit(1, 2)
    assert bench.running.acquire(timeout=30)
    bench.submit(3, 4)  # fewer than a second slot wakes for
    bench.gate.release(10)
    bench.answered.wait_for(4)
    assert bench.sizes == [2, 2]
    assert bench.batcher.stop(30)


def test_stop_waits_for_the_inference_of_a_lone_request() -> None:
    bench = GatedBench()
    lone = bench.submit_aside(1)
    assert bench.running.acquire(timeout=30)
    assert not bench.batcher.stop(0.05)
    bench.gate.release()
    lone.join(30)
    assert len(bench.answered) == 1
    assert bench.batcher.stop(30)


def test_stop_waits_for_the_reply_to_a_lone_request() -> None:
    bench, replying, leave = Bench(), threading.Event(), threading.Event()

    def slow(_requests: Any) -> None:
        replying.set()
        assert leave.wait(30)

    bench.batcher.start()
    lone = threading.Thread(target=bench.submit, args=(bench.request(1, reply=slow),))
    lone.start()
    assert replying.wait(30)
    assert not bench.batcher.stop(0.05)
    leave.set()
    assert bench.batcher.stop(30)
    lone.join(30)


def test_stop_waits_for_the_bad_news_of_a_lone_request() -> None:
    """Whatever goes wrong with it, the count of those that are left comes down."""
    bench = Bench()
    bench.fail = True
    bench.batcher.start()
    bench.submit(bench.request(1))
    assert bench.answered[0].refusal is Refusal.FAILED
    assert bench.batcher.stop(5)


def test_request_that_starts_over_when_the_slots_would_have_left_is_answered() -> None:
    """Its first part is the last to return, on its caller's thread, and of the older model."""
    bench, first_may_return, second_may_return = Bench(slots=1, max_batch_size=2), *events(2)
    bench.batcher.expect({1: 1.0})  # any image that waits is worth another slot

    def run(images: Any, count: int) -> Predictions:
        bench.runs.append(numbers(images))
        if len(bench.runs) > 2:
            return doubled(images, "newer")
        first = bench.runs[-1] == [1, 2]
        assert (first_may_return if first else second_may_return).wait(30)
        return doubled(images, "older" if first else "newer")

    bench.batcher._run = run
    bench.batcher.start()
    [slot] = bench.batcher.threads
    lone = threading.Thread(target=bench.submit, args=(bench.request(1, 2, 3),))
    lone.start()
    wait_until(lambda: len(bench.runs) == 2)
    stopped = []
    stopper = threading.Thread(target=lambda: stopped.append(bench.batcher.stop(30)))
    stopper.start()
    wait_until(lambda: bench.batcher._stopping)
    second_may_return.set()
    wait_until(lambda: bench.batcher._idle or not slot.is_alive())
    first_may_return.set()
    lone.join(30)
    stopper.join(60)
    assert stopped == [True]
    [request] = bench.answered
    assert (results(request), request.result.model) == ([2, 4, 6], "newer")


def events(number: int) -> list[Any]:
    return [threading.Event() for _ in range(number)]


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=60),
    slots=st.integers(1, 3),
    reloads=st.booleans(),
    data=st.data(),
)
def test_every_request_is_answered_once_with_its_own_result(
    sizes: Any, slots: Any, reloads: Any, data: Any
) -> None:
    """Submitted from several threads, in bursts; callers leave and models change on the way."""
    answered = Answered()
    models = iter(range(10_000)) if reloads else None

    def run(images: Any, _count: Any) -> Predictions:
        # The model changes for good after some batches, so that what starts over ends.
        return doubled(images, min(next(models), 20) if models else "model")

    batcher = Batcher(run, slots=slots, max_batch_size=5, max_queue_images=10_000)
    requests = [
        Request(pixels(*[7 * n + i for i in range(size)]), size, None, answered.reply, Caller())
        for n, size in enumerate(sizes)
    ]
    leaving = set(data.draw(st.lists(st.integers(0, len(requests) - 1), max_size=5)))
    batcher.start()
    threads = [
        threading.Thread(target=batcher.submit, args=(requests[start::3],)) for start in range(3)
    ]
    for thread in threads:
        thread.start()
    for index in leaving:
        requests[index].origin.cancelled = True
    for thread in threads:
        thread.join()
    assert batcher.stop(30)
    assert sorted(map(id, answered)) == sorted(map(id, requests))
    for index, request in enumerate(requests):
        if request.refusal is None:
            assert results(request) == twice(*numbers(request.images))
        else:
            assert (request.refusal, index in leaving) == (Refusal.CANCELLED, True)
    assert batcher.queued_images == 0
