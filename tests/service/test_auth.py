"""Bearer tokens and rate limits on the real server, on both transports."""

from __future__ import annotations

import asyncio
import itertools
import json
import queue
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from digits.cli.main import main
from digits.client import AsyncDigitClient, DigitClient, DigitError
from digits.v1 import digits_pb2, digits_pb2_grpc
from service.rpc.classify import SERVICE
from tests.calls import (
    ANNA,
    BERT,
    IMAGE,
    NO_RETRIES,
    TRANSPORTS,
    bearer,
    dropped,
    encoded,
    handled,
    pixels,
    refused,
    rich_detail,
    scrape,
    stream_of,
)
from tests.certificates import Authority
from tests.conftest import SAMPLES, RunningServer, start_process, wait_until

BLANK = np.zeros((28, 28), np.uint8)
DENIED = (grpc.StatusCode.UNAUTHENTICATED, "a valid bearer token is needed")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tokens"
    path.write_text(f"# who may call\nanna:{ANNA}\n\n{BERT}  # nobody knows who that is\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def guarded(
    start_server: Callable[..., RunningServer], file: Path
) -> Iterator[Callable[..., tuple[RunningServer, Any]]]:
    """Starts a server with the file's tokens; returns it and a channel to it."""
    channels = []

    def start(transport: str, *flags: str) -> tuple[RunningServer, Any]:
        server = start_server(f"--transport={transport}", f"--auth-token-file={file}", *flags)
        channels.append(grpc.insecure_channel(server.address, options=NO_RETRIES))
        return server, channels[-1]

    yield start
    for channel in channels:
        channel.close()


def stub_of(channel: Any) -> Any:
    return digits_pb2_grpc.DigitClassifierServiceStub(channel)


def methods(channel: Any) -> dict[str, Any]:
    """Every method that needs a token, called with some metadata."""
    stub, reflection = stub_of(channel), reflection_pb2_grpc.ServerReflectionStub(channel)
    listing = reflection_pb2.ServerReflectionRequest(list_services="")
    return {
        "Classify": lambda m: stub.Classify(pixels(IMAGE), metadata=m, timeout=30),
        "ClassifyStream": lambda m: list(
            stub.ClassifyStream(stream_of([pixels(IMAGE)]), metadata=m, timeout=30)
        ),
        "GetModel": lambda m: stub.GetModel(digits_pb2.GetModelRequest(), metadata=m, timeout=30),
        "reflection": lambda m: list(
            reflection.ServerReflectionInfo(iter([listing]), metadata=m, timeout=30)
        ),
        "unknown": lambda m: channel.unary_unary(f"/{SERVICE}/New")(b"", metadata=m, timeout=30),
    }


WRONG = {
    "missing": (),
    "empty": (("authorization", ""),),
    "another": bearer(secrets.token_hex(32)),
    "shorter": bearer(ANNA[:-1]),
    "longer": bearer(ANNA + "0"),
    "other case": bearer(ANNA.upper()),
    "named": bearer(f"anna:{ANNA}"),
    "no scheme": (("authorization", ANNA),),
    "another scheme": (("authorization", f"Basic {ANNA}"),),
    "elsewhere": (("x-authorization", f"Bearer {ANNA}"),),
    "two at once": (*bearer(ANNA), *bearer(BERT)),
    "huge": bearer("x" * 4000),
}


@TRANSPORTS
def test_call_without_a_valid_token_learns_nothing(
    guarded: Callable[..., tuple[RunningServer, Any]], transport: str
) -> None:
    server, channel = guarded(transport)
    images = scrape(server)["digits_images_total"]
    for (method, call), kind in itertools.product(methods(channel).items(), WRONG):
        error = refused(call, WRONG[kind])
        assert (error.code(), error.details()) == DENIED, (method, kind)
        said = [pair for pair in error.trailing_metadata() or () if pair[0].startswith("grpc-")]
        assert said == [], (method, kind)
    assert scrape(server)["digits_images_total"] == images
    kinds = {"Classify": "unary", "ClassifyStream": "bidi_stream", "GetModel": "unary"}
    for method, kind in kinds.items():
        counted = partial(handled, server, "UNAUTHENTICATED", method, kind)
        wait_until(lambda counted=counted: counted() == len(WRONG))
    wait_until(lambda: dropped(server, "unauthenticated") == 5 * len(WRONG))
    assert ANNA not in server.log_text()


