"""The Open Inference Protocol on the real server, on both transports."""

from __future__ import annotations

import secrets
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from digits.oip import inference_pb2
from digits.v1 import digits_pb2, digits_pb2_grpc
from service.assembly import OIP_METHODS
from service.oip.infer import SERVICE
from service.oip.messages import infer_response, read_infer
from service.serving.model import Answers, Predictions
from service.serving.request import InvalidInputError
from tests.calls import (
    NO_RETRIES,
    TRANSPORTS,
    dropped,
    entries,
    pixels,
    refused,
    rich_detail,
    scrape,
)
from tests.conftest import RunningServer, start_process, wait_until
from tests.gate import Gate
from tests.service.oip import BLANK, FORMS, Request, broken, count_of, infer, stub_of, tensors_of


@pytest.fixture
def stub(channel: grpc.Channel) -> Any:
    return stub_of(channel)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("raw", [True, False], ids=["raw", "typed"])
@pytest.mark.parametrize("datatype", ["UINT8", "FP32"])
def test_answers_are_those_of_classify_to_the_bit(
    channel: grpc.Channel,
    stub: Any,
    sample: dict[str, np.ndarray],
    datatype: str,
    raw: bool,
    form: Any,
) -> None:
    images = sample["images"][:60]
    expected = digits_pb2_grpc.DigitClassifierServiceStub(channel).Classify(
        pixels(images.tobytes())
    )
    answer = stub.ModelInfer(infer(images, datatype, raw=raw, form=form))
    assert bool(answer.raw_output_contents) == raw
    tensors = tensors_of(answer)
    assert list(tensors) == ["probabilities", "digit", "digit_score"]
    assert tensors["digit"].tolist() == [p.digit for p in expected.predictions]
    assert tensors["digit"].shape == tensors["digit_score"].shape == (60,)
    assert tensors["digit_score"].tolist() == [p.digit_score for p in expected.predictions]
    probabilities = [list(p.probabilities) for p in expected.predictions]
    assert tensors["probabilities"].tolist() == probabilities
    assert (answer.model_name, answer.model_version) == ("digits", expected.model.version)


def test_many_callers_get_their_own_answers(stub: Any, sample: dict[str, np.ndarray]) -> None:
    images, labels = sample["images"], sample["labels"]
    expected = tensors_of(stub.ModelInfer(infer(images)))["digit"]
    assert (expected == labels).mean() > 0.99

    def one(number: int) -> tuple[Any, Any]:
        answer = stub.ModelInfer(infer(images[number : number + 1], id=str(number)), timeout=60)
        return answer.id, tensors_of(answer)["digit"].tolist()

    with ThreadPoolExecutor(16) as callers:
        answers = list(callers.map(one, range(300)))
    assert answers == [(str(number), [expected[number]]) for number in range(300)]


def test_every_value_of_a_pixel_survives_fp32() -> None:
    ref: Any = SimpleNamespace(name="digits", version="4")
    images = np.resize(np.arange(256, dtype=np.uint8), (1, 28, 28))
    for raw in (True, False):
        message = infer(images, "FP32", raw=raw).SerializeToString()
        assert read_infer(message, ref, 1).pixels == images.tobytes()


def test_outputs_are_those_asked_for_in_that_order(stub: Any) -> None:
    output = Request.InferRequestedOutputTensor
    request = infer(BLANK, outputs=[output(name="digit"), output(name="probabilities")])
    assert [tensor.name for tensor in stub.ModelInfer(request).outputs] == [
        "digit",
        "probabilities",
    ]
    answer = stub.ModelInfer(infer(BLANK, outputs=[output(name="digit")]))
    assert [tensor.name for tensor in answer.outputs] == ["digit"]
    assert len(answer.raw_output_contents) == 1


def test_id_and_parameters_come_back(stub: Any) -> None:
    parameters = {
        "note": inference_pb2.InferParameter(string_param="x"),
        "number": inference_pb2.InferParameter(int64_param=-1),
    }
    answer = stub.ModelInfer(infer(BLANK, id="a7", parameters=parameters))
    assert answer.id == "a7"
    assert dict(answer.parameters) == parameters


