"""What is fuzzed within one process. Each target takes bytes and raises on a wrong outcome.

The same targets are fed by hypothesis in the suite and by coverage-guided fuzzing in ``make fuzz``.
"""

from __future__ import annotations

import contextlib
import io
import logging
import threading
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import ClassVar

import numpy as np
from google.protobuf.message import DecodeError, Message
from grpc import StatusCode

from digits.v1 import digits_pb2
from service.artifact.errors import ArtifactError, KeyFileError
from service.artifact.format import MANIFEST, PARITY, SIGNATURE, load_artifact
from service.artifact.golden import GOLDEN
from service.artifact.repository import PROMOTED, in_serving_order, promoted
from service.config import ServerConfig, load_config
from service.http2 import Connection, ConnectionLimits
from service.http2.messages import OK_TRAILERS, RESPONSE_HEAD
from service.http2.sending import END
from service.rpc import codec
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
from service.settings import ConfigError
from tests.conftest import REPOSITORY
from tests.fuzz import inputs
from tests.releases import FP32, INT8

MAX_IMAGES = 4
ANSWER_TIMEOUT_S = 20
MAX_MESSAGE_CHARACTERS = 500


class Target:
    """Something that takes hostile bytes.

    Args:
        folder: Scratch space, best in memory.

    Attributes:
        max_bytes: Inputs of the coverage-guided run are no longer.
    """

    max_bytes: ClassVar[int] = 4096

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def seeds(self) -> list[bytes]:
        """Valid inputs to start from."""
        raise NotImplementedError

    def run(self, data: bytes) -> None:
        """Takes one input.

        Raises:
            AssertionError: If the outcome is a wrong one; any other exception is a defect, too.
        """
        raise NotImplementedError

    def check_golden(self) -> None:
        """The target still does its work on a good input."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends what was started."""


class Wire(Target):
    """The hand-written reader of the wire format against the generated classes."""

    def seeds(self):
        return [*inputs.requests(), *inputs.stream_requests()]

    def run(self, data):
        view = codec.sole_field(data)
        if view is None:
            return
        assert bytes(view) == digits_pb2.ClassifyRequest.FromString(data).pixels
        assert codec.sole_field(codec.as_field(1, bytes(view))) == view

    def check_golden(self):
        image = bytes(range(256)) * 3 + bytes(16)
        assert codec.sole_field(inputs.request(image)) == image


class Http2(Target):
    """HTTP/2 without sockets: whatever comes, nothing raises, and what is held stays bounded."""

    def seeds(self):
        conversations = [
            inputs.conversation(inputs.CLASSIFY_PATH, [request]) for request in inputs.requests()
        ]
        return [inputs.PREFACE + b"".join(frames) for frames in conversations]

    def run(self, data):
        connection = Connection(ConnectionLimits(streams=8))
        half = len(data) // 2
        for piece in (data[:half], data[half:]):
            for kind, stream, _ in connection.receive(piece, 0.0):
                assert kind == END or not stream.local_closed
                if kind == END:
                    connection.respond(stream, RESPONSE_HEAD, b"answer", OK_TRAILERS)
            connection.take_output()
        assert len(connection.streams) <= 8
        assert connection.pending_bytes >= 0
        assert connection.receive(b"", 0.0) == []
        connection.close(0)
        assert not connection.streams
        assert connection.pending_bytes == 0

    def check_golden(self):
        frames = inputs.conversation(inputs.CLASSIFY_PATH, [b"hello"])
        connection = Connection(ConnectionLimits())
        events = connection.receive(inputs.PREFACE + b"".join(frames), 0.0)
        assert [kind for kind, *_ in events][-1] == END


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
    def respond_all(answers):
        return [call.respond(message) for call, message in answers]

    def send(self, message: bytes) -> bool:
        self.answers.append(message)
        return True

    def end(self, code=0, message="", trailers=()):
        if code:
            [found] = [each for each in StatusCode if each.value[0] == code]
            self.answers.append(Status(found, message, dict(trailers).get(DETAILS_KEY)))
        self.ended.set()
        return True

    @staticmethod
    def end_all(calls, code, message="", trailers=()):
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

    def __init__(self, folder):
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

    def seeds(self):
        return inputs.requests()

    def run(self, data):
        answer = self.answer(data)
        assert isinstance(answer, bytes) or answer.details
        self.check(answer, parse(digits_pb2.ClassifyRequest, data))

    def answer(self, request: bytes) -> bytes | Status:
        """What the hot path says to a serialised request."""
        call = RecordedCall(request)
        self.classify.receive([call])
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

    def close(self):
        assert self.gate.stop(ANSWER_TIMEOUT_S)
        logging.getLogger("service").removeHandler(self.complaints)

    def check_golden(self):
        golden = self.model.artifact.golden
        for first in range(0, len(golden.images) - MAX_IMAGES, MAX_IMAGES):
            some = slice(first, first + MAX_IMAGES)
            answer = self.answer(inputs.request(golden.images[some].tobytes()))
            assert isinstance(answer, bytes), answer
            response = digits_pb2.ClassifyResponse.FromString(answer)
            assert [p.digit for p in response.predictions] == golden.labels[some].tolist()


