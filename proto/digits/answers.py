"""What a call brings: a ``Classification``, or a ``DigitError`` that says why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from digits.v1 import digits_pb2


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image.

    Attributes:
        digit: The most probable digit, 0 to 9.
        confidence: Its probability, 0 to 1.
        probabilities: float32[10], the probability of each digit.
        digit_score: How much an image file looks like one digit at all, 0 to 1; None of arrays.
    """

    digit: int
    confidence: float
    probabilities: npt.NDArray[np.float32]
    digit_score: float | None = None


@dataclass(frozen=True)
class Model:
    """The model that made an answer.

    Attributes:
        name: Name of the model.
        version: Number of the version.
        sha256: Digest of its model.onnx.
        precision: fp32 or int8.
        execution_provider: What really ran it, such as CPUExecutionProvider.
    """

    name: str
    version: str
    sha256: str
    precision: str
    execution_provider: str


@dataclass(frozen=True)
class Classification:
    """The answer to one call.

    Attributes:
        predictions: One an image, in order.
        model: What made them.
        queue_us: Microseconds in the server's queue.
        inference_us: Microseconds of inference.
        batch_images: Images in the batch that held this call's, other callers' included.
    """

    predictions: list[Prediction]
    model: Model
    queue_us: int
    inference_us: int
    batch_images: int

    @property
    def digits(self) -> list[int]:
        """The predicted digits, in order."""
        return [prediction.digit for prediction in self.predictions]


class DigitError(RuntimeError):
    """A call that did not succeed.

    Attributes:
        code: gRPC status code.
        message: The server's message.
        violations: With INVALID_ARGUMENT, what was wrong with each field.
        retry_after_s: When the server asked to come back, or None.
    """

    def __init__(self, error: Any) -> None:  # grpc.RpcError or AioRpcError: no common interface
        self.code: grpc.StatusCode = error.code()
        self.message: str = error.details() or ""
        super().__init__(f"{self.code.name}: {self.message}")
        self.violations: dict[str, str] = {}
        self.retry_after_s: float | None = None
        for key, value in error.trailing_metadata() or ():
            if key == "grpc-status-details-bin":
                self._read_details(value)

    def _read_details(self, serialised: bytes) -> None:
        bad_request = error_details_pb2.BadRequest()
        retry_info = error_details_pb2.RetryInfo()
        try:
            for detail in status_pb2.Status.FromString(serialised).details:
                if detail.Unpack(bad_request):
                    self.violations = {v.field: v.description for v in bad_request.field_violations}
                elif detail.Unpack(retry_info):
                    self.retry_after_s = retry_info.retry_delay.ToNanoseconds() / 1e9
        except DecodeError:
            return  # not from this server; code and message still tell


class _ItemRefusal:
    """A StreamError, as an RPC's error tells it."""

    def __init__(self, error: digits_pb2.StreamError) -> None:
        self._error = error

    def code(self) -> grpc.StatusCode:
        unknown = grpc.StatusCode.UNKNOWN
        return next((c for c in grpc.StatusCode if c.value[0] == self._error.code), unknown)

    def details(self) -> str:
        return self._error.message

    def trailing_metadata(self) -> None:
        return None


def item_answer(response: digits_pb2.ClassifyStreamResponse) -> Classification | DigitError:
    """An answer of a stream as Python objects."""
    if response.HasField("response"):
        return classification(response.response)
    refusal = DigitError(_ItemRefusal(response.error))
    if response.error.retry_after_ms:
        refusal.retry_after_s = response.error.retry_after_ms / 1000
    return refusal


def classification(response: digits_pb2.ClassifyResponse) -> Classification:
    """A response as Python objects."""
    return Classification(
        predictions=[
            Prediction(
                p.digit,
                p.confidence,
                np.array(p.probabilities, np.float32),
                p.digit_score if p.HasField("digit_score") else None,
            )
            for p in response.predictions
        ],
        model=served_model(response.model),
        queue_us=response.timing.queue_us,
        inference_us=response.timing.inference_us,
        batch_images=response.timing.batch_images,
    )


def served_model(ref: digits_pb2.ModelRef) -> Model:
    """A reference to a model as a Python object."""
    return Model(ref.name, ref.version, ref.sha256, ref.precision, ref.execution_provider)