def test_version_that_serves_may_be_named(stub: Any) -> None:
    version = stub.ModelMetadata(inference_pb2.ModelMetadataRequest(name="digits")).versions[0]
    answer = stub.ModelInfer(infer(BLANK, model_version=version))
    assert answer.model_version == version


def test_answer_of_another_version_than_the_one_asked_for_is_not_given(
    sample: dict[str, np.ndarray],
) -> None:
    """The model was exchanged between the check and the batch."""
    asked = infer(BLANK, model_version="3").SerializeToString()
    older: Any = SimpleNamespace(name="digits", version="3")
    read = read_infer(asked, older, 1)
    newer: Any = SimpleNamespace(name="digits", version="4")
    predictions = Predictions(Answers(np.zeros((1, 10), np.float32), np.ones(1, np.float32)), newer)
    expected = r"^model_version: expected 4, which is in service"
    with pytest.raises(InvalidInputError, match=expected) as error:
        infer_response(read, predictions, 0)
    assert error.value.violation.not_served


def test_model_that_does_not_serve_is_not_found(stub: Any) -> None:
    missing = {
        "name": ("digits", "'cats'", {"name": "cats"}),
        "version": ("", "99", {"name": "digits", "version": "99"}),
    }
    for field, (expected, got, asked) in missing.items():
        for name in ("ModelMetadata", "ModelConfig"):
            request = getattr(inference_pb2, f"{name}Request")(**asked)
            error = refused(getattr(stub, name), request)
            assert error.code() is grpc.StatusCode.NOT_FOUND
            assert error.details().startswith(f"{field}: expected {expected}")
            assert error.details().endswith(f"got {got}")
        ready = stub.ModelReady(inference_pb2.ModelReadyRequest(**asked))
        assert not ready.ready
    request = infer(BLANK)
    request.model_name = "cats"
    error = refused(stub.ModelInfer, request)
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert error.details() == "model_name: expected digits, got 'cats'"


def test_server_and_model_describe_themselves(channel: grpc.Channel, stub: Any) -> None:
    own = digits_pb2_grpc.DigitClassifierServiceStub(channel)
    version = own.GetModel(digits_pb2.GetModelRequest()).model.version
    assert stub.ServerLive(inference_pb2.ServerLiveRequest()).live
    assert stub.ServerReady(inference_pb2.ServerReadyRequest()).ready
    assert stub.ModelReady(inference_pb2.ModelReadyRequest(name="digits", version=version)).ready
    assert stub.ServerMetadata(inference_pb2.ServerMetadataRequest()).name == "digits-serving"
    said = stub.ModelMetadata(inference_pb2.ModelMetadataRequest(name="digits"))
    assert list(said.versions) == [version]
    assert [(t.name, t.datatype, list(t.shape)) for t in [*said.inputs, *said.outputs]] == [
        ("image", "UINT8", [-1, 28, 28]),
        ("probabilities", "FP32", [-1, 10]),
        ("digit", "INT64", [-1]),
        ("digit_score", "FP32", [-1]),
    ]
    config = stub.ModelConfig(inference_pb2.ModelConfigRequest(name="digits")).config
    assert config.max_batch_size == 4096
    assert list(config.input[0].dims) == [28, 28]


def test_metrics_count_exactly_what_was_sent(
    server: RunningServer, stub: Any, sample: dict[str, np.ndarray]
) -> None:
    images = scrape(server)["digits_images_total"]
    ok, bad = (count_of(server, "ModelInfer", code) for code in ("OK", "INVALID_ARGUMENT"))
    for size in (1, 3, 200):
        stub.ModelInfer(infer(sample["images"][:size]))
    refused(stub.ModelInfer, broken(name="x"))
    wait_until(lambda: count_of(server, "ModelInfer", "OK") - ok == 3)
    wait_until(lambda: count_of(server, "ModelInfer", "INVALID_ARGUMENT") - bad == 1)
    wait_until(lambda: scrape(server)["digits_images_total"] - images == 204)


