"""What has ended is let go there and then, not when the garbage collector comes by.

A call holds its request, a model its session: held for longer, they add up with every bad call and
every change of the model.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
import weakref
from functools import partial
from types import SimpleNamespace

import grpc
import numpy as np
import pytest

from digits.v1 import digits_pb2
from export.artifact import promote
from service import wire
from service.batcher import Batcher
from service.call import Call
from service.classify import Classify
from service.config import ServerConfig
from service.job import Job
from service.metrics import Metrics
from service.server import Server
from service.transports import CLASSIFY, limits_of
from service.transports.native import NativeCall, NativeTransport, Route
from tests.conftest import SAMPLES, wait_until
from tests.service.test_reload import add_version

SEVEN = (SAMPLES / "7.png").read_bytes()


@pytest.fixture(autouse=True)
def _no_collector():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class KeptCall(Call):
    """Keeps how it ended, as a call does whose answer a coroutine awaits."""

    def __init__(self, request, ended):
        super().__init__(request, received=0.0, deadline=None)
        self.ended = ended
        self.outcome = None

    def respond(self, response):
        self.outcome = response
        self.ended.append(bytes)
        return True

    def fail(self, status):
        self.outcome = status
        self.ended.append(status.code)
        return True


def pixels(size):
    return digits_pb2.ClassifyRequest(pixels=bytes(size)).SerializeToString()


def files(*contents):
    encoded = digits_pb2.EncodedImages(files=contents)
    return digits_pb2.ClassifyRequest(encoded=encoded).SerializeToString()


@pytest.fixture
def hot_path():
    class Engine:
        def run(self, images):
            return np.full((len(images), 10), 0.1, np.float32)

    made = partial(Batcher, slots=2, max_batch_size=4, max_queue_images=100)
    classify = Classify(made, max_images_per_request=8, metrics=Metrics())
    encoded_ref = wire.encode_model_ref(digits_pb2.ModelRef(version="1"))
    classify.serve(
        SimpleNamespace(engine=Engine(), encoded_ref=encoded_ref, seconds_per_image=1e-6)
    )
    classify.open()
    classify.start()
    yield classify
    classify.stop(10)


@pytest.mark.parametrize(
    ("request_bytes", "how"),
    [
        (pixels(784), bytes),
        (pixels(8 * 784), bytes),  # several batches
        (pixels(783), grpc.StatusCode.INVALID_ARGUMENT),
        (b"\xff\xff", grpc.StatusCode.INVALID_ARGUMENT),
        (b"", grpc.StatusCode.INVALID_ARGUMENT),
        (files(SEVEN, SEVEN), bytes),
        (files(SEVEN, SEVEN[:-60]), grpc.StatusCode.INVALID_ARGUMENT),
        (files(SEVEN, b"nothing"), grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=["one", "split", "wrong size", "malformed", "empty", "files", "damaged", "no file"],
)
def test_call_is_let_go_as_it_ends(hot_path, request_bytes, how):
    ended = []
    call = KeptCall(request_bytes, ended)
    hot_path.receive([call])
    wait_until(lambda: ended)
    assert ended == [how]
    left = weakref.ref(call)
    del call
    wait_until(lambda: left() is None, timeout_s=10)


def test_idle_slot_holds_neither_jobs_nor_what_answered_them():
    class Model:
        """What made a result."""

    def run(images, _count):
        both.wait(30)
        return bytes(images), models.pop()

    models, both, ended = [Model(), Model()], threading.Barrier(2), []
    batcher = Batcher(
        run, lambda batch: ended.extend(len(batch.finished) * [True]),
        image_bytes=1, slots=2, max_batch_size=4, max_queue_images=100,
    )  # fmt: skip
    batcher.start()
    jobs = [Job(memoryview(bytes(4)), 4, None) for _ in range(2)]
    held = [weakref.ref(one) for one in (*models, *jobs)]
    batcher.submit(jobs)
    del jobs
    wait_until(lambda: len(ended) == 2)
    wait_until(lambda: [one() for one in held] == [None] * 4, timeout_s=10)
    assert batcher.stop(10)


def test_native_thread_that_waits_holds_no_call(tmp_path):
    held = []

    def receive(calls):
        for call in calls:
            held.append(weakref.ref(call))
            call.respond(b"answered")

    native = NativeTransport(
        "127.0.0.1", 0, fallback=str(tmp_path / "nobody"),
        routes=[Route(CLASSIFY, NativeCall, Metrics().started, list, receive)],
        refuse=lambda call, status: call.fail(status), limits=limits_of(ServerConfig()),
    )  # fmt: skip
    native.start()
    with grpc.insecure_channel(f"127.0.0.1:{native.port}") as channel:
        assert channel.unary_unary(CLASSIFY)(b"request", timeout=20) == b"answered"
    wait_until(lambda: held[0]() is None, timeout_s=10)
    native.close()


def test_model_is_let_go_when_another_serves(tmp_path):
    for number in (1, 2):
        add_version(tmp_path, number, "1")
    promote(tmp_path, 1)
    config = ServerConfig(
        model_repository=str(tmp_path), grpc_port=0, http_port=0, transport="grpcio",
        reload_interval_s=0.05,
    )  # fmt: skip

    def version(server):
        model = server._classify.model
        return model and int(model.ref.version)

    async def change():
        server = Server(config, time.monotonic())
        running = asyncio.create_task(server.run())
        held = []
        for number in (1, 2, 1):
            promote(tmp_path, number)
            await asyncio.to_thread(wait_until, lambda number=number: version(server) == number)
            held.append(weakref.ref(server._classify.model))
        await asyncio.to_thread(
            wait_until, lambda: [one() is None for one in held] == [True, True, False], 10
        )
        os.kill(os.getpid(), signal.SIGTERM)
        return await running

    assert asyncio.run(change()) == 0
