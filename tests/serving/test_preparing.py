"""The preparer: what is bounded, who goes first, and that every request gets its outcome."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image

from service.serving import pictures, preparing
from service.serving.pictures import Pictures
from service.serving.preparing import Preparer
from service.serving.request import Refusal, Request
from tests.conftest import SAMPLES, wait_until
from tests.presentations import saved
from tests.serving.core import Answered, Caller, Told, leave

SEVEN = (SAMPLES / "7.png").read_bytes()
# 64 KiB, and the dearest of files: 16 megapixels with transparency.
DEAR = saved(Image.new("RGBA", (4096, 4096)), "PNG")


DECODED = "decoded"


class Bench:
    """A decoder that is not started yet; outcomes are kept in order."""

    def __init__(self) -> None:
        self.told, self.replied = Told(), Answered()
        self.ended: list[tuple[Request, object]] = []
        self.preparer = Preparer(self.told)

    def request(self, deadline: Any = None) -> Request:
        return Request(b"", 0, deadline, self.refused, Caller())

    def passed_on(self, requests: Any) -> None:
        self.ended += [(request, DECODED) for request in requests]

    def refused(self, requests: Any) -> None:
        self.ended += [(request, request.refusal) for request in requests]

    def prepare(self, request: Any, files: Any) -> None:
        self.preparer.submit(request, Pictures(files, name="files"), self.passed_on)

    def submit(self, files: Any, deadline: Any = None) -> Request:
        request = self.request(deadline)
        self.prepare(request, files)
        return request

    def outcome(self, wanted: Any) -> Any:
        wait_until(lambda: any(one is wanted for one, _ in self.ended), timeout_s=60)
        return next(outcome for one, outcome in self.ended if one is wanted)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    if not bench.preparer.thread.ident:
        bench.preparer.start()
    assert bench.preparer.stop(60)


def test_small_file_waits_for_one_dear_file_at_most_and_the_dear_are_answered_too(
    bench: Bench,
) -> None:
    dear = [bench.submit([DEAR] * 4) for _ in range(2)]
    large = bench.preparer._large
    bench.preparer.start()
    wait_until(lambda: large.requests and large.requests[0].done)
    small = bench.submit([SEVEN])
    assert bench.outcome(small) is DECODED
    assert bench.ended[0][0] is small
    assert large.requests[0].done <= 2
    assert [bench.outcome(one) for one in dear] == [DECODED, DECODED]


def test_large_files_get_their_half_while_small_ones_never_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "SMALL_PIXELS", 2 * preparing.STEP_PIXELS)
    large = bench.submit([saved(Image.new("L", (400, 400)), "PNG")])
    small = [bench.submit([SEVEN]) for _ in range(100)]
    bench.preparer.start()
    bench.outcome(small[-1])
    assert [one for one, _ in bench.ended].index(large) == 1
    assert [one for one, _ in bench.ended if one is not large] == small


def test_dear_files_are_refused_by_their_pixels_with_a_hint_of_the_time_they_need(
    bench: Bench,
) -> None:
    bench.preparer._seconds_per_pixel = 1e-6
    requests = [bench.submit([DEAR] * 4) for _ in range(3)]
    for one in requests[1:2]:
        leave(one)
    bench.preparer.start()
    # Two of the largest fill the lane.
    assert bench.outcome(requests[2]) is Refusal.QUEUE_FULL
    assert requests[2].retry_after_s > 60
    leave(requests[0])  # after the file that is being decoded
    assert bench.outcome(requests[0]) in (Refusal.CANCELLED, DECODED)
    assert bench.outcome(requests[1]) is Refusal.CANCELLED
    wait_until(lambda: bench.told.dropped[:1] == [requests[2]])


def test_what_a_pixel_costs_is_learned_from_the_files_that_are_decoded(
    bench: Bench, monkeypatch: Any
) -> None:
    seconds = iter(range(0, 10_000, 3))
    monkeypatch.setattr("service.serving.preparing.time.monotonic", lambda: float(next(seconds)))
    bench.preparer._learn(preparing.STEP_PIXELS, 3.0)
    assert bench.preparer._seconds_per_pixel == pytest.approx(3.0 / preparing.STEP_PIXELS)
    before = bench.preparer._seconds_per_pixel
    bench.preparer._learn(preparing.STEP_PIXELS, 0.0)
    assert 0.99 * before < bench.preparer._seconds_per_pixel < before


def test_deadline_that_the_queue_can_not_meet_is_refused_at_once(bench: Bench) -> None:
    bench.preparer._seconds_per_pixel = 1.0
    ahead = bench.submit([SEVEN])
    hurried = bench.submit([SEVEN], time.monotonic() + 600)
    patient = bench.submit([SEVEN])
    bench.preparer.start()
    assert bench.outcome(patient) is DECODED
    assert bench.outcome(ahead) is DECODED
    assert bench.outcome(hurried) is Refusal.DEADLINE_UNREACHABLE
    assert hurried.retry_after_s == preparing.STEP_PIXELS


def test_expired_request_is_not_decoded(bench: Bench) -> None:
    late = bench.submit([SEVEN], time.monotonic() - 1)
    bench.preparer.start()
    assert bench.outcome(late) is Refusal.EXPIRED
    wait_until(lambda: bench.told.dropped == [late])


@pytest.mark.parametrize(
    ("files", "admitted"),
    [
        ([b""], preparing.MAX_WAITING_REQUESTS),
        ([b""] * 4096, preparing.MAX_WAITING_STEPS // 4096),
        ([bytes(2**22)], preparing.MAX_WAITING_BYTES // 2**22),
    ],
    ids=["requests", "files", "bytes"],
)
def test_what_waits_is_bounded_and_room_comes_back(bench: Bench, files: Any, admitted: Any) -> None:
    bench.preparer._seconds_per_pixel = 1e-6
    for _ in range(admitted):
        bench.submit(files)
    assert bench.ended == []
    refused = bench.submit(files)
    assert bench.ended == [(refused, Refusal.QUEUE_FULL)]
    assert refused.retry_after_s == pytest.approx(
        admitted * len(files) * preparing.STEP_PIXELS / 1e6
    )
    bench.preparer.start()
    wait_until(lambda: len(bench.ended) == 1 + admitted, timeout_s=60)
    assert {outcome for _, outcome in bench.ended[1:]} == {Refusal.INVALID}
    wait_until(lambda: not bench.preparer._requests)
    assert bench.outcome(bench.submit(files)) is Refusal.INVALID


def test_request_beyond_every_bound_is_admitted_when_nothing_waits(bench: Bench) -> None:
    bench.preparer.start()
    assert bench.outcome(bench.submit([DEAR] * 5)) is Refusal.INVALID
    wait_until(lambda: not bench.preparer._requests)
    many = bench.request()
    leave(many)
    bench.prepare(many, [SEVEN] * (preparing.MAX_WAITING_STEPS + 1))
    assert bench.outcome(many) is Refusal.CANCELLED


def test_request_that_claims_too_much_takes_no_more_room_than_the_largest(bench: Bench) -> None:
    claiming = bench.request()
    leave(claiming)
    bench.prepare(claiming, [DEAR] * 100)
    other = bench.submit([DEAR])
    bench.preparer.start()
    assert bench.outcome(other) is DECODED


def test_requests_that_race_with_the_end_are_all_told(bench: Bench) -> None:
    bench.preparer.start()
    submitted: list[Any]
    submitted, running = [], threading.Event()

    def knock() -> None:
        while not submitted or submitted[-1].refusal is not Refusal.STOPPED:
            submitted.append(bench.submit([SEVEN]))
            running.set()

    thread = threading.Thread(target=knock)
    thread.start()
    assert running.wait(60)
    assert bench.preparer.stop(60)
    thread.join(60)
    assert not thread.is_alive()
    assert sorted(id(one) for one, _ in bench.ended) == sorted(map(id, submitted))


@pytest.mark.parametrize(
    ("error", "refusal", "logged"),
    [
        (RuntimeError("a bug of ours"), Refusal.FAILED, "a bug of ours"),
        (MemoryError("no memory"), Refusal.NO_MEMORY, "memory ran out"),
    ],
)
@pytest.mark.parametrize("step", ["grey", "examine_grey", "pixels_claimed"])
def test_bug_or_lack_of_memory_is_not_the_fault_of_the_file(
    bench: Bench,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    step: str,
    error: Any,
    refusal: Any,
    logged: str,
) -> None:
    def fails(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(pictures, step, fails)
        request = bench.submit([SEVEN])
        bench.preparer.start()
        assert bench.outcome(request) is refusal
    wait_until(lambda: bench.told.dropped == [request])
    assert logged in caplog.text
    assert bench.outcome(bench.submit([SEVEN])) is DECODED, "the thread lives on"


@pytest.mark.parametrize("step", ["digits.files.Image.open", "PIL.ImageFile.ImageFile.load"])
def test_lack_of_memory_inside_pillow_is_not_the_fault_of_the_file(
    monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(step, fails)
    with pytest.raises(MemoryError):
        Pictures([SEVEN]).do(0)


def test_what_takes_the_images_may_raise_and_the_thread_lives_on(
    bench: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_requests: Any) -> None:
        raise RuntimeError("broken submit")

    bench.passed_on = fails
    bench.submit([SEVEN])
    bench.preparer.start()
    wait_until(lambda: not bench.preparer._requests)
    assert "broken submit" in caplog.text
    del bench.passed_on
    assert bench.outcome(bench.submit([SEVEN])) is DECODED
