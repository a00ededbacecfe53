"""How many values fall into each bucket of a histogram."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bounds = tuple[float, ...]


def bucket_counts(
    values: Sequence[npt.NDArray[np.generic]], bounds: Sequence[Bounds]
) -> list[npt.NDArray[np.int64]]:
    """How many of the values of each histogram are in each bucket; one on a bound belongs below it.

    All are looked up at once, among the bounds of all: under load each call of numpy may wait for
    the GIL, which costs more than what it does.

    Args:
        values: Of each histogram, any number.
        bounds: Upper bounds of its buckets, ascending; the last bucket has none.

    Returns:
        int64[len(bounds) + 1] for each.
    """
    edges, firsts = _merged(tuple(bounds))
    buckets = np.searchsorted(edges, np.concatenate(values))
    rows, width = len(values), len(edges) + 1
    buckets += np.repeat(np.arange(rows) * width, [len(row) for row in values])
    counts = np.bincount(buckets, minlength=rows * width).reshape(rows, width)
    return [np.add.reduceat(row, first) for row, first in zip(counts, firsts, strict=True)]


@functools.cache
def _merged(
    bounds: tuple[Bounds, ...],
) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.intp]]]:
    """Every bound of all, and where among the buckets between these each one's own begin."""
    edges = np.unique(np.concatenate(bounds).astype(np.float64))
    return edges, [np.append(0, np.searchsorted(edges, own) + 1) for own in bounds]