@pytest.mark.parametrize("echoed", [{"id": "x" * 2000}, {"parameters": {"x" * 2000: None}}])
def test_what_an_answer_repeats_is_bounded(stub: Any, echoed: Any) -> None:
    """Answers may wait for a caller that does not read."""
    if "parameters" in echoed:
        echoed = {"parameters": {"x" * 2000: inference_pb2.InferParameter(int64_param=1)}}
    error = refused(stub.ModelInfer, infer(BLANK, **echoed))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error.details().startswith("id, parameters: expected at most")


@TRANSPORTS
def test_log_tells_the_caller_and_how_its_call_ended(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}", "--request-log-per-s=100")
    with grpc.insecure_channel(server.address) as channel:
        shown = (("x-request-id", "order-67"),)
        stub_of(channel).ModelInfer(infer(BLANK), metadata=shown, timeout=30)
        refused(stub_of(channel).ModelInfer, broken(name="x"))
    [line] = wait_until(lambda: entries(server, "ModelInfer OK"))
    assert line["request_id"] == "order-67"
    assert line["peer"].startswith("ipv4:127.0.0.1:")
    assert wait_until(lambda: entries(server, "ModelInfer INVALID_ARGUMENT"))


@TRANSPORTS
def test_calls_whose_deadline_passes_are_counted_once(
    busy: Callable[..., tuple[RunningServer, Any, Any, Gate]], transport: str
) -> None:
    server, _, long, gate = busy(transport, "--max-queue-images=100000")
    with grpc.insecure_channel(server.address, options=NO_RETRIES) as channel:
        stub = stub_of(channel)
        futures = [stub.ModelInfer.future(infer(BLANK), timeout=0.001) for _ in range(3)]
        assert {future.code() for future in futures} == {StatusCode.DEADLINE_EXCEEDED}
        gate.open()
        long.result()
        assert stub.ModelInfer(infer(BLANK), timeout=60).outputs
        wait_until(lambda: count_of(server, "ModelInfer", "OK") >= 1)
        ended = ("OK", "DEADLINE_EXCEEDED", "CANCELLED")
        # A call of so short a deadline may end before the server has heard of it.
        assert sum(count_of(server, "ModelInfer", code) for code in ended) <= 4


def reflected(channel: Any) -> set[Any]:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    [response] = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
        iter([request])
    )
    return {service.name for service in response.list_services_response.service}


def test_it_is_served_with_every_series(start_server: Callable[..., RunningServer]) -> None:
    server = start_server()
    with grpc.insecure_channel(server.address) as channel:
        assert SERVICE in reflected(channel)
    series = scrape(server)
    for method in [*OIP_METHODS, "ModelInfer"]:
        for code in grpc.StatusCode:
            labels = f'grpc_method="{method}",grpc_service="{SERVICE}",grpc_type="unary"'
            assert series[f'grpc_server_handled_total{{grpc_code="{code.name}",{labels}}}'] == 0


@TRANSPORTS
def test_every_method_needs_a_token_and_the_rate_limit_holds(
    start_server: Callable[..., RunningServer], tmp_path: Path, transport: str
) -> None:
    token = secrets.token_hex(32)
    tokens = tmp_path / "tokens"
    tokens.write_text(token)
    server = start_server(
        f"--transport={transport}", f"--auth-token-file={tokens}", "--rate-limit-images-per-s=50"
    )
    shown = (("authorization", f"Bearer {token}"),)
    with grpc.insecure_channel(server.address, options=NO_RETRIES) as channel:
        for method in [*OIP_METHODS, "ModelInfer"]:
            error = refused(channel.unary_unary(f"/{SERVICE}/{method}"), b"")
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert count_of(server, method, "UNAUTHENTICATED") == 1
        stub = stub_of(channel)
        assert stub.ServerLive(inference_pb2.ServerLiveRequest(), metadata=shown).live
        assert stub.ModelInfer(infer(BLANK.repeat(500, 0)), metadata=shown).outputs
        error = refused(stub.ModelInfer, infer(BLANK), metadata=shown)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    delay = rich_detail(error, error_details_pb2.RetryInfo).retry_delay
    assert 1 < delay.ToNanoseconds() / 1e9 < 9
    assert dropped(server, "rate_limited") == 1


