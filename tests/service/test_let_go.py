"""What has ended is let go there and then, not when the garbage collector comes by.

A call holds its request, a model its session: held for longer, they add up with every bad call and
every change of the model.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import queue
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
from service.oip.reader import SMALL_BYTES
from service.server import Server
from service.transports import CLASSIFY
from tests.conftest import REPOSITORY, SAMPLES, wait_until
from tests.service.test_native import native_on
from tests.service.test_oip import infer
from tests.service.test_reload import add_version

MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
Code = grpc.StatusCode
SEVEN = (SAMPLES / "7.png").read_bytes()


@pytest.fixture(autouse=True)
def _nobody_else_holds_or_frees():
    """The collector is off, and so is the log: pytest keeps what is logged, errors among it."""
    logging.disable()
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    logging.disable(logging.NOTSET)


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
            if (images == ord("!")).all():
                raise RuntimeError("broken engine")
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
        (digits_pb2.ClassifyRequest(pixels=b"!" * 784).SerializeToString(), Code.INTERNAL),
        (pixels(783), Code.INVALID_ARGUMENT),
        (b"\xff\xff", Code.INVALID_ARGUMENT),
        (b"", Code.INVALID_ARGUMENT),
        (files(SEVEN, SEVEN), bytes),
        (files(SEVEN, SEVEN[:-60]), Code.INVALID_ARGUMENT),
        (files(SEVEN, b"nothing"), Code.INVALID_ARGUMENT),
    ],
    ids=[
        "lone",
        "split",
        "failing",
        "wrong size",
        "malformed",
        "empty",
        "files",
        "damaged",
        "no file",
    ],
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

    native = native_on(tmp_path, {CLASSIFY: receive})
    native.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{native.port}") as channel:
            assert channel.unary_unary(CLASSIFY)(b"request", timeout=20) == b"answered"
        wait_until(lambda: held[0]() is None, timeout_s=10)
    finally:
        native.close()


async def while_serving(config, visit):
    """Runs a server in this process, and beside it what looks at it; the server's exit code."""
    server = Server(config, time.monotonic())
    running = asyncio.create_task(server.run())
    try:
        await asyncio.to_thread(wait_until, lambda: server._classify.is_open)
        await asyncio.to_thread(visit, server)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await running
    return running.result()


def config_of(repository, transport):
    return ServerConfig(
        model_repository=str(repository), grpc_port=0, http_port=0, transport=transport,
        reload_interval_s=0.05,
    )  # fmt: skip


def calls_alive():
    return [one for one in gc.get_objects() if issubclass(type(one), Call)]


def stream_item(request_bytes):
    request = digits_pb2.ClassifyRequest.FromString(request_bytes)
    return digits_pb2.ClassifyStreamRequest(request=request).SerializeToString()


@pytest.mark.parametrize("transport", ["native", "grpcio"])
def test_server_holds_no_call_that_has_ended_and_no_item_of_a_silent_stream(transport):
    tensor = infer(np.zeros((50, 28, 28), np.uint8))
    cut = infer(np.zeros((50, 28, 28), np.uint8))
    cut.raw_input_contents[0] = cut.raw_input_contents[0][:-1]
    assert len(cut.SerializeToString()) > SMALL_BYTES
    unary = [(CLASSIFY, one) for one in (pixels(784), pixels(783), b"\xff", files(b"nothing"))]
    unary += [(MODEL_INFER, one.SerializeToString()) for one in (tensor, cut)]
    unary.append((MODEL_INFER, b"\xff"))
    codes = []
    others = {id(one): one for one in calls_alive()}  # of other tests

    def visit(server):
        items = queue.SimpleQueue()
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            answers = channel.stream_stream(f"{CLASSIFY}Stream")(iter(items.get, None))
            for item in (pixels(784), pixels(783), pixels(784)):
                items.put(stream_item(item))
                next(answers)
            for method, request in unary:
                call = channel.unary_unary(method).future(request, timeout=20)
                codes.append(call.code())
            wait_until(lambda: all(id(one) in others for one in calls_alive()), timeout_s=10)
            items.put(None)
            assert list(answers) == []

    assert asyncio.run(while_serving(config_of(REPOSITORY, transport), visit)) == 0
    bad = Code.INVALID_ARGUMENT
    assert codes == [Code.OK, bad, bad, bad, Code.OK, bad, bad]


def test_model_is_let_go_when_another_serves_and_after_looks_that_failed(tmp_path, monkeypatch):
    repository, elsewhere, said = tmp_path / "digits", tmp_path / "elsewhere", []
    monkeypatch.setattr("service.reload.logger.error", lambda text, error: said.append(text))
    for number in (1, 2):
        add_version(repository, number, "1")
    promote(repository, 1)

    def visit(server):
        held = []
        for number in (1, 2, 1):
            promote(repository, number)
            wait_until(lambda number=number: server._classify.model.ref.version == str(number))
            model = server._classify.model
            held.append([weakref.ref(part) for part in (model, model.engine)])
            del model
            said.clear()
            repository.rename(elsewhere)
            wait_until(lambda: said)
            elsewhere.rename(repository)
        for old in held[:2]:
            wait_until(lambda old=old: [part() for part in old] == [None, None], timeout_s=10)
        assert held[2][0]() is server._classify.model

    assert asyncio.run(while_serving(config_of(repository, "grpcio"), visit)) == 0
