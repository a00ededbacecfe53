"""The batcher without a model, a network or a sleep: threads only where the test is about them."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batcher import Batcher
from service.job import Batch, Job, Refusal


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A batcher whose engine doubles each byte, and that is stepped by hand."""

    def __init__(self, **settings):
        self.clock = FakeClock()
        self.runs: list[bytes] = []
        self.answered: list[Job] = []
        self.fail = False
        self.source = "engine"
        options = {"slots": 2, "max_batch_size": 4, "max_queue_images": 100, **settings}
        self.batcher = Batcher(self.run, self.complete, image_bytes=1, clock=self.clock, **options)

    def run(self, images, count):
        gathered = bytes(images)
        assert len(gathered) == count
        self.runs.append(gathered)
        if self.fail:
            raise RuntimeError("broken engine")
        return bytes(2 * byte % 256 for byte in gathered), self.source

    def complete(self, batch: Batch) -> None:
        self.answered.extend(batch.finished)

    def submit(self, *jobs: Job) -> list[Job]:
        return self.batcher.submit(jobs)

    def step(self) -> Batch:
        batch = self.batcher.form_batch()
        self.batcher.infer(batch)
        self.batcher.distribute(batch)
        self.complete(batch)
        return batch


def job(*images: int, deadline: float | None = None) -> Job:
    return Job(memoryview(bytes(images)), len(images), deadline)


def test_jobs_of_several_callers_share_a_batch_and_get_their_own_results():
    bench = Bench(max_batch_size=8)
    first, second = job(1, 2), job(3)
    assert bench.submit(first, second) == []
    batch = bench.step()
    assert bench.runs == [b"\1\2\3"]
    assert (first.result, second.result) == (b"\2\4", b"\6")
    assert (batch.images, batch.source, first.batch_images) == (3, "engine", 3)
    assert bench.batcher.queued_images == 0


def test_batch_counts_images_not_requests_and_splits_across_jobs():
    bench = Bench()
    jobs = [job(1, 2, 3), job(4, 5, 6)]
    bench.submit(*jobs)
    bench.step()
    assert bench.runs == [b"\1\2\3\4"]
    assert bench.answered == [jobs[0]]
    bench.step()
    assert bench.runs[1] == b"\5\6"
    assert jobs[1].result == b"\x08\x0a\x0c"


def test_oversize_job_is_split_and_rejoined_in_order():
    bench = Bench()
    large = job(*range(11))
    bench.submit(large)
    while not bench.answered:
        bench.step()
    assert [len(run) for run in bench.runs] == [4, 4, 3]
    assert large.result == bytes(2 * i for i in range(11))


def test_pieces_that_come_back_out_of_order_are_rejoined_in_order():
    bench = Bench()
    large = job(*range(8))
    bench.submit(large)
    first, second = bench.batcher.form_batch(), bench.batcher.form_batch()
    for batch in (second, first):
        bench.batcher.infer(batch)
        bench.batcher.distribute(batch)
    assert large.result == bytes(2 * i for i in range(8))
    assert (first.finished, second.finished) == ([large], [])


def test_failing_batch_fails_only_its_own_jobs():
    bench = Bench()
    doomed, neighbour = job(1, 2, 3, 4), job(5, 6)
    bench.submit(doomed, neighbour)
    bench.fail = True
    batch = bench.step()
    bench.fail = False
    bench.step()
    assert isinstance(batch.error, RuntimeError)
    assert doomed.refusal is Refusal.FAILED
    assert (neighbour.refusal, neighbour.result) == (None, b"\x0a\x0c")


def test_split_job_whose_first_piece_fails_is_answered_once_and_its_rest_not_run():
    bench = Bench()
    large = job(*range(10))
    bench.submit(large)
    bench.fail = True
    bench.step()
    bench.fail = False
    bench.step()
    assert bench.answered == [large]
    assert large.refusal is Refusal.FAILED
    assert len(bench.runs) == 1
    assert bench.batcher.queued_images == 0


def test_cancelled_job_costs_no_inference_and_leaves_its_neighbours():
    bench = Bench()
    left, stayed = job(1), job(2)
    bench.submit(left, stayed)
    left.cancelled = True
    bench.step()
    assert bench.runs == [b"\2"]
    assert (left.refusal, stayed.result) == (Refusal.CANCELLED, b"\4")


def test_split_job_cancelled_between_its_pieces_is_answered_once():
    bench = Bench()
    large = job(*range(8))
    bench.submit(large)
    first = bench.batcher.form_batch()
    large.cancelled = True
    bench.step()
    bench.batcher.infer(first)
    bench.batcher.distribute(first)
    bench.complete(first)
    assert bench.answered == [large]
    assert large.refusal is Refusal.CANCELLED


