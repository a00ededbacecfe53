"""Counting values into the buckets of several histograms at once."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from service.buckets import bucket_counts

# Values and bounds of few levels: many values are on a bound, and histograms share bounds.
LEVELS = st.sampled_from([-1.0, 0.0, 0.1, 0.25, 0.5, 1.0, 3.0, 4096.0])
HISTOGRAMS = st.lists(
    st.tuples(
        st.lists(LEVELS, max_size=20),
        st.sets(LEVELS, min_size=1).map(lambda bounds: tuple(sorted(bounds))),
    ),
    min_size=1,
    max_size=4,
)


@given(HISTOGRAMS)
def test_each_histogram_is_counted_as_if_it_were_alone(histograms):
    counted = bucket_counts(
        [np.array(values, np.float64) for values, _ in histograms],
        [bounds for _, bounds in histograms],
    )
    for (values, bounds), counts in zip(histograms, counted, strict=True):
        edges = [-np.inf, *bounds, np.inf]
        expected = [
            sum(low < value <= high for value in values) for low, high in itertools.pairwise(edges)
        ]
        assert counts.tolist() == expected


def test_types_may_differ():
    counts = bucket_counts(
        [np.array([0, 9], np.uint8), np.array([0.5, 0.7], np.float32)], [(0, 1), (0.5,)]
    )
    assert [row.tolist() for row in counts] == [[1, 0, 1], [1, 1]]
