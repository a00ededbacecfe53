"""Calls of the digits service: whole messages, streams of them, and files of images."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from grpc import StatusCode

from digits.v1 import digits_pb2
from service.artifact.repository import in_serving_order
from service.rpc.classify import ClassifyEdge
from service.rpc.classify_stream import StreamEdge
from service.rpc.recorder import Recorder
from service.rpc.status import DETAILS_KEY, Status
from service.serving.batcher import Batcher
from service.serving.gate import Gate
from service.serving.loader import load_model
from service.serving.model import ModelRunner
from service.serving.preparing import Preparer
from service.serving.request import IMAGE_BYTES
from tests.conftest import REPOSITORY
from tests.fuzz import inputs
from tests.fuzz.target import Target

M = TypeVar("M", bound=Message)
MAX_IMAGES = 4
ANSWER_TIMEOUT_S = 20
MAX_MESSAGE_CHARACTERS = 500


class RecordedCall:
    """A call that keeps what it is answered; see ``service.rpc.call.Call``."""

    path = inputs.CLASSIFY_PATH.decode()
    metadata = ()
    peer = "ipv4:127.0.0.1:1"
    received = 0.0
    deadline = None
    cancelled = False
    caller = ""
    state = None
    unsent = 0

    def __init__(self, message: bytes) -> None:
        self.message = message
        self.answers: list[bytes | Status] = []
        self.ended = threading.Event()

    def respond(self, message: bytes) -> bool:
        self.answers.append(message)
        self.ended.set()
        return True

    @staticmethod
    def respond_all(answers: Any) -> list[Any]:
        return [call.respond(message) for call, message in answers]

    def send(self, message: bytes) -> bool:
        self.answers.append(message)
        return True

    def end(self, code: int = 0, message: str = "", trailers: Any = ()) -> bool:
        if code:
            [found] = [each for each in StatusCode if each.value[0] == code]
            self.answers.append(Status(found, message, dict(trailers).get(DETAILS_KEY)))
        self.ended.set()
        return True

    @staticmethod
    def end_all(calls: Any, code: Any, message: str = "", trailers: Any = ()) -> list[Any]:
        return [call.end(code, message, trailers) for call in calls]

    def pause(self) -> None:
        pass

    def resume(self) -> None:
        pass


class _Complaints(logging.Handler):
    """Keeps what the server logs as an error: bad input is no reason for that."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class ClassifyRequests(Target):
    """The hot path with a real model: what the generated class reads decides what is expected."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        version = in_serving_order(REPOSITORY)[0]
        self.model = load_model(
            version, "digits", device="cpu", intra_op_threads=1, max_batch_size=8
        )
        runner = ModelRunner()
        batcher = Batcher(runner.run, slots=1, max_batch_size=8, max_queue_images=64)
        self.gate = Gate(batcher, runner, Preparer(), max_images_per_request=MAX_IMAGES)
        self.gate.serve(self.model)
        self.gate.open()
        self.gate.start()
        self.recorder = Recorder({}, [])
        self.classify = ClassifyEdge(self.gate, self.recorder)
        self.complaints = _Complaints()
        logging.getLogger("service").addHandler(self.complaints)

    def seeds(self) -> Any:
        return inputs.requests()

    def run(self, data: Any) -> None:
        answer = self.answer(data)
        assert isinstance(answer, bytes) or answer.details
        self.check(answer, parse(digits_pb2.ClassifyRequest, data))

    def answer(self, request: bytes) -> bytes | Status:
        """What the hot path says to a serialised request."""
        call = RecordedCall(request)
        self.classify.receive([call])  # type: ignore[list-item]
        return self.answer_of(call)

    def answer_of(self, call: RecordedCall) -> bytes | Status:
        """The one answer of a call, once it has ended."""
        assert call.ended.wait(ANSWER_TIMEOUT_S), "no answer"
        [answer] = call.answers
        assert not self.complaints.records, self.complaints.records[0].getMessage()
        return answer

    def check(self, answer: bytes | Status, request: Message | None) -> None:
        """An answer is the one that the parsed request, None for a malformed one, deserves."""
        if isinstance(answer, Status):
            assert answer.code is StatusCode.INVALID_ARGUMENT, answer
            assert 0 < len(answer.message) < MAX_MESSAGE_CHARACTERS
            assert answer.message.isprintable()
        expected = expected_images(request)
        if expected is None:  # files: only their number is known without reading them
            if isinstance(answer, bytes):
                self._check_predictions(answer, len(request.encoded.files))
        elif len(expected):
            assert isinstance(answer, bytes), answer
            got = self._check_predictions(answer, len(expected))
            assert np.array_equal(got, self.model.engine.run(expected))
        else:
            assert isinstance(answer, Status), "a bad request was answered with predictions"

    def _check_predictions(self, answer: bytes, count: int) -> np.ndarray:
        response = digits_pb2.ClassifyResponse.FromString(answer)
        assert response.model.sha256 == self.model.sha256
        assert 1 <= len(response.predictions) == count <= MAX_IMAGES
        return np.array([p.probabilities for p in response.predictions], np.float32)

    def close(self) -> None:
        assert self.gate.stop(ANSWER_TIMEOUT_S)
        logging.getLogger("service").removeHandler(self.complaints)

    def check_golden(self) -> None:
        golden = self.model.artifact.golden
        for first in range(0, len(golden.images) - MAX_IMAGES, MAX_IMAGES):
            some = slice(first, first + MAX_IMAGES)
            answer = self.answer(inputs.request(golden.images[some].tobytes()))
            assert isinstance(answer, bytes), answer
            response = digits_pb2.ClassifyResponse.FromString(answer)
            assert [p.digit for p in response.predictions] == golden.labels[some].tolist()


def parse(kind: type[M], data: bytes) -> M | None:
    """The message, or None if it is malformed."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def expected_images(request: Any) -> np.ndarray | None:
    """The images uint8[N, 28, 28] of a request; none if it is a bad one; None if it holds files."""
    if request is not None and request.WhichOneof("input") == "encoded":
        return None
    pixels = b"" if request is None else request.pixels
    count, rest = divmod(len(pixels), IMAGE_BYTES)
    if rest or count > MAX_IMAGES:
        count = 0
    return np.frombuffer(pixels[: count * IMAGE_BYTES], np.uint8).reshape(count, 28, 28)