def test_expired_job_costs_no_inference():
    bench = Bench()
    late = job(1, deadline=101.0)
    bench.submit(late)
    bench.clock.now = 101.0
    bench.step()
    assert (bench.runs, late.refusal) == ([], Refusal.EXPIRED)


def test_full_queue_refuses_with_a_hint_and_keeps_what_it_has():
    bench = Bench(max_queue_images=4)
    bench.batcher.tune(1e-3)
    waiting, refused = job(1, 2, 3), job(4, 5)
    assert bench.submit(waiting, refused) == [refused]
    assert refused.refusal is Refusal.QUEUE_FULL
    assert refused.retry_after_s == pytest.approx(3 * 1e-3 / 2)
    assert bench.batcher.queued_images == 3


def test_job_larger_than_the_queue_is_admitted_when_nothing_waits():
    bench = Bench(max_queue_images=4)
    assert bench.submit(job(*range(9))) == []
    assert bench.submit(job(1, 2))[0].refusal is Refusal.QUEUE_FULL


def test_deadline_that_the_queue_can_not_meet_is_refused_at_once():
    bench = Bench()
    bench.batcher.tune(1.0)
    assert bench.submit(job(*range(10), deadline=200.0)) == []
    hopeless = job(1, 2, deadline=104.0)  # behind 10 s of work for each of two slots
    assert bench.submit(hopeless) == [hopeless]
    assert hopeless.refusal is Refusal.DEADLINE_UNREACHABLE


def test_small_job_shares_the_next_batch_with_a_large_one_that_came_before():
    bench = Bench(max_batch_size=8)
    large = job(*range(100, 120))
    singles = [job(number) for number in range(6)]
    bench.submit(large, *singles)
    bench.step()
    assert bench.answered == singles[:4]
    assert bench.runs == [bytes([0, 1, 2, 3, 100, 101, 102, 103])]
    bench.step()
    assert bench.answered == singles
    assert bench.runs[-1] == bytes([4, 5, *range(104, 110)])  # no place stays empty
    bench.step()
    bench.step()
    assert large.result == bytes(2 * number % 256 for number in range(100, 120))


def test_large_jobs_get_their_half_while_small_ones_keep_coming():
    bench = Bench(max_batch_size=8)
    large = job(*range(16))
    bench.submit(large)
    for _ in range(4):
        bench.submit(*[job(1) for _ in range(8)])
        bench.step()
    assert large.result


def test_of_an_odd_batch_each_lane_gets_the_larger_half_in_turn():
    bench = Bench(max_batch_size=5)
    singles = [job(number) for number in range(10)]
    bench.submit(job(*range(20, 30)), *singles)
    for _ in range(2):
        bench.step()
    assert bench.runs == [bytes([0, 1, 2, 20, 21]), bytes([3, 4, 22, 23, 24])]


def test_large_jobs_do_not_fill_the_queue_of_small_ones():
    bench = Bench(max_queue_images=20, max_batch_size=8)
    assert bench.submit(job(*range(20))) == []
    assert bench.submit(job(*range(3)))[0].refusal is Refusal.QUEUE_FULL
    assert bench.submit(*[job(number) for number in range(20)]) == []
    assert bench.submit(job(1))[0].refusal is Refusal.QUEUE_FULL


def test_deadline_on_an_idle_server_is_tried_and_a_passed_one_is_not():
    bench = Bench()
    bench.batcher.tune(1.0)
    assert bench.submit(job(*range(50), deadline=101.0)) == []
    late = job(1, deadline=100.0)
    assert bench.submit(late) == [late]
    assert late.refusal is Refusal.EXPIRED


@pytest.mark.parametrize(
    ("seconds_per_image", "batch"), [(1.0, 1), (40e-6, 16), (18e-6, 32), (1e-9, 64)]
)
def test_batch_size_follows_the_cost_of_an_image(seconds_per_image, batch):
    bench = Bench(max_batch_size=64)
    bench.batcher.tune(seconds_per_image)
    bench.submit(*[job(number) for number in range(64)])
    assert bench.batcher.form_batch().images == batch


def test_large_job_fills_the_largest_batch_whatever_an_image_costs():
    bench = Bench(max_batch_size=64)
    bench.batcher.tune(1.0)
    bench.submit(job(*range(100)))
    assert bench.batcher.form_batch().images == 64


