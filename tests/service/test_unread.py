"""Answers that nobody reads, and requests that say too much: what they take of a server."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from digits.oip import inference_pb2
from service.http2.frames import HEADERS, SETTINGS, Setting, frame, settings_payload
from service.http2.messages import prefixed
from service.rpc.health import MAX_WATCHES_PER_CONNECTION
from tests.calls import TRANSPORTS
from tests.conftest import RunningServer, wait_until
from tests.http2.wire import Caller, call, data, opening
from tests.memory import MIB, PeakMemory
from tests.releases import check_answers

GET_MODEL = "/digits.v1.DigitClassifierService/GetModel"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
WATCH = "/grpc.health.v1.Health/Watch"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
NAME_BYTES = 4_000_000
QUEUE_FULL = "the queue is full"  # of those that are read aside
EXHAUSTED = grpc.StatusCode.RESOURCE_EXHAUSTED


class Unreading(Caller):
    """A connection that lets no byte of an answer's message be sent."""

    def __init__(self, server: RunningServer) -> None:
        self.port = int(server.address.rpartition(":")[2])
        super().__init__(self)
        self.send(frame(SETTINGS, 0, 0, settings_payload({Setting.INITIAL_WINDOW_SIZE: 0})))

    def answered(self, calls: Any) -> int:
        """Waits for the headers of so many answers, which no window holds back."""
        heads = (found for found in self.frames() if found[0] == HEADERS)
        return len(list(itertools.islice(heads, calls)))


def infer_request(**fields: Any) -> bytes:
    images = np.zeros((1, 28, 28), np.uint8)
    tensor = inference_pb2.ModelInferRequest.InferInputTensor(
        name="image", datatype="UINT8", shape=images.shape
    )
    return inference_pb2.ModelInferRequest(
        **{"model_name": "digits", "inputs": [tensor], "raw_input_contents": [images.tobytes()]}
        | fields
    ).SerializeToString()


@pytest.mark.full
@TRANSPORTS
def test_what_model_infer_would_repeat_is_refused(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    """150 calls at once, each with 4 MB that an answer would hold until it is read."""
    server = start_server(f"--transport={transport}")
    check_answers(server)
    long = "x" * NAME_BYTES
    outputs = [inference_pb2.ModelInferRequest.InferRequestedOutputTensor(name=long)]
    for field, value, said in (
        ("id", long, "id, parameters: expected at most 1024 bytes together, got 40000"),
        ("model_name", long, "model_name: expected digits, got 'xxx"),
        ("outputs", outputs, "outputs[0].name: expected "),
    ):
        request = infer_request(**{field: value})
        with PeakMemory(server) as peak, grpc.insecure_channel(server.address) as channel:
            infer = channel.unary_unary(MODEL_INFER)
            calls = [infer.future(request, timeout=120) for _ in range(150)]
            details = [one.exception().details() for one in calls]
        assert all(text.startswith((said, QUEUE_FULL)) for text in details)
        assert any(text.startswith(said) for text in details)
        assert max(map(len, details)) < 500
        if transport == "http2":  # grpcio takes requests as they come
            assert peak.grown < 96 * MIB
    check_answers(server)


@TRANSPORTS
@pytest.mark.parametrize("method", ["watch", "reflection"])
def test_names_of_four_megabytes_are_refused(
    start_server: Callable[..., RunningServer], transport: str, method: str
) -> None:
    server = start_server(f"--transport={transport}")
    path, message = {
        "watch": (WATCH, health_pb2.HealthCheckRequest(service="x" * NAME_BYTES)),
        "reflection": (
            REFLECTION,
            reflection_pb2.ServerReflectionRequest(file_by_filename="x" * NAME_BYTES),
        ),
    }[method]
    request = message.SerializeToString()
    with grpc.insecure_channel(server.address) as channel:
        begin = channel.stream_stream(path)
        calls = [begin(iter([request]), timeout=60) for _ in range(10)]
        for one in calls:
            with pytest.raises(grpc.RpcError) as caught:
                next(iter(one))
            assert caught.value.code() is EXHAUSTED
            assert "larger than max" in str(caught.value.details())
    check_answers(server)


@TRANSPORTS
def test_watches_of_one_connection_leave_those_of_others(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}")
    request = health_pb2.HealthCheckRequest().SerializeToString()
    with contextlib.ExitStack() as stack:
        channels = [
            stack.enter_context(
                grpc.insecure_channel(
                    server.address,
                    [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)],
                )
            )
            for _ in range(2)
        ]
        many, other = (channel.unary_stream(WATCH) for channel in channels)
        answers = [many(request) for _ in range(200)]
        codes = []
        for one in answers:
            try:
                next(iter(one))
            except grpc.RpcError as error:
                codes.append(error.code())
        assert codes == [EXHAUSTED] * (200 - MAX_WATCHES_PER_CONNECTION)
        watching = other(request)
        assert next(iter(watching))
        for one in (*answers, watching):
            one.cancel()


def test_answers_that_nobody_reads_are_bounded_in_all(
    start_server: Callable[..., RunningServer],
) -> None:
    """Two hundred connections with 256 calls of a few bytes each: 400 MB of answers."""
    server = start_server("--transport=http2")
    check_answers(server)
    calls = b"".join(call(2 * number + 1, b"", GET_MODEL) for number in range(256))
    with PeakMemory(server) as peak, contextlib.ExitStack() as callers:
        open_ones = []
        for _ in range(200):
            open_ones.append(callers.enter_context(Unreading(server)))
            open_ones[-1].send(calls)
            assert open_ones[-1].answered(256) <= 256
        check_answers(server)
    assert peak.grown < (128 + 64) * MIB
    wait_until(lambda: check_answers(server) is None)


def test_reflection_that_nobody_reads_is_bounded(
    start_server: Callable[..., RunningServer],
) -> None:
    """A stream answers nothing more until its caller has taken what was answered."""
    server = start_server("--transport=http2")
    check_answers(server)
    question = reflection_pb2.ServerReflectionRequest(
        file_containing_symbol="digits.v1.DigitClassifierService"
    ).SerializeToString()
    with PeakMemory(server) as peak, contextlib.ExitStack() as callers:
        for _ in range(16):
            caller = callers.enter_context(Unreading(server))
            for stream in range(1, 32, 2):
                questions = data(stream, prefixed(question) * 200, end=False)
                caller.send(opening(stream, REFLECTION) + questions)
            assert caller.answered(16) == 16
        check_answers(server)
    assert peak.grown < 48 * MIB


def test_watches_that_nobody_reads_are_bounded(start_server: Callable[..., RunningServer]) -> None:
    server = start_server("--transport=http2")
    check_answers(server)
    request = health_pb2.HealthCheckRequest(service="x" * 500).SerializeToString()
    with PeakMemory(server) as peak, contextlib.ExitStack() as callers:
        for _ in range(16):
            caller = callers.enter_context(Unreading(server))
            caller.send(b"".join(call(2 * n + 1, request, WATCH) for n in range(200)))
            assert caller.answered(200) == 200
        check_answers(server)
    assert peak.grown < 32 * MIB
