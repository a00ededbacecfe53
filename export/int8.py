"""Is the int8 variant good enough to answer in the fp32 model's place?

It is compared with the fp32 model that passed the parity gate. Its logits differ by design; what
is bounded is what callers see: decisions and accuracy, and that the integers are the weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from export.check import Check, at_most, equal
from export.parity import Reference, check_probabilities
from export.sessions import Images, Outputs, images_per_s, run_session, serving_session
from training.data import Split

MAX_ACCURACY_DROP = 0.0005
MAX_FLIPS = 0.001
# Corruptions put many images near a border between digits, where any noise flips a decision; and
# many digits are near the border to what is none, where callers choose a threshold of their own.
MAX_FLIPS_CORRUPTED = MAX_DIGIT_FLIPS = 0.005
# Test images decide nothing: int8 would be chosen by what its accuracy is reported on.
JUDGED = {"training images": MAX_FLIPS, "corrupted images": MAX_FLIPS_CORRUPTED}
REPORTED = "reported"
# Half a step, and float32's own rounding of the quotient.
MAX_ROUNDING = 0.501
TIMED_BATCH = 64
# Images that are named of those whose decision changed.
SHOWN = 10

Array = npt.NDArray[Any]


def check_int8(
    model: bytes, fp32: bytes, references: list[Reference], validation: Split, test: Split
) -> Iterator[Check]:
    """Weights, decisions on training images, validation accuracy; the rest is reported.

    Args:
        model: The int8 model.
        fp32: The model it was made from.
        references: From ``make_references``; the first is the test images.
        validation: Images that were held out from training; may be empty.
        test: The test split.
    """
    yield from check_weights(model, fp32)
    session, exact = serving_session(model), serving_session(fp32)
    for probe in references:
        outputs, expected = run_session(session, probe.images), run_session(exact, probe.images)
        yield equal(probe.name, "outputs that are NaN or infinite", outputs.not_finite, 0)
        if probe.name in JUDGED or probe is references[0]:
            yield _flips(probe, outputs, expected)
            yield _digit_flips(probe, outputs, expected)
        if probe is references[0]:
            yield _accuracy(probe.name, outputs, expected, test, decides=False)
        yield from check_probabilities(probe.name, outputs)
    if len(validation):
        images = validation.images.numpy()
        outputs, expected = (run_session(each, images) for each in (session, exact))
        yield _accuracy("validation images", outputs, expected, validation, decides=True)
    yield _speed(model, fp32, references[0].images[:TIMED_BATCH])


def check_weights(model: bytes, fp32: bytes) -> Iterator[Check]:
    """Every integer is the nearest one to its weight, so nothing else was quantised."""
    exact, stored = _initializers(fp32), _initializers(model)
    worst, count = 0.0, 0
    for name, scale in _scales(stored).items():
        integers = stored[f"{name}_quantized"]
        per_channel = scale.reshape(-1, *([1] * (integers.ndim - 1)))
        steps = np.abs(integers - exact[name] / per_channel)
        worst, count = float(np.maximum(worst, steps.max())), count + integers.size  # keeps NaN
    yield at_most("weights", f"largest rounding of {count:,}, in steps", worst, MAX_ROUNDING)
    kept = exact.keys() - {name for name in exact if f"{name}_quantized" in stored}
    changed = [
        n for n in sorted(kept) if n not in stored or not np.array_equal(exact[n], stored[n])
    ]
    yield equal("weights", "changed among those that stay float32", changed, [])
    convolutions = [n for n in onnx.load_from_string(fp32).graph.node if n.op_type == "Conv"]
    left = [n.input[1] for n in convolutions if f"{n.input[1]}_quantized" not in stored]
    yield equal("weights", "convolutions left in float32", left, [])


def _scales(stored: dict[str, Array]) -> dict[str, Array]:
    """The step of every quantised weight and bias, by the name it had in fp32."""
    names = [name.removesuffix("_quantized") for name in stored if name.endswith("_quantized")]
    return {
        name: stored[f"{name}_scale" if f"{name}_scale" in stored else f"{name}_quantized_scale"]
        for name in names
    }


def _initializers(model: bytes) -> dict[str, Array]:
    graph = onnx.load_from_string(model).graph
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}


def _flips(probe: Reference, outputs: Outputs, expected: Outputs) -> Check:
    flipped = np.flatnonzero(outputs.decisions != expected.decisions)
    listed = ", ".join(
        f"#{row} {expected.decisions[row]}→{outputs.decisions[row]}" for row in flipped[:SHOWN]
    )
    figure = f"{len(flipped)} of {len(probe.images):,}" + (f": {listed}" if listed else "")
    name = "decisions changed against fp32"
    return _bounded(probe, name, figure, len(flipped), JUDGED.get(probe.name))


def _digit_flips(probe: Reference, outputs: Outputs, expected: Outputs) -> Check:
    flipped = int(((outputs.is_digit > 0.5) != (expected.is_digit > 0.5)).sum())
    figure = f"{flipped} of {len(probe.images):,}"
    name = "digit or not changed against fp32"
    share = MAX_DIGIT_FLIPS if probe.name in JUDGED else None
    return _bounded(probe, name, figure, flipped, share)


def _bounded(probe: Reference, name: str, figure: str, flipped: int, share: float | None) -> Check:
    if share is None:
        return Check(probe.name, name, figure, REPORTED, passed=True)
    bound = math.ceil(share * len(probe.images))
    return Check(probe.name, name, figure, f"<= {bound}", flipped <= bound)


def _accuracy(
    group: str, outputs: Outputs, expected: Outputs, split: Split, *, decides: bool
) -> Check:
    labels = split.labels.numpy()
    correct, before = (int((o.decisions == labels).sum()) for o in (outputs, expected))
    least = before - math.ceil(MAX_ACCURACY_DROP * len(labels))
    figure = f"{correct:,} (fp32 {before:,})"
    if not decides:
        return Check(group, "correct digits", figure, REPORTED, passed=True)
    return Check(group, "correct digits", figure, f">= {least:,}", correct >= least)


def _speed(model: bytes, fp32: bytes, images: Images) -> Check:
    """It is reported and decides nothing: how much faster int8 is depends on the CPU.

    The machine that exports is seldom the one that serves.
    """
    rate, exact = images_per_s([model, fp32], images)
    name = f"images/s over fp32, batch of {len(images)}, one thread"
    return Check("speed", name, f"{rate / exact:.2f}", REPORTED, passed=True)
