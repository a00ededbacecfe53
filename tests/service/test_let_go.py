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
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from digits.v1 import digits_pb2
from export.artifact import promote
from service.config import ServerConfig
from service.http2 import Call
from service.oip.infer import SMALL_BYTES
from service.rpc.grpcio import GrpcioCall
from service.server import DigitsServer
from service.serving.request import Request
from tests.conftest import REPOSITORY, SAMPLES, wait_until
from tests.releases import copy_release
from tests.service.oip import infer

CLASSIFY = "/digits.v1.DigitClassifierService/Classify"
MODEL_INFER = "/inference.GRPCInferenceService/ModelInfer"
Code = grpc.StatusCode
SEVEN = (SAMPLES / "7.png").read_bytes()


@pytest.fixture(autouse=True)
def _nobody_else_holds_or_frees() -> Iterator[None]:
    """The collector is off, and so is the log: pytest keeps what is logged, errors among it."""
    logging.disable()
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    logging.disable(logging.NOTSET)


def pixels(size: Any) -> bytes:
    return digits_pb2.ClassifyRequest(pixels=bytes(size)).SerializeToString()


def files(*contents: Any) -> bytes:
    encoded = digits_pb2.EncodedImages(files=contents)
    return digits_pb2.ClassifyRequest(encoded=encoded).SerializeToString()


async def while_serving(config: Any, visit: Any) -> Any:
    """Runs a server in this process, and beside it what looks at it; the server's exit code."""
    server = DigitsServer(config, time.monotonic())
    running = asyncio.create_task(server.run())
    try:
        await asyncio.to_thread(wait_until, lambda: server._parts.gate.is_open)
        await asyncio.to_thread(visit, server)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        await running
    return running.result()


def config_of(repository: Any, transport: str) -> ServerConfig:
    return ServerConfig(
        model_repository=str(repository), grpc_port=0, http_port=0, transport=transport,
        reload_interval_s=0.05,
    )  # fmt: skip


def calls_alive() -> list[Any]:
    """Calls and requests, but for streams: one of them is open all the time."""
    kinds = (Call, GrpcioCall, Request)
    found = [one for one in gc.get_objects() if issubclass(type(one), kinds)]
    return [one for one in found if not getattr(one, "path", "").endswith("Stream")]


def stream_item(request_bytes: Any) -> bytes:
    request = digits_pb2.ClassifyRequest.FromString(request_bytes)
    return digits_pb2.ClassifyStreamRequest(request=request).SerializeToString()


@pytest.mark.parametrize("transport", ["http2", "grpcio"])
def test_server_holds_no_call_that_has_ended_and_no_item_of_a_silent_stream(transport: str) -> None:
    tensor = infer(np.zeros((50, 28, 28), np.uint8))
    cut = infer(np.zeros((50, 28, 28), np.uint8))
    cut.raw_input_contents[0] = cut.raw_input_contents[0][:-1]
    assert len(cut.SerializeToString()) > SMALL_BYTES
    unary = [(CLASSIFY, one) for one in (pixels(784), pixels(783), b"\xff", files(b"nothing"))]
    unary += [(MODEL_INFER, one.SerializeToString()) for one in (tensor, cut)]
    unary.append((MODEL_INFER, b"\xff"))
    codes = []
    others = {id(one): one for one in calls_alive()}  # of other tests

    def visit(server: Any) -> None:
        items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
            answers = channel.stream_stream(f"{CLASSIFY}Stream")(iter(items.get, None))
            for item in (pixels(784), pixels(783), pixels(784)):
                items.put(stream_item(item))
                next(iter(answers))
            for method, request in unary:
                call = channel.unary_unary(method).future(request, timeout=20)
                codes.append(call.code())
            wait_until(lambda: all(id(one) in others for one in calls_alive()), timeout_s=10)
            items.put(None)
            assert list(answers) == []

    assert asyncio.run(while_serving(config_of(REPOSITORY, transport), visit)) == 0
    bad = Code.INVALID_ARGUMENT
    assert codes == [Code.OK, bad, bad, bad, Code.OK, bad, bad]


def test_model_is_let_go_when_another_serves_and_after_looks_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository, elsewhere, said = tmp_path / "digits", tmp_path / "elsewhere", []
    monkeypatch.setattr("service.reloader.logger.error", lambda text, error: said.append(text))
    for number in (1, 2):
        copy_release(repository, number, "1")
    promote(repository, 1)

    def visit(server: Any) -> None:
        held = []
        for number in (1, 2, 1):
            promote(repository, number)
            wait_until(lambda number=number: server._parts.gate.model.version == str(number))
            model = server._parts.gate.model
            held.append([weakref.ref(part) for part in (model, model.engine)])
            del model
            said.clear()
            repository.rename(elsewhere)
            wait_until(lambda: said)
            elsewhere.rename(repository)
        for old in held[:2]:
            wait_until(lambda old=old: [part() for part in old] == [None, None], timeout_s=10)
        assert held[2][0]() is server._parts.gate.model

    assert asyncio.run(while_serving(config_of(repository, "grpcio"), visit)) == 0
