"""The batcher stepped by hand: without a model, a network, a thread or a sleep."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from service.serving.request import Refusal
from tests.serving.core import Bench, leave, numbers, results, twice


def test_requests_of_several_callers_share_a_batch_and_get_their_own_results() -> None:
    bench = Bench(max_batch_size=8)
    first, second = bench.request(1, 2), bench.request(3)
    assert bench.submit(first, second) == []
    batch = bench.step()
    assert bench.runs == [[1, 2, 3]]
    assert (results(first), results(second)) == ([2, 4], [6])
    assert first.result is second.result is batch.predictions
    assert (batch.images, first.batch_images) == (3, 3)
    assert bench.batcher.queued_images == bench.batcher.queued_requests == 0


def test_batch_counts_images_not_requests_and_splits_across_requests() -> None:
    bench = Bench(max_batch_size=16)
    one, two = bench.request(1, 2, 3), bench.request(*range(10, 26))
    bench.submit(one, two)
    bench.step()
    assert bench.runs == [[1, 2, 3, *range(10, 23)]]
    assert bench.answered == [one]
    bench.step()
    assert bench.runs[1] == [23, 24, 25]
    assert results(two) == twice(*range(10, 26))


def test_oversize_request_is_split_and_rejoined_in_order() -> None:
    bench = Bench()
    large = bench.request(*range(11))
    bench.submit(large)
    while not bench.answered:
        bench.step()
    assert [len(run) for run in bench.runs] == [4, 4, 3]
    assert results(large) == twice(*range(11))
    assert (large.first, large.batch_images, large.split) == (0, 4, None)


def test_parts_that_come_back_out_of_order_are_rejoined_in_order() -> None:
    bench = Bench()
    large = bench.request(*range(8))
    bench.submit(large)
    first, second = bench.start_batch(), bench.start_batch()
    for batch in (second, first):
        bench.end_batch(batch)
    assert results(large) == twice(*range(8))
    assert (first.finished, second.finished) == ([large], [])


def test_failing_batch_fails_only_its_own_requests(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    doomed, neighbour = bench.request(1, 2, 3, 4), bench.request(5, 6)
    bench.submit(doomed, neighbour)
    bench.fail = True
    bench.step()
    bench.fail = False
    bench.step()
    assert doomed.refusal is Refusal.FAILED
    assert (neighbour.refusal, results(neighbour)) == (None, [10, 12])
    assert bench.told.dropped == [doomed]
    assert "broken engine" in caplog.text


def test_engine_that_fails_every_batch_is_logged_once_a_second(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bench = Bench()
    bench.fail = True
    for _ in range(3):
        bench.submit(bench.request(1))
        bench.step()
    assert len(caplog.records) == 1
    bench.clock.now += 1
    bench.submit(bench.request(1))
    bench.step()
    assert len(caplog.records) == 2


def test_split_request_whose_first_part_fails_is_answered_once_and_its_rest_not_run() -> None:
    bench = Bench()
    large = bench.request(*range(10))
    bench.submit(large)
    bench.fail = True
    bench.step()
    bench.fail = False
    bench.step()
    assert bench.answered == [large]
    assert large.refusal is Refusal.FAILED
    assert len(bench.runs) == 1
    assert bench.batcher.queued_images == 0


def test_cancelled_request_costs_no_inference_and_leaves_its_neighbours() -> None:
    bench = Bench()
    left, stayed = bench.request(1), bench.request(2)
    bench.submit(left, stayed)
    leave(left)
    bench.step()
    assert bench.runs == [[2]]
    assert (left.refusal, results(stayed)) == (Refusal.CANCELLED, [4])
    assert bench.told.dropped == [left]


def test_split_request_cancelled_between_its_parts_is_answered_once() -> None:
    bench = Bench()
    large = bench.request(*range(8))
    bench.submit(large)
    first = bench.start_batch()
    leave(large)
    bench.step()
    bench.end_batch(first)
    assert bench.answered == [large]
    assert large.refusal is Refusal.CANCELLED


def test_expired_request_costs_no_inference() -> None:
    bench = Bench()
    late = bench.request(1, deadline=101.0)
    bench.submit(late)
    bench.clock.now = 101.0
    bench.step()
    assert (bench.runs, late.refusal) == ([], Refusal.EXPIRED)
    assert (bench.told.batches, bench.told.dropped) == ([], [late])


def test_overload_is_the_work_that_waits_while_a_lane_is_full() -> None:
    bench = Bench(max_batch_size=4, max_queue_images=10)
    bench.batcher.expect({1: 0.01, 4: 0.04})
    bench.submit(*[bench.request(number) for number in range(8)])
    assert bench.batcher.overload_s == 0
    bench.submit(bench.request(8))
    assert bench.batcher.overload_s == pytest.approx(9 * 0.01 / 2)
    bench.step()
    assert bench.batcher.overload_s == 0


def test_full_queue_refuses_with_a_hint_and_keeps_what_it_has() -> None:
    bench = Bench(max_queue_images=4, max_batch_size=16)
    bench.batcher.expect({1: 1e-3})
    waiting, refused = bench.request(1, 2, 3), bench.request(4, 5)
    assert bench.submit(waiting, refused) == [refused]
    assert refused.refusal is Refusal.QUEUE_FULL
    assert refused.retry_after_s == pytest.approx(3 * 1e-3 / 2)
    assert bench.batcher.queued_images == 3
    assert bench.answered == bench.told.dropped == [refused]


def test_request_larger_than_the_queue_is_admitted_when_nothing_waits() -> None:
    bench = Bench(max_queue_images=4)
    assert bench.submit(bench.request(*range(9))) == []
    assert bench.submit(bench.request(1, 2))[0].refusal is Refusal.QUEUE_FULL


def test_deadline_that_the_queue_can_not_meet_is_refused_at_once() -> None:
    bench = Bench()
    bench.batcher.expect({1: 1.0})
    assert bench.submit(bench.request(*range(10), deadline=200.0)) == []
    hopeless = bench.request(1, 2, deadline=104.0)  # behind 10 s of work for each of two slots
    assert bench.submit(hopeless) == [hopeless]
    assert hopeless.refusal is Refusal.DEADLINE_UNREACHABLE
    assert hopeless.retry_after_s == pytest.approx(5.0)


def test_admission_follows_what_batches_cost_now() -> None:
    bench = Bench()
    bench.batcher.expect({1: 1.0, 4: 4.0})
    run = bench.run

    def quick(images: bytes | memoryview, count: int) -> Any:
        bench.clock.now += count * 1e-3
        return run(images, count)

    bench.batcher._run = quick
    for _ in range(20):
        bench.submit(*[bench.request(number) for number in range(4)])
        while bench.batcher.queued_images:
            bench.step()
    bench.submit(bench.request(*range(10)))
    assert bench.submit(bench.request(1, 2, deadline=bench.clock.now + 1.0)) == []


def test_small_request_shares_the_next_batch_with_a_large_one_that_came_before() -> None:
    bench = Bench(max_batch_size=8)
    large = bench.request(*range(100, 120))
    singles = [bench.request(number) for number in range(6)]
    bench.submit(large, *singles)
    bench.step()
    assert bench.answered == singles[:4]
    assert bench.runs == [[0, 1, 2, 3, 100, 101, 102, 103]]
    bench.step()
    assert bench.answered == singles
    assert bench.runs[-1] == [4, 5, *range(104, 110)]  # no place stays empty
    bench.step()
    bench.step()
    assert results(large) == twice(*range(100, 120))


def test_large_requests_get_their_half_while_small_ones_keep_coming() -> None:
    bench = Bench(max_batch_size=8)
    large = bench.request(*range(16))
    bench.submit(large)
    for _ in range(4):
        bench.submit(*[bench.request(1) for _ in range(8)])
        bench.step()
    assert large.result


def test_of_an_odd_batch_each_lane_gets_the_larger_half_in_turn() -> None:
    bench = Bench(max_batch_size=5)
    singles = [bench.request(number) for number in range(10)]
    bench.submit(bench.request(*range(20, 30)), *singles)
    for _ in range(2):
        bench.step()
    assert bench.runs == [[0, 1, 2, 20, 21], [3, 4, 22, 23, 24]]


def test_large_requests_do_not_fill_the_queue_of_small_ones() -> None:
    bench = Bench(max_queue_images=20, max_batch_size=8)
    assert bench.submit(bench.request(*range(20))) == []
    assert bench.submit(bench.request(*range(3)))[0].refusal is Refusal.QUEUE_FULL
    assert bench.submit(*[bench.request(number) for number in range(20)]) == []
    assert bench.submit(bench.request(1))[0].refusal is Refusal.QUEUE_FULL


def test_deadline_on_an_idle_server_is_tried_and_a_passed_one_is_not() -> None:
    bench = Bench()
    bench.batcher.expect({1: 1.0})
    assert bench.submit(bench.request(*range(50), deadline=101.0)) == []
    late = bench.request(1, deadline=100.0)
    assert bench.submit(late) == [late]
    assert late.refusal is Refusal.EXPIRED


def test_large_request_fills_the_largest_batch_whatever_an_image_costs() -> None:
    bench = Bench(max_batch_size=64)
    bench.batcher.expect({1: 1.0})
    bench.submit(bench.request(*range(100)))
    assert bench.start_batch().images == 64


def test_small_requests_fill_a_batch_of_the_target_length() -> None:
    bench = Bench(max_batch_size=64)
    bench.batcher.expect({size: 60e-6 + size * 30e-6 for size in (1, 2, 4, 8, 16, 32, 64)})
    bench.submit(*[bench.request(number) for number in range(64)])
    assert bench.start_batch().images == bench.batcher.batch_images == 18


def test_small_request_cut_at_its_half_is_one_part_when_the_rest_fits_after_all() -> None:
    bench = Bench(max_batch_size=64)
    small, large = bench.request(*range(14)), bench.request(*range(100, 117))
    bench.submit(*[bench.request(number) for number in range(200, 220)], small, large)
    batch = bench.step()
    assert [part[1:] for part in batch.parts if part[0] is small] == [(0, 14)]
    assert results(small) == twice(*range(14))
    assert results(large) == twice(*range(100, 117))


def test_split_request_that_two_models_answered_starts_over() -> None:
    bench = Bench()
    large, next_one = bench.request(*range(10)), bench.request(20, 21)
    bench.submit(large, next_one)
    bench.step()
    bench.model = "another model"
    for _ in range(2):
        bench.step()
    assert next_one in bench.answered
    assert large not in bench.answered
    before = len(bench.runs)
    for _ in range(3):
        bench.step()
    assert [image for run in bench.runs[before:] for image in run] == list(range(10))
    assert (bench.answered.count(large), large.result.model) == (1, "another model")
    assert results(large) == twice(*range(10))
    assert large.inference_s == 0.0
    assert bench.batcher.queued_images == 0


def test_split_request_that_one_model_answered_is_run_once() -> None:
    bench = Bench()
    large = bench.request(*range(10))
    bench.submit(large)
    for _ in range(3):
        bench.step()
    assert bench.answered == [large]
    assert len(bench.runs) == 3


def test_each_reply_gets_all_its_requests_of_a_batch_in_one_call() -> None:
    one: list[Any]
    two: list[Any]
    bench, one, two = Bench(max_batch_size=16), [], []
    requests = [bench.request(n, reply=one.append if n % 2 else two.append) for n in range(7)]
    leave(requests[3])
    bench.submit(*requests)
    bench.step()
    assert one == [[requests[1], requests[5], requests[3]]]
    assert two == [requests[::2]]
    assert requests[3].refusal is Refusal.CANCELLED


def test_reply_that_raises_is_logged_and_loses_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(_requests: Any) -> None:
        raise RuntimeError("broken reply")

    bench = Bench(max_batch_size=16, max_queue_images=3)
    doomed, fine = bench.request(1, reply=broken), bench.request(2)
    bench.submit(doomed, fine)
    bench.step()
    assert bench.answered == [fine]
    assert len(bench.told.batches) == 1
    assert "broken reply" in caplog.text
    # Of those refused at once, too.
    bench.submit(*[bench.request(n) for n in range(3)])
    refused, other = bench.request(4, reply=broken), bench.request(5)
    assert bench.submit(refused, other) == [refused, other]
    assert bench.answered[-1] is other


def test_listener_that_raises_is_logged_and_keeps_nobody_from_an_answer(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken:
        def batch(self, batch: Any) -> None:
            raise RuntimeError(f"broken listener of {numbers(batch.pixels())}")

        def refused(self, requests: Any) -> None:
            raise RuntimeError("broken listener of refusals")

    bench = Bench(listener=Broken())
    left, stayed = bench.request(1), bench.request(2)
    leave(left)
    bench.submit(left, stayed)
    bench.step()
    assert bench.answered == [stayed, left]
    assert "broken listener of [2]" in caplog.text
    assert "broken listener of refusals" in caplog.text


def test_replies_come_before_the_listener() -> None:
    bench, order = Bench(), []
    bench.told.batch = lambda batch: order.append("listener")
    bench.submit(bench.request(1, reply=lambda _requests: order.append("reply")))
    bench.step()
    assert order == ["reply", "listener"]


def test_what_was_decided_is_logged_when_it_changes(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(max_batch_size=64)
    with caplog.at_level(logging.INFO):
        bench.batcher.expect({1: 20e-6})
        bench.clock.now += 60
        bench.batcher.expect({1: 21e-6})
        bench.clock.now += 60
        bench.batcher.expect({1: 100e-6})
        bench.batcher.expect({1: 20e-6})  # too soon
    assert [record.getMessage() for record in caplog.records] == [
        "batches of small requests: 30 images, at 20 us an image",
        "batches of small requests: 6 images, at 100 us an image",
    ]
    assert bench.batcher.batch_images == 30
    assert bench.batcher.image_cost_s == pytest.approx(20e-6)
