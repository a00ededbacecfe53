"""Writing to a repository: whole or not at all, whatever happens to the writer."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from export.artifact import TEMPORARY, next_release, promote, write_release
from service.artifact.format import MANIFEST, PARITY, sha256
from service.artifact.repository import PROMOTED, promoted, releases
from tests.conftest import ROOT, wait_until

MODELS, FILES = {"model.fp32.onnx": b"model"}, {PARITY: b"{}"}


def test_releases_count_up(tmp_path: Path) -> None:
    assert next_release(tmp_path / "new") == 1
    for name in ("1", "9", "x", ".export-1"):
        (tmp_path / name).mkdir()
    assert next_release(tmp_path) == 10


def test_failing_write_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(path: Any, data: Any) -> None:
        if path.name == MANIFEST:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr("export.artifact._write_synced", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_release(tmp_path / "digits", MODELS, FILES, {})
    assert list((tmp_path / "digits").iterdir()) == []


WRITER = """
import sys
from pathlib import Path
from export.artifact import promote, write_release
repository, number = Path(sys.argv[1]), 0
while True:
    models = {"model.fp32.onnx": bytes(300_000)}
    write_release(repository, models, {"parity.json": b"{}"}, {"name": "x"})
    number += 1
    promote(repository, number)
"""


@pytest.mark.full
def test_kill_at_any_moment_leaves_whole_releases(tmp_path: Path) -> None:
    """Killed mid-write twenty times: every release is complete, and the next writer cleans up."""
    repository, generator = tmp_path / "digits", random.Random(0)
    for _ in range(20):
        before = len(list(repository.glob("[0-9]*")))
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(repository)], cwd=ROOT)
        wait_until(lambda before=before: len(list(repository.glob("[0-9]*"))) > before)
        time.sleep(generator.random() * 0.01)  # the moment is what is being varied
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        for folder in repository.glob("[0-9]*"):
            manifest = json.loads((folder / MANIFEST).read_text())
            assert manifest["version"] == int(folder.name)
            assert (folder / "model.fp32.onnx").stat().st_size == 300_000
            for name, digest in manifest["files"].items():
                assert digest == sha256((folder / name).read_bytes())
        assert promoted(repository) is None or (repository / str(promoted(repository))).is_dir()
    write_release(repository, MODELS, FILES, {})
    assert not list(repository.glob(f"{TEMPORARY}*"))


def test_two_writers_at_once_get_two_numbers(tmp_path: Path) -> None:
    code = WRITER.replace("while True:", "for _ in range(20):")
    command = [sys.executable, "-c", code, str(tmp_path / "digits")]
    writers = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    numbers = Counter(int(folder.name) for folder in releases(tmp_path / "digits"))
    assert numbers == Counter(range(1, 41))


def test_promotion_is_one_file_that_latest_removes(tmp_path: Path) -> None:
    promote(tmp_path, 1)
    assert (tmp_path / PROMOTED).read_text() == "1\n"
    promote(tmp_path, None)
    assert list(tmp_path.iterdir()) == []
