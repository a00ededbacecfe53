"""A client of the digit classifier: ``DigitClient`` for threads, ``AsyncDigitClient`` for asyncio.

Needs grpcio, protobuf and numpy only. Calls that the server refuses for a passing reason are
retried by gRPC itself, within the deadline, waiting as long as the server asks for where its
transport can say so.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from digits.v1 import digits_pb2, digits_pb2_grpc

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 10.0
# gRPC takes far longer deadlines for ones that have passed.
MAX_TIMEOUT_S = 1e6

# Source: gRFC A6 (client retries). The server's pushback, where it can send one, takes the place
# of the backoff.
SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{"service": "digits.v1.DigitClassifierService"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.05s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE", "RESOURCE_EXHAUSTED"],
            },
        }
    ]
}
CHANNEL_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", json.dumps(SERVICE_CONFIG)),
    ("grpc.enable_retries", 1),
    # A call larger than this is not retried; gRPC's default of 256 KiB would be 334 images.
    ("grpc.per_rpc_retry_buffer_size", 8 * 2**20),
]

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Tls:
    """How a channel is encrypted, and who is at its ends. Files are PEM.

    Attributes:
        ca: File of the roots that may have signed the server's certificate; None for gRPC's own.
        cert: File of the certificate that this caller shows, where the server asks for one.
        key: File of its private key.
    """

    ca: str | Path | None = None
    cert: str | Path | None = None
    key: str | Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a channel.

        Raises:
            OSError: If a file can not be read.
            ValueError: If only one of ``cert`` and ``key`` is given.
        """
        if (self.cert is None) != (self.key is None):
            raise ValueError("tls: expected cert and key together, got one of them")
        ca, cert, key = (
            None if path is None else Path(path).read_bytes()
            for path in (self.ca, self.cert, self.key)
        )
        return grpc.ssl_channel_credentials(ca, key, cert)


@dataclass(frozen=True)
class Prediction:
    """What the model says about one image.

    Attributes:
        digit: The most probable digit, 0 to 9.
        confidence: Its probability, 0 to 1.
        probabilities: float32[10], the probability of each digit.
    """

    digit: int
    confidence: float
    probabilities: npt.NDArray[np.float32]


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


