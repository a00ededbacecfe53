"""Counting values into the buckets of a histogram."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.artifact.reference import bucket_counts

# Values and bounds of few levels: many values are on a bound.
LEVELS = st.sampled_from([-1.0, 0.0, 0.1, 0.25, 0.5, 1.0, 3.0, 4096.0])


@given(
    st.lists(LEVELS, max_size=20),
    st.sets(LEVELS, min_size=1).map(lambda bounds: tuple(sorted(bounds))),
)
def test_a_value_on_a_bound_is_below_it(values: Any, bounds: Any) -> None:
    edges = [-np.inf, *bounds, np.inf]
    expected = [
        sum(low < value <= high for value in values) for low, high in itertools.pairwise(edges)
    ]
    assert bucket_counts(np.array(values, np.float64), bounds).tolist() == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_of_any_type(dtype: Any) -> None:
    assert bucket_counts(np.array([0, 9, 1], dtype), (0, 1, 2)).tolist() == [1, 1, 0, 1]