@TRANSPORTS
def test_calls_in_flight_at_sigterm_are_answered(
    busy: Callable[..., tuple[RunningServer, Any, Any, Gate]], transport: str
) -> None:
    server, _, long, gate = busy(transport, "--max-queue-images=100000", "--drain-delay-s=1")
    started = f'grpc_method="ModelInfer",grpc_service="{SERVICE}",grpc_type="unary"'
    with grpc.insecure_channel(server.address, options=NO_RETRIES) as channel:
        stub = stub_of(channel)
        work = infer(BLANK.repeat(40, 0))
        futures = [stub.ModelInfer.future(work, timeout=60) for _ in range(12)]
        wait_until(lambda: scrape(server)[f"grpc_server_started_total{{{started}}}"] == 12)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not stub.ServerReady(inference_pb2.ServerReadyRequest()).ready)
        assert stub.ServerLive(inference_pb2.ServerLiveRequest()).live
        gate.open()
        for future in futures:
            assert tensors_of(future.result())["digit"].shape == (40,)
        assert len(long.result().predictions) == 4096
        assert server.process.wait(30) == 0


@pytest.fixture
def free_port() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


@TRANSPORTS
def test_while_a_model_loads_it_is_live_and_not_ready(
    endless_repository: Path,
    tmp_path: Path,
    free_port: Any,
    transport: str,
) -> None:
    flags = (f"--model-repository={endless_repository}", f"--grpc-port={free_port}")
    process = start_process(tmp_path / "log", *flags, f"--transport={transport}")
    try:
        with grpc.insecure_channel(f"127.0.0.1:{free_port}", options=NO_RETRIES) as channel:
            stub = stub_of(channel)
            live = stub.ServerLive(
                inference_pb2.ServerLiveRequest(), wait_for_ready=True, timeout=30
            )
            assert live.live
            assert not stub.ServerReady(inference_pb2.ServerReadyRequest()).ready
            ready = stub.ModelReady(inference_pb2.ModelReadyRequest(name="digits"))
            assert not ready.ready
            error = refused(stub.ModelInfer, infer(BLANK))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert error.details() == "the model is loading"
    finally:
        process.kill()
        process.wait()


@TRANSPORTS
def test_calls_that_are_left_cost_no_inference(
    busy: Callable[..., tuple[RunningServer, Any, Any, Gate]], transport: str
) -> None:
    server, _, long, gate = busy(transport, "--max-queue-images=8192")
    with grpc.insecure_channel(server.address, options=NO_RETRIES) as channel:
        request, call = infer(BLANK.repeat(32, 0)), stub_of(channel).ModelInfer
        futures = [call.future(request) for _ in range(10)]
        started = f'grpc_method="ModelInfer",grpc_service="{SERVICE}",grpc_type="unary"'
        wait_until(lambda: scrape(server)[f"grpc_server_started_total{{{started}}}"] == 10)
        for future in futures:
            future.cancel()
        # Behind the cancellations on the same connection.
        assert stub_of(channel).ServerLive(inference_pb2.ServerLiveRequest()).live
        gate.open()
        assert len(long.result().predictions) == 4096
        wait_until(lambda: count_of(server, "ModelInfer", "CANCELLED") == 10)
    wait_until(lambda: dropped(server, "cancelled") == 10)
    wait_until(lambda: scrape(server)["digits_images_total"] == 4096)


@TRANSPORTS
def test_large_requests_that_wait_to_be_read_are_bounded(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    """Each takes a tenth of a second to read, and is wrong at its very end."""
    server = start_server(f"--transport={transport}")
    values = np.ones((2600, 28, 28), np.uint8)
    request = infer(values, raw=False)
    request.inputs[0].contents.uint_contents[-1] = 256
    message = request.SerializeToString()
    with grpc.insecure_channel(server.address, options=NO_RETRIES) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
        futures = [call.future(message, timeout=120) for _ in range(56)]
        probe = health_pb2_grpc.HealthStub(channel)
        while not all(future.done() for future in futures):
            probe.Check(health_pb2.HealthCheckRequest(), timeout=20)
        codes = [future.code() for future in futures]
    # Over http2 flow control lets them in one after the other: none has to be refused.
    assert set(codes) <= {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
    wait_until(
        lambda: dropped(server, "queue_full") == codes.count(grpc.StatusCode.RESOURCE_EXHAUSTED)
    )
