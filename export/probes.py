"""The images that a model is examined with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from export.sessions import Images
from training.corruptions import CORRUPTIONS
from training.data import Split

TRAINING_IMAGES = 10_000
# In proportion to the data, so that a small set is examined in little time: of MNIST, 600 images
# under each corruption and 500 near ties.
CORRUPTED_SHARE = 0.01
TIES_SHARE = 0.05

Decide = Callable[[Images], npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Probe:
    """A named set of images, uint8[N, 28, 28]."""

    name: str
    images: Images


def make_probes(train: Split, test: Split, decide: Decide) -> list[Probe]:
    """Every set, the test images first.

    Args:
        train: The training split.
        test: The test split.
        decide: The trained model's decisions, for the search of near ties.
    """
    test_images = test.images.numpy()
    return [
        Probe("test images", test_images),
        Probe("training images", train.images[:TRAINING_IMAGES].numpy()),
        Probe("corrupted images", corrupted(train)),
        Probe("adversarial images", adversarial(test_images)),
        Probe("near ties", near_ties(test_images, decide)),
    ]


def corrupted(split: Split) -> Images:
    """Some images of a split under each corruption of ``training.corruptions``."""
    some = split.images[: int(CORRUPTED_SHARE * len(split))]
    sets = [corrupt(some, torch.Generator().manual_seed(0)) for corrupt in CORRUPTIONS.values()]
    return np.asarray(torch.cat(sets))


def adversarial(images: Images) -> Images:
    """Extremes that no data set has: flat, checkerboards, noise, single pixels, inverted digits."""
    rng = np.random.default_rng(0)
    rows, columns = np.indices((28, 28))
    boards = [
        np.where((rows // size + columns // size) % 2 == phase, 255, 0)
        for size in (1, 2, 4, 7, 14)
        for phase in (0, 1)
    ]
    single = np.zeros((784, 28, 28), np.uint8)
    single[np.arange(784), rows.ravel(), columns.ravel()] = 255
    sets = [
        np.stack([np.full((28, 28), level) for level in (0, 1, 127, 128, 254, 255)]),
        np.stack(boards),
        rng.integers(0, 256, (256, 28, 28)),
        rng.integers(0, 2, (256, 28, 28)) * 255,
        single,
        255 - single,
        255 - images[:500],
    ]
    return np.asarray(np.concatenate(sets), np.uint8)


def near_ties(images: Images, decide: Decide) -> Images:
    """Images one grey level of one pixel away from another decision.

    Between two images that are told apart there is a border. Each pair is brought closer to it
    from both sides, first by halving the difference of every pixel, then by halving the number
    of pixels that differ, until one level of one pixel is left.

    Args:
        images: uint8[N, 28, 28].
        decide: Decisions int64[N] for such images.

    Returns:
        uint8[M, 28, 28], a twentieth as many as there are images.
    """
    rng = np.random.default_rng(0)
    decided = decide(images)
    count = int(TIES_SHARE * len(images))
    left, right = rng.integers(0, len(images), (2, 2 * count))  # one in ten is of the same digit
    apart = np.flatnonzero(decided[left] != decided[right])[:count]
    low, high = images[left[apart]], images[right[apart]]
    before = decided[left[apart]]
    while (open_pairs := np.abs(low.astype(int) - high).sum(axis=(1, 2)) > 1).any():
        middle = _between(low[open_pairs], high[open_pairs], rng)
        same = decide(middle) == before[open_pairs]
        index = np.flatnonzero(open_pairs)
        low[index[same]], high[index[~same]] = middle[same], middle[~same]
    return np.asarray(low)


def _between(low: Images, high: Images, rng: np.random.Generator) -> Images:
    """Half of the way, in grey levels, or in pixels where they are one level apart at most."""
    difference = high.astype(int) - low
    middle = low + np.trunc(difference / 2).astype(int)
    close = np.abs(difference).max(axis=(1, 2)) == 1
    for row in np.flatnonzero(close):
        pixels = np.flatnonzero(difference[row])
        some = rng.permutation(pixels)[: len(pixels) // 2]
        middle[row].reshape(-1)[some] = high[row].reshape(-1)[some]
    return np.asarray(middle, np.uint8)
