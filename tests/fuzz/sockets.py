"""What is fuzzed over real sockets: a server takes bytes, frames, messages, and HTTP requests."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import grpc
import psutil

from digits.oip import inference_pb2
from digits.v1 import digits_pb2
from service.rpc.status import DETAILS_KEY, Status
from tests.calls import scrape
from tests.conftest import RunningServer, running_server
from tests.fuzz import inputs
from tests.fuzz.calls import ANSWER_TIMEOUT_S, MAX_IMAGES, ClassifyRequests, parse

FLAGS = (f"--max-images-per-request={MAX_IMAGES}", "--reload-interval-s=0")
CALLS_IN_FLIGHT = 50
# INTERNAL is right for a compressed message without grpc-encoding (doc/compression.md of gRPC);
# where it is the server's fault, an error is logged, too.
UNHANDLED = ("UNKNOWN", "DATA_LOSS")


def fuzzed_server(transport: str, folder: Path) -> contextlib.AbstractContextManager[RunningServer]:
    """A server that must not only survive but also drain cleanly at the end."""
    return running_server(folder / f"{transport}.log", f"--transport={transport}", *FLAGS)


def _is_grpcio_alone(lines: list[str]) -> bool:
    """Whether a traceback has no frame but grpcio's: it could not answer a caller that had left."""
    frames = list(itertools.takewhile(lambda line: line.startswith(" "), lines))
    files = [frame for frame in frames if frame.startswith("  File ")]
    return all('"src/python/grpcio/' in file for file in files) and bool(files)


class SocketTarget:
    """Something that sends hostile input to a server.

    Args:
        server: Started with ``FLAGS``.
        oracle: Knows what requests deserve.
    """

    at_once: ClassVar[int] = 1

    def __init__(self, server: RunningServer, oracle: ClassifyRequests) -> None:
        self.server = server
        self.oracle = oracle
        self.process = psutil.Process(server.process.pid)
        self.channel = grpc.insecure_channel(server.address)
        self._log_read = 0

    def run(self, rng: random.Random) -> None:
        """Sends ``at_once`` inputs.

        Raises:
            AssertionError: If an answer is a wrong one.
            OSError: If the server does not end a connection that its caller ended.
        """
        raise NotImplementedError

    def check_golden(self) -> None:
        """The server answers golden digits, no call ended unhandled, and its log names no bug."""
        golden = self.oracle.model.artifact.golden
        some = slice(0, MAX_IMAGES)
        call = self.channel.unary_unary(inputs.CLASSIFY_PATH.decode())
        request = inputs.request(golden.images[some].tobytes())
        answer = call(request, timeout=ANSWER_TIMEOUT_S)
        response = digits_pb2.ClassifyResponse.FromString(answer)
        assert [p.digit for p in response.predictions] == golden.labels[some].tolist()
        series = scrape(self.server)
        for code in UNHANDLED:
            ended = sum(value for name, value in series.items() if f'grpc_code="{code}"' in name)
            assert not ended, f"{ended:g} calls ended with {code}"
        assert not (complaints := list(self._complaints())), complaints[0]

    def _complaints(self) -> Iterator[str]:
        """What the log says since the last look, beside what grpcio says about its peers."""
        with self.server.log.open(errors="replace") as log:
            log.seek(self._log_read)
            lines = log.read().splitlines()
            self._log_read = log.tell()
        for number, line in enumerate(lines):
            if line.startswith("Traceback") and not _is_grpcio_alone(lines[number + 1 :]):
                yield "\n".join(lines[number : number + 20])
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                ours = entry["logger"].startswith(("service", "asyncio"))
                if ours and entry["level"] == "error":
                    yield line

    def close(self) -> None:
        """Ends what is open."""
        self.channel.close()


class Connections(SocketTarget):
    """Raw bytes: each input is what one connection sends.

    Some stay open for a while, so that what came over them is really worked on.
    """

    open_connections: ClassVar[int] = 32

    def __init__(self, server: RunningServer, oracle: Any) -> None:
        super().__init__(server, oracle)
        self._open: deque[socket.socket] = deque()

    def address(self) -> str:
        return self.server.address

    def conversation(self, rng: random.Random) -> bytes:
        return inputs.spoilt_conversation(rng)

    def run(self, rng: Any) -> None:
        host, _, port = self.address().rpartition(":")
        connection = socket.create_connection((host, int(port)), ANSWER_TIMEOUT_S)
        with contextlib.suppress(ConnectionError):  # it may be closed on a bad beginning
            connection.sendall(self.conversation(rng))
        self._open.append(connection)
        if len(self._open) > self.open_connections:
            _end(self._open.popleft())

    def close(self) -> None:
        while self._open:
            _end(self._open.popleft())
        super().close()


