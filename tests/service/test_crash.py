"""A server that is killed under load: what is left behind, and how soon another serves."""

from __future__ import annotations

import hashlib
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import grpc
import numpy as np
import pytest

from digits.client import DigitClient
from digits.v1 import digits_pb2, digits_pb2_grpc
from tests.calls import TRANSPORTS
from tests.conftest import REPOSITORY, RunningServer, wait_until

pytestmark = pytest.mark.full

CALLERS = 4


class Load:
    """Callers that go on until told to, whatever they are answered."""

    def __init__(self, address: str, images: np.ndarray) -> None:
        self._address, self._images = address, images
        self.digits: list[Any] = []  # of each call that was answered
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        self._threads = [threading.Thread(target=self._call) for _ in range(CALLERS)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self) -> None:
        options = [("grpc.enable_retries", 0), ("grpc.max_reconnect_backoff_ms", 100)]
        options.append(("grpc.use_local_subchannel_pool", 1))
        request = digits_pb2.ClassifyRequest(pixels=self._images.tobytes())
        with grpc.insecure_channel(self._address, options=options) as channel:
            stub = digits_pb2_grpc.DigitClassifierServiceStub(channel)
            while not self._stop.is_set():
                try:
                    response = stub.Classify(request, timeout=10)
                except grpc.RpcError:
                    self._stop.wait(0.02)
                else:
                    self.digits.append([p.digit for p in response.predictions])

    def wait_for_answers(self, count: int = 20) -> None:
        enough = len(self.digits) + count
        wait_until(lambda: len(self.digits) >= enough)


def content(folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@TRANSPORTS
def test_server_killed_under_load_serves_again_within_a_cold_start(
    start_server: Callable[..., RunningServer],
    sample: dict[str, np.ndarray],
    tmp_path: Path,
    transport: str,
) -> None:
    repository = tmp_path / "digits"
    shutil.copytree(REPOSITORY, repository)
    before = content(repository)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    flags = (f"--transport={transport}", f"--model-repository={repository}")
    environ = {"TMPDIR": str(temporary)}
    began = time.monotonic()
    server = start_server(*flags, env=environ)
    cold_start_s = time.monotonic() - began
    port = server.address.rpartition(":")[2]
    with DigitClient(server.address) as client:
        expected = client.classify(sample["images"][:20]).digits
    with Load(server.address, sample["images"][:20]) as load:
        for _ in range(2):
            load.wait_for_answers()
            server.process.kill()
            assert server.process.wait(10) == -signal.SIGKILL
            assert not list(temporary.iterdir())
            began = time.monotonic()
            server = start_server(*flags, f"--grpc-port={port}", env=environ)
            assert time.monotonic() - began < 3 * cold_start_s + 5  # a loaded machine
            load.wait_for_answers()
            assert not list(temporary.iterdir())
    assert all(digits == expected for digits in load.digits)
    assert content(repository) == before
    assert server.stop() == 0
    assert list(temporary.iterdir()) == []
