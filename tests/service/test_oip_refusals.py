"""Bad requests of the Open Inference Protocol are told what was expected."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from digits.oip import inference_pb2
from service.assembly import OIP_METHODS
from service.oip.infer import SERVICE
from service.oip.messages import read_infer
from service.serving.request import InvalidInputError
from tests.calls import (
    refused,
    rich_detail,
)
from tests.service.oip import BLANK, FORMS, Request, broken, infer, stub_of


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return stub_of(channel)


def typed(datatype: Any, field: Any, values: Any) -> Any:
    request = infer(BLANK, datatype, raw=False)
    request.inputs[0].ClearField("contents")
    getattr(request.inputs[0].contents, field).extend(values)
    return request


def fp32(value: Any, index: int = 5) -> Any:
    values = np.zeros(784, "<f4")
    values[index] = value
    request = infer(BLANK, "FP32")
    request.raw_input_contents[0] = values.tobytes()
    return request


def with_output(name: str, **parameters: Any) -> Any:
    return infer(
        BLANK, outputs=[Request.InferRequestedOutputTensor(name=name, parameters=parameters)]
    )


def both_forms() -> Any:
    request = infer(BLANK)
    request.inputs[0].contents.uint_contents.append(1)
    return request


def shared_memory() -> Any:
    request = infer(BLANK)
    request.inputs[0].parameters["shared_memory_region"].string_param = "x"
    return request


ONE = inference_pb2.InferParameter(int64_param=1)
INK = "expected values from 0 (background) to 1 (ink), got"
BAD = {
    "no tensor": (Request(model_name="digits"), "inputs: expected 1 tensor, got 0"),
    "another tensor": (broken(name="x"), "inputs[0].name: expected image, got 'x'"),
    "FP64": (broken(datatype="FP64"), "inputs[0].datatype: expected UINT8 or FP32, got 'FP64'"),
    "no images' dimension": (broken(shape=[28, 28]), "inputs[0].shape: expected [N,28,28], "),
    "another shape": (broken(shape=[1, 14, 56]), "inputs[0].shape: expected [N,28,28], "),
    "no images": (broken(shape=[0, 28, 28]), "inputs[0].shape: expected 1 to 4096 images, got 0"),
    "negative": (broken(shape=[-1, 784]), "inputs[0].shape: expected 1 to 4096 images, got -1"),
    "too many": (broken(shape=[2**62, 784]), "inputs[0].shape: expected 1 to 4096 images"),
    "too few bytes": (
        broken(raw=[b"x" * 783]),
        "raw_input_contents[0]: expected 784 bytes by datatype and shape, got 783 bytes",
    ),
    "bytes of another type": (
        broken(datatype="FP32"),
        "raw_input_contents[0]: expected 3136 bytes by datatype and shape, got 784 bytes",
    ),
    "raw twice": (broken(raw=[bytes(784)] * 2), "raw_input_contents: expected 1 element"),
    "raw and typed": (both_forms(), "inputs[0].contents: expected none beside raw"),
    "nothing": (
        broken(raw=[]),
        "inputs[0].contents.uint_contents: expected 784 values by shape, got 0",
    ),
    "another field": (
        typed("UINT8", "int_contents", [0] * 784),
        "inputs[0].contents: expected uint_contents, got int_contents",
    ),
    "above 255": (
        typed("UINT8", "uint_contents", [*[0] * 783, 256]),
        "inputs[0]: expected values from 0 (background) to 255 (ink), got 256 at 783",
    ),
    "of 0 to 255": (fp32(255), f"inputs[0]: {INK} 255 at 5"),
    "a little above 1": (fp32(1.0001), f"inputs[0]: {INK} 1.0001 at 5"),
    "negative value": (fp32(-0.5), f"inputs[0]: {INK} -0.5 at 5"),
    "NaN": (fp32(np.nan), f"inputs[0]: {INK} nan at 5"),
    "infinity": (fp32(np.inf), f"inputs[0]: {INK} inf at 5"),
    "typed NaN": (
        typed("FP32", "fp32_contents", [np.nan, *[0] * 783]),
        f"inputs[0]: {INK} nan at 0",
    ),
    "unknown output": (
        with_output("logits"),
        "outputs[0].name: expected probabilities or digit or digit_score, once, got 'logits'",
    ),
    "top-k": (
        with_output("digit", classification=ONE),
        "outputs[0].parameters: expected none, got 'classification'",
    ),
    "shared memory": (
        shared_memory(),
        "inputs[0].parameters: expected none, got 'shared_memory_region'",
    ),
    "no version": (
        infer(BLANK, model_version="x"),
        "model_version: expected a number or nothing, got 'x'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_request_is_told_what_was_expected(stub: Any, case: str) -> None:
    request, message = BAD[case]
    error = refused(stub.ModelInfer, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(message)
    [violation] = rich_detail(error, error_details_pb2.BadRequest).field_violations
    assert violation.field == message.partition(":")[0]


def test_malformed_bytes_are_refused_in_every_method(channel: grpc.Channel) -> None:
    for method in [*OIP_METHODS, "ModelInfer"]:
        error = refused(channel.unary_unary(f"/{SERVICE}/{method}"), b"\xff")
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert error.details() == (
            f"request: expected a serialised {method}Request, got malformed bytes"
        )


@settings(max_examples=1000, deadline=None)
@given(st.sampled_from(FORMS), st.booleans(), st.integers(0, 120), st.binary(max_size=6))
def test_spoilt_message_is_read_or_refused_as_invalid(
    form: Any, raw: Any, position: Any, spoilt: Any
) -> None:
    ref: Any = SimpleNamespace(name="digits", version="4")
    sound = infer(BLANK, raw=raw, form=form, id="x").SerializeToString()
    message = sound[:position] + spoilt + sound[position + len(spoilt) :]
    with contextlib.suppress(InvalidInputError):
        read = read_infer(message, ref, 4)
        assert len(read.pixels) == 784 * read.count
