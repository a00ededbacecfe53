"""ModelInfer over the native front: calls come in bursts and share batches, as Classify's do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
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
    """

    is_rpc = False
    infer: Infer

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

    def send(self, response: bytes) -> bool:
        """Sends a serialised ModelInferResponse; False if the caller has left."""
        return super().respond(response)


class NativeInference:
    """Reads bursts of ModelInfer calls, passes them on to Classify, and answers them. Thread-safe.

    Args:
        classify: Takes what was read.
        admit: Fails those calls of a burst that may not be read; returns the others.
        reader: Reads requests.
        statistics: Of how calls ended.
        metrics: Counts RPCs.
        listeners: Are told how they end.
    """

    def __init__(
        self,
        classify: Classify,
        admit: Callable[[Sequence[Call]], Sequence[Call]],
        *,
        reader: Reader,
        statistics: Statistics,
        metrics: Metrics,
        listeners: Sequence[RpcListener],
    ) -> None:
        self._classify = classify
        self._admit = admit
        self._reader = reader
        self._statistics = statistics
        self._rpcs = Rpcs(SERVICE, metrics, listeners)

    def route(self) -> Route:
        """What the front has to know."""
        return Route(
            path=f"/{SERVICE}/{METHOD}",
            make=partial(InferCall, self),
            count=partial(self._rpcs.began, METHOD),
            receive=self.receive,
        )

    def receive(self, calls: Sequence[Call]) -> None:
        """Takes a burst of calls; each is answered later, or failed here."""
        ready: list[Call] = []
        for call in self._admit(calls):
            assert isinstance(call, InferCall)
            if len(call.request) > SMALL_BYTES:
                self._read_aside(call)
            elif self._accept(call, partial(self._reader.read, call.request)):
                ready.append(call)
        if ready:
            self._classify.receive(ready)

    def _read_aside(self, call: InferCall) -> None:
        reading = self._reader.read_aside(call.request)
        if reading is None:
            call.refusal = Refusal.QUEUE_FULL
            self._classify.refuse([call])
            return

        def hand_over(read: Future[Infer]) -> None:
            if self._accept(call, read.result):
                self._classify.receive([call])

        reading.add_done_callback(hand_over)

    def _accept(self, call: InferCall, read: Callable[[], Infer]) -> bool:
        """Whether a request could be read; if not its call has failed."""
        try:
            call.infer = read()
        except InvalidRequestError as error:
            call.fail(error.status())
        except LoadingError:
            call.fail(unavailable("the model is loading"))
        except Exception:  # must not keep the others from being served
            logger.exception("reading a ModelInfer call failed; this is a bug")
            call.fail(Status(*REFUSALS[Refusal.FAILED]))
        else:
            call.request = wire.as_field_1(call.infer.pixels)
            return True
        return False

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
        if model is not None:
            self._statistics.fail(model.ref.version, now - call.received)
        self._ended(call, departed_code(call.deadline, now) if code is None else code)

    def _ended(self, call: InferCall, code: StatusCode) -> None:
        self._rpcs.ended(METHOD, code, call.peer, call.metadata, call.received)
