"""The hot path, the same on every transport: request bytes in, response bytes or a status out.

    transport -> Classify.receive -> Batcher -> Engine -> Classify.complete -> transport

No event loop in here: ``receive`` runs on the transport's thread, ``complete`` on a slot's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from google.protobuf.message import DecodeError
from grpc import StatusCode

from digits.v1 import digits_pb2
from service import wire
from service.batcher import Batcher
from service.decoder import Decoder, Outcome
from service.images import Decoded
from service.job import Batch, Refusal
from service.status import (
    REFUSALS,
    InvalidRequestError,
    Status,
    departed_code,
    refusal_status,
    unavailable,
)

if TYPE_CHECKING:
    from service.call import Call, RpcListener
    from service.metrics import Metrics
    from service.model import ServedModel
    from service.security.limit import RateLimit

logger = logging.getLogger(__name__)


class Classify:
    """Parses and validates calls, feeds the batcher, and turns its results into answers.

    Owns which model serves and whether calls are accepted.

    Args:
        make_batcher: Builds the batcher around this object's run and complete functions.
        max_images_per_request: Images in one request at most.
        metrics: Where calls are counted.
        listeners: Are told how they end.
        rate_limit: What each caller may ask for; None for no limit.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        make_batcher: Callable[..., Batcher],
        *,
        max_images_per_request: int,
        metrics: Metrics,
        listeners: Sequence[RpcListener] = (),
        rate_limit: RateLimit | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.batcher = make_batcher(self._run, self.complete, image_bytes=wire.IMAGE_BYTES)
        self._max_images = max_images_per_request
        self._metrics = metrics
        self._listeners = listeners
        self._rate_limit = rate_limit
        self._clock = clock
        self._model: ServedModel | None = None
        self._closed: Status | None = unavailable("the model is loading")
        self._decoder = Decoder(self._decoded)

    @property
    def model(self) -> ServedModel | None:
        """The model in service, or None while loading."""
        return self._model

    @property
    def is_open(self) -> bool:
        """Whether calls are accepted."""
        return self._closed is None

    @property
    def threads(self) -> list[threading.Thread]:
        """What must live as long as calls are accepted."""
        return [*self.batcher.threads, self._decoder.thread]

    def start(self) -> None:
        """Starts the threads."""
        self._decoder.start()
        self.batcher.start()

    def serve(self, model: ServedModel) -> None:
        """Answers with ``model`` from the next batch on."""
        self._model = model
        self.batcher.tune(model.seconds_per_image)

    def open(self) -> None:
        """Accepts calls; a model must serve."""
        self._closed = None

    def close(self, reason: str) -> None:
        """Refuses calls from here on with UNAVAILABLE; those admitted are still answered."""
        self._closed = unavailable(reason)

    def stop(self, grace_s: float) -> bool:
        """Finishes what was admitted; True if all of it was answered within the grace."""
        give_up = self._clock() + grace_s
        decoded = self._decoder.stop(grace_s)
        return self.batcher.stop(max(0.0, give_up - self._clock())) and decoded

    def receive(self, calls: Sequence[Call]) -> None:
        """Takes a burst of calls; each is answered later, or failed here."""
        ready = []
        for call in calls:
            try:
                if self._accept(call):
                    ready.append(call)
            except InvalidRequestError as error:
                self.fail(call, error.status())
            except Exception:  # must not keep the others from being served
                logger.exception("reading a call failed; this is a bug")
                call.refusal = Refusal.FAILED
                self.refuse([call])
        if ready and self._rate_limit is not None:
            ready = self._within_rate(ready, self._rate_limit)
        if ready:
            self._submit(ready)

    def _within_rate(self, calls: list[Call], rate_limit: RateLimit) -> list[Call]:
        """The calls whose callers have not asked for too much; the others are refused."""
        refused = rate_limit.refuse(calls)
        if not refused:
            return calls
        self.refuse(refused)
        return [call for call in calls if call.refusal is None]

    def _accept(self, call: Call) -> bool:
        """Reads a call; True if its images are ready for the queue."""
        if self._closed is not None:
            self.fail(call, self._closed, Refusal.STOPPED)
            return False
        pixels = wire.sole_field(call.request)
        if pixels is None:
            return self._accept_slowly(call)
        self._attach(call, pixels)
        return True

    def _accept_slowly(self, call: Call) -> bool:
        """The same for a request that is more than raw pixels: the generated class reads it."""
        try:
            request = digits_pb2.ClassifyRequest.FromString(call.request)
        except DecodeError:
            expected = "a serialised ClassifyRequest"
            raise InvalidRequestError("request", expected, "malformed bytes") from None
        form = request.WhichOneof("input")
        if form is None:
            raise InvalidRequestError("input", "pixels or encoded", "neither")
        if form == "pixels":
            self._attach(call, memoryview(request.pixels))
            return True
        self._check_count("encoded.files", len(request.encoded.files))
        self._decode(call, request.encoded.files)
        return False

    def _decode(self, call: Call, files: Sequence[bytes]) -> None:
        call.request = b""  # the files are held already
        call.count = len(files)
        if self._rate_limit is not None and not self._within_rate([call], self._rate_limit):
            return
        refusal = self._decoder.submit(call, files)
        if refusal is not None:
            call.refusal = refusal
            self.refuse([call])

    def _decoded(self, call: Call, result: Outcome) -> None:
        if isinstance(result, Decoded):
            self._attach(call, memoryview(result.pixels))
            call.plausibility = result.plausibility
            self._submit([call])
        elif isinstance(result, Refusal):
            call.refusal = result
            self.refuse([call])
        else:
            self.fail(call, result)

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
        refused = self.batcher.submit(calls)
        if refused:
            self.refuse([cast("Call", job) for job in refused])

    def _run(self, pixels: bytes | memoryview, count: int) -> tuple[bytes, ServedModel]:
        model = self._model
        assert model is not None, "a batch before a model; this is a bug"
        batch = np.frombuffer(pixels, np.uint8).reshape(count, 28, 28)
        return wire.encode_predictions(model.engine.run(batch)), model

    def complete(self, batch: Batch) -> None:
        """Answers the finished calls of a batch, and counts them all at once."""
        if batch.error is not None:
            self._metrics.log_failure(batch.error)
        model: ServedModel | None = batch.source
        whole_tail = b""
        if model is not None:
            whole_tail = wire.encode_tail(model.encoded_ref, batch.seconds, batch.images)
        answered: list[Call] = []
        for job in batch.finished:
            call = cast("Call", job)
            try:
                if self._answer(call, batch, whole_tail):
                    answered.append(call)
            except Exception:  # must not keep the others from their answers
                logger.exception("answering a call failed; this is a bug")
        now = self._clock()
        self._metrics.batch(batch, answered, now)
        for listener in self._listeners:
            listener.answered(answered, batch, now)

    def _answer(self, call: Call, batch: Batch, tail: bytes) -> bool:
        """Ends one call of a batch; True if it was with predictions that reached the caller."""
        if call.refusal is not None:
            self.refuse([call])
            return False
        if call.returned:  # it was split: its times are sums over several batches
            model: ServedModel = batch.source
            tail = wire.encode_tail(model.encoded_ref, call.inference_s, call.batch_images)
        predictions = call.result
        if call.plausibility is not None:
            predictions = wire.with_scores(predictions, call.plausibility)
        if call.respond(predictions + tail + wire.encode_queue_time(call.started - call.enqueued)):
            return True
        self._count_departed(call)
        return False

    def refuse(self, calls: Sequence[Call]) -> None:
        """Fails calls by their ``refusal``, and counts them all at once."""
        ended: defaultdict[Refusal, list[Call]] = defaultdict(list)
        for call in calls:
            assert call.refusal is not None
            if not call.fail(refusal_status(call)):
                self._count_departed(call)
            elif call.is_rpc:
                ended[call.refusal].append(call)
        for refusal, failed in ended.items():
            self._ended(failed, *REFUSALS[refusal])
        self._metrics.dropped([call.refusal for call in calls if call.refusal is not None])

    def fail(self, call: Call, status: Status, dropped: Refusal | None = None) -> None:
        """Ends a call that never reached the queue."""
        if not call.fail(status):
            self._count_departed(call)
        elif call.is_rpc:
            self._ended([call], status.code, status.message)
        if dropped is not None:
            self._metrics.dropped([dropped])

    def _count_departed(self, call: Call) -> None:
        """The caller left before its answer: the transport has told it why."""
        if not call.is_rpc:
            return
        self._ended([call], departed_code(call.deadline, self._clock()), "the caller left")

    def _ended(self, calls: Sequence[Call], code: StatusCode, message: str) -> None:
        """Counts RPCs that ended other than with OK."""
        now = self._clock()
        self._metrics.handled(code, [now - call.received for call in calls])
        for listener in self._listeners:
            listener.failed(calls, code, message, now)
