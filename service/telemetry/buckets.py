"""How many values fall into each bucket of a histogram."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def bucket_counts(
    values: npt.NDArray[np.generic], bounds: tuple[float, ...]
) -> npt.NDArray[np.int64]:
    """How many values are in each bucket; a value on a bound belongs below it.

    Sorting and looking up the bounds takes a fraction of the time of looking up each value.

    Args:
        values: Of any number.
        bounds: Upper bounds, ascending; the last bucket has none.

    Returns:
        int64[len(bounds) + 1].
    """
    up_to = np.empty(len(bounds) + 2, np.int64)
    up_to[0], up_to[-1] = 0, len(values)
    up_to[1:-1] = np.searchsorted(np.sort(values), bounds, "right")
    counts: npt.NDArray[np.int64] = up_to[1:] - up_to[:-1]
    return counts
