"""The reference for drift: counts of images by digit, confidence, being a digit, and ink.

The exporter counts validation images; the server counts what it answers, in the same buckets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from service.artifact.errors import ArtifactError

# Upper bounds of the buckets, ascending; the last bucket has none. A reference names those it was
# counted with.
BOUNDS: dict[str, tuple[float, ...]] = {
    "digit": (0, 1, 2, 3, 4, 5, 6, 7, 8),
    # Finer towards 1, where nearly all answers of a good model are.
    "confidence": (
        0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999,
    ),
    # Of models that were not trained to tell, 1 for every image.
    "is_digit": (0.01, 0.1, 0.5, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995),
    # A digit of MNIST has 0.13 on average; an image that is white all over has 1.
    "ink": (
        0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.14, 0.16, 0.18, 0.2, 0.25, 0.3, 0.5, 0.75,
    ),
}  # fmt: skip

Counts = dict[str, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Reference:
    """The counts that drift is measured against.

    Attributes:
        bounds: Of the buckets of each feature.
        counts: int64[len(bounds) + 1] of each feature: images in each bucket.
    """

    bounds: dict[str, tuple[float, ...]]
    counts: Counts


@dataclass(frozen=True)
class Observed:
    """The features of N images.

    Attributes:
        digit: int[N], the predicted digit.
        confidence: float32[N], its probability.
        is_digit: float32[N], the probability that the image is a digit at all.
        ink: float64[N], the image's mean brightness, from 0 to 1.
    """

    digit: npt.NDArray[np.integer[Any]]
    confidence: npt.NDArray[np.float32]
    is_digit: npt.NDArray[np.float32]
    ink: npt.NDArray[np.float64]

    def counts(self, bounds: Mapping[str, tuple[float, ...]] = BOUNDS) -> Counts:
        """Images in each bucket of each feature."""
        return {name: bucket_counts(getattr(self, name), bounds[name]) for name in bounds}


def observe(
    pixels: npt.NDArray[np.uint8],
    probabilities: npt.NDArray[np.float32],
    is_digit: npt.NDArray[np.float32],
) -> Observed:
    """The features of images.

    Args:
        pixels: uint8[N, 784], or any other shape with N first.
        probabilities: float32[N, 10].
        is_digit: float32[N].
    """
    flat = pixels.reshape(len(pixels), -1)
    return Observed(
        digit=probabilities.argmax(axis=1),
        confidence=probabilities.max(axis=1),
        is_digit=is_digit,
        ink=flat.sum(axis=1, dtype=np.uint32) / (255.0 * flat.shape[1]),
    )


def bucket_counts(
    values: npt.NDArray[np.generic], bounds: tuple[float, ...]
) -> npt.NDArray[np.int64]:
    """Values in each bucket; a value on a bound belongs below it.

    Sorting and then searching for the bounds is faster than searching for every value.

    Args:
        values: Of any length.
        bounds: Upper bounds, ascending; the last bucket has none.

    Returns:
        int64[len(bounds) + 1].
    """
    up_to = np.empty(len(bounds) + 2, np.int64)
    up_to[0], up_to[-1] = 0, len(values)
    up_to[1:-1] = np.searchsorted(np.sort(values), bounds, "right")
    counts: npt.NDArray[np.int64] = up_to[1:] - up_to[:-1]
    return counts


def write_reference(counts: Counts, images: str) -> dict[str, Any]:
    """The ``reference`` of a variant in the manifest.

    Args:
        counts: Images in each bucket of each feature.
        images: Which they were.
    """
    features = {
        name: {"bounds": list(BOUNDS[name]), "counts": counts[name].tolist()} for name in BOUNDS
    }
    return {"images": images, **features}


def read_reference(section: Any, where: str) -> Reference:
    """The inverse of ``write_reference``.

    Args:
        section: Parsed JSON.
        where: Its path, for errors.

    Raises:
        ArtifactError: If a feature is missing, its bounds do not ascend, or it counts no images.
    """
    if not isinstance(section, dict):
        raise ArtifactError(f"{where}: expected an object")
    bounds, counts = {}, {}
    for name in BOUNDS:
        feature = section.get(name)
        if not isinstance(feature, dict):
            raise ArtifactError(f"{where}: {name}: expected an object")
        found: Any = feature.get("bounds")
        if not _numbers(found, (int, float)) or not found or sorted(set(found)) != found:
            raise ArtifactError(f"{where}: {name}: bounds: expected ascending numbers")
        bounds[name] = tuple(found)
        found, buckets = feature.get("counts"), len(bounds[name]) + 1
        if not _numbers(found, (int,)) or len(found) != buckets or not sum(found):
            raise ArtifactError(f"{where}: {name}: counts: expected {buckets}, of images")
        counts[name] = np.array(found, np.int64)
    return Reference(bounds, counts)


def _numbers(found: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(found, list) and all(
        type(number) in kinds and 0 <= number < 2**53 for number in found
    )
