"""What a soak sends: good and bad calls whose outcome is known, and changes of the model."""

from __future__ import annotations

import contextlib
import io
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks import limit
from benchmarks.harness import CLASSIFY_PATH, BenchmarkError, ServerProcess
from digits.client import DigitClient
from digits.v1 import digits_pb2, digits_pb2_grpc
from service.artifact.format import load_artifact
from service.artifact.repository import PROMOTED, in_serving_order
from service.serving.loader import ON_CPU
from tests.conftest import REPOSITORY
from tests.releases import FP32, copy_release

TIMEOUT_S = 60.0
BULK_IMAGES, STREAM_ITEMS = 300, 24
POLL_S = 0.02
Code = grpc.StatusCode


class Versions:
    """A repository whose versions come and go, and what each of them answers to the same images.

    Args:
        folder: Where the repository is made; it begins with version 1.

    Attributes:
        images: uint8[N, 28, 28], the golden images.
        files: The same as PNG files.
        expected: Version -> float32[N, 10], the probabilities it must answer.
    """

    def __init__(self, folder: Path) -> None:
        self.repository = folder / "digits"
        self.repository.mkdir()
        self._sources = in_serving_order(REPOSITORY)[:2]
        artifacts = [load_artifact(source) for source in self._sources]
        self.images = artifacts[0].golden.images
        self.files = [_png(image) for image in self.images]
        self._answers = [
            limit.session(artifact.first_of(ON_CPU).model).run(
                ["probabilities"], {"image": self.images}
            )[0]
            for artifact in artifacts
        ]
        self.expected: dict[str, npt.NDArray[np.float32]] = {}
        self._newest = 0
        self.add()

    def add(self, *, damaged: bool = False) -> str:
        """Another version, in one step, as an exporter adds it; its name."""
        self._newest += 1
        name, turn = str(self._newest), self._newest % len(self._sources)
        source = self._sources[turn]
        if damaged:
            source = self.repository / ".damaged"
            shutil.copytree(self._sources[turn], source)
            (source / FP32).write_bytes((source / FP32).read_bytes()[:-1000])
        else:
            self.expected[name] = self._answers[turn]
        copy_release(self.repository, self._newest, source)
        if damaged:
            shutil.rmtree(source)
        return name

    def promote(self, name: str | None) -> None:
        """Lets a version serve; None lets the highest one."""
        note, temporary = self.repository / PROMOTED, self.repository / ".promoted"
        if name is None:
            note.unlink()
        else:
            temporary.write_text(name)
            temporary.rename(note)

    def remove(self, name: str) -> None:
        """Takes a version away, in one step."""
        (self.repository / name).rename(self.repository / f".removed-{name}")
        shutil.rmtree(self.repository / f".removed-{name}")


