"""Which variant of a release serves: fp32 or int8."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.artifact.errors import ArtifactError
from service.artifact.golden import GOLDEN, read_golden, write_golden
from service.artifact.repository import PROMOTED
from service.serving.loader import LOADED
from tests.releases import FP32, change_manifest, copy_release, rewrite
from tests.serving.loading import load_one, loader, only


@pytest.fixture
def both(tmp_path: Path) -> Path:
    """A copy of a release in two precisions, above one in fp32."""
    repository = tmp_path / "both/digits"
    repository.mkdir(parents=True)
    copy_release(repository, 1, "1")
    return copy_release(repository, 2, "2")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_precision_that_is_pinned_serves_and_no_other(both: Path, precision: str) -> None:
    assert load_one(both, precision=precision).precision == precision


def test_precision_that_a_release_lacks_rejects_it(repository: Path) -> None:
    expected = "precision: expected int8, got a release with fp32"
    with pytest.raises(ArtifactError, match=expected):
        load_one(repository / "1", precision="int8")


def test_fp32_serves_where_cuda_works(both: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.serving.loader.cuda_problem", lambda: None)
    monkeypatch.setattr("service.serving.engine.cuda_problem", lambda: "no GPU in this test")
    assert load_one(both, device="auto").precision == "fp32"
    assert load_one(both, device="cpu").precision == "int8"
    with pytest.raises(ArtifactError, match="expected fp32, since CUDA runs no int8"):
        load_one(both, device="auto", precision="int8")


def spoil_golden(folder: Path, precision: str) -> None:
    """Makes the golden digits expect other answers of one variant."""
    golden = read_golden((folder / GOLDEN).read_bytes(), ["fp32", "int8"])
    other = golden.probabilities[precision][:, ::-1].copy()
    changed = replace(golden, probabilities={**golden.probabilities, precision: other})
    rewrite(folder, GOLDEN, write_golden(changed))


def spoil_model(folder: Path, precision: str) -> None:
    """Makes onnxruntime reject one variant."""
    rewrite(folder, f"model.{precision}.onnx", b"no model")


@pytest.mark.parametrize("spoil", [spoil_golden, spoil_model])
def test_variant_that_can_not_serve_yields_to_the_other_one_of_the_release(
    both: Path, spoil: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    spoil(both, "int8")
    results: list[Any] = []
    model = loader(both.parent, results).load()
    assert (model.version, model.precision, results) == ("2", "fp32", [LOADED])
    assert "release 2 serves fp32: " in caplog.text
    with pytest.raises(ArtifactError):
        load_one(both, precision="int8")
    spoil(both, "fp32")
    assert loader(both.parent, []).load().version == "1", "then to the release before"


def test_file_of_either_variant_that_is_damaged_rejects_the_release(both: Path) -> None:
    """It may still be being copied, or not be what was signed."""
    (both / FP32).write_bytes(b"half a file")
    assert loader(both.parent, []).load().version == "1"


def test_release_with_other_labels_does_not_replace_the_one_in_service(
    both: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watched = loader(both.parent, [])
    current = watched.load()
    change_manifest(copy_release(both.parent, 3, both), labels=list("abcdefghij"))
    assert watched.load_other_than(current) is None
    assert "release 3 rejected: manifest.json: labels: expected ['0', '1'," in caplog.text


def test_release_that_was_not_published_serves_only_where_it_is_asked_for(
    both: Path, caplog: pytest.LogCaptureFixture
) -> None:
    comparison = {"against": "1", "publish": False, "reasons": ["accuracy: lower"], "measures": []}
    change_manifest(both, comparison=comparison)
    watched = loader(both.parent, [])
    current = watched.load()
    assert current.version == "1"
    assert "release 2 rejected: it was not published, and is not promoted: accuracy" in caplog.text
    (both.parent / PROMOTED).write_text("2\n")
    assert watched.load_other_than(current).version == "2", "the note is a new reason to try it"
    (both.parent / PROMOTED).unlink()
    assert loader(both.parent, [], wanted=only(2)).load().version == "2"
