"""The release that a clone serves: what it says of itself is true, and the docs say the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.check import read_reports
from export.reference import make_reference
from export.sessions import run_session, serving_session
from export.show import card_markdown, gate_markdown
from export.verify import verify
from service.artifact.format import PARITY, PRECISIONS, load_artifact
from service.artifact.repository import releases
from tests.conftest import COMMITTED, ROOT
from training.data import hold_out, load_split


@pytest.fixture(scope="module")
def release() -> Any:
    [folder] = releases(COMMITTED)
    return load_artifact(folder)


def test_one_release_is_committed_and_passes_every_check(release: Any) -> None:
    assert set(release.variants) == set(PRECISIONS)
    checks = list(verify(COMMITTED / release.version))
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) > 20


def test_it_is_accurate_and_says_how_it_was_made(release: Any) -> None:
    for variant in release.variants.values():
        assert variant.accuracy["accuracy"] >= 0.995
        assert variant.accuracy["images"] == 10_000
    assert "dirty" not in release.manifest["source_commit"]


def test_its_accuracy_is_that_of_the_test_images(release: Any, full_data: Path) -> None:
    test = load_split("mnist", "test", full_data)
    for variant in release.variants.values():
        answers = run_session(serving_session(variant.model), test.images.numpy())
        correct = int((answers.decisions == test.labels.numpy()).sum())
        # Another CPU may decide a near tie the other way.
        assert abs(correct - variant.accuracy["correct"]) <= 2


def test_its_drift_reference_is_of_its_validation_images(release: Any, full_data: Path) -> None:
    train = load_split("mnist", "train", full_data)
    _, held_out = hold_out(train, release.manifest["training"]["config"]["validation"])
    for variant in release.variants.values():
        counted = make_reference(variant.model, train, held_out)
        assert counted["images"] == "validation"
        for name, counts in variant.reference.counts.items():
            # An image on a bound may fall to the other side on another CPU.
            moved = np.abs(np.cumsum(counts) - np.cumsum(counted[name]["counts"])).max()
            assert moved <= 5, name


def test_model_card_has_its_figures(release: Any) -> None:
    assert card_markdown(release) in (ROOT / "docs/model-card.md").read_text()


def test_readme_has_its_accuracy_and_hash(release: Any) -> None:
    readme, variant = (ROOT / "README.md").read_text(), release.variants["int8"]
    assert f"reads {variant.accuracy['accuracy']:.2%}".replace("%", " %") in readme
    assert f"model digits/{release.version} int8 {variant.sha256[:12]} on" in readme


@pytest.mark.parametrize("precision", PRECISIONS)
def test_documented_gate_is_its_own(release: Any, precision: Any) -> None:
    reports = read_reports((COMMITTED / release.version / PARITY).read_bytes())
    assert gate_markdown(reports[precision]) in (ROOT / "docs/gate.md").read_text()
