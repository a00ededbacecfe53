"""Folders hold more than pictures: what is passed over is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from digits.cli.main import main
from digits.cli.sources import PicturesError, items_of
from tests.conftest import SAMPLES, RunningServer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.txt", "b.TXT", "c.heic", "README", "d.gif"):
        (tmp_path / name).write_bytes(b"none")
    (tmp_path / ".hidden").write_bytes(b"none")  # of which nothing is told
    (tmp_path / "inner.png").mkdir()
    return tmp_path


SAID = "2 .txt, 1 .heic, 1 .gif, 1 folder, 1 without suffix"
COUNTED = {".txt": 2, ".heic": 1, ".gif": 1, "folder": 1, "without suffix": 1}


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_what_is_passed_over_is_counted_by_suffix(
    server: RunningServer, folder: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(SAMPLES / "7.png", folder / "seven.PNG")
    assert main(["classify", *flags, "--address", server.address, str(folder)]) == 0
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    told, _, listed = line.partition(": 6 passed over (by name no PNG, JPEG, WebP or BMP): ")
    assert told == "digits classify"
    assert sorted(listed.split(", ")) == sorted(SAID.split(", "))
    if flags:
        document = json.loads(printed.out)
        assert document["passed_over"] == COUNTED
        assert document["errors"] == []
        assert [each["digit"] for each in document["predictions"]] == [7]


def test_folder_without_pictures_tells_what_it_holds(folder: Path) -> None:
    (folder / "more").mkdir()
    with pytest.raises(PicturesError, match=r"files in it, got .*2 folders"):
        items_of([str(folder)])


def test_files_named_one_by_one_are_not_passed_over(folder: Path) -> None:
    items, passed_over = items_of([str(folder / "c.heic"), str(folder / "*.gif")])
    assert [item.name for item in items] == [str(folder / "c.heic"), str(folder / "d.gif")]
    assert not passed_over
