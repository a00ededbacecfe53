"""Which version of a repository serves, and which are passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from service.artifact.errors import ArtifactError
from service.artifact.repository import PROMOTED
from service.serving.loader import LOADED, REFUSED
from tests.releases import FP32, change_manifest, copy_release
from tests.serving.loading import load, only


def test_highest_version_serves_and_hidden_folders_are_passed_over(repository: Path) -> None:
    copy_release(repository, 9, repository / "1")
    copy_release(repository, 10, repository / "1")
    (repository / ".export-half").mkdir()
    assert load(repository)[0].version == "10"


def test_highest_version_that_is_damaged_yields_to_the_next(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (copy_release(repository, 2, repository / "1") / FP32).write_bytes(b"half a file")
    model, results = load(repository)
    assert model.version == "1"
    assert results == [REFUSED, LOADED]
    assert "release 2 rejected: model.fp32.onnx: expected sha256" in caplog.text


def test_any_defect_of_the_highest_release_yields_to_the_next(repository: Path) -> None:
    change_manifest(copy_release(repository, 2, repository / "1"), variants={"fp32": {}})
    assert load(repository)[0].version == "1"


def test_link_to_a_repository_names_it(repository: Path, tmp_path: Path) -> None:
    """Operators swap links; callers know the model by the name of the link."""
    target = tmp_path / "release-7"
    repository.rename(target)
    repository.symlink_to(target)
    model, _ = load(repository)
    assert model.name == "digits"


@pytest.mark.parametrize("name", ["01", "+1", "\u0661", "1 ", "11111111111", "0", "1.0"])
def test_names_that_are_no_version_are_passed_over(repository: Path, name: str) -> None:
    (repository / "1").rename(repository / name)
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)


def test_dangling_link_is_no_version(repository: Path) -> None:
    (repository / "9").symlink_to(repository / "8")
    model, _ = load(repository)
    assert model.version == "1"


def test_repository_named_by_a_dot_keeps_its_name(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(repository)
    assert load(Path())[0].name == "digits"


def test_pinned_version_is_the_only_one_considered(repository: Path) -> None:
    copy_release(repository, 2, repository / "1")
    assert load(repository, wanted=only(1))[0].version == "1"
    with pytest.raises(ArtifactError, match="expected release 3"):
        load(repository, wanted=only(3))


def test_repository_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is not a folder"):
        load(tmp_path / "nowhere")


def test_promoted_version_comes_first_and_yields_when_it_does_not_hold(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy_release(repository, 2, repository / "1")
    copy_release(repository, 3, repository / "1")
    (repository / PROMOTED).write_text("2\n")
    assert load(repository)[0].version == "2"
    (repository / "2" / FP32).write_bytes(b"half a file")
    assert load(repository)[0].version == "1", "3 was staged, or rolled back from"
    assert "release 2 rejected" in caplog.text
    (repository / "1" / FP32).write_bytes(b"half a file")
    assert load(repository)[0].version == "3"


def test_promotion_of_a_version_that_is_not_there_leaves_the_highest(repository: Path) -> None:
    copy_release(repository, 2, repository / "1")
    (repository / PROMOTED).write_text("7\n")
    assert load(repository)[0].version == "2"


@pytest.mark.parametrize("text", ["", "two", "-1", "1 2", "²", "07", "9" * 11])
def test_note_that_is_no_version_is_refused_by_name(repository: Path, text: Any) -> None:
    (repository / PROMOTED).write_text(text)
    with pytest.raises(ArtifactError, match="PROMOTED: expected the number of a release"):
        load(repository)
    assert load(repository, wanted=only(1))[0].version == "1", "which needs no note"
