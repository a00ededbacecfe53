"""How many values fall into each bucket of a histogram."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def bucket_counts(
    values: npt.NDArray[np.generic], bounds: tuple[float, ...]
) -> npt.NDArray[np.int64]:
    """How many values are in each bucket; a value on a bound belongs below it.

    Args:
        values: Of any number.
        bounds: Upper bounds, ascending; the last bucket has none.

    Returns:
        int64[len(bounds) + 1].
    """
    return np.bincount(np.searchsorted(bounds, values), minlength=len(bounds) + 1)
