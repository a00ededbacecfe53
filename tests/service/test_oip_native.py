"""ModelInfer's bursts over the native front: what is read where, and what is not read at all."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from digits.v1 import digits_pb2
from service.call import Call
from service.job import Refusal
from service.metrics import Metrics
from service.oip.native import NativeInference
from service.oip.reader import SMALL_BYTES, Reader
from service.oip.statistics import Statistics
from tests.conftest import wait_until
from tests.service.test_oip import BLANK, infer

LARGE = infer(BLANK.repeat(50, 0)).SerializeToString()


class HeldClassify:
    """Takes calls and remembers on which thread it did."""

    model = SimpleNamespace(ref=digits_pb2.ModelRef(name="digits", version="1"))

    def __init__(self):
        self.taken: list[tuple[str, Call]] = []
        self.refused: list[Call] = []

    def receive(self, calls):
        self.taken += [(threading.current_thread().name, call) for call in calls]

    def refuse(self, calls):
        self.refused += calls


@pytest.fixture
def classify():
    return HeldClassify()


@pytest.fixture
def inference(classify):
    return NativeInference(
        classify, reader=Reader(classify, 4096), statistics=Statistics(), metrics=Metrics(),
        listeners=[],
    )  # fmt: skip


def calls_of(inference, requests, remaining=None):
    """A burst of calls, made as the native front makes them."""
    front = SimpleNamespace(fail=lambda *_: True)
    transport = SimpleNamespace(calls={}, front=front)
    make = inference.route(list).make
    return [
        make(transport, number, request, time.monotonic(), ((), "peer", remaining))
        for number, request in enumerate(requests)
    ]


def test_a_burst_is_read_on_its_thread_only_as_far_as_that_is_quick(classify, inference):
    """Whoever takes calls from the front takes Classify's as well."""
    small = infer(BLANK, "FP32", raw=False).SerializeToString()
    calls = calls_of(inference, [small] * 30 + [LARGE] + [small] * 30)
    inference.receive(calls)
    wait_until(lambda: len(classify.taken) == 61)
    here = [call for thread, call in classify.taken if not thread.startswith("oip-reader")]
    assert len(here) == SMALL_BYTES // len(small)
    assert calls[30] not in here
    assert sorted(id(call) for _, call in classify.taken) == sorted(map(id, calls))


def test_a_large_request_whose_caller_has_left_is_not_read(classify, inference):
    [left], [late] = calls_of(inference, [LARGE]), calls_of(inference, [LARGE], remaining=0.0)
    left.cancelled = True
    inference.receive([left, late])
    wait_until(lambda: len(classify.refused) == 2)
    assert (left.refusal, late.refusal) == (Refusal.CANCELLED, Refusal.EXPIRED)
    assert not classify.taken