@TRANSPORTS
def test_every_token_of_the_file_opens_every_method(
    guarded: Callable[..., tuple[RunningServer, Any]], transport: str
) -> None:
    _, channel = guarded(transport)
    calls = methods(channel)
    unknown = calls.pop("unknown")
    for token, call in itertools.product((ANNA, BERT), calls.values()):
        assert call(bearer(token))
    assert call((("authorization", f"bEARER {ANNA}"),))  # RFC 7235: the scheme has no case
    assert refused(unknown, bearer(ANNA)).code() is grpc.StatusCode.UNIMPLEMENTED


@TRANSPORTS
def test_health_is_open(guarded: Callable[..., tuple[RunningServer, Any]], transport: str) -> None:
    _, channel = guarded(transport)
    health = health_pb2_grpc.HealthStub(channel)
    request = health_pb2.HealthCheckRequest(service=SERVICE)
    assert health.Check(request).status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(request)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


@TRANSPORTS
def test_refused_calls_do_not_harm_those_beside_them(
    guarded: Callable[..., tuple[RunningServer, Any]], transport: str, sample: dict[str, np.ndarray]
) -> None:
    _, channel = guarded(transport)
    classify = stub_of(channel).Classify
    good, bad = [], []
    for image in sample["images"][:64]:
        good.append(classify.future(pixels(image.tobytes()), metadata=bearer(ANNA)))
        bad.append(classify.future(pixels(image.tobytes()), metadata=bearer("x" * 64)))
    digits = [future.result().predictions[0].digit for future in good]
    assert np.mean(digits == sample["labels"][:64]) > 0.95
    assert {future.code() for future in bad} == {grpc.StatusCode.UNAUTHENTICATED}


def test_clients_show_their_token(
    guarded: Callable[..., tuple[RunningServer, Any]],
    file: Path,
    sample: dict[str, np.ndarray],
    capsys: pytest.CaptureFixture[str],
) -> None:
    server, _ = guarded("http2")
    assert server.announced["access"] == "plaintext, 2 token(s)"
    images = sample["images"][:5]
    with DigitClient(server.address, token=ANNA) as client:
        digits = client.classify(images).digits
        assert client.get_model()[0].name == "digits"

    async def ask() -> Any:
        async with AsyncDigitClient(server.address, token=BERT) as client:
            assert (await client.get_model())[0].name == "digits"
            return (await client.classify(images)).digits

    assert asyncio.run(ask()) == digits
    with DigitClient(server.address) as client, pytest.raises(DigitError) as caught:
        client.classify(images)
    assert (caught.value.code, caught.value.message) == DENIED
    flags = ["classify", "--address", server.address]
    assert main([*flags, "--token-file", str(file), str(SAMPLES / "7.png")]) == 0
    assert main([*flags, str(SAMPLES / "7.png")]) == 1
    assert "UNAUTHENTICATED: a valid bearer token is needed" in capsys.readouterr().err


@pytest.mark.parametrize("token", ["", "two words", "line\n", "ä" * 40])
def test_client_refuses_a_token_that_can_not_be_one(token: Any) -> None:
    with pytest.raises(ValueError, match="token: expected printable ASCII") as caught:
        DigitClient(token=token)
    assert token not in str(caught.value) or not token


