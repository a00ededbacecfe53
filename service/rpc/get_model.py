"""GetModel: which model serves, and where it came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from google.protobuf.message import Message
from grpc import StatusCode

from digits.v1 import digits_pb2
from service.rpc.call import RpcCall
from service.rpc.classify import SERVICE
from service.rpc.codec import parse
from service.rpc.recorder import Recorder
from service.rpc.status import Status, departed_code, fail, invalid_status, unavailable
from service.serving.gate import Gate
from service.serving.model import ServedModel
from service.serving.request import InvalidInputError
from service.telemetry.listener import Method

GET_MODEL = Method(SERVICE, "GetModel")
# Open to everybody, or nearly so; none of these requests needs more.
MAX_SMALL_MESSAGE_BYTES = 512
LOADING = unavailable("the model is loading")


class SimpleMethod:
    """A unary method that answers at once.

    Args:
        method: It.
        recorder: Is notified of calls.
        answer: Makes the response, serialised or not, or says how the call ends otherwise; may
            raise ``InvalidInputError``.
    """

    def __init__(
        self,
        method: Method,
        recorder: Recorder,
        answer: Callable[[bytes], Message | bytes | Status],
    ) -> None:
        self._method = method
        self._recorder = recorder
        self._answer = answer

    def receive(self, calls: Sequence[RpcCall]) -> None:
        """Answers a burst of calls."""
        self._recorder.began(self._method, len(calls))
        for call in calls:
            try:
                answer = self._answer(call.message)
            except InvalidInputError as error:
                answer = invalid_status(error.violation)
            code, message = StatusCode.OK, ""
            if isinstance(answer, Status):
                code, message = answer.code, answer.message
                was_sent = fail(call, answer)
            else:
                encoded = answer if isinstance(answer, bytes) else answer.SerializeToString()
                was_sent = call.respond(encoded)
            if not was_sent:
                code, message = departed_code(call.deadline, call.received), "the caller left"
            self._recorder.ended(self._method, [call], code, message)


def answer_get_model(gate: Gate, message: bytes) -> bytes | Status:
    """The response to a GetModelRequest, made once for each model: a manifest can be long."""
    parse(digits_pb2.GetModelRequest, message)
    model = gate.model
    if model is None:
        return LOADING
    answer = model.encoded.get(GET_MODEL)
    if answer is None:
        answer = model.encoded[GET_MODEL] = _describe(model).SerializeToString()
    return answer


def _describe(model: ServedModel) -> digits_pb2.GetModelResponse:
    ref = digits_pb2.ModelRef(
        name=model.name,
        version=model.version,
        sha256=model.sha256,
        precision=model.precision,
        execution_provider=model.provider,
    )
    return digits_pb2.GetModelResponse(
        model=ref,
        labels=model.artifact.labels,
        manifest_json=model.artifact.manifest_json,
    )
