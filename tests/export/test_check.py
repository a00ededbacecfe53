"""What a check and a report of checks say of figures at their bounds."""

from __future__ import annotations

import math

import pytest

from export.check import GateReport, at_most


@pytest.mark.parametrize(
    ("got", "passed"), [(0.5, True), (1.0, True), (math.nextafter(1, 2), False), (math.nan, False)]
)
def test_figure_at_its_bound_passes_and_what_is_no_number_does_not(
    got: float, passed: bool
) -> None:
    assert at_most("group", "name", got, 1.0).passed is passed


def test_report_passes_only_with_every_check() -> None:
    good, bad = (at_most("group", "name", got, 1.0) for got in (0.0, 2.0))
    assert GateReport("", [good, good]).passed
    assert not GateReport("", [good, bad]).passed
