"""Requests of the Open Inference Protocol."""

from __future__ import annotations

from typing import Any

import numpy as np

from digits.oip import inference_pb2, inference_pb2_grpc
from service.oip.infer import SERVICE
from tests.calls import scrape

FORMS = [(28, 28), (1, 28, 28), (784,)]
BLANK = np.zeros((1, 28, 28), np.uint8)
Request = inference_pb2.ModelInferRequest


def stub_of(channel: Any) -> Any:
    return inference_pb2_grpc.GRPCInferenceServiceStub(channel)


def infer(
    images: np.ndarray,
    datatype: str = "UINT8",
    *,
    raw: bool = True,
    form: Any = (28, 28),
    **rest: Any,
) -> Any:
    """A request for uint8[N, 28, 28]."""
    tensor = Request.InferInputTensor(name="image", datatype=datatype, shape=(len(images), *form))
    values = images if datatype == "UINT8" else (images / np.float32(255)).astype("<f4")
    request = Request(model_name="digits", **rest)
    if raw:
        request.raw_input_contents.append(values.tobytes())
    elif datatype == "UINT8":
        tensor.contents.uint_contents.extend(values.ravel().tolist())
    else:
        tensor.contents.fp32_contents.extend(values.ravel().tolist())
    request.inputs.append(tensor)
    return request


def broken(**changes: Any) -> Any:
    """A request with other things in its one tensor."""
    request = infer(BLANK)
    for name, value in changes.items():
        if name == "raw":
            request.raw_input_contents[:] = value
        elif name == "shape":
            request.inputs[0].shape[:] = value
        else:
            setattr(request.inputs[0], name, value)
    return request


def tensors_of(response: Any) -> Any:
    """Its tensors by name, raw or typed."""
    raw, found = list(response.raw_output_contents), {}
    for tensor in response.outputs:
        dtype, field = {"FP32": ("<f4", "fp32_contents"), "INT64": ("<i8", "int64_contents")}[
            tensor.datatype
        ]
        typed = getattr(tensor.contents, field)
        values = np.frombuffer(raw.pop(0), dtype) if raw else np.array(typed, dtype)
        found[tensor.name] = values.reshape(tensor.shape)
    assert raw == []
    return found


def count_of(server: Any, method: Any, code: Any) -> Any:
    return scrape(server)[
        f'grpc_server_handled_total{{grpc_code="{code}",grpc_method="{method}",'
        f'grpc_service="{SERVICE}",grpc_type="unary"}}'
    ]
