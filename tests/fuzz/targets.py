"""What is fuzzed within one process. Each target takes bytes and raises on a wrong outcome.

The same targets are fed by hypothesis in the suite and by coverage-guided fuzzing in ``make fuzz``.
"""

from __future__ import annotations

from typing import Any

from digits.v1 import digits_pb2
from service.http2 import Connection, ConnectionLimits
from service.http2.frames import ErrorCode
from service.http2.messages import OK_TRAILERS, RESPONSE_HEAD
from service.http2.sending import END
from service.rpc import codec
from tests.fuzz import inputs
from tests.fuzz.calls import (
    ClassifyRequests,
    ImageFiles,
    StreamRequests,
)
from tests.fuzz.files import Artifacts, Config, Models
from tests.fuzz.target import Target


class Wire(Target):
    """The hand-written reader of the wire format against the generated classes."""

    def seeds(self) -> list[Any]:
        return [*inputs.requests(), *inputs.stream_requests()]

    def run(self, data: Any) -> None:
        view = codec.sole_field(data)
        if view is None:
            return
        assert bytes(view) == digits_pb2.ClassifyRequest.FromString(data).pixels
        assert codec.sole_field(codec.as_field(1, bytes(view))) == view

    def check_golden(self) -> None:
        image = bytes(range(256)) * 3 + bytes(16)
        assert bytes(codec.sole_field(inputs.request(image)) or b"") == image


class Http2(Target):
    """HTTP/2 without sockets: whatever comes, nothing raises, and what is held stays bounded."""

    def seeds(self) -> list[bytes]:
        conversations = [
            inputs.conversation(inputs.CLASSIFY_PATH, [request]) for request in inputs.requests()
        ]
        return [inputs.PREFACE + b"".join(frames) for frames in conversations]

    def run(self, data: Any) -> None:
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
        connection.close(ErrorCode.NO_ERROR)
        assert not connection.streams
        assert connection.pending_bytes == 0

    def check_golden(self) -> None:
        frames = inputs.conversation(inputs.CLASSIFY_PATH, [b"hello"])
        connection = Connection(ConnectionLimits())
        events = connection.receive(inputs.PREFACE + b"".join(frames), 0.0)
        assert [kind for kind, *_ in events][-1] == END


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
