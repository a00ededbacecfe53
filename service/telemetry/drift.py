"""Do the digits that come in still look like those the model was made with?

What is looked at of every image, how it is counted, and how far two counts are apart. Knows neither
Prometheus nor gRPC: the exporter counts the reference with it, the server what it answers.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.telemetry.buckets import bucket_counts

# Upper bounds of the buckets, ascending; the last bucket has none. A reference tells those it was
# counted with: one with others is compared with those.
BOUNDS: dict[str, tuple[float, ...]] = {
    "digit": (0, 1, 2, 3, 4, 5, 6, 7, 8),
    # Finer towards 1, where a model that is nearly always right says most of what it says.
    "confidence": (
        0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999,
    ),
    # Of a digit of MNIST 0.13 on average; 1 is an image that is bright all over.
    "ink": (
        0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.25, 0.3, 0.5, 0.75,
    ),
}  # fmt: skip
# What moves the margin moves the confidence: it is exported, but not compared.
EXPORTED_BOUNDS = {
    **BOUNDS,
    "margin": (0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999),
}

# With fewer images the index is mostly noise: about (buckets - 1) times (1 / window + 1 /
# reference) for two samples of one population, here 0.013. Source: Yurdakul and Naranjo,
# Statistical Properties of the Population Stability Index, J. Risk Model Validation 14(4), 2020.
MIN_IMAGES = 2_000
# The window holds at least this much of the past where there is so much, of images and of time.
PARTS = 5
PART_IMAGES = MIN_IMAGES
PART_S = 60.0

Counts = dict[str, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Observed:
    """What was looked at of N images.

    Attributes:
        digit: int[N], the digit that was predicted.
        confidence: float32[N], its probability.
        margin: float32[N], by how much that exceeds the next digit's.
        ink: float64[N], the image's brightness as a share of one that is bright all over.
    """

    digit: npt.NDArray[np.uint8]
    confidence: npt.NDArray[np.float32]
    margin: npt.NDArray[np.float32]
    ink: npt.NDArray[np.float64]

    def counts(self, bounds: Mapping[str, tuple[float, ...]] = BOUNDS) -> Counts:
        """Images in each bucket of each feature that has bounds here."""
        return {name: bucket_counts(getattr(self, name), bounds[name]) for name in bounds}


def observe(
    pixels: npt.NDArray[np.uint8],
    probabilities: npt.NDArray[np.float32],
    digit: npt.NDArray[np.uint8] | None = None,
) -> Observed:
    """Looks at images and their answers.

    Args:
        pixels: uint8[N, 784], or of any other shape with N first.
        probabilities: float32[N, 10].
        digit: uint8[N], the most probable ones, where they are known already.
    """
    flat = pixels.reshape(len(pixels), -1)
    probabilities = np.ascontiguousarray(probabilities)
    ordered = np.partition(probabilities, -2, axis=1)
    return Observed(
        digit=probabilities.argmax(axis=1).astype(np.uint8) if digit is None else digit,
        confidence=ordered[:, -1],
        margin=ordered[:, -1] - ordered[:, -2],
        ink=flat.sum(axis=1, dtype=np.uint32) / (255.0 * flat.shape[1]),
    )


def stability_index(reference: npt.NDArray[np.int64], observed: npt.NDArray[np.int64]) -> float:
    """The population-stability index (PSI) of two counts over the same buckets.

    By convention, below 0.1 nothing has changed, and above 0.25 much has. Half an image is added to
    every bucket, so that an empty one does not make it infinite. Source: Siddiqi, Credit Risk
    Scorecards, Wiley 2006, chapter 8.
    """
    expected, actual = reference + 0.5, observed + 0.5
    expected, actual = expected / expected.sum(), actual / actual.sum()
    return float(((actual - expected) * np.log(actual / expected)).sum())


@dataclass(frozen=True)
class Reference:
    """What drift is measured against.

    Attributes:
        bounds: Of the buckets of each feature.
        counts: Images in each of them.
    """

    bounds: dict[str, tuple[float, ...]]
    counts: Counts


@dataclass
class _Part:
    began: float
    counts: Counts
    images: int = 0


class Window:
    """Counts of the latest images, in parts of which the oldest is dropped as a new one begins.

    A part ends when it is a minute old and holds 2,000 images. So the window spans the last four
    minutes at least, and on a quiet server as long as 8,000 images took, in bounded memory. Not
    thread-safe.

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

    def add(self, observed: Observed, counts: Counts | None = None) -> None:
        """Adds images.

        Args:
            observed: What was looked at of them.
            counts: The same in the buckets of BOUNDS or more, if that was counted already.
        """
        now, images = self._clock(), len(observed.digit)
        if counts is None or self._reference.bounds != BOUNDS:
            counts = observed.counts(self._reference.bounds)
        full = self._parts and self._parts[-1].images >= PART_IMAGES
        if not self._parts or (full and now - self._parts[-1].began >= PART_S):
            self._parts.append(_Part(now, counts, images))
            return
        part = self._parts[-1]
        part.images += images
        for name, added in counts.items():
            part.counts[name] += added

    def stability(self) -> dict[str, float]:
        """The index of each feature; NaN while the window holds too few images to tell."""
        if self.images < MIN_IMAGES:
            return dict.fromkeys(BOUNDS, float("nan"))
        return {
            name: stability_index(
                self._reference.counts[name],
                np.sum([part.counts[name] for part in self._parts], axis=0),
            )
            for name in BOUNDS
        }
