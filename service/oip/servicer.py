"""``inference.GRPCInferenceService``: a plain grpcio servicer that feeds the same batcher.

ModelInfer comes here over grpcio alone; over the native transport it is ``native.py``'s.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from digits.oip import inference_pb2
from digits.v1 import digits_pb2
from service import wire
from service.call import Call, RpcListener
from service.classify import Classify
from service.job import Refusal
from service.metrics import Metrics
from service.oip import METHODS, SERVICE, tensors
from service.oip.messages import Infer, check_model, infer_response, parse
from service.oip.reader import SMALL_BYTES, LoadingError, Reader
from service.oip.statistics import Statistics
from service.rpcs import Origin, Rpcs
from service.status import InvalidRequestError, Status, refusal_status, unavailable
from service.transports.grpcio import AsyncCall, Gatherer, Mailbox, trailing_metadata

if TYPE_CHECKING:
    RpcMethodHandler = grpc.RpcMethodHandler[Any, Any]
    ServicerContext = grpc.aio.ServicerContext[Any, Any]
else:  # generic in the stubs, not at run time
    from grpc import RpcMethodHandler
    from grpc.aio import ServicerContext

DISTRIBUTION = "digits-serving"
# Triton's names for ModelConfig and ModelStatistics.
EXTENSIONS = ("model_configuration", "statistics")
# Answers a request, or says how it ends otherwise.
Behaviour = Callable[[bytes, Origin], Awaitable[Message | Status]]


class InferItem(AsyncCall):
    """The images of a ModelInfer call, which is counted as an RPC of its own service."""

    is_rpc = False


class InferenceService:
    """The Open Inference Protocol. Lives on the event loop.

    Args:
        classify: The model in service.
        receive: Takes bursts of calls.
        metrics: Counts them.
        listeners: Are told how they end.
        max_images: Images in one request at most.
        max_queue_delay_ms: What ModelConfig says about batches.
        is_live: What ServerLive says.
        is_ready: What ServerReady says.

    Attributes:
        reader: Reads ModelInfer requests.
        statistics: Of how they ended.
    """

    def __init__(
        self,
        classify: Classify,
        receive: Callable[[Sequence[Call]], None],
        metrics: Metrics,
        listeners: Sequence[RpcListener],
        *,
        max_images: int,
        max_queue_delay_ms: float,
        is_live: Callable[[], bool],
        is_ready: Callable[[], bool],
    ) -> None:
        self._classify = classify
        self._metrics = metrics
        self._rpcs = Rpcs(SERVICE, metrics, listeners)
        self._max_images = max_images
        self._max_queue_delay_ms = max_queue_delay_ms
        self._is_live = is_live
        self._is_ready = is_ready
        self._mailbox = Mailbox(asyncio.get_running_loop())
        self._gatherer = Gatherer(self._mailbox.loop, receive)
        self.statistics = Statistics()
        self.reader = Reader(classify, max_images)
        self._inferring: set[asyncio.Task[Any]] = set()

    def handlers(self) -> dict[str, RpcMethodHandler]:
        """The method handlers by name. Messages stay bytes: a malformed one is answered here."""
        behaviours: dict[str, Behaviour] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ModelReady": self._model_ready,
            "ServerMetadata": self._server_metadata,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
            "ModelConfig": self._model_config,
            "ModelStatistics": self._model_statistics,
        }
        assert behaviours.keys() == METHODS.keys()
        return {
            method: grpc.unary_unary_rpc_method_handler(partial(self._answer, method, behaviour))
            for method, behaviour in behaviours.items()
        }

    async def finished(self, grace_s: float) -> bool:
        """Waits for answers to leave; True if all did within the grace."""
        if self._inferring:
            await asyncio.wait(self._inferring, timeout=grace_s)
        return not self._inferring

    async def _answer(
        self, method: str, behaviour: Behaviour, request: bytes, context: ServicerContext
    ) -> bytes:
        origin = Origin.of(context)
        with self._rpcs.counting(method, context, origin):
            try:
                answer = await behaviour(request, origin)
            except InvalidRequestError as error:
                answer = error.status()
            except LoadingError:
                answer = unavailable("the model is loading")
            if isinstance(answer, Status):
                del request  # the context keeps abort's error, and that this frame
                await context.abort(answer.code, answer.message, trailing_metadata(answer))
            return answer.SerializeToString()

    async def _server_live(self, request: bytes, _: Origin) -> Message:
        parse(inference_pb2.ServerLiveRequest, request)
        return inference_pb2.ServerLiveResponse(live=self._is_live())

    async def _server_ready(self, request: bytes, _: Origin) -> Message:
        parse(inference_pb2.ServerReadyRequest, request)
        return inference_pb2.ServerReadyResponse(ready=self._is_ready())

    async def _server_metadata(self, request: bytes, _: Origin) -> Message:
        parse(inference_pb2.ServerMetadataRequest, request)
        version = importlib.metadata.version(DISTRIBUTION)
        return inference_pb2.ServerMetadataResponse(
            name=DISTRIBUTION, version=version, extensions=EXTENSIONS
        )

    async def _model_ready(self, request: bytes, _: Origin) -> Message:
        asked = parse(inference_pb2.ModelReadyRequest, request)
        model = self._classify.model
        if model is None or not self._is_ready():
            return inference_pb2.ModelReadyResponse(ready=False)
        is_ours = asked.name == model.ref.name and asked.version in ("", model.ref.version)
        return inference_pb2.ModelReadyResponse(ready=is_ours)

    async def _model_metadata(self, request: bytes, _: Origin) -> Message:
        asked = parse(inference_pb2.ModelMetadataRequest, request)
        return tensors.metadata(self._model_of(asked))

    async def _model_config(self, request: bytes, _: Origin) -> Message:
        asked = parse(inference_pb2.ModelConfigRequest, request)
        return tensors.config(
            self._model_of(asked),
            max_images=self._max_images,
            max_queue_delay_ms=self._max_queue_delay_ms,
        )

    async def _model_statistics(self, request: bytes, _: Origin) -> Message:
        asked = parse(inference_pb2.ModelStatisticsRequest, request)
        ref = self._model_of(asked) if asked.name else self.reader.ref()
        return inference_pb2.ModelStatisticsResponse(model_stats=[self.statistics.message(ref)])

    async def _model_infer(self, request: bytes, origin: Origin) -> Message | Status:
        task = asyncio.current_task()
        assert task is not None
        self._inferring.add(task)
        task.add_done_callback(self._inferring.discard)
        received = time.monotonic()
        answer: Message | Status | None = None
        try:
            answer = await self._infer(request, origin, received)
        finally:
            if not isinstance(answer, Message) and (model := self._classify.model):
                self.statistics.fail(model.ref.version, time.monotonic() - received)
        return answer

    async def _infer(self, request: bytes, origin: Origin, received: float) -> Message | Status:
        item = InferItem(
            self._mailbox,
            b"",
            received=received,
            deadline=origin.deadline,
            metadata=origin.metadata,
            peer=origin.peer,
        )
        infer = await self._read(request)
        if infer is None:
            item.refusal = Refusal.QUEUE_FULL
            self._metrics.dropped([item.refusal])
            return refusal_status(item)
        item.request = wire.as_field_1(infer.pixels)
        answer = await self._gatherer.answer(item)
        if isinstance(answer, Status):
            return answer
        predictions, rest = wire.decode_predictions(answer, infer.count)
        response = infer_response(infer, predictions, rest.model)
        self.statistics.answer(rest.model.version, item, time.monotonic())
        return response

    async def _read(self, request: bytes) -> Infer | None:
        """Reads a request, beside the event loop if it is large; None if too many wait for that."""
        if len(request) <= SMALL_BYTES:
            return self.reader.read(request)
        reading = self.reader.aside(len(request), partial(self.reader.read, request))
        if reading is None:
            return None
        try:
            return await asyncio.wrap_future(reading)
        finally:
            del reading  # an error that it holds leads back to this frame

    def _model_of(self, asked: Any) -> digits_pb2.ModelRef:
        """The model in service, if that is the one asked for."""
        ref = self.reader.ref()
        check_model(ref, asked.name, asked.version)
        return ref