def _end(connection: socket.socket) -> None:
    """Says that nothing follows, and waits until the server has ended the connection, too."""
    with connection, contextlib.suppress(ConnectionError):
        with contextlib.suppress(OSError):  # not connected any more
            connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):
            pass


class HttpRequests(Connections):
    """The HTTP port of /metrics and /healthz."""

    open_connections = 4  # it lets five wait

    def address(self) -> str:
        return self.server.http.removeprefix("http://")

    def conversation(self, rng: Any) -> Any:
        path = rng.choice((b"/metrics", b"/healthz", b"/" + b"x" * 300, b"*"))
        head = b"GET " + path + b" HTTP/1.1\r\nHost: x\r\nAccept-Encoding: gzip\r\n"
        return inputs.mutate(rng, head + b"Content-Length: 3\r\n\r\nabc")


class Messages(SocketTarget):
    """Malformed and hostile protobuf in valid frames, unary and in streams."""

    at_once = CALLS_IN_FLIGHT

    def __init__(self, server: RunningServer, oracle: Any) -> None:
        super().__init__(server, oracle)
        self._classify = self.channel.unary_unary(inputs.CLASSIFY_PATH.decode())
        self._stream = self.channel.stream_stream(inputs.STREAM_PATH.decode())
        files = [inputs.request(files=(file,)) for file in inputs.image_files()]
        self._unary_seeds = inputs.requests() + files
        self._stream_seeds = inputs.stream_requests()
        self._infer = self.channel.unary_unary(inputs.INFER_PATH.decode())
        self._infer_seeds = inputs.infer_requests()

    def run(self, rng: Any) -> None:
        match rng.randrange(3):
            case 0:
                self._run_unary(spoilt(rng, self._unary_seeds))
            case 1:
                self._run_stream(spoilt(rng, self._stream_seeds))
            case _:
                self._run_infer(spoilt(rng, self._infer_seeds))

    def _run_unary(self, messages: list[bytes]) -> None:
        calls = [self._classify.future(data, timeout=ANSWER_TIMEOUT_S) for data in messages]
        for data, call in zip(messages, calls, strict=True):
            answer = call.result() if call.exception() is None else _status(call)
            assert isinstance(answer, bytes) or answer.details
            self.oracle.check(answer, parse(digits_pb2.ClassifyRequest, data))

    def _run_infer(self, messages: list[bytes]) -> None:
        calls = [self._infer.future(data, timeout=ANSWER_TIMEOUT_S) for data in messages]
        for data, call in zip(messages, calls, strict=True):
            if call.exception() is None:
                asked = parse(inference_pb2.ModelInferRequest, data)
                answer = inference_pb2.ModelInferResponse.FromString(call.result())
                assert answer.outputs[0].shape[0] == asked.inputs[0].shape[0]
                continue
            assert call.code() in REFUSED_INFER, (call.code(), call.details())
            assert ": expected " in call.details()

    def _run_stream(self, messages: list[bytes]) -> None:
        answers = list(self._stream(iter(messages), timeout=ANSWER_TIMEOUT_S))
        for data, answer in zip(messages, answers, strict=True):
            item = parse(digits_pb2.ClassifyStreamRequest, data)
            response = digits_pb2.ClassifyStreamResponse.FromString(answer)
            error = response.error
            said: bytes | Status = response.response.SerializeToString()
            if response.WhichOneof("result") == "error":
                [code] = [code for code in grpc.StatusCode if code.value[0] == error.code]
                said = Status(code, error.message)
            self.oracle.check(said, item and item.request)


# What a ModelInfer request can be refused for that says something wrong.
REFUSED_INFER = frozenset({grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND})


def spoilt(rng: random.Random, seeds: list[bytes]) -> list[bytes]:
    """As many spoilt messages as are sent at once."""
    return [inputs.mutate(rng, rng.choice(seeds)) for _ in range(CALLS_IN_FLIGHT)]


def _status(call: Any[Any]) -> Status:
    trailers = dict(call.trailing_metadata())
    return Status(call.code(), call.details(), trailers.get(DETAILS_KEY))


SOCKET_TARGETS: dict[str, type[SocketTarget]] = {
    "connections": Connections,
    "messages": Messages,
    "http": HttpRequests,
}
