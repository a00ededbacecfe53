"""The decoder's queue: what is bounded, who goes first, and that every call gets its outcome."""

from __future__ import annotations

import threading
import time

import pytest
from PIL import Image

from service import decoder as module
from service.call import Call
from service.decoder import Decoder
from service.images import Decoded
from service.job import Refusal
from service.status import Status
from tests.conftest import SAMPLES, wait_until
from tests.presentations import saved

SEVEN = (SAMPLES / "7.png").read_bytes()
# 700 bytes, and the dearest of files: 16 megapixels with transparency.
DEAR = saved(Image.new("RGBA", (4096, 4096)), "WEBP", lossless=True)


@pytest.fixture
def decode():
    """A decoder that is not started yet, and the calls with their outcomes in order."""
    ended = []
    decoder = Decoder(lambda call, outcome: ended.append((call, outcome)))
    yield decoder, ended
    if not decoder.thread.ident:
        decoder.start()
    assert decoder.stop(60)


def call(deadline=None):
    return Call(b"", time.monotonic(), deadline)


def outcome_of(ended, wanted):
    wait_until(lambda: any(one is wanted for one, _ in ended), timeout_s=60)
    return next(outcome for one, outcome in ended if one is wanted)


def test_small_file_waits_for_one_dear_file_at_most_and_the_dear_are_answered_too(decode):
    decoder, ended = decode
    dear = [call() for _ in range(2)]
    for one in dear:
        assert decoder.submit(one, [DEAR] * 4) is None
    decoder.start()
    wait_until(lambda: decoder._large.calls and decoder._large.calls[0].decoded)
    small = call()
    assert decoder.submit(small, [SEVEN]) is None
    assert isinstance(outcome_of(ended, small), Decoded)
    assert ended[0][0] is small
    assert decoder._large.calls[0].decoded <= 2
    assert [type(outcome_of(ended, one)) for one in dear] == [Decoded, Decoded]


def test_large_files_get_their_half_while_small_ones_never_end(decode, monkeypatch):
    decoder, ended = decode
    monkeypatch.setattr(module, "SMALL_PIXELS", 2 * module.FILE_PIXELS)
    large = call()
    decoder.submit(large, [saved(Image.new("L", (400, 400)), "PNG")])
    small = [call() for _ in range(100)]
    for one in small:
        decoder.submit(one, [SEVEN])
    decoder.start()
    outcome_of(ended, small[-1])
    assert [one for one, _ in ended].index(large) == 1
    assert [one for one, _ in ended if one is not large] == small


def test_dear_files_are_refused_by_their_pixels_with_a_hint_of_the_time_they_need(decode):
    decoder, ended = decode
    first = call()
    decoder.submit(first, [DEAR])
    decoder.start()
    outcome_of(ended, first)  # what a pixel costs is known from here on
    calls = [call() for _ in range(4)]
    for one in calls:
        assert decoder.submit(one, [DEAR] * 4) is None
    assert outcome_of(ended, calls[-1]) is Refusal.QUEUE_FULL
    assert calls[-1].retry_after_s > 0.1
    late = call(time.monotonic() + 0.05)
    assert decoder.submit(late, [DEAR]) is None
    assert outcome_of(ended, late) in (Refusal.DEADLINE_UNREACHABLE, Refusal.EXPIRED)
    for one in calls:
        one.cancelled = True  # after the file that is being decoded
    assert outcome_of(ended, calls[0]) is Refusal.CANCELLED


def test_deadline_that_the_queue_can_not_meet_is_refused_at_once(decode):
    decoder, ended = decode
    decoder._seconds_per_pixel = 1.0
    decoder.submit(ahead := call(), [SEVEN])
    decoder.submit(hurried := call(time.monotonic() + 60), [SEVEN])
    decoder.submit(patient := call(), [SEVEN])
    decoder.start()
    assert isinstance(outcome_of(ended, patient), Decoded)
    assert isinstance(outcome_of(ended, ahead), Decoded)
    assert outcome_of(ended, hurried) is Refusal.DEADLINE_UNREACHABLE
    assert hurried.retry_after_s == module.FILE_PIXELS


@pytest.mark.parametrize(
    ("files", "admitted"),
    [
        ([b""], module.MAX_WAITING_CALLS),
        ([b""] * 4096, module.MAX_WAITING_FILES // 4096),
        ([bytes(2**22)], module.MAX_WAITING_BYTES // 2**22),
    ],
    ids=["calls", "files", "bytes"],
)
def test_what_waits_is_bounded_and_room_comes_back(decode, files, admitted):
    decoder, ended = decode
    decoder._seconds_per_pixel = 1e-6
    assert [decoder.submit(call(), files) for _ in range(admitted)] == [None] * admitted
    refused = call()
    assert decoder.submit(refused, files) is Refusal.QUEUE_FULL
    assert refused.retry_after_s == pytest.approx(admitted * len(files) * module.FILE_PIXELS / 1e6)
    decoder.start()
    wait_until(lambda: len(ended) == admitted, timeout_s=60)
    assert all(isinstance(outcome, Status) for _, outcome in ended)
    assert decoder.submit(call(), files) is None


def test_request_beyond_every_bound_is_admitted_when_nothing_waits(decode):
    decoder, ended = decode
    decoder.start()
    decoder.submit(one := call(), [DEAR] * 5)
    assert isinstance(outcome_of(ended, one), Status)
    many = [SEVEN] * (module.MAX_WAITING_FILES + 1)
    one = call()
    one.cancelled = True
    wait_until(lambda: decoder.submit(one, many) is None)
    assert outcome_of(ended, one) is Refusal.CANCELLED


def test_request_that_claims_too_much_takes_no_more_room_than_the_largest(decode):
    decoder, ended = decode
    claiming = call()
    claiming.cancelled = True
    decoder.submit(claiming, [DEAR] * 100)
    decoder.submit(other := call(), [DEAR])
    decoder.start()
    assert isinstance(outcome_of(ended, other), Decoded)


def test_calls_that_race_with_the_end_are_all_told(decode):
    decoder, ended = decode
    decoder.start()
    taken, refused, running = [], [], threading.Event()

    def knock():
        while Refusal.STOPPED not in refused:
            refusal = decoder.submit(one := call(), [SEVEN])
            if refusal is None:
                taken.append(one)
            else:
                refused.append(refusal)
            running.set()

    thread = threading.Thread(target=knock)
    thread.start()
    running.wait(60)
    assert decoder.stop(60)
    thread.join(60)
    assert not thread.is_alive()
    assert [one for one, _ in ended] == taken