class StreamRequests(ClassifyRequests):
    """Items of ClassifyStream."""

    def seeds(self) -> list[Any]:
        return [*inputs.stream_requests(), *inputs.requests()]

    def run(self, data: Any) -> None:
        item = parse(digits_pb2.ClassifyStreamRequest, data)
        edge = StreamEdge(
            self.gate, self.recorder, max_streams=1, max_ahead_bytes=2**20, idle_s=0.0
        )
        call = RecordedCall(b"")
        stream = edge.open(call)  # type: ignore[arg-type]
        stream.message(data)
        stream.half_closed()
        answer = self.answer_of(call)
        assert isinstance(answer, bytes)
        response = digits_pb2.ClassifyStreamResponse.FromString(answer)
        if response.WhichOneof("result") == "response":
            self.check(response.response.SerializeToString(), item and item.request)
        else:
            [code] = [each for each in StatusCode if each.value[0] == response.error.code]
            self.check(Status(code, response.error.message), item and item.request)


class ImageFiles(ClassifyRequests):
    """Image files. The first byte says whether a PNG's checksums are put right."""

    def seeds(self) -> list[Any]:
        return [flag + file for flag in (b"\0", b"\1") for file in inputs.image_files()]

    def run(self, data: Any) -> None:
        file = inputs.repair_png(data[1:]) if data[:1] > b"\x7f" else data[1:]
        super().run(inputs.request(files=(file,)))
