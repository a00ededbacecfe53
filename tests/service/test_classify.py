"""The hot path with an engine that fails: what callers see, and that nobody else suffers."""

from __future__ import annotations

import threading
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from grpc import StatusCode

from digits.v1 import digits_pb2
from service import wire
from service.batcher import Batcher
from service.call import Call
from service.classify import Classify
from service.metrics import Metrics


class FakeCall(Call):
    def __init__(self, count):
        request = digits_pb2.ClassifyRequest(pixels=bytes([count]) * (784 * count))
        super().__init__(request.SerializeToString(), received=0.0, deadline=None)
        self.ended = threading.Event()
        self.response = self.status = None

    def respond(self, response):
        assert not self.ended.is_set(), "a call was answered twice"
        self.response = digits_pb2.ClassifyResponse.FromString(response)
        self.ended.set()
        return True

    def fail(self, status):
        assert not self.ended.is_set(), "a call was answered twice"
        self.status = status
        self.ended.set()
        return True


class Departed(FakeCall):
    """Its caller leaves while it is answered."""

    def respond(self, response):
        super().respond(response)
        return False


class FakeEngine:
    """Fails on a batch that holds an image of a given ink."""

    poison = None

    def run(self, images):
        if self.poison is not None and (images == self.poison).any():
            raise RuntimeError("secret internals")
        return np.full((len(images), 10), 0.1, np.float32)


@pytest.fixture
def metrics():
    return Metrics()


@pytest.fixture
def classify(metrics):
    made = partial(Batcher, slots=1, max_batch_size=4, max_queue_images=100)
    hot_path = Classify(made, max_images_per_request=8, metrics=metrics)
    engine = FakeEngine()
    ref = digits_pb2.ModelRef(version="1")
    model = SimpleNamespace(
        engine=engine, encoded_ref=wire.encode_model_ref(ref), seconds_per_image=1e-6
    )
    hot_path.serve(model)
    hot_path.open()
    hot_path.start()
    yield hot_path, engine
    hot_path.stop(10)


def test_failing_batch_is_internal_without_internals_and_the_next_is_served(classify, caplog):
    hot_path, engine = classify
    engine.poison = 2
    doomed, later = FakeCall(2), FakeCall(1)
    hot_path.receive([doomed])
    assert doomed.ended.wait(10)
    assert doomed.status.code is StatusCode.INTERNAL
    assert "secret" not in doomed.status.message
    assert "secret internals" in caplog.text
    hot_path.receive([later])
    assert later.ended.wait(10)
    assert len(later.response.predictions) == 1


def test_split_call_is_answered_once_with_summed_times(classify):
    hot_path, _ = classify
    call = FakeCall(7)
    hot_path.receive([call])
    assert call.ended.wait(10)
    assert len(call.response.predictions) == 7
    assert call.response.timing.batch_images == 4


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param([FakeCall(1), FakeCall(3)], id="whole-batch"),
        pytest.param([FakeCall(1), Departed(2), FakeCall(1)], id="one-has-left"),
        pytest.param([Departed(7)], id="nobody-left-to-answer"),
        pytest.param([FakeCall(3), FakeCall(7)], id="split"),
        pytest.param([FakeCall(7), Departed(3), FakeCall(5)], id="split-and-left"),
    ],
)
def test_ink_of_those_that_were_answered_is_counted_and_no_other(classify, metrics, calls):
    hot_path, _ = classify
    hot_path.receive(calls)
    assert all(call.ended.wait(10) for call in calls)
    assert hot_path.stop(10)
    answered = [call.count for call in calls if not isinstance(call, Departed)]
    value = metrics.registry.get_sample_value
    assert value("digits_ink_ratio_count") == sum(answered)
    # Each pixel of a FakeCall is the number of its images.
    expected = sum(count * count / 255 for count in answered)
    assert value("digits_ink_ratio_sum") == pytest.approx(expected)
    for name in ("digits_confidence", "digits_margin"):
        assert value(f"{name}_count") == sum(answered)


def test_closed_path_refuses_with_unavailable(classify):
    hot_path, _ = classify
    hot_path.close("the server is shutting down")
    call = FakeCall(1)
    hot_path.receive([call])
    assert call.status.code is StatusCode.UNAVAILABLE
    assert call.status.message == "the server is shutting down"


def test_file_that_comes_after_the_end_of_the_drain_is_answered(classify):
    """As one does that was found to be in time, and whose thread then had to wait."""
    hot_path, _ = classify
    assert hot_path.stop(10)
    call = FakeCall(1)
    files = digits_pb2.EncodedImages(files=[b"x"])
    call.request = digits_pb2.ClassifyRequest(encoded=files).SerializeToString()
    hot_path.receive([call])
    assert call.ended.wait(10)
    assert call.status.code is StatusCode.UNAVAILABLE


def test_burst_with_a_bad_call_serves_the_others(classify):
    hot_path, _ = classify
    calls = [FakeCall(1), FakeCall(9), FakeCall(3)]
    hot_path.receive(calls)
    assert all(call.ended.wait(10) for call in calls)
    assert calls[1].status.code is StatusCode.INVALID_ARGUMENT
    assert [len(calls[i].response.predictions) for i in (0, 2)] == [1, 3]