class DigitClient:
    """Blocking client; safe to share between threads.

    Args:
        address: ``host:port``, or any gRPC target.
        timeout_s: Deadline of a call, retries included, in seconds.
        tls: How to encrypt; None for plaintext.
        token: Bearer token to show with each call. On plaintext the network can read it.

    Raises:
        OSError: If a file of ``tls`` can not be read.
        ValueError: If the token can not be one, or ``tls`` lacks a file.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: Tls | None = None,
        token: str | None = None,
    ) -> None:
        self._metadata = _metadata(token)
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, tls.credentials(), options=CHANNEL_OPTIONS)
        self._stub = digits_pb2_grpc.DigitClassifierServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._timeout_s = timeout_s

    def classify(self, images: Image, *, timeout_s: float | None = None) -> Classification:
        """Classifies images.

        Args:
            images: uint8[28, 28], uint8[N, 28, 28] or uint8[N, 784], 0 = background, 255 = ink.
            timeout_s: Deadline of this call, instead of the client's.

        Raises:
            TypeError: If the array is not uint8.
            ValueError: If its shape is another one, or the deadline is not a time.
            DigitError: If the server refused or could not be reached in time.
        """
        return self._call(pixels_request(images), timeout_s)

    def classify_files(
        self, files: Sequence[str | Path | bytes], *, timeout_s: float | None = None
    ) -> Classification:
        """Classifies image files, given by path or content; the server decodes them.

        Raises:
            OSError: If a file can not be read.
            DigitError: If the server refused or could not be reached in time.
        """
        return self._call(files_request(files), timeout_s)

    def get_model(self, *, timeout_s: float | None = None) -> tuple[Model, dict[str, Any]]:
        """The model in service and its manifest.

        Raises:
            DigitError: If the server refused or could not be reached in time.
        """
        try:
            response = self._stub.GetModel(
                digits_pb2.GetModelRequest(),
                timeout=_deadline(timeout_s, self._timeout_s),
                metadata=self._metadata,
            )
        except grpc.RpcError as error:
            raise DigitError(error) from error
        return _model(response.model), json.loads(response.manifest_json)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _call(self, request: digits_pb2.ClassifyRequest, timeout_s: float | None) -> Classification:
        try:
            response = self._stub.Classify(
                request, timeout=_deadline(timeout_s, self._timeout_s), metadata=self._metadata
            )
        except grpc.RpcError as error:
            raise DigitError(error) from error
        return _classification(response)


class AsyncDigitClient:
    """The same for asyncio; made and used on one event loop.

    Args:
        address: ``host:port``, or any gRPC target.
        timeout_s: Deadline of a call, retries included, in seconds.
        tls: How to encrypt; None for plaintext.
        token: Bearer token to show with each call. On plaintext the network can read it.

    Raises:
        OSError: If a file of ``tls`` can not be read.
        ValueError: If the token can not be one, or ``tls`` lacks a file.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        tls: Tls | None = None,
        token: str | None = None,
    ) -> None:
        self._metadata = _metadata(token)
        if tls is None:
            self._channel = grpc.aio.insecure_channel(address, options=CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(
                address, tls.credentials(), options=CHANNEL_OPTIONS
            )
        self._stub = digits_pb2_grpc.DigitClassifierServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._timeout_s = timeout_s

    async def classify(self, images: Image, *, timeout_s: float | None = None) -> Classification:
        """See ``DigitClient.classify``."""
        return await self._call(pixels_request(images), timeout_s)

    async def classify_files(
        self, files: Sequence[str | Path | bytes], *, timeout_s: float | None = None
    ) -> Classification:
        """See ``DigitClient.classify_files``."""
        return await self._call(files_request(files), timeout_s)

    async def get_model(self, *, timeout_s: float | None = None) -> tuple[Model, dict[str, Any]]:
        """See ``DigitClient.get_model``."""
        try:
            response = await self._stub.GetModel(
                digits_pb2.GetModelRequest(),
                timeout=_deadline(timeout_s, self._timeout_s),
                metadata=self._metadata,
            )
        except grpc.aio.AioRpcError as error:
            raise DigitError(error) from error
        return _model(response.model), json.loads(response.manifest_json)

    async def close(self) -> None:
        """Closes the connection."""
        await self._channel.close(None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _call(
        self, request: digits_pb2.ClassifyRequest, timeout_s: float | None
    ) -> Classification:
        try:
            response = await self._stub.Classify(
                request, timeout=_deadline(timeout_s, self._timeout_s), metadata=self._metadata
            )
        except grpc.aio.AioRpcError as error:
            raise DigitError(error) from error
        return _classification(response)


def _metadata(token: str | None) -> tuple[tuple[str, str], ...]:
    """What a call shows. gRPC refuses call credentials on plaintext, so the token is metadata."""
    if token is None:
        return ()
    if not token or not all("!" <= character <= "~" for character in token):
        raise ValueError("token: expected printable ASCII without spaces, got something else")
    return (("authorization", f"Bearer {token}"),)


def _deadline(timeout_s: float | None, default_s: float) -> float:
    seconds = default_s if timeout_s is None else timeout_s
    if not 0 < seconds < MAX_TIMEOUT_S:
        raise ValueError(f"timeout_s: expected 0 to {MAX_TIMEOUT_S:g} seconds, got {seconds}")
    return seconds


def pixels_request(images: Image) -> digits_pb2.ClassifyRequest:
    """A request of raw pixels; see ``DigitClient.classify`` for shapes and errors."""
    array = np.asarray(images)
    if array.dtype != np.uint8:
        raise TypeError(f"images: expected dtype uint8 (0 to 255), got {array.dtype}")
    if array.shape[-2:] != (28, 28) and (array.ndim != 2 or array.shape[1] != 784):
        raise ValueError(
            f"images: expected shape [28, 28], [N, 28, 28] or [N, 784], got {list(array.shape)}"
        )
    if array.ndim > 3:
        raise ValueError(f"images: expected at most 3 dimensions, got {list(array.shape)}")
    return digits_pb2.ClassifyRequest(pixels=array.tobytes())


def files_request(files: Sequence[str | Path | bytes]) -> digits_pb2.ClassifyRequest:
    """A request of image files, given by path or content.

    Raises:
        TypeError: If one path or content is given in place of a sequence of them.
        OSError: If a file can not be read.
    """
    if isinstance(files, (str, bytes, Path)):
        raise TypeError(
            f"files: expected a sequence of paths or bytes, got one {type(files).__name__}"
        )
    contents = [file if isinstance(file, bytes) else Path(file).read_bytes() for file in files]
    return digits_pb2.ClassifyRequest(encoded=digits_pb2.EncodedImages(files=contents))


def _classification(response: digits_pb2.ClassifyResponse) -> Classification:
    return Classification(
        predictions=[
            Prediction(p.digit, p.confidence, np.array(p.probabilities, np.float32))
            for p in response.predictions
        ],
        model=_model(response.model),
        queue_us=response.timing.queue_us,
        inference_us=response.timing.inference_us,
        batch_images=response.timing.batch_images,
    )


def _model(ref: digits_pb2.ModelRef) -> Model:
    return Model(ref.name, ref.version, ref.sha256, ref.precision, ref.execution_provider)
