"""What is tried again: errors of the environment are, refusals wait for a change."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from service.artifact.errors import ArtifactError
from service.host.files import read_regular
from service.serving.engine import Engine
from service.serving.loader import FAILED, LOADED, REFUSED
from tests.releases import FP32, copy_release, rewrite
from tests.serving.loading import load, loader


def test_damaged_model_is_tried_once_and_prints_nothing(
    repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """By itself onnxruntime would load it a second time, and print that it does."""
    model = (repository / "1" / FP32).read_bytes()
    rewrite(repository / "1", FP32, model.replace(b"Conv", b"\xff\xfe\xfdv"))
    with pytest.raises(ArtifactError):
        load(repository)
    assert capfd.readouterr().out == ""


# What says nothing about a version: the system, the disk, a network volume, memory.
OF_THE_ENVIRONMENT = [
    *[OSError(number, os.strerror(number)) for number in (
        errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE, errno.EINTR,
    )],
    MemoryError("no memory"),
]  # fmt: skip


@pytest.fixture
def reading_fails(monkeypatch: pytest.MonkeyPatch) -> dict[Any, Any]:
    """Reading the files of a version fails with what is set here."""
    errors: dict[Any, Any] = {}

    def read(path: Any, max_bytes: Any) -> Any:
        error = errors.get(path.parent.name)
        if error is not None:
            raise error
        return read_regular(path, max_bytes)

    monkeypatch.setattr("service.artifact.format.read_regular", read)
    return errors


@pytest.mark.parametrize("error", OF_THE_ENVIRONMENT, ids=repr)
def test_error_of_the_environment_is_tried_again_at_every_look(
    repository: Path, reading_fails: dict[Any, Any], error: Any, caplog: pytest.LogCaptureFixture
) -> None:
    results: list[Any] = []
    watched = loader(repository, results)
    current = watched.load()
    copy_release(repository, 2, repository / "1")
    reading_fails["2"] = error
    assert watched.load_other_than(current) is None
    assert watched.load_other_than(current) is None
    assert results == [LOADED, FAILED, FAILED]
    assert caplog.text.count("release 2 not loaded") == 1, "not again at every look"
    reading_fails.clear()
    assert watched.load_other_than(current).version == "2"


def test_version_below_one_that_can_not_be_read_now_does_not_take_over(
    repository: Path, reading_fails: dict[Any, Any]
) -> None:
    copy_release(repository, 2, repository / "1")
    copy_release(repository, 3, repository / "1")
    watched = loader(repository, [])
    reading_fails["3"] = reading_fails["2"] = OSError(errno.EIO, "I/O error")
    current = watched.load()
    assert current.version == "1", "at a start something must serve"
    del reading_fails["2"]
    assert watched.load_other_than(current) is None
    del reading_fails["3"]
    assert watched.load_other_than(current).version == "3"


def test_start_without_a_version_that_can_be_read_says_why(
    repository: Path, reading_fails: dict[Any, Any]
) -> None:
    reading_fails["1"] = OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(ArtifactError, match=r"found none; release 1: .*Too many open files"):
        load(repository)


@pytest.mark.parametrize("step", ["__init__", "run", "warm_up"])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("bad allocation")], ids=repr)
def test_engine_without_memory_says_nothing_about_the_version(
    repository: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: Any
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    results: list[Any] = []
    watched = loader(repository, results)
    with monkeypatch.context() as patched:
        patched.setattr(Engine, step, fails)
        assert watched.load_other_than(None) is None
    assert watched.load_other_than(None).version == "1"
    assert results == [FAILED, LOADED]


def test_version_that_was_refused_is_not_tried_again_until_a_file_changes(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    results: list[Any] = []
    watched = loader(repository, results)
    current = watched.load()
    folder = copy_release(repository, 2, repository / "1")
    good = (folder / FP32).read_bytes()
    (folder / FP32).write_bytes(b"half a file")
    for _ in range(3):
        assert watched.load_other_than(current) is None
    assert results == [LOADED, REFUSED]
    (folder / FP32).write_bytes(good)
    assert watched.load_other_than(current).version == "2"


def test_refusal_that_is_forgotten_is_looked_into_again(repository: Path) -> None:
    results: list[Any] = []
    watched = loader(repository, results)
    current = watched.load()
    (copy_release(repository, 2, repository / "1") / FP32).write_bytes(b"half a file")
    assert watched.load_other_than(current) is None
    watched.forget_refusals()
    assert watched.load_other_than(current) is None
    assert results == [LOADED, REFUSED, REFUSED]


def test_repository_that_can_not_be_listed_now_is_an_error_of_its_own(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(_path: Any) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    watched = loader(repository, [])
    current = watched.load()
    monkeypatch.setattr(Path, "iterdir", fails)
    with pytest.raises(ArtifactError, match="Stale file handle"):
        watched.load_other_than(current)
