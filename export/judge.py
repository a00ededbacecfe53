"""Is a new release at least as good as the one it would replace?

Both answer the same test images, each with the variant that serves on a CPU. Accuracy is compared
by McNemar's exact test on the images that only one of the two gets right: with the same images, far
smaller differences can be told from noise than by two intervals. Source: McNemar 1947,
Psychometrika 12(2); Dietterich 1998, Neural Computation 10(7).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from export.sessions import Images, images_per_s, run_session, serving_session
from service.artifact.format import Artifact
from service.serving.loader import ON_CPU
from training.corruptions import CORRUPTIONS
from training.data import Split
from training.evaluate import calibration_bins, expected_calibration_error

# Of the tests: how seldom noise alone may keep a release back. Shared by the corruptions.
LEVEL = 0.01
# Images that are corrupted; each in every way.
CORRUPTED_IMAGES = 2000
# The log loss must rise by this share, beside what the test says: among 10,000 images smaller
# differences are certain, and of no use.
MAX_LOSS_RISE = 0.1
# Slower by this factor is worse: less is what other work on the machine explains.
MAX_SLOWDOWN = 1.5
TIMED_BATCH = 64

WORSE, SAME, BETTER, INFORMATION = "worse", "same", "better", "for information"

Floats = npt.NDArray[np.float64]
Answer = Callable[[Images], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Candidate:
    """What is compared of a release.

    Attributes:
        name: Of the model.
        version: Of the release; empty for one that has no number yet.
        labels: Of the classes.
        dataset: Name and digests of what it was trained and tested on.
        models: By precision, serialised.
    """

    name: str
    version: str
    labels: tuple[str, ...]
    dataset: dict[str, Any]
    models: Mapping[str, bytes]

    @classmethod
    def of(cls, release: Artifact) -> Candidate:
        """A release that was written."""
        manifest = release.manifest
        models = {name: variant.model for name, variant in release.variants.items()}
        dataset = manifest["dataset"]
        return cls(manifest["name"], release.version, release.labels, dataset, models)

    @property
    def model(self) -> bytes:
        """The one that serves on a CPU."""
        return next(self.models[name] for name in ON_CPU if name in self.models)


@dataclass(frozen=True)
class Measure:
    """One line of a comparison.

    Attributes:
        name: What was measured.
        serving: The figure of the release in service.
        new: The figure of the new one.
        difference: Between them, with what the test says.
        verdict: ``better``, ``same``, ``worse`` or ``for information``.
    """

    name: str
    serving: str
    new: str
    difference: str
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        against: Release that it was compared with; empty if there was none.
        reasons: Why the new release is not published; none if it is.
        measures: Every figure.
    """

    against: str
    reasons: list[str] = field(default_factory=list)
    measures: list[Measure] = field(default_factory=list)

    @property
    def publish(self) -> bool:
        """Whether the new release may serve without anybody's say."""
        return not self.reasons

    def to_manifest(self) -> dict[str, Any]:
        """The manifest's ``comparison``."""
        return {
            "against": self.against or None,
            "publish": self.publish,
            "reasons": self.reasons,
            "measures": [asdict(measure) for measure in self.measures],
        }


def compare(new: Candidate, serving: Candidate | None, test: Split, floor: float) -> Comparison:
    """Compares a new release with the one that serves.

    Args:
        new: The new release.
        serving: The one that it would replace; None if there is none.
        test: Test split of the new one's data set.
        floor: Accuracy on it below which nothing is published, 0 to 1.
    """
    result = Comparison(serving.version if serving else "")
    ours, truth = _answer(new), test.labels.numpy()
    answers = ours(test.images.numpy())
    accuracy = float((answers.argmax(axis=1) == truth).mean())
    if accuracy < floor:
        result.reasons.append(f"accuracy: expected at least {floor:.2%}, got {accuracy:.2%}")
    if serving is None:
        return result
    result.reasons.extend(_differences(new, serving))
    if new.labels != serving.labels:
        return result  # their answers mean different things
    theirs = _answer(serving)
    before = theirs(test.images.numpy())
    result.measures.extend(_quality(before, answers, truth))
    result.measures.extend(_corruptions(theirs, ours, test))
    result.measures.extend(_cost(serving, new, test.images[:TIMED_BATCH].numpy()))
    result.reasons.extend(
        f"{one.name}: {one.serving} → {one.new} ({one.difference})"
        for one in result.measures
        if one.verdict == WORSE
    )
    return result


