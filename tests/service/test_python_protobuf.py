"""protobuf in pure Python, which has another error for texts that are not UTF-8."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from tests.conftest import RunningServer, running_server
from tests.releases import check_answers

OIP = "inference.GRPCInferenceService"
REFLECTION = "grpc.reflection.v1.ServerReflection/ServerReflectionInfo"
BAD = b"\xff\xfe"


def field(number: int, content: Any) -> Any:
    return bytes([number << 3 | 2, len(content)]) + content


DIGITS = field(1, b"digits")
# Methods, and messages of which a text, or all, is not what it should be.
UNARY = {
    "model_name": (f"{OIP}/ModelInfer", field(1, BAD)),
    "id": (f"{OIP}/ModelInfer", DIGITS + field(3, BAD)),
    "input's name": (f"{OIP}/ModelInfer", DIGITS + field(5, field(1, BAD))),
    "parameter": (f"{OIP}/ModelInfer", DIGITS + field(4, field(1, b"a") + field(2, field(3, BAD)))),
    "ready": (f"{OIP}/ModelReady", field(1, BAD)),
    "metadata": (f"{OIP}/ModelMetadata", field(1, BAD)),
    "config": (f"{OIP}/ModelConfig", field(1, BAD)),
    "classify": ("digits.v1.DigitClassifierService/Classify", BAD),
    "files": ("digits.v1.DigitClassifierService/Classify", field(2, BAD)),
    "get model": ("digits.v1.DigitClassifierService/GetModel", BAD),
    "check": ("grpc.health.v1.Health/Check", field(1, BAD)),
}
STREAMS = {
    "watch": ("grpc.health.v1.Health/Watch", field(1, BAD)),
    "host": (REFLECTION, field(1, BAD)),
    "symbol": (REFLECTION, field(4, BAD)),
    "extension": (REFLECTION, field(5, field(1, BAD))),
}


@pytest.fixture(scope="module", params=["http2", "grpcio"])
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("server") / "log"
    env = {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    with running_server(log, f"--transport={request.param}", env=env) as running:
        yield running
    assert "this is a bug" not in log.read_text()


def answer(channel: Any, case: Any) -> Any:
    path, message = (UNARY | STREAMS)[case]
    if case in UNARY:
        return channel.unary_unary(f"/{path}")(message, timeout=30)
    return list(channel.stream_stream(f"/{path}")(iter([message]), timeout=30))


@pytest.mark.parametrize("case", UNARY | STREAMS)
def test_text_that_is_not_utf8_is_the_callers_error(server: RunningServer, case: Any) -> None:
    with grpc.insecure_channel(server.address) as channel, pytest.raises(grpc.RpcError) as caught:
        answer(channel, case)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "malformed bytes" in str(caught.value.details()) or case == "files"


def test_it_serves_like_the_fast_one(server: RunningServer) -> None:
    check_answers(server)
