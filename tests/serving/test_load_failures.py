"""Why a release could not be loaded is told while it holds, and no longer."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest

from service.artifact.errors import ArtifactError
from service.host.files import read_regular
from service.serving.loader import ModelLoader
from tests.conftest import REPOSITORY

IO_ERROR = OSError(errno.EIO, "I/O error")


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, OSError]:
    """What reading the files of a version fails with."""
    errors: dict[str, OSError] = {}

    def read(path: Path, max_bytes: int) -> bytes:
        if path.parent.name in errors:
            raise errors[path.parent.name]
        return read_regular(path, max_bytes)

    monkeypatch.setattr("service.artifact.format.read_regular", read)
    return errors


@pytest.fixture
def loader(tmp_path: Path) -> ModelLoader:
    shutil.copytree(REPOSITORY / "1", tmp_path / "digits/1")
    return ModelLoader(
        tmp_path / "digits", wanted=range(1, 2), device="cpu", precision="auto",
        intra_op_threads=1, max_batch_size=4, public_key=None, on_load=lambda _: None,
    )  # fmt: skip


def test_failure_that_comes_back_after_a_success_is_logged_again(
    loader: ModelLoader, failing: dict[str, OSError], caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        failing["1"] = IO_ERROR
        with pytest.raises(ArtifactError, match=r"release 1: .*I/O error"):
            loader.load()
        failing.clear()
        assert loader.load().version == "1"
    assert caplog.text.count("release 1 not loaded") == 2


def test_failure_is_not_named_once_the_release_was_rejected(
    loader: ModelLoader, failing: dict[str, OSError], tmp_path: Path
) -> None:
    failing["1"] = IO_ERROR
    with pytest.raises(ArtifactError, match=r"release 1: .*I/O error"):
        loader.load()
    failing.clear()
    (tmp_path / "digits/1/manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"found none$"):
        loader.load()
