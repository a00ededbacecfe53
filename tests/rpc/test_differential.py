"""The same calls on both transports end the same way, and are counted the same."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.rpc import status_pb2

from digits.v1 import digits_pb2
from service.rpc.classify import SERVICE
from tests.calls import scrape
from tests.conftest import RunningServer, wait_until
from tests.fuzz import inputs

pytestmark = pytest.mark.full

OIP = "inference.GRPCInferenceService"
SCRIPTS, CALLS = 4, 60
FLAGS = ("--max-images-per-request=64", "--request-log-per-s=0")


def script(
    seed: int,
) -> Iterator[tuple[Any, str, list[Any], Any] | tuple[str, str, list[Any], Any]]:
    """Calls, one after the other: path, kind, messages, metadata, seconds until the deadline."""
    rng = random.Random(seed)
    seeds = {
        f"/{SERVICE}/Classify": [*inputs.requests(), inputs.request(bytes(784 * 65))],
        f"/{SERVICE}/GetModel": [b"", b"\xff"],
        f"/{OIP}/ModelInfer": inputs.infer_requests(),
        f"/{OIP}/ModelMetadata": [b"\x0a\x06digits", b"\x0a\x04cats", b"\xff"],
        f"/{OIP}/ServerReady": [b""],
        f"/{SERVICE}/Nope": [b""],
        "/grpc.health.v1.Health/Check": [b"", b"\x0a\x06nobody"],
    }
    for _ in range(CALLS):
        metadata = rng.choice([(), (("x-note", "hello"),), (("x-bytes-bin", b"\0\xff"),)])
        if rng.random() < 0.2:
            items = [inputs.mutate(rng, rng.choice(inputs.stream_requests())) for _ in range(4)]
            yield f"/{SERVICE}/ClassifyStream", "stream", items, metadata
            continue
        path = rng.choice(list(seeds))
        message = rng.choice(seeds[path])
        if rng.random() < 0.5:
            message = inputs.mutate(rng, message)
        yield path, "unary", [message], metadata


def stripped(path: Any, answer: Any) -> Any:
    """An answer without what two servers may say differently."""
    if path.endswith("/Classify"):
        response = digits_pb2.ClassifyResponse.FromString(answer)
        response.ClearField("timing")
        return response.SerializeToString(deterministic=True)
    if path.endswith("/ClassifyStream"):
        item = digits_pb2.ClassifyStreamResponse.FromString(answer)
        item.response.ClearField("timing")
        return item.SerializeToString(deterministic=True)
    return answer


def outcome(
    channel: Any, path: Any, kind: Any, messages: Any, metadata: Any
) -> tuple[Any, Any, Any, list[Any], list[Any]]:
    """What a caller sees: status, message, details, answers."""
    if kind == "stream":
        call = channel.stream_stream(path)(iter(messages), metadata=metadata, timeout=60)
        answers = []
        with contextlib.suppress(grpc.RpcError):
            answers.extend(call)
    else:
        call = channel.unary_unary(path).future(messages[0], metadata=metadata, timeout=60)
        answers = [] if call.exception() else [call.result()]
    trailers = dict(call.trailing_metadata() or ())
    rich = trailers.pop("grpc-status-details-bin", None)
    known = call.details() if call.code() is not grpc.StatusCode.UNIMPLEMENTED else ""
    return (
        call.code().name,
        known,
        rich and status_pb2.Status.FromString(rich).SerializeToString(deterministic=True),
        sorted(trailers),
        [stripped(path, answer) for answer in answers],
    )


def counts(series: Any) -> dict[Any, Any]:
    """The counts that calls make, without times."""
    names = (
        *("grpc_server_started_total", "grpc_server_handled_total", "digits_images_total"),
        *("digits_requests_dropped_total", "digits_predictions_total", "digits_queue_seconds_c"),
    )
    return {name: value for name, value in series.items() if name.startswith(names)}


@pytest.mark.parametrize("seed", range(SCRIPTS))
def test_same_calls_same_ends_same_counts(
    start_server: Callable[..., RunningServer], seed: Any
) -> None:
    seen, counted = [], []
    for transport in ("http2", "grpcio"):
        server = start_server(f"--transport={transport}", *FLAGS)
        with grpc.insecure_channel(server.address) as channel:
            seen.append([outcome(channel, *call) for call in script(seed)])
        started = sum(v for k, v in scrape(server).items() if "started_total" in k)

        def settled(server: Any = server, started: Any = started) -> Any:
            series = scrape(server)
            return sum(v for k, v in series.items() if "handled_total" in k) == started and series

        counted.append(counts(wait_until(settled)))
        assert server.stop() == 0
    for call, http2, grpcio in zip(script(seed), *seen, strict=True):
        assert http2 == grpcio, call[0]
    assert counted[0] == counted[1]
    assert len({end[0] for end in seen[0]}) > 2, "a script of one outcome tells nothing"
    assert any(end[4] for end in seen[0])
