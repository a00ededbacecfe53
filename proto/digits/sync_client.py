"""The client for threads."""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Self

import grpc

from digits.answers import (
    Classification,
    Model,
    classification,
    item_answer,
    joined,
    served_model,
)
from digits.base_client import IN_FLIGHT, BaseClient, PendingCall
from digits.errors import DigitError
from digits.fork import is_forked
from digits.inputs import (
    ErrorsLast,
    Image,
    Pictures,
    classify_requests,
    one_request,
    several_files,
)
from digits.progress import Progress
from digits.resume import SyncUnanswered
from digits.retry import Retry
from digits.v1 import digits_pb2


class DigitClient(BaseClient):
    """Blocking client; safe to share between threads. Its settings are those of ``BaseClient``."""

    _insecure_channel = staticmethod(grpc.insecure_channel)
    _secure_channel = staticmethod(grpc.secure_channel)

    def classify(
        self,
        images: Pictures,
        *,
        timeout_s: float | None = None,
        progress: Progress | None = None,
    ) -> Classification:
        """Classifies images, however many.

        Args:
            images: One or several of: arrays, tensors or lists of numbers, [28, 28], [N, 28, 28] or
                [N, 784], 0 = background, 255 (or 1.0, or True) = ink; and pictures of one digit
                that the server is to find, of any size and colours: PIL images, paths, and the
                bytes of PNG, JPEG, WebP or BMP files.
            timeout_s: Deadline of each request, instead of the client's.
            progress: Called after each answer with the number of its images, such as what
                ``progress_bar`` gives.

        Raises:
            TypeError: If something is none of these, or an array holds no numbers.
            ValueError: If an array has another shape or range, a PIL image or a file of more than
                1 MiB can not be read (``digits.images.PictureError``), or the deadline is no time.
            OSError: If a file can not be read.
            DigitError: If the server refused or could not be reached in time.
            ClientStateError: If the client is closed, or this process was forked from one that used
                a client.
        """
        answers = []
        for answer in self.classify_batches(images, timeout_s=timeout_s):
            answers.append(answer)
            if progress is not None:
                progress(len(answer.predictions))
        return joined(answers)

    def classify_batches(
        self, images: Pictures, *, timeout_s: float | None = None
    ) -> Iterator[Classification]:
        """Like ``classify``, for more than fits into memory: answers as they come.

        Args:
            images: As for ``classify``; taken a few requests ahead of the answers.
            timeout_s: Deadline of each request, instead of the client's.

        Yields:
            The answer to each request, of ``request_images`` images at most, in order.

        Raises:
            Exception: As from ``classify``, and what ``images`` raised; after the answers to what
                came before.
        """
        requests = ErrorsLast(classify_requests(images, self._request_images))
        match list(islice(requests, 2)):
            case [only]:  # a blocking call is quicker than a future
                response = self._answer("Classify", only, self._retry(timeout_s))
                yield classification(response)
            case first:
                yield from self._pipelined(chain(first, requests), timeout_s)
        requests.finish()

    def _pipelined(
        self, requests: Iterator[digits_pb2.ClassifyRequest], timeout_s: float | None
    ) -> Iterator[Classification]:
        sent: deque[PendingCall] = deque()
        done = 0
        try:
            while True:
                for request in islice(requests, IN_FLIGHT - len(sent)):
                    sent.append(self._send("Classify.future", request, timeout_s))
                if not sent:
                    return
                answer = classification(self._result(sent[0], done))
                sent.popleft()
                done += len(answer.predictions)
                yield answer
        finally:
            for unanswered in sent:
                unanswered.call.cancel()

    def classify_files(
        self, files: Sequence[str | Path | bytes], *, timeout_s: float | None = None
    ) -> Classification:
        """Classifies a sequence of image files, given by path or content; see ``classify``."""
        return self.classify(several_files(files), timeout_s=timeout_s)

    def classify_stream(
        self, batches: Iterable[Image], *, timeout_s: float | None = None
    ) -> Iterator[Classification | DigitError]:
        """Classifies a long sequence over one stream, sending up to 64 items ahead of the answers.

        A stream that its server ends, or in which an item meets a transient error, is resumed: what
        has no answer is sent again, on whatever server the channel reaches.

        Args:
            batches: Arrays as ``classify`` takes them, one an item; read on another thread.
            timeout_s: Deadline of the whole; by default there is none.

        Yields:
            One answer an item, in order: the classification, or why this item was refused.

        Raises:
            DigitError: If there was nothing but refusals for the client's ``timeout_s``, or until
                the deadline; or one that would not pass.
            Exception: What ``batches`` raised, after the answers to what it gave before.
        """
        unanswered = SyncUnanswered(one_request(images) for images in batches)
        retry = self._stream_retry(timeout_s)
        with contextlib.closing(unanswered):
            while True:
                requests = (
                    digits_pb2.ClassifyStreamRequest(request=r) for r in unanswered.requests()
                )
                stream, failure = self._start("ClassifyStream", requests, retry), None
                try:
                    for response in stream:
                        self._reached()
                        answer = item_answer(response)
                        if isinstance(answer, DigitError) and answer.transient:
                            failure = answer
                            break
                        unanswered.answered()
                        retry.reset()
                        yield answer
                except grpc.RpcError as error:
                    failure = self._error(error)
                finally:
                    stream.cancel()
                if failure is None:
                    return unanswered.finish()
                time.sleep(retry.wait_s(failure))

    def get_model(self, *, timeout_s: float | None = None) -> tuple[Model, dict[str, Any]]:
        """The model in service and its manifest.

        Raises:
            DigitError: If the server refused or could not be reached in time.
        """
        response = self._answer("GetModel", digits_pb2.GetModelRequest(), self._retry(timeout_s))
        return served_model(response.model), json.loads(response.manifest_json)

    def close(self) -> None:
        """Closes the connections; calls under way and later ones raise ClientStateError."""
        if is_forked():
            return  # the channel is the parent's
        channel = self._close()
        if channel is not None:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _result(self, sent: PendingCall, offset: int) -> Any:
        """The response to a request under way; further attempts block."""
        try:
            try:
                response = sent.call.result()
            except grpc.RpcError as error:
                failure = self._error(error)
            else:
                self._reached()
                return response
            time.sleep(sent.retry.wait_s(failure))
            return self._answer("Classify", sent.request, sent.retry)
        except DigitError as error:
            error.offset = offset
            raise

    def _answer(self, method: str, request: Any, retry: Retry) -> Any:
        while True:
            try:
                response = self._start(method, request, retry)
            except grpc.RpcError as error:
                failure = self._error(error)
            else:
                self._reached()
                return response
            time.sleep(retry.wait_s(failure))