def parse(kind: type[Message], data: bytes) -> Message | None:
    """The message, or None if it is malformed."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return None


def expected_images(request: Message | None) -> np.ndarray | None:
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

    def seeds(self):
        return [*inputs.stream_requests(), *inputs.requests()]

    def run(self, data):
        item = parse(digits_pb2.ClassifyStreamRequest, data)
        edge = StreamEdge(
            self.gate, self.recorder, max_streams=1, max_ahead_bytes=2**20, idle_s=0.0
        )
        call = RecordedCall(b"")
        stream = edge.open(call)
        stream.message(data)
        stream.half_closed()
        answer = self.answer_of(call)
        response = digits_pb2.ClassifyStreamResponse.FromString(answer)
        if response.WhichOneof("result") == "response":
            self.check(response.response.SerializeToString(), item and item.request)
        else:
            [code] = [each for each in StatusCode if each.value[0] == response.error.code]
            self.check(Status(code, response.error.message), item and item.request)


class ImageFiles(ClassifyRequests):
    """Image files. The first byte says whether a PNG's checksums are put right."""

    def seeds(self):
        return [flag + file for flag in (b"\0", b"\1") for file in inputs.image_files()]

    def run(self, data):
        file = inputs.repair_png(data[1:]) if data[:1] > b"\x7f" else data[1:]
        super().run(inputs.request(files=(file,)))


class Artifacts(Target):
    """Every file of an artifact, with right hashes. The first byte says which one."""

    def __init__(self, folder):
        super().__init__(folder)
        self.artifact = inputs.served_artifact()
        source = REPOSITORY / self.artifact.version
        self.good = {name: (source / name).read_bytes() for name in (FP32, INT8, GOLDEN, PARITY)}
        self.good[MANIFEST] = self.artifact.manifest_json.encode()
        self.members = inputs.npy_members(self.artifact)
        self.version = folder / self.artifact.version
        self.version.mkdir(exist_ok=True)
        self.kinds = (
            self._manifest, self._model, self._golden, *map(self._member, self.members),
            self._signature, self._key, self._promoted,
        )  # fmt: skip

    def seeds(self):
        artifact = self.artifact
        contents = [
            self.good[MANIFEST], b"\x42\x02\x10\x14", self.good[GOLDEN],
            *self.members.values(), bytes(64), PUBLIC_KEY, b"3\n",
        ]  # fmt: skip
        assert len(contents) == len(self.kinds), artifact
        return [bytes((index,)) + content for index, content in enumerate(contents)]

    max_bytes = 32_768

    def run(self, data):
        if not data:
            return
        kind = self.kinds[data[0] % len(self.kinds)]
        with contextlib.suppress(ArtifactError, KeyFileError):
            kind(data[1:])

    def check_golden(self):
        self._write()
        assert load_artifact(self.version).manifest == self.artifact.manifest

    def _write(self, **changed: bytes) -> None:
        names = {"model": FP32, "golden": GOLDEN, "manifest": MANIFEST}
        files = self.good | {names[part]: data for part, data in changed.items()}
        for name, data in files.items():
            (self.version / name).write_bytes(data)

    def _manifest(self, data: bytes) -> None:
        self._write(manifest=data)
        load_artifact(self.version)

    def _model(self, data: bytes) -> None:
        self._write(model=data, manifest=inputs.manifest_with(self.artifact, model=data))
        load_artifact(self.version)

    def _golden(self, data: bytes) -> None:
        self._write(golden=data, manifest=inputs.manifest_with(self.artifact, golden=data))
        expected = self.artifact.golden
        found = load_artifact(self.version).golden
        found.check(expected.probabilities["fp32"], expected.is_digit["fp32"], "fp32")

    def _member(self, name: str):
        def run(data: bytes) -> None:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                for member, content in {**self.members, name: data}.items():
                    archive.writestr(member, content)
            self._golden(buffer.getvalue())

        return run

    def _signature(self, data: bytes) -> None:
        self._write()
        self._signed(PUBLIC_KEY, data)

    def _key(self, data: bytes) -> None:
        self._write()
        self._signed(data, bytes(64))

    def _signed(self, key: bytes, signature: bytes) -> None:
        (self.version / SIGNATURE).write_bytes(signature)
        (self.folder / "key.pem").write_bytes(key)
        load_artifact(self.version, self.folder / "key.pem")
        raise AssertionError("an artifact that nobody signed was accepted")

    def _promoted(self, data: bytes) -> None:
        (self.folder / PROMOTED).write_bytes(data)
        assert in_serving_order(self.folder, note=promoted(self.folder)) == [self.version]


