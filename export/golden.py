"""Chooses golden digits: real training images, easy to borderline, with their exact answers."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from export.check import GateError
from export.sessions import run_session, serving_session
from service.artifact.golden import Golden
from training.data import Split
from training.model import NUM_CLASSES

PER_CLASS = 6
# Candidates that are enough to find hard digits of each class without running all 60,000.
CANDIDATES = 10_000
# Below this margin between the two best probabilities another CPU could round to another digit;
# above twice the tolerance that a server allows (``service.artifact.golden.GOLDEN_TOLERANCE``).
MIN_MARGIN = 0.05


def choose_golden(models: Mapping[str, bytes], split: Split, labels: tuple[str, ...]) -> Golden:
    """For each class, images spread evenly from hardest to easiest that every model gets right.

    Args:
        models: The exported model in each precision.
        split: The training split.
        labels: Of the classes.

    Raises:
        GateError: If a model gets hardly any image of a class right.
    """
    images, truth = split.images[:CANDIDATES].numpy(), split.labels[:CANDIDATES].numpy()
    answers = {name: run_session(serving_session(m), images) for name, m in models.items()}
    margin = np.min([_margin(each.probabilities, truth) for each in answers.values()], axis=0)
    chosen: list[int] = []
    for digit in range(NUM_CLASSES):
        candidates = np.flatnonzero((margin > MIN_MARGIN) & (truth == digit))
        if len(candidates) < PER_CLASS // 2:
            present = int((truth == digit).sum())
            raise GateError(
                f"golden digits: class {labels[digit]!r}: expected at least {PER_CLASS // 2} "
                f"training images that the model gets right, got {len(candidates)} of {present}"
            )
        ranked = candidates[np.argsort(margin[candidates], kind="stable")]
        # Half of them from the hardest percent, where a broken model shows first.
        hard = ranked[: PER_CLASS // 2]
        spread = ranked[np.linspace(len(ranked) // 10, len(ranked) - 1, PER_CLASS // 2, dtype=int)]
        chosen.extend(int(i) for i in (*hard, *spread))
    return Golden(
        images=images[chosen],
        labels=truth[chosen].astype(np.int64),
        probabilities={name: each.probabilities[chosen] for name, each in answers.items()},
        is_digit={name: each.is_digit[chosen] for name, each in answers.items()},
    )


def _margin(
    probabilities: npt.NDArray[np.float32], truth: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """By how much the right class is ahead of the best other one; negative if it is behind."""
    rows = np.arange(len(truth))
    right = probabilities[rows, truth]
    others = probabilities.copy()
    others[rows, truth] = -1
    return np.asarray(right - others.max(axis=1))
