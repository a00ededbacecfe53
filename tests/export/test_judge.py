"""A new release is compared with the one in service, and worse is told from noise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from export import judge
from export.judge import Candidate, _paired, _tail, compare
from export.sessions import images_per_s
from tests.export.conftest import LABELS, altered
from training.data import Split

DATASET = {"name": "mnist", "sha256": {"train": "a", "test": "b"}}


@pytest.fixture
def candidate(model: Any) -> Candidate:
    return Candidate("digits", "1", LABELS, DATASET, {"fp32": model})


def weaker(model: Any, share: Any) -> bytes:
    """The model with noise in its last layer."""
    rng = np.random.default_rng(0)

    def change(values: Any) -> Any:
        return values + rng.normal(0, share * values.std(), values.shape)

    return altered(model, "head.weight", change)


def verdicts(comparison: Any) -> dict[Any, Any]:
    return {measure.name: measure.verdict for measure in comparison.measures}


def test_same_model_is_the_same_and_published(candidate: Candidate, split: Split) -> None:
    found = compare(candidate, candidate, split, 0.5)
    assert (found.publish, found.reasons, found.against) == (True, [], "1")
    assert set(verdicts(found).values()) <= {judge.SAME, judge.INFORMATION}
    assert found.to_manifest()["publish"] is True


def test_worse_model_is_not_published_and_the_reasons_are_named(
    candidate: Candidate, model: Any, split: Split
) -> None:
    worse = replace(candidate, models={"fp32": weaker(model, 2)})
    found = compare(worse, candidate, split, 0)
    assert verdicts(found)["accuracy"] == judge.WORSE
    assert not found.publish
    assert any(reason.startswith("accuracy: ") for reason in found.reasons)
    better = compare(candidate, worse, split, 0)
    assert verdicts(better)["accuracy"] == judge.BETTER
    assert better.publish


def test_int8_is_judged_where_there_is_one(
    candidate: Candidate, model: Any, int8_model: Any
) -> None:
    both = replace(candidate, models={"fp32": model, "int8": int8_model})
    assert both.model == int8_model


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("labels", tuple("abcdefghij"), "labels: the release in service has 0, 1, 2"),
        ("dataset", {"name": "mnist", "sha256": {"train": "c", "test": "b"}}, "dataset: "),
        ("name", "letters", "name: the release in service has digits, this one letters"),
    ],
)
def test_release_of_something_else_is_not_published(
    candidate: Candidate, split: Split, field: str, value: Any, reason: str
) -> None:
    found = compare(replace(candidate, **{field: value}), candidate, split, 0)
    assert not found.publish
    assert found.reasons[0].startswith(reason)


def test_first_release_needs_only_the_floor(candidate: Candidate, split: Split) -> None:
    assert compare(candidate, None, split, 0.5).publish
    found = compare(candidate, None, split, 1.01)
    assert found.reasons[0].startswith("accuracy: expected at least 101.00%, got ")


@pytest.mark.full
def test_slower_by_more_than_other_work_explains_is_worse(
    candidate: Candidate, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rates, verdict in (([100, 50], judge.WORSE), ([100, 80], judge.SAME)):
        monkeypatch.setattr(judge, "images_per_s", lambda *_, rates=rates: rates)
        found = compare(candidate, candidate, split, 0)
        assert verdicts(found)["images/s, batches of 64, one thread"] == verdict


@pytest.mark.full
def test_speed_is_measured_of_every_model(model: Any, int8_model: Any, split: Split) -> None:
    rates = images_per_s([model, int8_model], split.images.numpy()[:64])
    assert len(rates) == 2
    assert min(rates) > 0


def test_test_is_the_exact_one() -> None:
    assert _tail(0, 0) == 1
    assert _tail(0, 3) == pytest.approx(1 / 8)
    assert _tail(1, 10) == pytest.approx(11 / 1024)


@pytest.mark.parametrize(
    ("lost", "won", "verdict"),
    [(5, 5, judge.SAME), (9, 4, judge.SAME), (30, 5, judge.WORSE), (5, 30, judge.BETTER)],
)
def test_differences_are_told_from_noise(lost: int, won: int, verdict: Any) -> None:
    before, after = np.ones(1000, bool), np.ones(1000, bool)
    after[:lost] = False
    before[lost : lost + won] = False
    assert _paired("accuracy", before, after, 0.01).verdict == verdict
