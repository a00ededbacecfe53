"""ModelInfer: bursts of calls to requests, and back."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from service.oip.messages import infer_response, read_infer
from service.rpc.call import RpcCall
from service.rpc.classify import FAILED, Ending
from service.rpc.get_model import LOADING
from service.rpc.recorder import Recorder
from service.rpc.status import invalid_status
from service.serving.gate import Gate
from service.serving.request import InvalidInputError, Request
from service.telemetry.listener import Method

logger = logging.getLogger(__name__)

SERVICE = "inference.GRPCInferenceService"
MODEL_INFER = Method(SERVICE, "ModelInfer")
# A value of typed contents takes about 50 ns to read, a parameter about 1 us. More bytes than this,
# of one call or of a burst, would hold up the thread that reads all connections.
SMALL_BYTES = 32 * 1024
# Reading a byte takes about as long as decoding so many pixels.
PIXELS_PER_BYTE = 5


class InferEdge:
    """Takes ModelInfer calls. Thread-safe.

    Args:
        gate: The way into the core, and the model in service.
        recorder: Is notified of calls.
        max_images: Images in one request at most.
    """

    def __init__(self, gate: Gate, recorder: Recorder, max_images: int) -> None:
        self._gate = gate
        self._recorder = recorder
        self._max_images = max_images
        self._ending = Ending(MODEL_INFER, recorder, _encode)
        self._reply = self._ending.reply

    def receive(self, calls: Sequence[RpcCall]) -> None:
        """Takes a burst of calls; each is answered later, or rejected here.

        Small ones are read here, as long as the burst is small; the others are prepared.
        """
        self._recorder.began(MODEL_INFER, len(calls))
        if self._gate.model is None:
            for call in calls:
                self._ending.fail(call, LOADING)
            return
        ready: list[Request] = []
        room = SMALL_BYTES
        for call in calls:
            request = Request(b"", 0, call.deadline, self._reply, call)
            call.state = request
            reading = Reading(call.message, self._gate, self._max_images)
            call.message = b""  # until it is read, and not until it is answered
            if reading.size <= room:
                room -= reading.size
                if self._read(call, request, reading):
                    ready.append(request)
            else:
                self._gate.prepare(request, reading)
        if ready:
            self._gate.submit(ready)

    def _read(self, call: RpcCall, request: Request, reading: Reading) -> bool:
        """Reads a call; False if that ended it."""
        try:
            reading.do(0)
            reading.give_to(request)
        except InvalidInputError as error:
            self._ending.fail(call, invalid_status(error.violation))
        except Exception:  # must not keep the others from being served
            logger.exception("reading a ModelInfer call failed; this is a bug")
            self._ending.fail(call, FAILED)
        else:
            return True
        return False


class Reading:
    """Reads one ModelInferRequest: ``Work`` of one step.

    Args:
        message: The serialised request.
        gate: The model in service, of which there must be one.
        max_images: Images in one request at most.
    """

    steps = 1

    def __init__(self, message: bytes, gate: Gate, max_images: int) -> None:
        self.size = len(message)
        self._message = message
        self._gate = gate
        self._max_images = max_images

    def costs(self) -> list[int]:
        """See ``Work``."""
        return [self.size * PIXELS_PER_BYTE]

    def do(self, _: int) -> None:
        """See ``Work``."""
        model = self._gate.model
        assert model is not None
        self._infer = read_infer(self._message, model, self._max_images)

    def give_to(self, request: Request) -> None:
        """See ``Work``; what the answer needs of the message becomes the request's state."""
        request.images = self._infer.pixels
        request.count = self._infer.count
        request.state = self._infer


def _encode(request: Request) -> bytes:
    assert request.result is not None
    return infer_response(request.state, request.result, request.first)
