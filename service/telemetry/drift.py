"""The population stability index (PSI) of recent images against the model's reference."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.artifact.reference import BOUNDS, Counts, Observed, Reference

# With fewer images the index is mostly noise: about (buckets - 1) times (1 / window + 1 /
# reference) for two samples of one population, here 0.013. Source: Yurdakul and Naranjo,
# Statistical Properties of the Population Stability Index, J. Risk Model Validation 14(4), 2020.
MIN_IMAGES = 2_000
# A part of the window is complete when it has both this many images and this many seconds.
PARTS = 5
PART_IMAGES = MIN_IMAGES
PART_S = 60.0


def stability_index(reference: npt.NDArray[np.int64], observed: npt.NDArray[np.int64]) -> float:
    """The PSI of two counts over the same buckets.

    By convention, below 0.1 nothing has changed, and above 0.25 much has. Half an image is added to
    every bucket, so that an empty one does not make it infinite. Source: Siddiqi, Credit Risk
    Scorecards, Wiley 2006, chapter 8.
    """
    expected, actual = reference + 0.5, observed + 0.5
    expected, actual = expected / expected.sum(), actual / actual.sum()
    return float(((actual - expected) * np.log(actual / expected)).sum())


@dataclass
class _Part:
    began: float
    counts: Counts
    images: int


class Window:
    """Counts of the latest images, in parts; a new part evicts the oldest. Not thread-safe.

    It spans at least four minutes and 8,000 images, in bounded memory.

    Args:
        reference: What they are compared with.
        clock: Monotonic seconds.
    """

    def __init__(self, reference: Reference, clock: Callable[[], float] = time.monotonic) -> None:
        self._reference = reference
        self._clock = clock
        self._parts: deque[_Part] = deque(maxlen=PARTS)

    @property
    def images(self) -> int:
        """Images in it."""
        return sum(part.images for part in self._parts)

    def add(self, observed: Observed) -> None:
        """Adds images."""
        now, images = self._clock(), len(observed.digit)
        counts = observed.counts(self._reference.bounds)
        last = self._parts[-1] if self._parts else None
        if last is None or (last.images >= PART_IMAGES and now - last.began >= PART_S):
            self._parts.append(_Part(now, counts, images))
            return
        last.images += images
        for name, added in counts.items():
            last.counts[name] += added

    def stability(self) -> dict[str, float]:
        """The index of each feature; NaN while the window holds fewer than ``MIN_IMAGES``."""
        if self.images < MIN_IMAGES:
            return dict.fromkeys(BOUNDS, float("nan"))
        return {
            name: stability_index(
                self._reference.counts[name],
                np.sum([part.counts[name] for part in self._parts], axis=0),
            )
            for name in BOUNDS
        }
