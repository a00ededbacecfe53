"""Is the exported model the trained one? Values, decisions, batches, options, processes.

The tolerance is measured, not chosen. The trained model is evaluated in float64 as the oracle;
PyTorch's own float32 error against it says what rounding does to this network on these images,
and onnxruntime, which adds in another order, may err four times as much.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from onnx.reference import ReferenceEvaluator

from export.check import Check, at_most, equal
from export.probes import make_probes
from export.sessions import (
    Floats,
    Images,
    Outputs,
    digest,
    in_fresh_process,
    run_session,
    serving_session,
    session_digest,
)
from service.artifact.format import INPUT, OUTPUTS
from service.serving.engine import CPU_PROVIDER, session_options
from training.data import Split
from training.evaluate import confusion_matrix, predict
from training.model import Classifier

# How much larger than PyTorch's own the rounding error may be.
ERROR_RATIO = 4
MAX_PROBABILITY_ERROR = 1e-6
# A probability moves by at most a quarter of its logit's error.
MAX_IS_DIGIT_ERROR = 1e-5
BATCH_SIZES = (1, 2, 3, 7, 8, 16, 31, 64, 256, 1000)
# Images that are run in each of many ways, spread over every probe.
REPEATED = 2000
REFERENCE_IMAGES = 100
LEVELS = ("disabled", "basic", "extended", "all")

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """One probe with the trained model's answers.

    Attributes:
        name: The probe's name.
        images: uint8[N, 28, 28].
        trained: float32[N, 10], PyTorch's logits.
        oracle: float64[N, 10], the same model's logits in float64.
        is_digit: float64[N], its probability that an image is a digit; 1 if it does not tell.
    """

    name: str
    images: Images
    trained: Floats
    oracle: Doubles
    is_digit: Doubles

    @property
    def errors(self) -> Doubles:
        """float64[N, 10], how far PyTorch's float32 is from the oracle."""
        return np.abs(self.trained - self.oracle)

    @property
    def margins(self) -> Doubles:
        """float64[N], the oracle's two best logits' difference."""
        top = np.sort(self.oracle, axis=1)
        return np.asarray(top[:, -1] - top[:, -2])


def make_references(classifier: Classifier, train: Split, test: Split) -> list[Reference]:
    """Every probe with the trained model's answers; the test images come first."""
    exact = copy.deepcopy(classifier).double()

    def answers(model: Classifier, images: Images) -> Any:
        return [each.numpy() for each in predict(model, torch.from_numpy(images))]

    def decisions(images: Images) -> Any:
        return answers(classifier, images)[0].argmax(axis=1)

    references = []
    for probe in make_probes(train, test, decisions):
        trained, _ = answers(classifier, probe.images)
        oracle, is_digit = answers(exact, probe.images)
        references.append(Reference(probe.name, probe.images, trained, oracle, is_digit))
    return references


def tolerance(references: list[Reference]) -> float:
    """The largest error that rounding explains, over all probes."""
    return ERROR_RATIO * max(float(one.errors.max()) for one in references)


def check_values(reference: Reference, answered: Outputs) -> Iterator[Check]:
    """Finite, and as near to the oracle as float32 can be asked to be."""
    group, own = reference.name, reference.errors
    error = np.abs(answered.logits - reference.oracle)
    yield equal(group, "outputs that are NaN or infinite", answered.not_finite, 0)
    ulp = error / np.spacing(np.abs(reference.oracle).astype(np.float32))
    yield at_most(
        group,
        "largest logit difference to PyTorch",
        float(np.abs(answered.logits - reference.trained).max()),
        (ERROR_RATIO + 1) * float(own.max()),
        note=f", to the oracle p50 {np.median(ulp):.2g} p99 {np.quantile(ulp, 0.99):.2g} ulp",
    )
    for name, figure in (("largest", np.max), ("p99.9", lambda e: np.quantile(e, 0.999))):
        bound = ERROR_RATIO * float(figure(own))
        yield at_most(group, f"{name} error to float64", float(figure(error)), bound)


def check_decisions(reference: Reference, answered: Outputs) -> Iterator[Check]:
    """The same digit on every image, unless rounding alone explains another."""
    decisions, oracle = answered.decisions, reference.oracle
    other = (decisions != oracle.argmax(axis=1)) | (decisions != reference.trained.argmax(axis=1))
    # The error that the exported model may have, and PyTorch's, on both logits of a tie. Not the
    # error that it has: a model that is far off would excuse itself.
    noise = 2 * (ERROR_RATIO + 1) * float(reference.errors.max())
    unexplained = int((other & (reference.margins > noise)).sum())
    excused = int(other.sum()) - unexplained
    tied = f" ({excused} more within rounding)" if excused else ""
    margin = float(np.median(reference.margins))
    figure = f"{unexplained} of {len(decisions):,}{tied}; median margin {margin:.3g}"
    yield Check(reference.name, "images decided otherwise", figure, "== 0", unexplained == 0)
    yield from check_probabilities(reference.name, answered)
    error = float(np.abs(answered.is_digit - reference.is_digit).max())
    yield at_most(reference.name, "is_digit, error to float64", error, MAX_IS_DIGIT_ERROR)


