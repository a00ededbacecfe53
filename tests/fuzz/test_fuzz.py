"""The short form of ``make fuzz``: some hundred hostile inputs for each target."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calls import TRANSPORTS
from tests.conftest import RunningServer
from tests.fuzz import inputs
from tests.fuzz.calls import ClassifyRequests
from tests.fuzz.sockets import FLAGS, SOCKET_TARGETS, Connections
from tests.fuzz.targets import TARGETS
from tests.fuzz.watch import GOLDEN_EVERY, Watch, growth, read_record

pytestmark = pytest.mark.full

# The same inputs each time: what is found at random belongs to the long run.
FEW = settings(max_examples=200, deadline=None, derandomize=True, database=None)
RST_STREAM, CANCEL = 3, b"\0\0\0\x08"
# Inputs that found a defect which is mended.
FOUND = {
    # Malformed as an item of a stream, good as a ClassifyRequest: it was answered.
    "stream": [inputs.request(bytes(784)) + b"\x98\x06\x01"],
    # A member of golden.npz that is no array ended the load with an AttributeError.
    "artifact": [b"\x03no array"],
}


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input_gets_the_answer_it_deserves(name: Any, tmp_path: Path) -> None:
    target = TARGETS[name](tmp_path)

    @FEW
    @given(seed=st.sampled_from(target.seeds()), rng=st.randoms(use_true_random=False))
    def fuzz(seed: Any, rng: Any) -> None:
        target.run(inputs.mutate(rng, seed))

    for data in [*target.seeds(), *FOUND.get(name, [])]:
        target.run(data)
    fuzz()
    target.check_golden()
    target.close()


@pytest.fixture
def oracle(tmp_path: Path) -> Iterator[ClassifyRequests]:
    target = ClassifyRequests(tmp_path)
    yield target
    target.close()


@TRANSPORTS
def test_hostile_sockets_leave_the_server_as_it_was(
    transport: str, start_server: Callable[..., RunningServer], oracle: ClassifyRequests
) -> None:
    server = start_server(f"--transport={transport}", *FLAGS)
    rng = random.Random(1)
    for name, rounds in {"connections": 300, "messages": 6, "http": 30}.items():
        target = SOCKET_TARGETS[name](server, oracle)
        for _ in range(rounds):
            target.run(rng)
        target.check_golden()
        target.close()
    assert server.stop() == 0, server.log_text()


@TRANSPORTS
def test_stream_that_is_reset_while_it_is_read_does_not_end_the_process(
    transport: str, start_server: Callable[..., RunningServer], oracle: ClassifyRequests
) -> None:
    """grpcio crashes the process when a call that has ended is asked for its peer."""
    server = start_server(f"--transport={transport}", *FLAGS)
    frames = inputs.conversation(inputs.STREAM_PATH, inputs.stream_requests()[:1] * 12)
    opened = inputs.PREFACE + b"".join(frames[:-1])
    reset = inputs.frame(RST_STREAM, 0, 1, CANCEL)
    host, port = server.address.split(":")
    for _ in range(200):
        with socket.create_connection((host, int(port)), 20) as connection:
            connection.sendall(opened)
            assert connection.recv(100), "no answer"
            connection.sendall(reset)
    Connections(server, oracle).check_golden()
    assert server.stop() == 0, server.log_text()


@TRANSPORTS
def test_path_that_is_not_utf8_does_not_end_the_service(
    transport: str, start_server: Callable[..., RunningServer], oracle: ClassifyRequests
) -> None:
    """It did with grpcio 1.84 and 1.85, whose server ends by itself at such a call."""
    server = start_server(f"--transport={transport}", *FLAGS)
    bad = inputs.PREFACE + b"".join(inputs.conversation(b"/\xff", [b""]))

    class BadPaths(Connections):
        open_connections = 1

        def conversation(self, rng: Any) -> bytes:
            return bad

    target = BadPaths(server, oracle)
    for _ in range(3):
        target.run(random.Random(1))
        target.check_golden()
        stream = target.channel.stream_stream(inputs.STREAM_PATH.decode())
        assert len(list(stream(iter(inputs.stream_requests()[:1]), timeout=20))) == 1
    target.close()
    assert server.stop() == 0, server.log_text()


def test_run_that_loses_memory_or_its_golden_digit_is_noticed(tmp_path: Path) -> None:
    def refuse() -> None:
        raise AssertionError("a wrong digit")

    record = tmp_path / "record"
    watch = Watch(lambda: None, record)
    for _ in range(5):
        watch.count(GOLDEN_EVERY)
    assert read_record(record)[0] == 5 * GOLDEN_EVERY
    assert growth([10, 20, 30, 40, 50, 60]) == 20
    with pytest.raises(AssertionError, match="a wrong digit"):
        Watch(refuse, record).count(GOLDEN_EVERY)
