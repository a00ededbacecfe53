"""int8: made from training images, compared with fp32, and its gate catches what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export import create
from export.check import GateError
from export.create import make_release
from export.quantize import is_quantizable, quantize_model
from export.sessions import run_session, serving_session
from tests.export.conftest import Caught, Silent, UntilCaught, altered, trained
from training.checkpoint import Checkpoint
from training.config import make_config
from training.data import Split
from training.sets import Sets


def test_gate_passes_int8_and_lists_what_changed(int8_gate: Callable[..., Any]) -> None:
    report = int8_gate()
    assert report.failed == []
    names = {(check.group, check.name) for check in report.checks}
    assert ("test images", "decisions changed against fp32") in names
    assert ("test images", "correct digits") in names
    assert ("batches", "neighbours replaced by noise") in names
    assert ("structure", "made again in a fresh process, sha256") in names


def test_all_convolutions_run_on_integers(int8_model: Any, tmp_path: Path) -> None:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(int8_model, options, providers=["CPUExecutionProvider"])
    operators = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert operators.count("QLinearConv") == 4
    assert "Conv" not in operators


def test_scales_are_fixed_in_the_file(int8_model: Any) -> None:
    """Scales that are computed at run time would tie an answer to its batch-mates."""
    operators = {node.op_type for node in onnx.load_from_string(int8_model).graph.node}
    assert "DynamicQuantizeLinear" not in operators
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators


def test_weights_use_seven_bits(int8_model: Any) -> None:
    """Eight would overflow the 16-bit sums of CPUs without VNNI."""
    stored = onnx.load_from_string(int8_model).graph.initializer
    weights = [t for t in stored if t.name.endswith("weight_quantized")]
    assert len(weights) == 4
    assert max(int(np.abs(numpy_helper.to_array(t)).max()) for t in weights) <= 64


def test_calibration_images_decide_the_scales_but_that_of_the_pixels(
    model: Any, int8_model: Any, split: Split
) -> None:
    """The first convolution takes them as they are, also where none is white."""
    dim = quantize_model(model, split.images.numpy() // 4)
    assert dim != int8_model
    for each in (dim, int8_model):
        operators = [node.op_type for node in onnx.load_from_string(each).graph.node]
        assert "Cast" not in operators
        assert operators.count("QuantizeLinear") < operators.count("DequantizeLinear")


def swapped(values: Any) -> Any:
    values[[0, 1]] = values[[1, 0]]
    return values


MUTATIONS = {
    "a weight one step off": ("network.3.0.weight_quantized", lambda v: v + (v == v.flat[7])),
    "a bias one step off": ("network.2.0.bias_quantized", lambda v: v + 1),
    "a float weight changed": ("head.weight", lambda v: v + np.float32(1e-3)),
    "two classes swapped": ("head.weight", swapped),
    "temperature not applied": ("head.weight", lambda v: v * np.float32(0.8)),
    "another scale": ("network.4.0.weight_scale", lambda v: v * np.float32(1.1)),
    "a scale that is no number": ("network.1.convolution.weight_scale", lambda v: v * np.nan),
    # Far enough from right for every CPU: kernels with and without VNNI round and saturate apart.
    "activations of an eighth of the range": ("relu_1_scale", lambda v: v / 8),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_gate_catches_a_wrong_int8_model(
    mutation: str, int8_model: Any, int8_gate: Callable[..., Any]
) -> None:
    mutant = altered(int8_model, *MUTATIONS[mutation])
    assert mutant != int8_model
    with pytest.raises(Caught, match=r"weights|images"):
        int8_gate(mutant, reporter=UntilCaught())


def test_gate_catches_int8_of_another_model(
    checkpoint: Checkpoint, split: Split, int8_gate: Callable[..., Any], model: Any, int8_model: Any
) -> None:
    def brighter(values: Any) -> Any:
        return values * np.float32(1.01)

    other = altered(model, "network.1.convolution.weight", brighter)
    with pytest.raises(Caught, match="weights"):
        int8_gate(int8_model, fp32=other, reporter=UntilCaught())


def test_gate_catches_a_layer_left_in_float(model: Any, int8_gate: Callable[..., Any]) -> None:
    with pytest.raises(Caught, match="left in float32"):
        int8_gate(model, reporter=UntilCaught())


@pytest.mark.full
def test_validation_images_decide_and_test_images_are_reported(
    int8_gate: Callable[..., Any], model: Any, references: Any, split: Split
) -> None:
    ties = next(each.images for each in references if each.name == "near ties")
    labels = run_session(serving_session(model), ties).decisions
    near = Split(torch.from_numpy(ties), torch.from_numpy(labels))  # int8 decides some otherwise
    with pytest.raises(Caught, match="validation images: correct digits"):
        int8_gate(validation=near, reporter=UntilCaught())
    wrong = Split(split.images, (split.labels + 1) % 10)
    assert int8_gate(test=wrong).failed == []


def test_int8_is_in_the_release_when_it_passes(made: Any, model: Any, int8_model: Any) -> None:
    assert [variant.precision for variant in made.variants] == ["fp32", "int8"]
    assert [variant.model for variant in made.variants] == [model, int8_model]
    assert made.left_out == ""
    exact, quantised = (variant.accuracy["correct"] for variant in made.variants)
    assert abs(exact - quantised) <= 2
    assert made.variants[1].accuracy != made.variants[0].accuracy  # measured, not copied


def test_golden_digits_hold_the_answers_of_each_variant(made: Any) -> None:
    for variant in made.variants:
        outputs = run_session(serving_session(variant.model), made.golden.images)
        expected = made.golden.probabilities[variant.precision]
        np.testing.assert_array_equal(expected, outputs.probabilities)


@pytest.mark.full
def test_network_without_convolutions_stays_fp32_and_says_why(
    split: Split, sets: Sets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(create, "in_fresh_process", lambda function, *given: function(*given))
    config = make_config("classic", {"arch": "mlp", "epochs": 3, "validation": 0})
    checkpoint = trained(config, split)
    releases = [
        make_release(checkpoint, sets, precision=precision, reporter=Silent())
        for precision in ("fp32", "best")
    ]
    assert [[v.precision for v in each.variants] for each in releases] == [["fp32"], ["fp32"]]
    assert "fp32 was asked for" in releases[0].left_out
    assert "no convolution" in releases[1].left_out
    assert not is_quantizable(releases[0].variants[0].model)


@pytest.mark.full
def test_failing_int8_is_left_out_with_its_reason_unless_it_was_asked_for(
    checkpoint: Checkpoint, sets: Sets, references: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any, images: np.ndarray) -> bytes:
        return altered(quantize_model(model, images), "head.weight", np.zeros_like)

    monkeypatch.setattr(create, "quantize_model", broken)
    monkeypatch.setattr(create, "make_references", lambda *_: references)
    monkeypatch.setattr(create, "in_fresh_process", lambda function, *given: function(*given))

    def make(precision: str) -> Any:
        return make_release(checkpoint, sets, precision=precision, reporter=Silent())

    made = make("best")
    assert [variant.precision for variant in made.variants] == ["fp32"]
    assert made.left_out.startswith("it did not pass its gate: weights: ")
    with pytest.raises(GateError, match="int8: weights"):
        make("int8")
