"""Chooses golden digits: real training images, easy to borderline, with their exact answers."""

from __future__ import annotations

import numpy as np

from export.sessions import run_session, serving_session
from service.artifact.format import Golden
from training.data import Split
from training.model import NUM_CLASSES

PER_CLASS = 6
# Candidates that are enough to find hard digits of each class without running all 60,000.
CANDIDATES = 10_000
# Below this margin between the two best probabilities another CPU could round to another digit;
# above twice the tolerance that a server allows (``service.artifact.format.GOLDEN_TOLERANCE``).
MIN_MARGIN = 0.05


def choose_golden(model: bytes, split: Split) -> Golden:
    """For each digit, correctly classified images spread evenly from hardest to easiest.

    Args:
        model: The exported model.
        split: The training split.
    """
    images, labels = split.images[:CANDIDATES].numpy(), split.labels[:CANDIDATES].numpy()
    probabilities = run_session(serving_session(model), images).probabilities
    top = np.sort(probabilities, axis=1)
    margin = top[:, -1] - top[:, -2]
    usable = (probabilities.argmax(axis=1) == labels) & (margin > MIN_MARGIN)
    chosen: list[int] = []
    for digit in range(NUM_CLASSES):
        candidates = np.flatnonzero(usable & (labels == digit))
        ranked = candidates[np.argsort(margin[candidates], kind="stable")]
        # Half of them from the hardest percent, where a broken model shows first.
        hard = ranked[: PER_CLASS // 2]
        spread = ranked[np.linspace(len(ranked) // 10, len(ranked) - 1, PER_CLASS // 2, dtype=int)]
        chosen.extend(int(i) for i in (*hard, *spread))
    return Golden(
        images=images[chosen],
        labels=labels[chosen].astype(np.int64),
        probabilities=probabilities[chosen],
    )
