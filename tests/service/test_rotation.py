"""Files that are replaced: what was good stays until something good comes."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest

from service.security.rotation import CredentialError, RotatingFiles


def parse(first: Any, second: Any) -> Any:
    if first != second:
        raise CredentialError("--first: expected what --second holds, got something else")
    return first


@pytest.fixture
def paths(tmp_path: Path) -> dict[str, Path]:
    found = {"--first": tmp_path / "first", "--second": tmp_path / "second"}
    for path in found.values():
        path.write_bytes(b"old")
    return found


@pytest.fixture
def files(paths: dict[str, Path]) -> RotatingFiles[Any]:
    return RotatingFiles(paths, parse)


def test_nothing_happens_while_nothing_changes(
    files: RotatingFiles[Any], paths: dict[str, Path]
) -> None:
    paths["--first"].touch()
    assert files.refresh() is None
    assert files.value == b"old"


def test_another_content_of_the_same_size_and_age_is_seen(
    files: RotatingFiles[Any], paths: dict[str, Path]
) -> None:
    for path in paths.values():
        before = path.stat()
        path.write_bytes(b"new")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.refresh() is True
    assert files.value == b"new"


def test_what_can_not_be_used_is_refused_and_logged_once(
    files: RotatingFiles[Any], paths: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    paths["--first"].write_bytes(b"new")
    assert [files.refresh() for _ in range(5)] == [False, None, None, None, None]
    assert files.value == b"old"
    [record] = caplog.records
    assert record.levelname == "ERROR"
    assert record.getMessage() == (
        "--first: expected what --second holds, got something else; "
        "still using what was read before"
    )
    paths["--second"].write_bytes(b"new")
    assert [files.refresh(), files.refresh()] == [True, None]
    assert files.value == b"new"


def test_file_that_goes_away_is_refused_until_it_comes_back(
    files: RotatingFiles[Any], paths: dict[str, Path]
) -> None:
    paths["--second"].unlink()
    assert [files.refresh(), files.refresh()] == [False, None]
    paths["--second"].write_bytes(b"old")
    assert files.refresh() is True


def test_file_that_is_not_there_at_the_start_is_an_error(paths: dict[str, Path]) -> None:
    paths["--second"].unlink()
    with pytest.raises(CredentialError, match=r"--second: .*second: No such file"):
        RotatingFiles(paths, parse)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("pipe", "expected a regular file, got something else"),
        ("device", "expected a regular file, got something else"),
        ("folder", "Is a directory"),
    ],
)
def test_what_is_no_file_is_refused_at_once(paths: dict[str, Path], kind: str, said: str) -> None:
    """Nothing may ever come out of a pipe, and no end out of a device."""
    path = paths["--second"]
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(CredentialError, match=f"--second: .*second: {said}"):
        RotatingFiles(paths, parse)


def test_file_that_becomes_a_pipe_is_refused(
    files: RotatingFiles[Any], paths: dict[str, Path]
) -> None:
    paths["--second"].unlink()
    os.mkfifo(paths["--second"])
    assert [files.refresh(), files.refresh()] == [False, None]
    assert files.value == b"old"


def test_file_of_any_size_is_read_within_a_bound(paths: dict[str, Path]) -> None:
    with paths["--second"].open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CredentialError, match=r"second: expected at most 1048576 bytes, got more"):
        RotatingFiles(paths, parse)


def test_secret_that_everybody_may_write_is_refused(paths: dict[str, Path]) -> None:
    for path in paths.values():
        path.chmod(0o602)
    assert RotatingFiles(paths, parse).value == b"old"
    with pytest.raises(CredentialError, match=r"--first: .*first: expected a file of its owner"):
        RotatingFiles(paths, parse, {"--first"})


def test_secret_that_everybody_may_read_is_warned_about_once(
    paths: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    for path in paths.values():
        path.chmod(0o604)
    files = RotatingFiles(paths, parse, {"--second"})
    files.refresh()
    paths["--second"].chmod(0o600)
    files.refresh()
    assert [record.getMessage() for record in caplog.records] == [
        f"--second: every user of this machine may read {paths['--second']}"
    ]
    paths["--second"].chmod(0o604)
    files.refresh()
    assert len(caplog.records) == 2
