"""Another version comes into service under load: no call fails, every answer names its model."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from digits.client import DigitClient
from digits.v1 import digits_pb2
from export.__main__ import main as export_command
from export.artifact import promote, sign_release
from service.artifact.format import MANIFEST, load_artifact
from service.artifact.golden import GOLDEN, read_golden, write_golden
from service.artifact.repository import ANY
from service.config import ServerConfig
from service.rpc.get_model import answer_get_model
from service.server import DigitsServer
from service.serving.engine import Engine
from service.serving.loader import ModelLoader
from tests.conftest import REPOSITORY, RunningServer, wait_until
from tests.releases import FP32, copy_release, rewrite, write_keys
from tests.service.conftest import FAST
from tests.service.trap import write_trap

PINNED = "--precision=fp32"  # for answers that are exact


def loader_of(repository: Any, wanted: Any = ANY, results: Any = None) -> ModelLoader:
    return ModelLoader(
        repository, wanted=wanted, device="cpu", precision="auto", intra_op_threads=1,
        max_batch_size=4, public_key=None, on_load=([] if results is None else results).append,
    )  # fmt: skip


def serving_version(server: RunningServer) -> int:
    with DigitClient(server.address) as client:
        return int(client.get_model()[0].version)


def loads(server: RunningServer, result: Any) -> float:
    text = urllib.request.urlopen(f"{server.http}/metrics").read().decode()
    [line] = [
        x for x in text.splitlines() if x.startswith(f'digits_model_loads_total{{result="{result}"')
    ]
    return float(line.split()[-1])


@contextmanager
def callers(server: RunningServer, batches: Any) -> Iterator[tuple[Any, Any]]:
    """Threads that classify until the block ends; yields what they got."""
    ended, answers, errors = threading.Event(), [], []

    def call(images: np.ndarray) -> None:
        with DigitClient(server.address) as client:
            while not ended.is_set():
                try:
                    answered = client.classify(images, timeout_s=20)
                except Exception as error:  # what a caller would see
                    errors.append(error)
                else:
                    answers.append((images, answered))

    threads = [threading.Thread(target=call, args=(images,)) for images in batches]
    for thread in threads:
        thread.start()
    try:
        yield answers, errors
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def probabilities(answered: Any) -> np.ndarray:
    return np.stack([prediction.probabilities for prediction in answered.predictions])


@pytest.mark.parametrize("transport", ["http2", "grpcio"])
def test_releases_change_under_load_without_a_failed_or_mixed_answer(
    transport: str,
    repository: Path,
    start_server: Callable[..., RunningServer],
    sample: dict[str, np.ndarray],
) -> None:
    server = start_server(
        f"--model-repository={repository}", f"--transport={transport}", FAST, PINNED
    )
    # 250: several batches of the server's, and one request of the client's.
    batches = [sample["images"][:1], sample["images"][:250], sample["images"][7:9]]
    with callers(server, batches) as (answers, errors):
        for number in range(2, 8):
            copy_release(repository, number, source_of(number))
            wait_until(lambda number=number: serving_version(server) == number)
        wait_until(lambda: errors or answers[-1][1].model.version == "7")
    assert errors == []
    seen = {answered.model.version for _, answered in answers}
    assert seen >= {"1", "7"}
    engines = {source: Engine((REPOSITORY / source / FP32).read_bytes()) for source in "12"}
    for images, answered in answers:
        expected = engines[source_of(int(answered.model.version))].run(images)
        assert np.abs(probabilities(answered) - expected).max() < 1e-5


def test_memory_is_given_back_after_a_change_and_an_error_there_ends_no_later_one(
    repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failures, given_back = [RuntimeError("can't start new thread")], []

    def give_back() -> None:
        if failures:
            raise failures.pop()
        given_back.append(True)

    monkeypatch.setattr("service.host.memory.give_back", give_back)
    config = ServerConfig(
        model_repository=str(repository), grpc_port=0, http_port=0, transport="grpcio",
        reload_interval_s=0.05,
    )  # fmt: skip

    def serves(server: Any, number: int) -> Any:
        model = server._parts.gate.model
        return model is not None and model.version == str(number)

    async def change_twice() -> Any:
        server = DigitsServer(config, time.monotonic())
        running = asyncio.create_task(server.run())
        for number in (1, 2, 3):
            if number > 1:
                copy_release(repository, number, source_of(number))
            await asyncio.to_thread(wait_until, partial(serves, server, number))
        await asyncio.to_thread(wait_until, lambda: given_back)
        os.kill(os.getpid(), signal.SIGTERM)
        return await running

    assert asyncio.run(change_twice()) == 0
    assert "can't start new thread" in caplog.text


def source_of(number: int) -> str:
    """Odd versions hold the first committed model, even ones the second."""
    return "1" if number % 2 else "2"


def truncated(folder: Path) -> None:
    path = folder / FP32
    path.write_bytes(path.read_bytes()[:-500])


def another_golden(folder: Path) -> None:
    """Golden digits that no model of the release answers, with hashes that agree."""
    golden = read_golden((folder / GOLDEN).read_bytes(), ["fp32", "int8"])
    others = {name: answers[:, ::-1].copy() for name, answers in golden.probabilities.items()}
    rewrite(folder, GOLDEN, write_golden(replace(golden, probabilities=others)))


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncated, "model.fp32.onnx: expected sha256"),
        (another_golden, "golden digits"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json: not JSON"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json: No such file"),
    ],
)
def test_release_that_does_not_hold_is_refused_once_and_the_old_one_serves(
    spoil: Callable[..., Any],
    reason: str,
    repository: Path,
    start_server: Callable[..., RunningServer],
) -> None:
    server = start_server(f"--model-repository={repository}", FAST)
    temporary = copy_release(repository, 2, "2").rename(repository / ".spoiled")
    spoil(temporary)
    temporary.rename(repository / "2")
    wait_until(lambda: loads(server, "refused") == 1)
    assert reason in server.log_text()
    assert serving_version(server) == 1
    copy_release(repository, 3, "2")
    wait_until(lambda: serving_version(server) == 3)
    assert loads(server, "refused") == 1, "tried again although nothing changed"


def test_release_that_was_refused_is_tried_again_when_its_files_change(
    repository: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(f"--model-repository={repository}", FAST)
    complete = (REPOSITORY / "2" / FP32).read_bytes()
    folder = copy_release(repository, 2, "2")
    (folder / FP32).write_bytes(complete[:100])
    wait_until(lambda: loads(server, "refused") >= 1 or serving_version(server) == 2)
    (folder / FP32).write_bytes(complete)
    wait_until(lambda: serving_version(server) == 2)


def test_answer_that_describes_a_model_is_made_once_for_each(repository: Path) -> None:
    """GetModel, of which a burst would hold up other callers: a manifest is long."""
    copy_release(repository, 2, "2")
    gate: Any = SimpleNamespace()
    answers = []
    for version in (1, 2):
        promote(repository, version)
        gate.model = loader_of(repository).load()
        first = answer_get_model(gate, b"")
        assert answer_get_model(gate, b"") is first
        assert isinstance(first, bytes)
        answers.append(digits_pb2.GetModelResponse.FromString(first).model.version)
    assert answers == ["1", "2"]


def test_promotion_and_rollback_reach_a_running_server(
    repository: Path, start_server: Callable[..., RunningServer]
) -> None:
    copy_release(repository, 2, "2")
    server = start_server(f"--model-repository={repository}", FAST)
    assert serving_version(server) == 2
    promote(repository, 1)
    wait_until(lambda: serving_version(server) == 1)
    promote(repository, None)
    wait_until(lambda: serving_version(server) == 2)


def test_server_with_a_key_is_turned_back_by_its_owner_and_nobody_else(
    repository: Path, start_server: Callable[..., RunningServer], tmp_path: Path
) -> None:
    private, public = (write_keys(tmp_path) / f"{kind}.pem" for kind in ("private", "public"))
    copy_release(repository, 2, "2")
    for number in "12":
        sign_release(repository / number, private)
    server = start_server(f"--model-repository={repository}", f"--model-public-key={public}", FAST)
    promote(repository, 1)
    wait_until(lambda: "PROMOTED: expected a signature of the required key" in server.log_text())
    assert serving_version(server) == 2
    promote(repository, 1, private)
    wait_until(lambda: serving_version(server) == 1)


@pytest.mark.parametrize("transport", ["http2", "grpcio"])
def test_rollback_under_load_serves_the_old_weights_again(
    transport: str,
    repository: Path,
    start_server: Callable[..., RunningServer],
    sample: dict[str, np.ndarray],
) -> None:
    copy_release(repository, 2, "2")
    server = start_server(f"--model-repository={repository}", f"--transport={transport}", FAST)
    old = Engine((repository / "1" / FP32).read_bytes())
    batches = [sample["images"][:1], sample["images"][:250]]
    with callers(server, batches) as (answers, errors):
        wait_until(lambda: answers and answers[-1][1].model.version == "2")
        assert export_command(["rollback", f"--model-repository={repository}"]) == 0
        wait_until(lambda: serving_version(server) == 1)
        before = len(answers) + len(batches)  # those that were under way
        wait_until(lambda: errors or len(answers) > before + 50)
    assert errors == []
    for images, answered in answers[before:]:
        assert (answered.model.version, answered.model.precision) == ("1", "fp32")
        assert np.abs(probabilities(answered) - old.run(images)).max() < 1e-5


def test_pinned_version_stays(repository: Path) -> None:
    """The loader itself is asked: that a running server did not change proves nothing in time."""
    loaders = [loader_of(repository, wanted) for wanted in (range(1, 2), ANY)]
    models = [loader.load() for loader in loaders]
    copy_release(repository, 2, "2")
    pinned, free = (
        loader.load_other_than(model) for loader, model in zip(loaders, models, strict=True)
    )
    assert pinned is None
    assert free.version == "2"


def test_hangup_looks_at_once(repository: Path, start_server: Callable[..., RunningServer]) -> None:
    server = start_server(f"--model-repository={repository}", "--reload-interval-s=0")
    copy_release(repository, 2, "2")
    server.process.send_signal(signal.SIGHUP)
    wait_until(lambda: serving_version(server) == 2)
    assert "now serving another release" in server.log_text()


def test_repository_that_disappears_leaves_the_model_in_service(
    repository: Path, start_server: Callable[..., RunningServer], sample: dict[str, np.ndarray]
) -> None:
    server = start_server(f"--model-repository={repository}", FAST)
    repository.rename(repository.parent / "away")
    wait_until(lambda: "is not a folder" in server.log_text())
    with DigitClient(server.address) as client:
        assert client.classify(sample["images"][:1]).model.version == "1"


def test_release_that_loads_for_ever_is_rejected_in_time_and_the_next_one_serves(
    repository: Path, start_server: Callable[..., RunningServer], sample: dict[str, np.ndarray]
) -> None:
    server = start_server(
        f"--model-repository={repository}",
        FAST,
        constants={
            "service.serving.loader.LOAD_TIMEOUT_S": 3.0,
            "service.reloader.TELL_EVERY_S": 0.2,
        },
    )
    write_trap(repository / "2", at_once=True)
    wait_until(lambda: server.log_text().count("reload: not done after another 0.2 s") > 1)
    with DigitClient(server.address) as client:
        assert client.classify(sample["images"][:1]).model.version == "1"
    rejected = "release 2 rejected: fp32: expected a model that is ready within 3 s"
    wait_until(lambda: rejected in server.log_text())
    copy_release(repository, 3, "2")

    def serves_3() -> bool:
        server.process.send_signal(signal.SIGHUP)  # on a starved machine it may have been too slow
        return serving_version(server) == 3

    wait_until(serves_3)
    assert "terminate flag" not in server.log_text(), "onnxruntime's own log goes past ours"
    assert server.stop() == 0


@pytest.mark.full
def test_two_hundred_reloads_leave_memory_flat(repository: Path) -> None:
    """One model that is kept takes over a MiB: 200 of them would be far over the bound."""
    copy_release(repository, 2, "2")
    loader = loader_of(repository)
    model, process = loader.load(), psutil.Process()

    def reload(times: Any) -> None:
        nonlocal model
        for number in range(times):
            promote(repository, 1 + number % 2)
            model = loader.load_other_than(model) or model

    reload(20)
    before = process.memory_info().rss
    reload(200)
    assert process.memory_info().rss - before < 32 * 2**20
    assert load_artifact(repository / "1")


def test_version_with_wrong_permissions_is_tried_again_when_they_change(repository: Path) -> None:
    folder = copy_release(repository, 2, "2")
    results: list[Any] = []
    loader = loader_of(repository, results=results)
    model_file = folder / FP32
    complete = model_file.read_bytes()
    model_file.write_bytes(b"?" * len(complete))
    assert loader.load().version == "1"
    assert loader.load_other_than(None).version == "1"
    assert results.count("refused") == 1
    model_file.chmod(0o600)
    loader.load_other_than(None)
    assert results.count("refused") == 2
    loader.forget_refusals()
    loader.load_other_than(None)
    assert results.count("refused") == 3