def _png(image: npt.NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


class Operator:
    """Changes the model again and again: added, damaged, promoted, rolled back, removed.

    Args:
        server: Serves the repository.
        versions: The repository.

    Attributes:
        reloads: Changes that came into service.
        refusals: Damaged versions that were refused.
    """

    def __init__(self, server: ServerProcess, versions: Versions) -> None:
        self._server = server
        self._versions = versions
        self.reloads = self.refusals = 0

    def cycle(self) -> None:
        """One of each change; raises if one does not come into service."""
        versions, before = self._versions, self._serving()
        added = versions.add()
        self._expect(added)
        versions.promote(before)
        self._expect(before)
        versions.promote(None)
        self._expect(added)
        self._refuse(versions.add(damaged=True), added)
        versions.remove(added)
        self._expect(before)

    def _expect(self, version: str) -> None:
        os.kill(self._server.pid, signal.SIGHUP)
        wait_until(lambda: self._serving() == version, f"version {version} serves")
        self.reloads += 1

    def _refuse(self, damaged: str, serving: str) -> None:
        series = 'digits_model_loads_total{result="refused"}'
        before = self._server.counter(series)
        os.kill(self._server.pid, signal.SIGHUP)
        wait_until(lambda: self._server.counter(series) > before, f"version {damaged} is refused")
        if self._serving() != serving:
            raise BenchmarkError(f"a damaged version took the place of version {serving}")
        self._versions.remove(damaged)
        self.refusals += 1

    def _serving(self) -> str:
        with DigitClient(self._server.address, timeout_s=TIMEOUT_S) as client:
            return client.get_model()[0].version


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Polls until the condition is true.

    Raises:
        BenchmarkError: If it does not become true in time.
    """
    give_up = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > give_up:
            raise BenchmarkError(f"waited {TIMEOUT_S:g} s in vain until {what}")
        time.sleep(POLL_S)


class Caller:
    """One caller: makes calls of every kind in turn at random, and checks each outcome.

    Args:
        address: Of the server.
        versions: What must be answered.
        limit: Images in one request at most, by the server's settings.
        rng: Decides what is called.

    Attributes:
        calls: Kind of call -> how often it was made.
        ended: RPC, or item of a stream, and status code -> how often the caller saw it.
        left: RPC -> calls that the caller left: the server may have seen another end, or none.
    """

    def __init__(self, address: str, versions: Versions, limit: int, rng: random.Random) -> None:
        self._address = address
        self._versions = versions
        self._limit = limit
        self._rng = rng
        self.calls: Counter[str] = Counter()
        self.ended: Counter[tuple[str, Code]] = Counter()
        self.left: Counter[str] = Counter()
        self._channel: grpc.Channel
        self._kinds: dict[str, tuple[int, Callable[[], None]]] = {
            "single": (30, self._single),
            "bulk": (10, self._bulk),
            "files": (10, self._files),
            "stream": (6, self._stream),
            "malformed": (10, self._malformed),
            "wrong size": (10, self._wrong_size),
            "damaged file": (5, self._damaged_file),
            "oversize": (1, self._oversize),
            "unknown method": (3, self._unknown_method),
            "cancelled": (8, self._cancelled),
            "cancelled stream": (2, self._cancelled_stream),
            "expired": (8, self._expired),
            "reconnect": (1, self._connect),
        }
        self._connect()

    def _connect(self) -> None:
        with contextlib.suppress(AttributeError):
            self._channel.close()
        # A pool of its own: else grpc would go on using the old connection.
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        self._channel = grpc.insecure_channel(self._address, options=options)
        self._classify = self._channel.unary_unary(CLASSIFY_PATH)
        self._stub = digits_pb2_grpc.DigitClassifierServiceStub(self._channel)

    def run(self, ended: threading.Event) -> None:
        """Calls until the event is set.

        Raises:
            BenchmarkError: At the first wrong answer.
        """
        names = list(self._kinds)
        weights = [weight for weight, _ in self._kinds.values()]
        while not ended.is_set():
            [name] = self._rng.choices(names, weights)
            self._kinds[name][1]()
            self.calls[name] += 1
        self._channel.close()

    def _some(self, at_most: int) -> list[int]:
        count = self._rng.randint(1, at_most)
        return self._rng.choices(range(len(self._versions.images)), k=count)

    def _pixels(self, chosen: list[int]) -> digits_pb2.ClassifyRequest:
        return digits_pb2.ClassifyRequest(pixels=self._versions.images[chosen].tobytes())

    def _check(self, response: digits_pb2.ClassifyResponse, chosen: list[int]) -> None:
        """Digits and probabilities are those of the version that the answer names, bit by bit."""
        expected = self._versions.expected[response.model.version][chosen]
        got = np.array([p.probabilities for p in response.predictions], np.float32)
        digits = [p.digit for p in response.predictions]
        if not np.array_equal(got, expected) or digits != expected.argmax(axis=1).tolist():
            raise BenchmarkError(f"a wrong answer of version {response.model.version}: {response}")

    def _unary(self, request: bytes, *expected: Code, timeout_s: float = TIMEOUT_S) -> bytes:
        """Calls Classify; the response, or nothing when it ended with another expected code."""
        response, code = b"", Code.OK
        try:
            response = self._classify(request, timeout=timeout_s)
        except grpc.RpcError as error:
            code = error.code()
            _require(code, expected, error.details())
        else:
            _require(code, expected, "")
        self.ended["Classify", code] += 1
        return response

    def _answered(self, request: digits_pb2.ClassifyRequest, chosen: list[int]) -> None:
        response = self._unary(request.SerializeToString(), Code.OK)
        self._check(digits_pb2.ClassifyResponse.FromString(response), chosen)

    def _single(self) -> None:
        chosen = self._some(1)
        self._answered(self._pixels(chosen), chosen)

    def _bulk(self) -> None:
        chosen = self._some(BULK_IMAGES)
        self._answered(self._pixels(chosen), chosen)

    def _encoded(self, chosen: list[int]) -> digits_pb2.EncodedImages:
        return digits_pb2.EncodedImages(files=[self._versions.files[index] for index in chosen])

    def _files(self) -> None:
        chosen = self._some(8)
        self._answered(digits_pb2.ClassifyRequest(encoded=self._encoded(chosen)), chosen)

    def _malformed(self) -> None:
        self._unary(b"\xff" + self._rng.randbytes(20), Code.INVALID_ARGUMENT)

    def _wrong_size(self) -> None:
        size = self._rng.choice((0, 783, 785, 784 * (self._limit + 1)))
        request = digits_pb2.ClassifyRequest(pixels=bytes(size))
        self._unary(request.SerializeToString(), Code.INVALID_ARGUMENT)

    def _damaged_file(self) -> None:
        files = self._encoded(self._some(3))
        files.files.append(files.files[0][:-60])
        request = digits_pb2.ClassifyRequest(encoded=files)
        self._unary(request.SerializeToString(), Code.INVALID_ARGUMENT)

    def _oversize(self) -> None:
        request = digits_pb2.ClassifyRequest(pixels=bytes(784 * self._limit + 2 * 2**20))
        self._unary(request.SerializeToString(), Code.RESOURCE_EXHAUSTED)

    def _unknown_method(self) -> None:
        try:
            self._channel.unary_unary(f"{CLASSIFY_PATH}Nothing")(b"", timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            _require(error.code(), (Code.UNIMPLEMENTED,), error.details())
        else:
            raise BenchmarkError("an unknown method was answered")

    def _cancelled(self) -> None:
        request = self._pixels(self._some(64)).SerializeToString()
        call = self._classify.future(request, timeout=TIMEOUT_S)
        time.sleep(self._rng.random() * 0.003)
        call.cancel()
        _require(call.code(), (Code.OK, Code.CANCELLED), call.details())
        self.left["Classify"] += 1

    def _expired(self) -> None:
        request = self._pixels(self._some(64)).SerializeToString()
        codes = (Code.OK, Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED)
        try:
            code = self._classify.with_call(request, timeout=self._rng.random() * 0.003)[1].code()
        except grpc.RpcError as error:
            code = error.code()
            _require(code, codes, error.details())
        self.left["Classify"] += 1

    def _stream(self) -> None:
        items = [
            None if self._rng.random() < 0.2 else self._some(40)
            for _ in range(self._rng.randint(1, STREAM_ITEMS))
        ]
        answers = list(self._stub.ClassifyStream(self._items(items), timeout=TIMEOUT_S))
        if len(answers) != len(items):
            raise BenchmarkError(f"a stream of {len(items)} items got {len(answers)} answers")
        for item, answer in zip(items, answers, strict=True):
            if item is not None:
                _require(answer.WhichOneof("result"), ("response",), answer.error.message)
                self._check(answer.response, item)
            else:
                _require(answer.error.code, (Code.INVALID_ARGUMENT.value[0],), answer)
        self.ended["ClassifyStream", Code.OK] += 1

    def _items(self, items: list[list[int] | None]) -> Iterator[digits_pb2.ClassifyStreamRequest]:
        bad = digits_pb2.ClassifyRequest(pixels=b"bad")
        for item in items:
            request = bad if item is None else self._pixels(item)
            yield digits_pb2.ClassifyStreamRequest(request=request)

    def _cancelled_stream(self) -> None:
        stream = self._stub.ClassifyStream(self._items([[0]] * 50), timeout=TIMEOUT_S)
        self._check(next(stream).response, [0])
        stream.cancel()
        self.left["ClassifyStream"] += 1


def _require(got: object, expected: tuple[object, ...], details: object) -> None:
    if got not in expected:
        raise BenchmarkError(f"expected one of {expected}, got {got}: {details}")
