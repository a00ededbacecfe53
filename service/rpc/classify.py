"""Classify: bursts of calls to requests, and what the core has made of them to answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from grpc import StatusCode

from digits.v1 import digits_pb2
from service.rpc import codec
from service.rpc.call import RpcCall
from service.rpc.recorder import Recorder
from service.rpc.status import (
    REFUSALS,
    Status,
    departed_code,
    fail_all,
    invalid_status,
    refusal_status,
)
from service.serving.gate import Gate
from service.serving.pictures import Pictures
from service.serving.request import InvalidInputError, Origin, Refusal, Reply, Request
from service.telemetry.listener import Method

logger = logging.getLogger(__name__)

SERVICE = "digits.v1.DigitClassifierService"
CLASSIFY = Method(SERVICE, "Classify")
FAILED = Status(*REFUSALS[Refusal.FAILED])


class Ending:
    """Ends the calls of one unary method that feeds the core, and records how.

    Args:
        method: It.
        recorder: Is notified.
        encode: The serialised response to a request that has its result.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        method: Method,
        recorder: Recorder,
        encode: Callable[[Request], bytes],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._method = method
        self._recorder = recorder
        self._encode = encode
        self._clock = clock

    def reply(self, requests: Sequence[Request]) -> None:
        """Answers the calls of requests that the core has ended; see ``Reply``."""
        answers: list[tuple[RpcCall, bytes]] = []
        failed: dict[Status, list[RpcCall]] = {}
        for request in requests:
            call: RpcCall = request.origin  # type: ignore[assignment] # a request here is a call's
            try:
                if request.result is None:
                    failed.setdefault(refusal_status(request), []).append(call)
                else:
                    answers.append((call, self._encode(request)))
            except InvalidInputError as error:
                self.fail(call, invalid_status(error.violation))
            except Exception:  # must not keep the others from their answers
                logger.exception("answering %s failed; this is a bug", self._method.name)
                self.fail(call, FAILED)
        if answers:
            self._respond(answers)
        for status, calls in failed.items():
            self._fail_all(calls, status)

    def _respond(self, answers: Sequence[tuple[RpcCall, bytes]]) -> None:
        sent = answers[0][0].respond_all(answers)
        calls = [call for call, _ in answers]
        if not all(sent):
            for call, was_sent in zip(calls, sent, strict=True):
                if not was_sent:
                    self._depart(call)
            calls = [call for call, was_sent in zip(calls, sent, strict=True) if was_sent]
        if calls:
            self._recorder.ended(self._method, calls, StatusCode.OK)
        for call in calls:
            call.state = None  # its request leads back to it

    def fail(self, call: RpcCall, status: Status) -> None:
        """Ends one call with a status other than OK."""
        self._fail_all([call], status)

    def _fail_all(self, calls: Sequence[RpcCall], status: Status) -> None:
        """Ends calls with one status. In an overload a refusal must cost less than an answer."""
        ended = []
        for call, was_there in zip(calls, fail_all(calls, status), strict=True):
            if was_there:
                ended.append(call)
            else:
                self._depart(call)
        if ended:
            self._recorder.ended(self._method, ended, status.code, status.message)
        for call in ended:
            call.state = None

    def _depart(self, call: RpcCall) -> None:
        """The caller left before its answer."""
        code = departed_code(call.deadline, self._clock())
        self._recorder.ended(self._method, [call], code, "the caller left")
        call.state = None


class ClassifyEdge:
    """Takes Classify calls.

    Args:
        gate: The way into the core.
        recorder: Is notified of calls.
    """

    def __init__(self, gate: Gate, recorder: Recorder) -> None:
        self._gate = gate
        self._recorder = recorder
        self._ending = Ending(CLASSIFY, recorder, codec.encode_response)
        self._reply = self._ending.reply

    def receive(self, calls: Sequence[RpcCall]) -> None:
        """Takes a burst; each call is answered later, or refused here."""
        self._recorder.began(CLASSIFY, len(calls))
        ready: list[Request] = []
        for call in calls:
            try:
                request = read_pixels(call.message, call.deadline, self._gate, self._reply, call)
                if request is not None:
                    call.state = request
                    ready.append(request)
                else:
                    self._receive_slowly(call)
            except InvalidInputError as error:
                self._ending.fail(call, invalid_status(error.violation))
            except Exception:  # must not keep the others from being served
                logger.exception("reading a call failed; this is a bug")
                self._ending.fail(call, FAILED)
        if ready:
            self._gate.submit(ready)

    def _receive_slowly(self, call: RpcCall) -> None:
        request, files = read_request(call.message, call.deadline, self._gate, self._reply, call)
        call.state = request
        if files is None:
            self._gate.submit([request])
        else:
            call.message = b""  # the files are held already
            self._gate.prepare(request, Pictures(files, self._gate.judge))


def read_pixels(
    message: bytes | memoryview, deadline: float | None, gate: Gate, reply: Reply, origin: Origin
) -> Request | None:
    """The request in a ClassifyRequest that is nothing but pixels, without a copy; else None.

    Raises:
        InvalidInputError: If they are no images, or too many.
    """
    pixels = codec.sole_field(message)
    if pixels is None:
        return None
    return Request(pixels, gate.count_images("pixels", len(pixels)), deadline, reply, origin)


def read_request(
    message: bytes, deadline: float | None, gate: Gate, reply: Reply, origin: Origin
) -> tuple[Request, Sequence[bytes] | None]:
    """The request in any ClassifyRequest, and its files where it has those in place of pixels.

    Raises:
        InvalidInputError: Naming what is wrong.
    """
    parsed = codec.parse(digits_pb2.ClassifyRequest, message)
    form = parsed.WhichOneof("input")
    if form is None:
        raise InvalidInputError("input", "pixels or encoded", "neither")
    if form == "pixels":
        pixels = memoryview(parsed.pixels)
        count = gate.count_images("pixels", len(pixels))
        return Request(pixels, count, deadline, reply, origin), None
    files = parsed.encoded.files
    gate.check_count("encoded.files", len(files))
    return Request(b"", len(files), deadline, reply, origin), files