@TRANSPORTS
def test_tokens_are_exchanged_without_a_restart(
    guarded: Callable[..., tuple[RunningServer, Any]], file: Path, transport: str
) -> None:
    server, channel = guarded(transport)
    stub = stub_of(channel)
    carl = secrets.token_hex(32)

    def ends(token: str) -> tuple[Any, Any] | tuple[Any, str]:
        try:
            stub.Classify(pixels(IMAGE), metadata=bearer(token), timeout=30)
        except grpc.RpcError as error:
            return error.code(), error.details()
        return grpc.StatusCode.OK, ""

    requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
    stream = stub.ClassifyStream(iter(requests.get, None), metadata=bearer(ANNA), timeout=60)
    requests.put(digits_pb2.ClassifyStreamRequest(request=pixels(IMAGE)))
    assert next(stream).response.predictions

    file.write_text(f"{ANNA}\n{BERT}\n{carl}\n")  # first the new one beside the old ones
    wait_until(lambda: ends(carl)[0] is grpc.StatusCode.OK)
    assert ends(ANNA)[0] is grpc.StatusCode.OK
    file.write_text(f"{carl}\n")
    wait_until(lambda: ends(ANNA) == DENIED)
    assert ends(BERT) == DENIED
    assert ends(carl)[0] is grpc.StatusCode.OK
    requests.put(digits_pb2.ClassifyStreamRequest(request=pixels(IMAGE)))
    error = refused(next, stream)  # it was opened with a token that is no more
    assert (error.code(), error.details()) == DENIED
    requests.put(None)
    assert not any(token in server.log_text() for token in (ANNA, BERT, carl))


def loads(server: RunningServer, result: Any) -> Any:
    return scrape(server)[f'digits_credential_loads_total{{kind="tokens",result="{result}"}}']


def test_file_that_can_not_be_used_keeps_the_old_tokens_and_is_logged_once(
    guarded: Callable[..., tuple[RunningServer, Any]], file: Path
) -> None:
    server, channel = guarded("http2")
    classify = stub_of(channel).Classify
    assert loads(server, "refused") == loads(server, "loaded") == 0
    spoilt = ["", "# nobody\n", f"{ANNA}\nshort\n", b"\xff" * 40, None]
    for count, text in enumerate(spoilt, start=1):
        if text is None:
            file.unlink()
        else:
            file.write_bytes(text if isinstance(text, bytes) else text.encode())
        wait_until(lambda count=count: loads(server, "refused") == count)
        assert classify(pixels(IMAGE), metadata=bearer(BERT)).predictions
    file.write_text(BERT)
    wait_until(lambda: loads(server, "loaded") == 1)
    assert refused(classify, pixels(IMAGE), metadata=bearer(ANNA)).code() is DENIED[0]
    lines = [
        line
        for line in server.log_text().splitlines()
        if "still using what was read before" in line
    ]
    assert len(lines) == len(spoilt)
    assert ANNA not in server.log_text()


