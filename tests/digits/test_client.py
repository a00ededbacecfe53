from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest

from digits.client import AsyncDigitClient, DigitClient, DigitError
from digits.inputs import one_request
from digits.v1 import digits_pb2, digits_pb2_grpc
from tests.conftest import SAMPLES, RunningServer

FILES = [SAMPLES / f"{digit}.png" for digit in range(10)]


def test_arrays_in_typed_predictions_out(
    server: RunningServer, sample: dict[str, np.ndarray]
) -> None:
    images = sample["images"][:20]
    with DigitClient(server.address) as client:
        answer = client.classify(images)
    assert len(answer.predictions) == 20
    assert np.mean(answer.digits == sample["labels"][:20]) >= 0.95
    first = answer.predictions[0]
    assert first.probabilities.shape == (10,)
    assert first.probabilities.dtype == np.float32
    assert first.confidence == pytest.approx(float(first.probabilities.max()))
    assert first.digit == first.probabilities.argmax()
    assert answer.model.version
    assert answer.batch_images >= 1


def test_one_image_and_flat_images_are_understood(
    server: RunningServer, sample: dict[str, np.ndarray]
) -> None:
    with DigitClient(server.address) as client:
        one = client.classify(sample["images"][0])
        flat = client.classify(sample["images"][:1].reshape(1, 784))
    assert one.digits == flat.digits == [int(sample["labels"][0])]


def test_files_by_path_and_by_content(server: RunningServer) -> None:
    with DigitClient(server.address) as client:
        answer = client.classify_files([*FILES[:5], *[path.read_bytes() for path in FILES[5:]]])
    assert answer.digits == list(range(10))


def test_model_comes_with_its_manifest(server: RunningServer) -> None:
    with DigitClient(server.address) as client:
        model, manifest = client.get_model()
    assert str(manifest["version"]) == model.version
    assert manifest["variants"][model.precision]["accuracy"]["accuracy"] >= 0.995


def test_async_client_answers_the_same(
    server: RunningServer, sample: dict[str, np.ndarray]
) -> None:
    images = sample["images"][:30]

    async def ask() -> tuple[Any, Any, Any, Any]:
        async with AsyncDigitClient(server.address) as client:
            together = await client.classify(images)
            singles = await asyncio.gather(*(client.classify(image) for image in images))
            files = await client.classify_files(FILES)
            model, _ = await client.get_model()
            with pytest.raises(DigitError, match="expected 1 to 4096 images, got 0"):
                await client.classify(images[:0])
        return together, singles, files, model

    together, singles, files, model = asyncio.run(ask())
    assert together.digits == [single.digits[0] for single in singles]
    assert files.digits == list(range(10))
    assert model == together.model


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.full((28, 28), -0.4), ValueError, "expected values of 0 to 1 or 0 to 255"),
        (np.zeros((3, 27, 28), np.uint8), ValueError, r"got \[3, 27, 28\]"),
        (np.zeros(785, np.uint8), ValueError, r"got \[785\]"),
        (np.zeros((2, 2, 28, 28), np.uint8), ValueError, r"got \[2, 2, 28, 28\]"),
        (np.uint8(3), ValueError, r"got \[\]"),
    ],
)
def test_array_of_another_kind_is_refused_before_it_is_sent(
    images: Any, error: Any, message: str
) -> None:
    with pytest.raises(error, match=message):
        one_request(images)


def test_error_carries_code_violations_and_message(server: RunningServer) -> None:
    with DigitClient(server.address) as client, pytest.raises(DigitError) as caught:
        client.classify_files([FILES[0], b"nonsense"])
    error = caught.value
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert list(error.violations) == ["encoded.files[1]"]
    assert error.retry_after_s is None


def test_server_that_is_not_there_is_unavailable_within_the_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.monotonic()
    with DigitClient(f"127.0.0.1:{port}", timeout_s=2) as client, pytest.raises(DigitError) as e:
        client.classify(np.zeros((28, 28), np.uint8))
    assert e.value.code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
    assert time.monotonic() - began < 10


PUSHBACK = (("grpc-retry-pushback-ms", "700"),)


