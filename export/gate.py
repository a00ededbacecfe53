"""The gate: an artifact is written only if every check here passes.

``torch.onnx.export(verify=True)`` can not fail a build: it compares one example and logs what it
finds. Here every check has a figure and a bound, and a failed one stops the export.
docs/artifact.md tells what each is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from export.check import Check, GateReport, equal
from export.int8 import check_int8
from export.parity import (
    REPEATED,
    Reference,
    check_batches,
    check_decisions,
    check_determinism,
    check_options,
    check_truth,
    check_values,
    spread,
    tolerance,
)
from export.sessions import Images, run_session, serving_session
from export.structure import GROUP as STRUCTURE
from export.structure import check_structure
from service.artifact.format import sha256
from training.data import Split


class Reporter(Protocol):
    """Is notified of what the gate does."""

    def stage(self, text: str) -> None:
        """What is being done now."""

    def check(self, check: Check) -> None:
        """A check was decided."""


def gate_fp32(
    model: bytes,
    *,
    labels: Sequence[str],
    again: bytes,
    references: list[Reference],
    test: Split,
    confusion: list[list[int]],
    reporter: Reporter,
) -> GateReport:
    """Examines an exported model against the one that was trained.

    Args:
        model: The exported model.
        labels: Of the classes.
        again: A second export of the same checkpoint, from another process.
        references: From ``make_references``: the trained model's answers.
        test: The test split.
        confusion: What training recorded on it, rows: truth.
        reporter: Is notified of each check as it is decided.
    """
    report = GateReport(sha256(model))
    _run(report, _structure(model, labels, again), reporter)
    if report.passed:  # a malformed graph can not be run
        _run(report, _parity(model, references, test, confusion), reporter)
    return report


def gate_int8(
    model: bytes,
    *,
    labels: Sequence[str],
    again: bytes,
    fp32: bytes,
    references: list[Reference],
    validation: Split,
    test: Split,
    reporter: Reporter,
) -> GateReport:
    """Examines the int8 variant against the fp32 model, which has passed its own gate.

    ``validation`` decides whether it is as accurate; what it does to ``test`` is reported.
    """
    report = GateReport(sha256(model))
    _run(report, _structure(model, labels, again), reporter)
    if report.passed:
        _run(report, _variant(model, fp32, references, validation, test), reporter)
    return report


def _run(report: GateReport, checks: Iterable[Check], reporter: Reporter) -> None:
    for check in checks:
        report.checks.append(check)
        reporter.check(check)


def _structure(model: bytes, labels: Sequence[str], again: bytes) -> Iterator[Check]:
    yield from check_structure(model, labels)
    yield equal(STRUCTURE, "made again in a fresh process, sha256", sha256(again), sha256(model))


def _parity(
    model: bytes,
    references: list[Reference],
    test: Split,
    confusion: list[list[int]],
) -> Iterator[Check]:
    session = serving_session(model)
    for reference in references:
        answered = run_session(session, reference.images)
        yield from check_values(reference, answered)
        yield from check_decisions(reference, answered)
        if reference is references[0]:
            yield from check_truth(reference.name, answered, test, confusion)
    bound, repeated = tolerance(references), _mixture(references)
    oracle = np.concatenate([one.oracle[_some(one, references)] for one in references])
    yield from check_batches(model, repeated, bound)
    yield from check_options(model, repeated, oracle, bound)
    yield from check_determinism(model, repeated)


def _variant(
    model: bytes, fp32: bytes, references: list[Reference], validation: Split, test: Split
) -> Iterator[Check]:
    yield from check_int8(model, fp32, references, validation, test)
    repeated = _mixture(references)
    # Between batches only float32 rounding may differ; between kernels, a rounding to another
    # integer may, which is what quantisation costs anyway.
    yield from check_batches(model, repeated, tolerance(references))
    served, exact = (run_session(serving_session(m), repeated).logits for m in (model, fp32))
    yield from check_options(model, repeated, served, float(np.abs(served - exact).max()))
    yield from check_determinism(model, repeated)


def _mixture(references: list[Reference]) -> Images:
    return np.concatenate([one.images[_some(one, references)] for one in references])


def _some(reference: Reference, references: list[Reference]) -> npt.NDArray[np.int64]:
    """The rows of a probe that are run in many ways: as many of each probe."""
    return spread(len(reference.images), REPEATED // len(references))
