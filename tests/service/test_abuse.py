"""Callers that misbehave: everybody else is served meanwhile, and nothing of them stays."""

from __future__ import annotations

import contextlib
import io
import struct
import threading
import time
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
from PIL import Image

from digits.client import DigitClient
from digits.v1 import digits_pb2, digits_pb2_grpc
from service.rpc.classify import SERVICE
from tests.attacks import attacks
from tests.calls import IMAGE, NO_RETRIES, TRANSPORTS, encoded, handled, pixels, refused, scrape
from tests.conftest import RunningServer, running_server, wait_until
from tests.memory import MIB, PeakMemory
from tests.releases import check_answers, copy_release

# Few enough for the 1,024 descriptors that a process often has; the benchmark opens thousands.
CONNECTIONS = 400
FRAMES_PER_S = 5_000
ATTACK_S = 1.0

Attack = Callable[[str], Any]
ATTACKS: dict[str, Attack] = {
    "idle": lambda address: attacks.idle(address, CONNECTIONS),
    "half open": lambda address: attacks.half_open(address, CONNECTIONS),
    "half sent": lambda address: attacks.half_sent(address, 10, 99),
    "trickled": lambda address: attacks.trickled(address, CONNECTIONS),
    "pings": lambda address: attacks.ping_flood(address, FRAMES_PER_S),
    "pings unread": lambda address: attacks.ping_flood(address, FRAMES_PER_S, reads=False),
    "settings": lambda address: attacks.settings_flood(address, FRAMES_PER_S),
    "settings unread": lambda address: attacks.settings_flood(address, FRAMES_PER_S, reads=False),
}


def stub_for(channel: Any) -> Any:
    return digits_pb2_grpc.DigitClassifierServiceStub(channel)


def check_under(attack: Attack, server: RunningServer) -> None:
    """Answers during and after an attack, of which no descriptor, thread or memory may stay."""
    process = psutil.Process(server.process.pid)
    check_answers(server)
    descriptors, threads = process.num_fds(), process.num_threads()
    memory = process.memory_info().rss
    with attack(server.address):
        until = time.monotonic() + ATTACK_S
        while time.monotonic() < until:
            check_answers(server)
    check_answers(server)
    wait_until(lambda: process.num_fds() <= descriptors + 5)
    assert process.num_threads() <= threads + 4
    assert process.memory_info().rss < memory + 64 * MIB


@pytest.mark.full
@pytest.mark.parametrize("attack", ATTACKS)
def test_golden_digits_are_answered_during_an_attack_and_nothing_of_it_stays(
    server: RunningServer, attack: str
) -> None:
    """That the server ends with 0 when it is drained is asserted where it is started."""
    check_under(ATTACKS[attack], server)


@pytest.mark.full
def test_golden_digits_are_answered_during_resets(
    start_server: Callable[..., RunningServer],
) -> None:
    """Not by grpcio, which resets calls of others at random while many wait to be accepted."""
    server = start_server("--transport=http2")
    check_under(lambda address: attacks.reset_flood(address, FRAMES_PER_S), server)