def check_probabilities(group: str, outputs: Outputs) -> Iterator[Check]:
    """Probabilities are the softmax of the logits."""
    softmax = torch.softmax(torch.from_numpy(outputs.logits).double(), dim=1).numpy()
    error = np.abs(outputs.probabilities - softmax).max()
    yield at_most(group, "probability error to softmax", float(error), MAX_PROBABILITY_ERROR)
    sums = np.abs(outputs.probabilities.astype(np.float64).sum(axis=1) - 1).max()
    yield at_most(group, "probabilities' sum minus 1", float(sums), MAX_PROBABILITY_ERROR)


def check_truth(
    group: str, answered: Outputs, split: Split, recorded: list[list[int]]
) -> Iterator[Check]:
    """On the test images: the confusion matrix that training recorded, cell by cell."""
    matrix = confusion_matrix(torch.from_numpy(answered.decisions), split.labels)
    expected = torch.tensor(recorded)
    moved = int((matrix - expected).abs().sum())
    yield equal(group, "confusion matrix, cells' difference to training's", moved, 0)
    yield equal(group, "correct digits", int(matrix.trace()), int(expected.trace()))


def check_batches(model: bytes, images: Images, bound: float) -> Iterator[Check]:
    """An answer may not depend on the images that share its batch."""
    session = serving_session(model)
    alone = run_session(session, images, 1)

    def compare(name: str, outputs: Outputs, expected: Outputs = alone) -> Check:
        exact = digest(outputs) == digest(expected)
        error = float(np.abs(outputs.logits - expected.logits).max())
        return at_most("batches", name, error, bound, note=", bit-exact" if exact else "")

    for size in BATCH_SIZES[1:]:
        yield compare(f"batch of {size} against 1", run_session(session, images, size))
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    yield compare("rows permuted", run_session(session, images[order]), _at(alone, order))
    batch = rng.integers(0, 256, (8, 28, 28), dtype=np.uint8)
    rows = []
    for number, image in enumerate(images):
        place = number % 8
        neighbours = batch.copy()
        neighbours[place] = image
        outputs = run_session(session, neighbours, 8)
        rows.append(_at(outputs, np.array([place])))
    yield compare("neighbours replaced by noise", _joined(rows))


def spread(count: int, some: int) -> npt.NDArray[np.int64]:
    """At most ``some`` of ``count`` rows, evenly over all of them."""
    return np.linspace(0, count - 1, min(count, some)).astype(np.int64)


def _at(outputs: Outputs, index: npt.NDArray[np.int64]) -> Outputs:
    return Outputs(outputs.logits[index], outputs.probabilities[index], outputs.is_digit[index])


def _joined(parts: list[Outputs]) -> Outputs:
    return Outputs(
        np.concatenate([part.logits for part in parts]),
        np.concatenate([part.probabilities for part in parts]),
        np.concatenate([part.is_digit for part in parts]),
    )


def check_options(
    model: bytes, images: Images, expected: Floats | Doubles, bound: float
) -> Iterator[Check]:
    """Other optimisation levels, threads and memory settings, and onnx's own evaluator.

    Args:
        model: A serialised model.
        images: uint8[N, 28, 28].
        expected: Logits [N, 10] that each has to reproduce.
        bound: How near.
    """
    for number, level in enumerate(LEVELS):
        worst = 0.0
        for threads in (1, 2):
            for arena in (True, False):
                session = _session(model, number, threads, arena=arena)
                logits = run_session(session, images).logits
                worst = float(np.maximum(worst, np.abs(logits - expected).max()))  # keeps NaN
        name = f"optimisation {level}, 1 and 2 threads, arena on and off"
        yield at_most("options", name, worst, bound)
    index = spread(len(images), REFERENCE_IMAGES)
    some = images[index]
    evaluator = ReferenceEvaluator(onnx.load_from_string(model))
    with np.errstate(over="ignore"):  # its sigmoid also takes the branch that it does not need
        logits = np.asarray(*evaluator.run([OUTPUTS[0]], {INPUT["name"]: some}))
    error = float(np.abs(logits - expected[index]).max())
    yield at_most("options", f"reference evaluator of onnx, {len(some)} images", error, bound)


def _session(model: bytes, level: int, threads: int, *, arena: bool) -> ort.InferenceSession:
    options = session_options(threads)
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = (
        levels.ORT_DISABLE_ALL,
        levels.ORT_ENABLE_BASIC,
        levels.ORT_ENABLE_EXTENDED,
        levels.ORT_ENABLE_ALL,
    )[level]
    options.enable_cpu_mem_arena = arena
    return ort.InferenceSession(model, options, providers=[CPU_PROVIDER])


def check_determinism(model: bytes, images: Images) -> Iterator[Check]:
    """The same bits again, in this process and in two fresh ones."""
    digests = [session_digest(model, images) for _ in range(2)]
    yield equal("determinism", "distinct answers of 2 sessions", len(set(digests)), 1)
    digests += [in_fresh_process(session_digest, model, images) for _ in range(2)]
    yield equal("determinism", "distinct answers of 3 processes", len(set(digests)), 1)
