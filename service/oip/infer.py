"""ModelInfer: bursts of calls to requests, and back. What takes long to read is read aside."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from service.oip.messages import infer_response, read_infer
from service.rpc.call import RpcCall
from service.rpc.classify import FAILED, Ending
from service.rpc.get_model import LOADING
from service.rpc.recorder import Recorder
from service.rpc.status import invalid_status
from service.serving.gate import Gate
from service.serving.request import InvalidInputError, Refusal, Request
from service.telemetry.listener import Method

logger = logging.getLogger(__name__)

SERVICE = "inference.GRPCInferenceService"
MODEL_INFER = Method(SERVICE, "ModelInfer")
# One value of typed contents takes some 50 ns to read, one parameter about 1 us. To read more than
# this at a time, of one call or of a burst, would hold up the thread that all calls come by.
SMALL_BYTES = 32 * 1024
# Of requests that wait for the thread of large ones, in all.
MAX_WAITING_BYTES = 64 * 2**20


class InferEdge:
    """Takes ModelInfer calls. Thread-safe.

    Args:
        gate: The way into the core, and the model in service.
        recorder: Is told of calls.
        max_images: Images in one request at most.
    """

    def __init__(self, gate: Gate, recorder: Recorder, max_images: int) -> None:
        self._gate = gate
        self._recorder = recorder
        self._max_images = max_images
        self._ending = Ending(MODEL_INFER, recorder, _encode)
        self._thread = ThreadPoolExecutor(1, "oip-reader")
        self._lock = threading.Lock()
        self._waiting_bytes = 0

    def receive(self, calls: Sequence[RpcCall]) -> None:
        """Takes a burst of calls; each is answered later, or refused here."""
        self._recorder.began(MODEL_INFER, len(calls))
        room = SMALL_BYTES
        now: list[RpcCall] = []
        later: list[RpcCall] = []
        for call in calls:
            room -= len(call.message)
            if len(call.message) > SMALL_BYTES:
                room += len(call.message)
                self._take_aside([call])
            else:
                (now if room >= 0 else later).append(call)
        if later:
            self._take_aside(later)
        self._take(now)

    def _take_aside(self, calls: list[RpcCall]) -> None:
        size = sum([len(call.message) for call in calls])
        with self._lock:
            fits = self._waiting_bytes + size <= MAX_WAITING_BYTES
            if fits:
                self._waiting_bytes += size
        if fits:
            try:
                self._thread.submit(self._take_then_leave, calls, size)
                return
            except RuntimeError:
                logger.exception("no thread for large requests")
                self._leave(size)
        for call in calls:
            request = Request(b"", 0, call.deadline, self._ending.reply, call)
            request.refusal = Refusal.QUEUE_FULL
            self._gate.refuse([request])

    def _take_then_leave(self, calls: list[RpcCall], size: int) -> None:
        try:
            self._take(calls)
        finally:
            self._leave(size)

    def _leave(self, size: int) -> None:
        with self._lock:
            self._waiting_bytes -= size

    def _take(self, calls: Sequence[RpcCall]) -> None:
        """Reads calls and passes them on."""
        ready = [request for call in calls if (request := self._read(call)) is not None]
        if ready:
            self._gate.submit(ready)

    def _read(self, call: RpcCall) -> Request | None:
        """The request of a call; None if the call was ended."""
        model = self._gate.model
        if call.cancelled or (call.deadline is not None and time.monotonic() >= call.deadline):
            request = Request(b"", 0, call.deadline, self._ending.reply, call)
            request.refusal = Refusal.CANCELLED if call.cancelled else Refusal.EXPIRED
            self._gate.refuse([request])
        elif model is None:
            self._ending.fail(call, LOADING)
        else:
            try:
                infer = read_infer(call.message, model, self._max_images)
            except InvalidInputError as error:
                self._ending.fail(call, invalid_status(error))
            except Exception:  # must not keep the others from being served
                logger.exception("reading a ModelInfer call failed; this is a bug")
                self._ending.fail(call, FAILED)
            else:
                call.message = b""
                request = Request(
                    infer.pixels, infer.count, call.deadline, self._ending.reply, call
                )
                request.state = infer
                call.state = request
                return request
        return None


def _encode(request: Request) -> bytes:
    assert request.result is not None
    return infer_response(request.state, request.result, request.first)
