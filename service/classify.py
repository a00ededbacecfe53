"""The hot path, the same on every transport: request bytes in, response bytes or a status out.

    transport -> Classify.receive -> Batcher -> Engine -> Classify.complete -> transport

No event loop in here: ``receive`` runs on the transport's thread, ``complete`` on a slot's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import numpy as np
from digits.v1 import digits_pb2
from google.protobuf.message import DecodeError
from grpc import StatusCode

from service import wire
from service.batcher import Batch, Batcher, BoundedCount, Refusal
from service.images import decode_image
from service.status import InvalidRequestError, Status, refusal_status, unavailable

if TYPE_CHECKING:
    from service.call import Call
    from service.metrics import Metrics
    from service.model import ServedModel


class Classify:
    """Parses and validates calls, feeds the batcher, and turns its results into answers.

    Owns which model serves and whether calls are accepted.

    Args:
        make_batcher: Builds the batcher around this object's run and complete functions.
        max_images_per_request: Images in one request at most.
        max_queue_images: Image files that may wait to be decoded.
        metrics: Where calls are counted.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        make_batcher: Callable[..., Batcher],
        *,
        max_images_per_request: int,
        max_queue_images: int,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.batcher = make_batcher(self._run, self.complete, image_bytes=wire.IMAGE_BYTES)
        self._max_images = max_images_per_request
        self._metrics = metrics
        self._clock = clock
        self._model: ServedModel | None = None
        self._closed: Status | None = unavailable("the model is loading")
        # Decoding a file takes longer than accepting a call, so it has a thread of its own.
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decoder")
        self._decoding = BoundedCount(max_queue_images)

    @property
    def model(self) -> ServedModel | None:
        """The model in service, or None while loading."""
        return self._model

    @property
    def is_open(self) -> bool:
        """Whether calls are accepted."""
        return self._closed is None

    def start(self) -> None:
        """Starts the slots."""
        self.batcher.start()

    def open(self, model: ServedModel) -> None:
        """Serves ``model`` and accepts calls."""
        self._model = model
        self.batcher.tune(model.seconds_per_image)
        self._closed = None

    def close(self, reason: str) -> None:
        """Refuses calls from here on with UNAVAILABLE; those admitted are still answered."""
        self._closed = unavailable(reason)

    def stop(self, grace_s: float) -> bool:
        """Finishes what was admitted; True if all of it was answered within the grace."""
        self._decoder.shutdown(wait=True)
        return self.batcher.stop(grace_s)

    def receive(self, calls: Sequence[Call]) -> None:
        """Takes a burst of calls; each is answered later, or failed here."""
        ready = []
        for call in calls:
            if self._closed is not None:
                self._fail(call, self._closed, Refusal.STOPPED)
                continue
            pixels = wire.pixels_view(call.request)
            if pixels is None:
                self._receive_slowly(call)
                continue
            try:
                self._attach(call, pixels)
            except InvalidRequestError as error:
                self._fail(call, error.status())
                continue
            ready.append(call)
        if ready:
            self._submit(ready)

    def _receive_slowly(self, call: Call) -> None:
        """A request that is more than raw pixels: the generated class reads it."""
        try:
            request = digits_pb2.ClassifyRequest.FromString(call.request)
            form = request.WhichOneof("input")
            if form is None:
                raise InvalidRequestError("input", "pixels or encoded", "neither")
            if form == "pixels":
                self._attach(call, memoryview(request.pixels))
                self._submit([call])
                return
            files = request.encoded.files
            self._check_count("encoded.files", len(files))
        except DecodeError:
            error = InvalidRequestError(
                "request", "a serialised ClassifyRequest", "malformed bytes"
            )
            self._fail(call, error.status())
        except InvalidRequestError as error:
            self._fail(call, error.status())
        else:
            self._queue_decoding(call, files)

    def _queue_decoding(self, call: Call, files: Sequence[bytes]) -> None:
        if not self._decoding.add(len(files)):
            call.refusal = Refusal.QUEUE_FULL
            self._refuse(call)
            return
        try:
            self._decoder.submit(self._decode, call, files)
        except RuntimeError:  # the executor was shut down between the check and here
            call.refusal = Refusal.STOPPED
            self._refuse(call)

    def _decode(self, call: Call, files: Sequence[bytes]) -> None:
        self._decoding.remove(len(files))
        if call.cancelled:
            call.refusal = Refusal.CANCELLED
            self._refuse(call)
            return
        try:
            pixels = b"".join(
                decode_image(data, f"encoded.files[{index}]") for index, data in enumerate(files)
            )
            self._attach(call, memoryview(pixels))
        except InvalidRequestError as error:
            self._fail(call, error.status())
        else:
            self._submit([call])

    def _attach(self, call: Call, pixels: memoryview) -> None:
        count, rest = divmod(len(pixels), wire.IMAGE_BYTES)
        if rest:
            expected = f"a multiple of {wire.IMAGE_BYTES} bytes"
            raise InvalidRequestError("pixels", expected, f"{len(pixels)} bytes")
        self._check_count("pixels", count)
        call.images = pixels
        call.count = count

    def _check_count(self, field: str, count: int) -> None:
        if not 1 <= count <= self._max_images:
            raise InvalidRequestError(field, f"1 to {self._max_images} images", str(count))

    def _submit(self, calls: list[Call]) -> None:
        for job in self.batcher.submit(calls):
            self._refuse(cast("Call", job))

    def _run(self, images: list[memoryview], count: int) -> tuple[bytes, ServedModel]:
        model = self._model
        assert model is not None, "a batch before a model; this is a bug"
        pixels = images[0] if len(images) == 1 else b"".join(images)
        batch = np.frombuffer(pixels, np.uint8).reshape(count, 28, 28)
        return wire.encode_predictions(model.engine.run(batch)), model

    def complete(self, batch: Batch) -> None:
        """Answers the finished calls of a batch, and counts them all at once."""
        if batch.error is not None:
            self._metrics.log_failure(batch.error)
        answered: list[Call] = []
        for call, response in self._responses(batch):
            if call.respond(response):
                answered.append(call)
            else:
                self._count_departed(call)
        self._metrics.batch(batch, answered, self._clock())

    def _responses(self, batch: Batch) -> Iterator[tuple[Call, bytes]]:
        """The finished calls of a batch with their response bytes; refused ones are failed."""
        model: ServedModel | None = batch.source
        whole_tail = b""
        if model is not None:
            whole_tail = wire.encode_tail(model.encoded_ref, batch.seconds, batch.images)
        for job in batch.finished:
            call = cast("Call", job)
            if call.refusal is not None or model is None:
                self._refuse(call)
                continue
            tail = whole_tail
            if call.returned:  # it was split: its times are sums over several batches
                tail = wire.encode_tail(model.encoded_ref, call.inference_s, call.batch_images)
            queue_s = call.started - call.enqueued
            yield call, call.result + tail + wire.encode_queue_time(queue_s)

    def _refuse(self, call: Call) -> None:
        self._fail(call, refusal_status(call), call.refusal)

    def _fail(self, call: Call, status: Status, dropped: Refusal | None = None) -> None:
        if not call.fail(status):
            self._count_departed(call)
        elif call.is_rpc:
            self._metrics.handled(status.code, self._clock() - call.received)
        if dropped is not None:
            self._metrics.dropped(dropped)

    def _count_departed(self, call: Call) -> None:
        """The caller left before its answer: the transport has told it why."""
        if not call.is_rpc:
            return
        now = self._clock()
        expired = call.deadline is not None and now >= call.deadline
        code = StatusCode.DEADLINE_EXCEEDED if expired else StatusCode.CANCELLED
        self._metrics.handled(code, now - call.received)