class GatedBench:
    """A started batcher whose engine waits for permission, to see which slots run."""

    def __init__(self, **settings):
        self.running = threading.Semaphore(0)
        self.gate = threading.Semaphore(0)
        self.answered: list[Job] = []
        self.all_answered = threading.Condition()
        self.sizes: list[int] = []
        options = {"slots": 2, "max_batch_size": 4, "max_queue_images": 1000, **settings}
        self.batcher = Batcher(self.run, self.complete, image_bytes=1, **options)
        self.batcher.start()

    def run(self, images, count):
        self.sizes.append(count)
        self.running.release()
        assert self.gate.acquire(timeout=30)
        return bytes(images), None

    def complete(self, batch):
        with self.all_answered:
            self.answered.extend(batch.finished)
            self.all_answered.notify_all()

    def submit_aside(self, lone):
        """From a thread of its own, which a lone job keeps until it is answered."""
        threading.Thread(target=self.batcher.submit, args=([lone],), daemon=True).start()

    def wait_for(self, count):
        with self.all_answered:
            assert self.all_answered.wait_for(lambda: len(self.answered) >= count, timeout=30)


def test_second_slot_stays_asleep_until_a_full_batch_waits():
    bench = GatedBench()
    bench.submit_aside(job(1))
    assert bench.running.acquire(timeout=30)
    bench.batcher.submit([job(2), job(3), job(4)])
    # Three wait: the second slot must not take them.
    assert not bench.running.acquire(timeout=0.2)
    bench.batcher.submit([job(5)])
    assert bench.running.acquire(timeout=30)
    bench.gate.release(10)
    bench.wait_for(5)
    assert bench.sizes == [1, 4]
    assert bench.batcher.stop(30)


def test_second_slot_wakes_when_a_queue_shorter_than_a_batch_is_full():
    bench = GatedBench(max_batch_size=100, max_queue_images=3)
    bench.submit_aside(job(1))
    assert bench.running.acquire(timeout=30)
    bench.batcher.submit([job(2), job(3), job(4)])
    assert bench.running.acquire(timeout=30)
    bench.gate.release(10)
    bench.wait_for(4)
    assert bench.batcher.stop(30)


def test_stop_answers_what_was_admitted_and_refuses_the_rest():
    bench = GatedBench()
    jobs = [job(i) for i in range(20)]
    bench.batcher.submit(jobs)
    bench.gate.release(100)
    assert bench.batcher.stop(30)
    assert sorted(j.result for j in bench.answered) == sorted(bytes([i]) for i in range(20))
    late = job(1)
    assert bench.batcher.submit([late]) == [late]
    assert late.refusal is Refusal.STOPPED


def test_stop_reports_what_did_not_finish_within_the_grace():
    bench = GatedBench()
    bench.submit_aside(job(1))
    assert bench.running.acquire(timeout=30)
    assert not bench.batcher.stop(0.01)
    bench.gate.release()
    bench.wait_for(1)


def test_batch_that_is_not_full_waits_for_company_when_asked_to():
    clock = FakeClock()
    ran = threading.Event()

    def run(images, count):
        ran.set()
        return bytes(images), None

    batcher = Batcher(
        run, lambda batch: None, image_bytes=1, slots=1, max_batch_size=2, max_queue_images=9,
        max_queue_delay_s=60.0, clock=clock,
    )  # fmt: skip
    batcher.start()
    batcher.submit([job(1)])
    assert not ran.wait(0.2)
    batcher.submit([job(2)])  # full: nothing to wait for
    assert ran.wait(30)
    assert batcher.stop(30)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 13), min_size=1, max_size=60),
    slots=st.integers(1, 3),
    data=st.data(),
)
def test_every_job_is_answered_once_with_its_own_result(sizes, slots, data):
    """Submitted from several threads, in bursts, with some callers leaving on the way."""
    answered: list[Job] = []
    batcher = Batcher(
        lambda images, count: (bytes(images), None),
        lambda batch: answered.extend(batch.finished),
        image_bytes=1, slots=slots, max_batch_size=5, max_queue_images=10_000,
    )  # fmt: skip
    jobs = [job(*[(7 * n + i) % 256 for i in range(size)]) for n, size in enumerate(sizes)]
    leaving = set(data.draw(st.lists(st.integers(0, len(jobs) - 1), max_size=5)))
    batcher.start()
    threads = [
        threading.Thread(target=batcher.submit, args=(jobs[start::3],)) for start in range(3)
    ]
    for thread in threads:
        thread.start()
    for index in leaving:
        jobs[index].cancelled = True
    for thread in threads:
        thread.join()
    assert batcher.stop(30)
    assert sorted(map(id, answered)) == sorted(map(id, jobs))
    for index, done in enumerate(jobs):
        if done.refusal is None:
            assert done.result == bytes(done.images)
        else:
            assert (done.refusal, index in leaving) == (Refusal.CANCELLED, True)
    assert batcher.queued_images == 0