@pytest.mark.full
@TRANSPORTS
def test_calls_behind_a_burst_of_somebody_elses_are_all_answered(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    """By default grpc resets some of what waits, at random, once that is more than 1,000 calls."""
    server = start_server(f"--transport={transport}")
    with grpc.insecure_channel(server.address, options=NO_RETRIES) as channel:
        classify = stub_for(channel).Classify
        classify(pixels(IMAGE))
        with attacks.half_sent(server.address, 3, 1_000):
            futures = [classify.future(pixels(IMAGE), timeout=60) for _ in range(200)]
            assert [future.code() for future in futures] == [grpc.StatusCode.OK] * 200


@pytest.mark.full
def test_resets_without_end_are_sent_away(start_server: Callable[..., RunningServer]) -> None:
    server = start_server("--transport=http2")
    with attacks.reset_flood(server.address, FRAMES_PER_S) as sent:
        wait_until(lambda: len(sent) > 2)


@pytest.mark.full
def test_pings_without_end_are_sent_away_by_grpcio(
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server("--transport=grpcio")
    with attacks.ping_flood(server.address, FRAMES_PER_S) as sent:
        wait_until(lambda: len(sent) > 2)


def test_metadata_over_the_limit_is_refused(server: RunningServer, channel: grpc.Channel) -> None:
    stub = stub_for(channel)
    fits = [("x-note", "x" * 15_000)]
    assert stub.Classify(pixels(IMAGE), metadata=fits).predictions
    error = refused(stub.Classify, pixels(IMAGE), metadata=[("x-note", "x" * 20_000)])
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "metadata" in error.details()


@TRANSPORTS
def test_streams_over_the_limit_are_refused_until_one_ends(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}", constants={f"{STREAM}.MAX_STREAMS": 4})
    ended = threading.Event()

    def requests() -> Iterator[Any]:
        yield digits_pb2.ClassifyStreamRequest(request=pixels(IMAGE))
        ended.wait(60)

    with grpc.insecure_channel(server.address, NO_RETRIES) as channel:
        stub = stub_for(channel)
        streams = [stub.ClassifyStream(requests()) for _ in range(2)]
        for stream in streams:
            assert next(stream).response.predictions
        error = refused(list, stub.ClassifyStream(requests()))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "2 streams are open, the most this server takes; retry later"
        assert ("grpc-retry-pushback-ms", "1000") in error.trailing_metadata()
        assert stub.Classify(pixels(IMAGE)).predictions
        ended.set()
        assert [list(stream) for stream in streams] == [[], []]
        assert next(stub.ClassifyStream(requests())).response.predictions


@TRANSPORTS
def test_stream_in_which_nothing_moves_is_ended_and_a_slow_one_is_not(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}", constants={f"{STREAM}.STREAM_IDLE_S": 1})
    never = threading.Event()

    def requests(count: int) -> Iterator[Any]:
        for _ in range(count):
            yield digits_pb2.ClassifyStreamRequest(request=pixels(IMAGE))
            never.wait(0.25)
        never.wait(60)

    with grpc.insecure_channel(server.address) as channel:
        stream = stub_for(channel).ClassifyStream(requests(8))  # two seconds of them
        for _ in range(8):
            assert next(stream).response.predictions
        error = refused(next, stream)
        never.set()
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.details() == "no request came and no answer was taken for 1 s"


@contextlib.contextmanager
def unread_stream(server: RunningServer) -> Iterator[tuple[Any, Any]]:
    """A stream of large requests that takes one answer, and the event that ends its requests."""
    large = digits_pb2.ClassifyStreamRequest(request=pixels(IMAGE * 4096))
    never = threading.Event()

    def endless() -> Iterator[Any]:
        while not never.is_set():
            yield large

    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    with grpc.insecure_channel(server.address, options=narrow) as channel:
        stream = stub_for(channel).ClassifyStream(endless())
        next(stream)
        yield stream, never
        stream.cancel()


@TRANSPORTS
def test_stream_that_nobody_reads_gives_its_place_back(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(
        f"--transport={transport}",
        constants={f"{STREAM}.STREAM_IDLE_S": 1, f"{STREAM}.MAX_STREAMS": 1},
    )
    with unread_stream(server) as (_, never):
        with grpc.insecure_channel(server.address, NO_RETRIES) as channel:

            def served() -> bool:
                answers = stub_for(channel).ClassifyStream(
                    iter([digits_pb2.ClassifyStreamRequest(request=pixels(IMAGE))])
                )
                with contextlib.suppress(grpc.RpcError):
                    return len(list(answers)) == 1
                assert answers.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                return False

            assert not served()
            wait_until(served)
        never.set()


@TRANSPORTS
def test_stream_that_nobody_reads_ends_by_its_time_and_is_counted_so(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}", constants={f"{STREAM}.STREAM_IDLE_S": 1})
    with unread_stream(server) as (stream, never):
        ended = partial(handled, server, method="ClassifyStream", kind="bidi_stream")
        wait_until(lambda: ended("DEADLINE_EXCEEDED"))
        never.set()
        error = refused(list, stream)  # what had been sent, and then why there is no more
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no request came and no answer was taken for 1 s" in error.details()
    check_answers(server)
    assert (ended("DEADLINE_EXCEEDED"), ended("CANCELLED"), ended("OK")) == (1, 0, 0)


STREAM = "service.rpc.classify_stream"
HUGE_BYTES = 300 * MIB


@pytest.mark.full
@pytest.mark.parametrize("compression", list(grpc.Compression)[::2], ids=["plain", "gzip"])
@TRANSPORTS
def test_huge_message_is_refused_before_it_fills_memory(
    start_server: Callable[..., RunningServer], transport: str, compression: Any
) -> None:
    server = start_server(f"--transport={transport}")
    peak = PeakMemory(server)
    with peak, grpc.insecure_channel(server.address) as channel:
        classify = channel.unary_unary(f"/{SERVICE}/Classify")
        error = refused(classify, bytes(HUGE_BYTES), timeout=60, compression=compression)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in error.details()
    check_answers(server)
    assert peak.grown < 64 * MIB


def png(width: Any, height: Any) -> Any:
    def chunk(kind: Any, body: Any) -> Any:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(min(width // 8 + 1, 2**16) * min(height, 1024)))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def webp() -> bytes:
    """A lossless one; its header counts in fields of 14 bits."""
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28)).save(buffer, "WEBP", lossless=True)
    data = bytearray(buffer.getvalue())
    start = data.index(b"VP8L") + 9
    data[start : start + 4] = bytes((0xFF, 0xFF, 0xFF, data[start + 3] | 0x0F))
    return bytes(data)


def with_size(kind: Any, where: Any, form: Any, width: Any, height: Any) -> bytes:
    """A small file whose header says another size."""
    buffer = io.BytesIO()
    Image.new("L", (28, 28)).save(buffer, kind)
    data = bytearray(buffer.getvalue())
    start = where(data)
    data[start : start + struct.calcsize(form)] = struct.pack(form, height, width)
    return bytes(data)


BOMBS = {
    "png": png(50_000, 50_000),
    "png of 2**31 rows": png(2**31 - 1, 2**31 - 1),
    "jpeg": with_size("JPEG", lambda data: data.index(b"\xff\xc0") + 5, ">HH", 65_000, 65_000),
    "bmp": with_size("BMP", lambda data: 18, "<ii", 40_000, 40_000),
    "webp": webp(),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_image_bomb_is_refused_before_it_is_unfolded(
    server: RunningServer, channel: grpc.Channel, bomb: str
) -> None:
    with PeakMemory(server) as peak:
        error = refused(stub_for(channel).Classify, encoded(BOMBS[bomb]), timeout=60)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert peak.grown < 64 * MIB
    check_answers(server)


@pytest.mark.full
@TRANSPORTS
def test_ten_times_the_load_is_refused_in_bounded_memory_and_a_patient_caller_answered(
    start_server: Callable[..., RunningServer], transport: str, sample: dict[str, np.ndarray]
) -> None:
    server = start_server(f"--transport={transport}", "--max-queue-images=256", "--instances=1")
    check_answers(server)
    images, labels = sample["images"][:20], sample["labels"][:20]
    ended = threading.Event()
    codes: set[Any] = set()

    def flood() -> None:
        batch = pixels(IMAGE * 16)
        with grpc.insecure_channel(server.address, NO_RETRIES) as channel:
            stub = stub_for(channel)
            while not ended.is_set():
                futures = [stub.Classify.future(batch, timeout=30) for _ in range(200)]
                codes.update(future.code() for future in futures)

    thread = threading.Thread(target=flood)
    with PeakMemory(server) as peak, DigitClient(server.address, timeout_s=30) as client:
        thread.start()
        wait_until(lambda: grpc.StatusCode.RESOURCE_EXHAUSTED in codes)
        answers = [client.classify(image[None]).digits[0] for image in images]
        ended.set()
        thread.join()
    assert np.mean(answers == labels) > 0.9
    assert codes == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert peak.grown < 64 * MIB
    assert handled(server, "RESOURCE_EXHAUSTED") > 0
    wait_until(lambda: scrape(server)["digits_queue_images"] == 0)


def test_descriptors_are_left_for_files_whatever_connects(tmp_path: Path) -> None:
    """From the start on: releases, tokens and what is imported late are read from files."""
    repository = tmp_path / "digits"
    repository.mkdir()
    copy_release(repository, 1, "1")
    few = ("prlimit", "--nofile=256")
    flags = (f"--model-repository={repository}", "--reload-interval-s=0.05")
    with (
        running_server(tmp_path / "log", *flags, under=few) as server,
        attacks.half_open(server.address, 300),
        attacks.half_open(server.http.removeprefix("http://"), 300),
        DigitClient(server.address) as client,
    ):
        copy_release(repository, 2, "2")
        wait_until(lambda: client.get_model()[0].version == "2")
        for path in ("/healthz", "/metrics"):
            assert urllib.request.urlopen(server.http + path).status == 200
    for trouble in ("Too many open files", "out of system resource"):
        assert trouble not in server.log_text()
