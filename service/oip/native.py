"""ModelInfer over the native front: calls come in bursts and share batches, as Classify's do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from grpc import StatusCode

from service import wire
from service.call import Call, RpcListener
from service.classify import Classify
from service.job import Refusal
from service.metrics import Metrics
from service.oip import SERVICE
from service.oip.messages import Infer, infer_response
from service.oip.reader import SMALL_BYTES, LoadingError, Reader
from service.oip.statistics import Statistics
from service.rpcs import Rpcs
from service.status import REFUSALS, InvalidRequestError, Status, departed_code, unavailable
from service.transports.native import NativeCall, Route

logger = logging.getLogger(__name__)

METHOD = "ModelInfer"


class InferCall(NativeCall):
    """A ModelInfer call, which is counted as an RPC of its own service.

    Attributes:
        infer: Its request, once it was read.
        admitted: Whether it may be read; the model's statistics know of no other call.
    """

    is_rpc = False
    infer: Infer
    admitted = False

    def __init__(self, inference: NativeInference, *rest: Any) -> None:
        super().__init__(*rest)
        self._inference = inference

    def respond(self, response: bytes) -> bool:
        """See ``Call.respond``; the caller gets it in its own protocol's words."""
        return self._inference.answer(self, response)

    def fail(self, status: Status) -> bool:
        """See ``Call.fail``."""
        sent = super().fail(status)
        self._inference.failed(self, status.code if sent else None)
        return sent

    def give_up(self) -> None:
        """Ends the call if it is neither in the queue nor answered."""
        self._transport.give_up([self])

    def send(self, response: bytes) -> bool:
        """Sends a serialised ModelInferResponse; False if the caller has left."""
        return super().respond(response)


class NativeInference:
    """Reads bursts of ModelInfer calls, passes them on to Classify, and answers them. Thread-safe.

    Args:
        classify: Takes what was read.
        reader: Reads requests.
        statistics: Of how calls ended.
        metrics: Counts RPCs.
        listeners: Are told how they end.
    """

    def __init__(
        self,
        classify: Classify,
        *,
        reader: Reader,
        statistics: Statistics,
        metrics: Metrics,
        listeners: Sequence[RpcListener],
    ) -> None:
        self._classify = classify
        self._reader = reader
        self._statistics = statistics
        self._rpcs = Rpcs(SERVICE, metrics, listeners)

    def route(self, admit: Callable[[Sequence[Call]], Sequence[Call]]) -> Route:
        """What the front has to know; ``admit`` is the route's."""
        return Route(
            path=f"/{SERVICE}/{METHOD}",
            make=partial(InferCall, self),
            count=partial(self._rpcs.began, METHOD),
            admit=admit,
            receive=self.receive,
        )

    def receive(self, calls: Sequence[Call]) -> None:
        """Takes a burst of calls; each is answered later, or failed here.

        What takes long to read is read on the reader's thread: each large request by itself, and
        of many small ones those that are too many.
        """
        room = SMALL_BYTES
        now: list[InferCall] = []
        later: list[InferCall] = []
        for call in calls:
            assert isinstance(call, InferCall)
            call.admitted = True
            size = len(call.request)
            if size > SMALL_BYTES:
                self._take_aside([call])
            elif size > room:
                later.append(call)
            else:
                room -= size
                now.append(call)
        if later:
            self._take_aside(later)
        self._take(now)

    def _take_aside(self, calls: list[InferCall]) -> None:
        try:
            size = sum(len(call.request) for call in calls)
            taken = self._reader.aside(size, partial(self._take, calls))
        except RuntimeError:
            logger.exception("no thread for large requests")
            taken = None
        if taken is None:
            for call in calls:
                call.refusal = Refusal.QUEUE_FULL
            self._classify.refuse(calls)

    def _take(self, calls: list[InferCall]) -> None:
        """Reads calls and passes them on. Raises nothing: nobody would hear it."""
        try:
            ready = [call for call in calls if self._accept(call)]
            if ready:
                self._classify.receive(ready)
        except Exception:
            logger.exception("taking ModelInfer calls failed; this is a bug")
            for call in calls:
                call.give_up()

    def _accept(self, call: InferCall) -> bool:
        """Reads a call; True if it is ready for Classify, otherwise it has failed."""
        if call.cancelled or (call.deadline is not None and time.monotonic() >= call.deadline):
            call.refusal = Refusal.CANCELLED if call.cancelled else Refusal.EXPIRED
            self._classify.refuse([call])
            return False
        try:
            call.infer = self._reader.read(call.request)
        except InvalidRequestError as error:
            call.fail(error.status())
            return False
        except LoadingError:
            call.fail(unavailable("the model is loading"))
            return False
        except Exception:  # must not keep the others from being served
            logger.exception("reading a ModelInfer call failed; this is a bug")
            call.give_up()
            return False
        call.request = wire.as_field_1(call.infer.pixels)
        return True

    def answer(self, call: InferCall, response: bytes) -> bool:
        """Answers a call with what Classify answered; False if its caller has left."""
        try:
            predictions, rest = wire.decode_predictions(response, call.infer.count)
            message = infer_response(call.infer, predictions, rest.model)
        except InvalidRequestError as error:
            return call.fail(error.status())
        except Exception:  # the caller must not wait for ever
            logger.exception("answering a ModelInfer call failed; this is a bug")
            return call.fail(Status(*REFUSALS[Refusal.FAILED]))
        if not call.send(message.SerializeToString()):
            self.failed(call, None)
            return False
        self._statistics.answer(rest.model.version, call, time.monotonic())
        self._ended(call, StatusCode.OK)
        return True

    def failed(self, call: InferCall, code: StatusCode | None) -> None:
        """Counts a call that ended with a code other than OK; None if its caller has left."""
        now, model = time.monotonic(), self._classify.model
        if model is not None and call.admitted:
            self._statistics.fail(model.ref.version, now - call.received)
        self._ended(call, departed_code(call.deadline, now) if code is None else code)

    def _ended(self, call: InferCall, code: StatusCode) -> None:
        self._rpcs.ended(METHOD, code, call.peer, call.metadata, call.received)