PUBLIC_KEY = b"""-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=
-----END PUBLIC KEY-----
"""


class Models(Target):
    """A model with right hashes, up to a session of onnxruntime and its golden digits."""

    max_bytes = 110_000

    def __init__(self, folder):
        super().__init__(folder)
        self.artifacts = Artifacts(folder)

    def seeds(self):
        return [self.artifacts.good[FP32]]

    def run(self, data):
        manifest = inputs.manifest_with(self.artifacts.artifact, model=data)
        self.artifacts._write(model=data, manifest=manifest)
        with contextlib.suppress(ArtifactError):
            self._load()

    def check_golden(self):
        self.artifacts._write()
        self._load()

    def _load(self):
        load_model(
            self.artifacts.version, "digits", device="cpu", intra_op_threads=1, max_batch_size=1
        )


class Config(Target):
    """Flags, one a line, then an empty line, then the environment."""

    def seeds(self):
        file = b"DIGITS_GRPC_PORT=0\nDIGITS_LOG_FORMAT=json\nDIGITS_INSTANCES=2\n"
        return [
            b"--grpc-port=1\n--no-reflection\n--drain-delay-s\n1.5\n\n" + file,
            b"--host=::1\n--max-batch-size=64\n\n" + file,
            b"--transport=grpcio\n--reflection=false\n--device\ncpu\n\n",
        ]

    def run(self, data):
        # No operating system passes a NUL in an argument or a variable.
        flags, _, file = data.replace(b"\0", b"").partition(b"\n\n")
        arguments = flags.decode("utf-8", "surrogateescape").split("\n")
        lines = file.decode("utf-8", "surrogateescape").split("\n")
        environ = dict(line.split("=", 1) for line in lines if "=" in line)
        with contextlib.suppress(ConfigError):
            check_bounds(load_config(arguments, environ))

    def check_golden(self):
        assert load_config(["--grpc-port=7"], {"DIGITS_INSTANCES": "2"}).grpc_port == 7


def check_bounds(config: ServerConfig) -> None:
    """Every setting is of its type and within its bounds."""
    for setting in fields(config):
        value, about = getattr(config, setting.name), setting.metadata
        assert type(value).__name__ == setting.type
        assert not about["choices"] or value in about["choices"]
        if setting.type in ("int", "float"):
            low, high = about["bounds"]
            assert low <= value <= high


TARGETS: dict[str, type[Target]] = {
    "wire": Wire,
    "http2": Http2,
    "classify": ClassifyRequests,
    "stream": StreamRequests,
    "images": ImageFiles,
    "artifact": Artifacts,
    "model": Models,
    "config": Config,
}