def _differences(new: Candidate, serving: Candidate) -> Iterator[str]:
    for name in ("name", "labels", "dataset"):
        expected, got = getattr(serving, name), getattr(new, name)
        if expected != got:
            yield f"{name}: the release in service has {_listed(expected)}, this one {_listed(got)}"


def _listed(value: Any) -> str:
    if isinstance(value, dict):
        digests = {split: digest[:12] for split, digest in value["sha256"].items()}
        return f"{value['name']} {digests}"
    return ", ".join(value) if isinstance(value, tuple) else str(value)


def _answer(candidate: Candidate) -> Answer:
    session = serving_session(candidate.model)
    return lambda images: run_session(session, images).probabilities


def _quality(
    before: npt.NDArray[np.float32], after: npt.NDArray[np.float32], truth: npt.NDArray[np.int64]
) -> Iterator[Measure]:
    yield _paired("accuracy", before.argmax(axis=1) == truth, after.argmax(axis=1) == truth, LEVEL)
    losses = [-np.log(np.maximum(p[np.arange(len(truth)), truth], 1e-12)) for p in (before, after)]
    yield _loss(*(each.astype(np.float64) for each in losses))
    errors = [
        expected_calibration_error(calibration_bins(torch.from_numpy(p), torch.from_numpy(truth)))
        for p in (before, after)
    ]
    difference = f"{errors[1] - errors[0]:+.2%}"
    yield Measure(
        "calibration error (ECE)", f"{errors[0]:.2%}", f"{errors[1]:.2%}", difference, INFORMATION
    )


def _paired(
    name: str, before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_], level: float
) -> Measure:
    lost, won = int((before & ~after).sum()), int((after & ~before).sum())
    chance = _tail(min(lost, won), lost + won)
    verdict = SAME if chance >= level else WORSE if lost > won else BETTER
    difference = f"+{won} -{lost} images, {_p(chance)}"
    return Measure(name, f"{before.mean():.2%}", f"{after.mean():.2%}", difference, verdict)


def _tail(fewer: int, total: int) -> float:
    """How often fair coins fall ``fewer`` times or less on one side: one-sided exact test."""
    ways: int = sum(math.comb(total, k) for k in range(fewer + 1))
    return float(ways / 2**total)


def _p(chance: float) -> str:
    return "p < 1e-99" if chance < 1e-99 else f"p = {chance:.1g}"


def _loss(before: Floats, after: Floats) -> Measure:
    means = before.mean(), after.mean()
    change = after - before
    error = change.std(ddof=1) / math.sqrt(len(change)) or math.inf
    chance = 0.5 * math.erfc(abs(change.mean()) / error / math.sqrt(2))
    verdict = SAME
    if chance < LEVEL and means[1] > (1 + MAX_LOSS_RISE) * means[0]:
        verdict = WORSE
    elif chance < LEVEL and means[1] < means[0]:
        verdict = BETTER
    difference = f"{change.mean():+.4f}, {_p(chance)}"
    return Measure("log loss (NLL)", f"{means[0]:.4f}", f"{means[1]:.4f}", difference, verdict)


def _corruptions(before: Answer, after: Answer, test: Split) -> Iterator[Measure]:
    some, truth = test.images[:CORRUPTED_IMAGES], test.labels[:CORRUPTED_IMAGES].numpy()
    for name, corrupt in CORRUPTIONS.items():
        images = corrupt(some, torch.Generator().manual_seed(0)).numpy()
        were, are = (answer(images).argmax(axis=1) == truth for answer in (before, after))
        yield _paired(name, were, are, LEVEL / len(CORRUPTIONS))


def _cost(serving: Candidate, new: Candidate, images: Images) -> Iterator[Measure]:
    rates = images_per_s([serving.model, new.model], images)
    ratio = rates[1] / rates[0]
    verdict = WORSE if ratio < 1 / MAX_SLOWDOWN else BETTER if ratio > MAX_SLOWDOWN else SAME
    name = f"images/s, batches of {len(images)}, one thread"
    yield Measure(name, f"{rates[0]:,.0f}", f"{rates[1]:,.0f}", f"{ratio:.2f} times", verdict)
    sizes = [len(each.model) for each in (serving, new)]
    difference = f"{sizes[1] - sizes[0]:+,}"
    yield Measure("bytes", f"{sizes[0]:,}", f"{sizes[1]:,}", difference, INFORMATION)
