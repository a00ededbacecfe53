"""A client of the digit classifier: ``DigitClient`` for threads, ``AsyncDigitClient`` for asyncio.

Needs grpcio, protobuf and numpy only. Calls that the server refuses for a passing reason are
retried by gRPC itself, within the deadline, waiting as long as the server asks for where its
transport can say so.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt

from digits.answers import (
    Classification,
    DigitError,
    Model,
    Prediction,
    classification,
    item_answer,
    served_model,
)
from digits.stream import AsyncBacklog, Patience, SyncBacklog
from digits.v1 import digits_pb2, digits_pb2_grpc

__all__ = [
    "AsyncDigitClient",
    "Classification",
    "DigitClient",
    "DigitError",
    "Model",
    "Prediction",
    "Tls",
]

DEFAULT_ADDRESS = "127.0.0.1:50051"
DEFAULT_TIMEOUT_S = 10.0
# gRPC takes far longer deadlines for ones that have passed.
MAX_TIMEOUT_S = 1e6

# Source: gRFC A6 (client retries). The server's pushback, where it can send one, takes the place
# of the backoff.
SERVICE_CONFIG = {
    # Every address that the target's name stands for gets calls, as behind a headless Service.
    "loadBalancingConfig": [{"round_robin": {}}],
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
        },
        # Without a policy: gRPC can not retry a stream that had an answer, classify_stream can.
        {"name": [{"service": "digits.v1.DigitClassifierService", "method": "ClassifyStream"}]},
    ],
}
PASSING = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
# What grpc.aio puts in place of the server's status where it was sending when the server ended the
# stream. Source: grpc/grpc#36066.
LOST_STATUS = (grpc.StatusCode.INTERNAL, "Internal error from Core")
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
        """Classifies image files, given by path or content; the server finds the digit in each.

        Raises:
            OSError: If a file can not be read.
            DigitError: If the server refused or could not be reached in time.
        """
        return self._call(files_request(files), timeout_s)

    def classify_stream(
        self, batches: Iterable[Image], *, timeout_s: float | None = None
    ) -> Iterator[Classification | DigitError]:
        """Classifies a long sequence over one stream, sending up to 64 items ahead of the answers.

        A stream that its server ends, or an item refused for a passing reason, is resumed: what has
        no answer is sent again, on whatever server the channel reaches.

        Args:
            batches: What ``classify`` takes, one an item; read on another thread.
            timeout_s: Deadline of the whole; by default there is none.

        Yields:
            One answer an item, in order: the classification, or why this item was refused.

        Raises:
            DigitError: If there was nothing but refusals for the client's ``timeout_s``, or until
                the deadline; or one that would not pass.
            Exception: What ``batches`` raised, after the answers to what it gave before.
        """
        backlog = SyncBacklog(pixels_request(images) for images in batches)
        patience = _patience(timeout_s, self._timeout_s)
        with contextlib.closing(backlog):
            while True:
                requests = (digits_pb2.ClassifyStreamRequest(request=r) for r in backlog.requests())
                stream = self._stub.ClassifyStream(
                    requests, timeout=patience.time_left_s(), metadata=self._metadata
                )
                try:
                    for response in stream:
                        answer = item_answer(response)
                        if isinstance(answer, DigitError) and answer.code in PASSING:
                            refusal = answer
                            break
                        backlog.answered()
                        patience.renew()
                        yield answer
                    else:
                        return backlog.finish()
                except grpc.RpcError as error:
                    refusal = DigitError(error)
                finally:
                    stream.cancel()
                time.sleep(_wait_s(refusal, patience))

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
        return served_model(response.model), json.loads(response.manifest_json)

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
        return classification(response)


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

    async def classify_stream(
        self, batches: AsyncIterable[Image], *, timeout_s: float | None = None
    ) -> AsyncIterator[Classification | DigitError]:
        """See ``DigitClient.classify_stream``; ``batches`` is read on the event loop."""
        backlog = AsyncBacklog(pixels_request(images) async for images in batches)
        patience = _patience(timeout_s, self._timeout_s)
        with contextlib.closing(backlog):
            while True:
                requests = (
                    digits_pb2.ClassifyStreamRequest(request=r) async for r in backlog.requests()
                )
                stream = self._stub.ClassifyStream(
                    requests, timeout=patience.time_left_s(), metadata=self._metadata
                )
                try:
                    async for response in stream:
                        answer = item_answer(response)
                        if isinstance(answer, DigitError) and answer.code in PASSING:
                            refusal = answer
                            break
                        backlog.answered()
                        patience.renew()
                        yield answer
                    else:
                        backlog.finish()
                        return
                except grpc.aio.AioRpcError as error:
                    refusal = DigitError(error)
                finally:
                    stream.cancel()
                await asyncio.sleep(_wait_s(refusal, patience))

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
        return served_model(response.model), json.loads(response.manifest_json)

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
        return classification(response)


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


def _patience(timeout_s: float | None, give_up_s: float) -> Patience:
    return Patience(give_up_s, None if timeout_s is None else _deadline(timeout_s, timeout_s))


def _wait_s(refusal: DigitError, patience: Patience) -> float:
    """How long to wait before a stream is resumed; raises the refusal if it is not."""
    passes = refusal.code in PASSING or (refusal.code, refusal.message) == LOST_STATUS
    wait_s = patience.wait_s(refusal.retry_after_s) if passes else None
    if wait_s is None:
        raise refusal
    return wait_s


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
