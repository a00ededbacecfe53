"""Hand-written wire format must say exactly what the generated classes say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from digits.v1 import digits_pb2
from service import wire


@given(st.binary(max_size=3 * 784))
def test_sole_field_agrees_with_the_generated_class(pixels):
    request = digits_pb2.ClassifyRequest(pixels=pixels).SerializeToString()
    view = wire.sole_field(request)
    assert view is not None
    assert bytes(view) == pixels


@given(st.binary(max_size=40))
def test_sole_field_of_any_bytes_never_contradicts_the_generated_class(data):
    view = wire.sole_field(data)
    if view is not None:
        assert digits_pb2.ClassifyRequest.FromString(data).pixels == bytes(view)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x0a",
        b"\x0a\x05abc",  # shorter than it says
        b"\x0a\x01abc",  # something follows
        b"\x0a\xff\xff\xff\xff\xff\xff\x01",  # a length beyond 32 bits
        digits_pb2.ClassifyRequest(encoded=digits_pb2.EncodedImages()).SerializeToString(),
    ],
)
def test_anything_but_one_pixels_field_is_left_to_the_generated_class(data):
    assert wire.sole_field(data) is None


@given(st.binary(max_size=40_000))
def test_wrapped_response_is_the_generated_class(content):
    request = digits_pb2.ClassifyRequest(pixels=content)
    wrapped = wire.as_field_1(request.SerializeToString())
    assert digits_pb2.ClassifyStreamRequest.FromString(wrapped).request == request
    assert bytes(wire.sole_field(wrapped)) == request.SerializeToString()


def test_encoded_response_parses_to_what_was_meant():
    rng = np.random.default_rng(1)
    probabilities = rng.random((7, 10), np.float32)
    probabilities[3] = np.eye(10, dtype=np.float32)[0]  # digit 0: a default value in proto3
    ref = digits_pb2.ModelRef(name="digits", version="3", sha256="ab", precision="fp32")
    body = wire.encode_predictions(probabilities)
    tail = wire.encode_tail(wire.encode_model_ref(ref), 0.25, 64)
    response = digits_pb2.ClassifyResponse.FromString(body + tail + wire.encode_queue_time(1e-3))
    assert response.model == ref
    timing = response.timing
    assert (timing.queue_us, timing.inference_us, timing.batch_images) == (1000, 250_000, 64)
    assert [p.digit for p in response.predictions] == probabilities.argmax(axis=1).tolist()
    for prediction, expected in zip(response.predictions, probabilities, strict=True):
        assert np.array_equal(np.array(prediction.probabilities, np.float32), expected)
        assert np.float32(prediction.confidence) == expected.max()


def test_scored_predictions_parse_to_what_was_meant():
    probabilities = np.random.default_rng(2).random((5, 10), np.float32)
    plausibility = np.array([0, 0.25, 0.5, 1, 1], np.float32)
    plain = wire.encode_predictions(probabilities)
    response = digits_pb2.ClassifyResponse.FromString(wire.with_scores(plain, plausibility))
    before = digits_pb2.ClassifyResponse.FromString(plain)
    expected = probabilities.max(axis=1) * plausibility
    for scored, unscored, score in zip(
        response.predictions, before.predictions, expected, strict=True
    ):
        assert np.float32(scored.digit_score) == score
        assert scored.HasField("digit_score")
        assert not unscored.HasField("digit_score")
        scored.ClearField("digit_score")
        assert scored == unscored


def test_any_run_of_predictions_is_a_response_of_its_own():
    body = wire.encode_predictions(np.eye(10, dtype=np.float32))
    stride = len(body) // 10
    middle = digits_pb2.ClassifyResponse.FromString(body[3 * stride : 5 * stride])
    assert [p.digit for p in middle.predictions] == [3, 4]


def test_times_beyond_the_field_are_clipped():
    assert wire.encode_queue_time(1e9) == b"\xff\xff\xff\xff"