class Reluctant(digits_pb2_grpc.DigitClassifierServiceServicer):
    """Refuses the first calls with a passing reason, then answers."""

    def __init__(self, code: Any, refusals: Any, metadata: Any = ()) -> None:
        self.code, self.refusals, self.metadata = code, refusals, metadata
        self.times: list[Any] = []
        self.lock = threading.Lock()

    def Classify(self, request: Any, context: Any) -> Any:
        with self.lock:
            self.times.append(time.monotonic())
            refuse = len(self.times) <= self.refusals
        if refuse:
            context.set_trailing_metadata(self.metadata)
            context.abort(self.code, "not now")
        return digits_pb2.ClassifyResponse(predictions=[digits_pb2.Prediction(digit=5)])


@pytest.fixture
def reluctant(serve: Callable[..., Any]) -> Callable[..., tuple[Reluctant, Any]]:
    def start(*arguments: Any, **options: Any) -> tuple[Reluctant, Any]:
        servicer = Reluctant(*arguments, **options)
        return servicer, serve(servicer)

    return start


@pytest.mark.parametrize(
    ("code", "metadata"),
    [
        (grpc.StatusCode.UNAVAILABLE, ()),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, (("grpc-retry-pushback-ms", "5"),)),
    ],
)
def test_transient_errors_are_retried(
    reluctant: Callable[..., tuple[Reluctant, Any]], code: grpc.StatusCode, metadata: Any
) -> None:
    servicer, address = reluctant(code, 3, metadata)
    with DigitClient(address) as client:
        assert client.classify(np.zeros((28, 28), np.uint8)).digits == [5]
    assert len(servicer.times) == 4


def test_refusals_that_go_on_end_after_five_attempts(
    reluctant: Callable[..., tuple[Reluctant, Any]],
) -> None:
    servicer, address = reluctant(grpc.StatusCode.UNAVAILABLE, 100)
    with DigitClient(address) as client, pytest.raises(DigitError, match="not now"):
        client.classify(np.zeros((28, 28), np.uint8))
    assert len(servicer.times) == 5


def test_large_calls_are_retried_too(reluctant: Callable[..., tuple[Reluctant, Any]]) -> None:
    servicer, address = reluctant(grpc.StatusCode.UNAVAILABLE, 2)
    with DigitClient(address) as client:
        assert client.classify(np.zeros((256, 28, 28), np.uint8)).digits == [5]
    assert len(servicer.times) == 3


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan"), float("inf"), 1e12, "5"])
def test_deadline_that_is_no_time_is_refused(timeout_s: Any) -> None:
    with DigitClient() as client, pytest.raises(ValueError, match="timeout_s: expected"):
        client.classify(np.zeros((28, 28), np.uint8), timeout_s=timeout_s)


def test_details_that_are_not_ours_leave_the_error_readable(
    reluctant: Callable[..., tuple[Reluctant, Any]],
) -> None:
    _, address = reluctant(
        grpc.StatusCode.INVALID_ARGUMENT, 1, metadata=(("grpc-status-details-bin", b"\xff"),)
    )
    with DigitClient(address) as client, pytest.raises(DigitError, match="not now"):
        client.classify(np.zeros((28, 28), np.uint8))


def test_one_path_in_place_of_a_list_is_refused() -> None:
    with DigitClient() as client, pytest.raises(TypeError, match="expected a sequence"):
        client.classify_files("seven.png")


def test_retry_waits_as_long_as_the_server_asks(
    reluctant: Callable[..., tuple[Reluctant, Any]],
) -> None:
    servicer, address = reluctant(grpc.StatusCode.RESOURCE_EXHAUSTED, 1, metadata=PUSHBACK)
    with DigitClient(address) as client:
        client.classify(np.zeros((28, 28), np.uint8))
    first, second = servicer.times
    assert second - first >= 0.69


def test_other_errors_are_not_retried(reluctant: Callable[..., tuple[Reluctant, Any]]) -> None:
    servicer, address = reluctant(grpc.StatusCode.INVALID_ARGUMENT, 1)
    with DigitClient(address) as client, pytest.raises(DigitError, match="not now"):
        client.classify(np.zeros((28, 28), np.uint8))
    assert len(servicer.times) == 1


def test_client_loads_nothing_of_the_server() -> None:
    heavy = ("onnxruntime", "PIL", "prometheus_client", "service", "torch")
    code = f"import sys, digits.client;print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"