def test_split_job_that_two_models_answered_starts_over():
    bench = Bench()
    large, next_one = job(*range(10)), job(20, 21)
    bench.submit(large, next_one)
    bench.step()
    bench.source = "another engine"
    for _ in range(2):
        bench.step()
    assert next_one in bench.answered
    assert large not in bench.answered
    before = len(bench.runs)
    for _ in range(3):
        bench.step()
    assert b"".join(bench.runs[before:]) == bytes(range(10))
    assert (bench.answered.count(large), large.source) == (1, "another engine")
    assert large.result == bytes(2 * number for number in range(10))
    assert bench.batcher.queued_images == 0


def test_split_job_that_one_model_answered_is_run_once():
    bench = Bench()
    large = job(*range(10))
    bench.submit(large)
    for _ in range(3):
        bench.step()
    bench.source = "another engine"
    assert bench.answered == [large]
    assert len(bench.runs) == 3


def test_lone_small_job_runs_on_the_thread_that_brings_it():
    bench = Bench()
    threads = []
    bench.batcher._complete = lambda batch: threads.append(threading.current_thread())
    bench.batcher.start()
    single = job(7)
    assert bench.submit(single) == []
    assert threads == [threading.current_thread()]
    assert single.result == b"\x0e"
    assert bench.batcher.stop(5)


def test_job_beside_a_lone_one_is_woken_for_when_that_ends():
    bench, entered, leave = Bench(slots=1), threading.Event(), threading.Event()
    run = bench.batcher._run

    def slow(images, count):
        entered.set()
        assert leave.wait(10)
        return run(images, count)

    bench.batcher._run = slow
    bench.batcher.start()
    first, second = job(1), job(2)
    lone = threading.Thread(target=bench.submit, args=(first,))
    lone.start()
    assert entered.wait(10)
    bench.submit(second)
    leave.set()
    lone.join(10)
    assert bench.batcher.stop(5)
    assert (first.result, second.result) == (b"\2", b"\4")


def test_what_comes_while_a_slot_answers_is_run_by_another():
    bench, answering, answered, leave = Bench(), *(threading.Event() for _ in range(3))
    complete = bench.batcher._complete

    def slow(batch):
        if not answering.is_set():
            answering.set()
            assert leave.wait(10)
        complete(batch)
        answered.set()

    bench.batcher._complete = slow
    bench.batcher.start()
    # Two each: neither is a lone one, which would be answered right here.
    early, late = [job(1), job(2)], [job(3), job(4)]
    bench.submit(*early)
    assert answering.wait(10)
    bench.submit(*late)
    assert answered.wait(10)
    assert bench.answered == late
    leave.set()
    assert bench.batcher.stop(5)
    assert bench.answered == late + early


@pytest.mark.parametrize("broken", [False, True])
def test_what_waited_while_a_slot_inferred_is_run_after_its_answer(broken):
    bench = GatedBench()
    complete = bench.batcher._complete

    def failing_at_first(batch):
        complete(batch)
        if broken and len(bench.answered) == 2:
            raise RuntimeError("a bug")

    bench.batcher._complete = failing_at_first
    bench.batcher.submit([job(1), job(2)])
    assert bench.running.acquire(timeout=30)
    bench.batcher.submit([job(3), job(4)])  # fewer than a second slot wakes for
    bench.gate.release(10)
    bench.wait_for(4)
    assert bench.sizes == [2, 2]
    assert bench.batcher.stop(30)


def test_stop_waits_for_a_lone_job():
    bench, entered, leave = Bench(), threading.Event(), threading.Event()

    def slow(images, count):
        entered.set()
        leave.wait(10)
        return bytes(count), "engine"

    bench.batcher._run = slow
    bench.batcher.start()
    lone = threading.Thread(target=bench.submit, args=(job(1),))
    lone.start()
    assert entered.wait(10)
    assert not bench.batcher.stop(0.1)
    leave.set()
    lone.join(10)
    assert len(bench.answered) == 1


def test_small_job_cut_at_its_half_is_one_part_when_the_rest_fits_after_all():
    bench = Bench(max_batch_size=64)
    small, large = job(*range(14)), job(*range(100, 117))
    bench.submit(*[job(number) for number in range(200, 220)], small, large)
    batch = bench.step()
    assert [part[1:] for part in batch.parts if part[0] is small] == [(0, 14)]
    assert small.result == bytes(2 * number for number in range(14))
    assert large.result == bytes(2 * number % 256 for number in range(100, 117))