def test_server_does_not_start_without_its_tokens(tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start_process(log, f"--auth-token-file={tmp_path / 'tokens'}")
    assert process.wait(60) == 2
    assert "can not serve: --auth-token-file: " in log.read_text()


def test_token_on_plaintext_to_elsewhere_is_warned_about(
    guarded: Callable[..., tuple[RunningServer, Any]],
) -> None:
    server, _ = guarded("http2", "--host=0.0.0.0")
    entries = [json.loads(line) for line in server.log_text().splitlines()]
    [warning] = [entry["message"] for entry in entries if entry["level"] == "warning"]
    assert warning.startswith("--auth-token-file without --tls-cert on 0.0.0.0")


@pytest.mark.parametrize("tls", [False, True], ids=["plaintext", "TLS"])
def test_token_on_plaintext_http_to_elsewhere_is_warned_about(
    guarded: Callable[..., tuple[RunningServer, Any]], tmp_path: Path, tls: bool
) -> None:
    flags = ["--host=0.0.0.0", "--playground"]
    if tls:
        certificate, key = Authority(tmp_path, "root").issue("server")
        flags += [f"--tls-cert={certificate}", f"--tls-key={key}"]
    server, _ = guarded("http2", *flags)
    entries = [json.loads(line) for line in server.log_text().splitlines()]
    [warning] = [entry["message"] for entry in entries if entry["level"] == "warning"]
    assert warning.startswith("--auth-token-file with --playground, which has no TLS, on 0.0.0.0")


def test_log_names_callers_and_never_their_tokens(
    guarded: Callable[..., tuple[RunningServer, Any]],
) -> None:
    server, channel = guarded("http2", "--request-log-per-s=100")
    for token in (ANNA, BERT):
        stub_of(channel).Classify(pixels(IMAGE), metadata=bearer(token))
    refused(stub_of(channel).Classify, pixels(IMAGE), metadata=bearer("y" * 64))

    def lines() -> list[Any]:
        entries = [json.loads(line) for line in server.log_text().splitlines()]
        return [entry for entry in entries if entry["message"].startswith("Classify ")]

    wait_until(lambda: len(lines()) == 3)
    assert {line["message"]: line.get("caller", "") for line in lines()} == {
        "Classify OK": lines()[1]["caller"],
        "Classify UNAUTHENTICATED": "",
    }
    assert lines()[0]["caller"] == "anna"
    assert not any(token in server.log_text() for token in (ANNA, BERT, "y" * 64))


def test_nothing_is_warned_about_where_tokens_stay_on_this_machine(
    guarded: Callable[..., tuple[RunningServer, Any]],
) -> None:
    server, _ = guarded("http2", "--playground")
    assert "can read the tokens" not in server.log_text()


RATE = 50  # images a second, and so at once


@TRANSPORTS
def test_caller_that_asks_for_too_much_is_told_when_to_come_back(
    guarded: Callable[..., tuple[RunningServer, Any]], transport: str
) -> None:
    server, channel = guarded(transport, f"--rate-limit-images-per-s={RATE}")
    assert dropped(server, "rate_limited") == 0
    classify = stub_of(channel).Classify
    # More than is there is lent once, however slow this machine is.
    assert len(classify(pixels(IMAGE * 10 * RATE), metadata=bearer(ANNA)).predictions) == 10 * RATE
    error = refused(classify, pixels(IMAGE), metadata=bearer(ANNA))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details() == "more images were asked for than the rate limit allows; retry later"
    delay = rich_detail(error, error_details_pb2.RetryInfo).retry_delay.ToNanoseconds() / 1e9
    assert 1 < delay < 9  # nine seconds of the rate are owed
    if transport == "grpcio":
        [pushback] = [v for k, v in error.trailing_metadata() if k == "grpc-retry-pushback-ms"]
        assert int(pushback) == round(delay * 1000)
    assert classify(pixels(IMAGE), metadata=bearer(BERT)).predictions  # not its debt
    seven = (SAMPLES / "7.png").read_bytes()
    assert refused(classify, encoded(seven), metadata=bearer(ANNA)).code() is error.code()
    [item] = stub_of(channel).ClassifyStream(stream_of([pixels(IMAGE)]), metadata=bearer(ANNA))
    assert item.error.code == error.code().value[0]
    assert 0 < item.error.retry_after_ms < 9000
    assert dropped(server, "rate_limited") == 3
    again = partial(classify.future, pixels(IMAGE), metadata=bearer(ANNA))
    wait_until(lambda: again().code() is grpc.StatusCode.OK)


def test_bad_request_costs_its_caller_nothing(
    guarded: Callable[..., tuple[RunningServer, Any]],
) -> None:
    _, channel = guarded("http2", "--rate-limit-images-per-s=1")
    classify = stub_of(channel).Classify
    for _ in range(5):
        error = refused(classify, pixels(b"bad"), metadata=bearer(ANNA))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert classify(pixels(IMAGE), metadata=bearer(ANNA)).predictions


def test_files_are_paid_for_before_they_are_looked_at(
    guarded: Callable[..., tuple[RunningServer, Any]],
) -> None:
    _, channel = guarded("http2", "--rate-limit-images-per-s=1")
    classify = stub_of(channel).Classify
    junk = partial(refused, classify, encoded(*[b"no image"] * 60), metadata=bearer(ANNA))
    assert junk().code() is grpc.StatusCode.INVALID_ARGUMENT
    assert junk().code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # for a minute


def test_client_waits_as_long_as_the_rate_limit_asks(
    guarded: Callable[..., tuple[RunningServer, Any]],
) -> None:
    server, _ = guarded("grpcio", "--rate-limit-images-per-s=100")
    with DigitClient(server.address, token=ANNA, timeout_s=60) as client:
        client.classify(np.zeros((400, 28, 28), np.uint8))  # three seconds of the rate are owed
        assert len(client.classify(BLANK).digits) == 1
    assert dropped(server, "rate_limited") >= 1
