"""Few bytes of a request that unfold into many: in headers, by compression, in protobuf."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from digits.oip import inference_pb2
from digits.v1 import digits_pb2
from service.rpc.codec import as_field, parse
from service.serving.request import InvalidInputError
from tests.conftest import RunningServer
from tests.http2.wire import Caller, compressed, in_frames, opening
from tests.memory import MIB, PeakMemory
from tests.releases import check_answers

CHECK = "/grpc.health.v1.Health/Check"
CLASSIFY = "/digits.v1.DigitClassifierService/Classify"
INFER = "/inference.GRPCInferenceService/ModelInfer"
PACKED = (b"grpc-encoding", b"gzip")
BYTES = 4_000_000
CALLS = 128  # on each connection
FIELDS = [(b"%03x" % number, b"\x80") for number in range(400)]


def packed_call(path: Any, message: Any, *, whole: bool = True) -> Any:
    body = compressed(message)
    return lambda stream: opening(stream, path, PACKED) + in_frames(stream, body, whole=whole)


EMPTY_FILES = as_field(2, b"\x0a\0" * (BYTES // 2))
EMPTY_INPUTS = b"\x2a\0" * (BYTES // 2)
EMPTY_PARAMETERS = as_field(5, b"\x22\0" * (BYTES // 2))
NUMBERS = as_field(5, as_field(5, b"\x08\1" * (BYTES // 2)))
BLANK = bytes(BYTES)
# What is sent on each of so many connections, as each of its calls.
ATTACKS = {
    "headers of half a call": (8, lambda stream: opening(stream, CHECK, *FIELDS[:120])),
    "too many headers": (8, lambda stream: opening(stream, CHECK, *FIELDS)),
    "pixels": (8, packed_call(CLASSIFY, as_field(1, BLANK))),
    "no end": (4, packed_call(CLASSIFY, as_field(1, BLANK), whole=False)),
    "a file": (8, packed_call(CLASSIFY, as_field(2, as_field(1, BLANK)))),
    "empty files": (2, packed_call(CLASSIFY, EMPTY_FILES)),
    "empty tensors": (2, packed_call(INFER, EMPTY_INPUTS)),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_memory_is_bounded_by_what_is_unfolded_at_once(
    start_server: Callable[..., RunningServer], attack: str
) -> None:
    connections, make = ATTACKS[attack]
    server = start_server()
    check_answers(server)
    frames = b"".join(make(2 * n + 1) for n in range(CALLS))
    with PeakMemory(server) as peak:
        callers = [Caller(server) for _ in range(connections)]
        for caller in callers:
            caller.send(frames)
        for _ in range(3):
            check_answers(server)
        for caller in callers:
            caller.socket.close()
        check_answers(server)
    assert peak.grown < 96 * MIB


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (digits_pb2.ClassifyRequest, EMPTY_FILES),
        (digits_pb2.ClassifyStreamRequest, as_field(1, EMPTY_FILES)),
        (inference_pb2.ModelInferRequest, EMPTY_INPUTS),
        (inference_pb2.ModelInferRequest, EMPTY_PARAMETERS),
        (inference_pb2.ModelInferRequest, NUMBERS),
    ],
)
def test_message_of_too_many_fields_is_not_parsed(kind: Any, message: Any) -> None:
    with pytest.raises(InvalidInputError, match="at most 131,072 fields"):
        parse(kind, message)


@pytest.mark.parametrize("message", [b"\xff" * BYTES, b"\x0a", EMPTY_FILES[:200_000]])
def test_malformed_message_is_told_so(message: Any) -> None:
    with pytest.raises(InvalidInputError, match="got malformed bytes"):
        parse(digits_pb2.ClassifyRequest, message)


def test_most_files_that_may_be_sent_are_not_too_many() -> None:
    files = [bytes(50)] * 100_000  # the largest setting
    message = digits_pb2.ClassifyRequest(encoded=digits_pb2.EncodedImages(files=files))
    assert parse(digits_pb2.ClassifyRequest, message.SerializeToString()) == message
