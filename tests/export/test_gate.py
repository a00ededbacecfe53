"""The gate passes a faithful export, and who guards it: every mutation has to be caught."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from export.check import GateReport, at_most, read_reports, write_reports
from export.graph import export_model
from export.parity import BATCH_SIZES, LEVELS, check_decisions, check_options, spread
from export.probes import near_ties
from export.sessions import Outputs, digest, run_session, serving_session
from service.artifact.errors import ArtifactError
from tests.export.conftest import CONFIG, LABELS, Caught, UntilCaught, trained
from training.checkpoint import Checkpoint
from training.data import Split
from training.evaluate import predict_logits


def initializer(proto: Any, ending: Any) -> Any:
    [found] = [t for t in proto.graph.initializer if t.name.endswith(ending)]
    return found


def changed(model: Any, ending: Any, change: Any) -> bytes:
    """The model with one stored tensor replaced."""
    proto = onnx.load_from_string(model)
    tensor = initializer(proto, ending)
    values = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    return proto.SerializeToString()


def test_gate_passes_a_faithful_export(gate: Callable[..., Any]) -> None:
    report = gate()
    assert report.failed == []
    names = {(check.group, check.name) for check in report.checks}
    for size in BATCH_SIZES[1:]:
        assert ("batches", f"batch of {size} against 1") in names
    for level in LEVELS:
        assert ("options", f"optimisation {level}, 1 and 2 threads, arena on and off") in names
    for group in ("test", "training", "corrupted", "adversarial"):
        assert (f"{group} images", "largest error to float64") in names
    assert ("near ties", "images decided otherwise") in names
    assert ("determinism", "distinct answers of 3 processes") in names


def nudged(row: Any) -> Callable[..., Any]:
    def change(values: Any) -> Any:
        values.reshape(-1)[row % values.size] += 1e-3
        return values

    return change


def swapped(values: Any) -> Any:
    values[[0, 1]] = values[[1, 0]]
    return values


MUTATIONS = {
    "another scale": ("network.1.convolution.weight", lambda v: v * 1.02),
    "temperature not applied": ("head.weight", lambda v: v * 0.8),
    "two classes swapped": ("head.weight", swapped),
    "a bias forgotten": ("head.bias", np.zeros_like),
    "a stem weight 1e-3 off": ("network.1.convolution.weight", nudged(5)),
    "a middle weight 1e-3 off": ("network.3.0.weight", nudged(9000)),
    "a deep weight 1e-3 off": ("network.4.0.weight", nudged(20_000)),
    "a last weight 1e-3 off": ("head.weight", nudged(1500)),
    "a folded norm 1e-3 off": ("network.2.0.bias", nudged(7)),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_gate_catches_changed_numbers(mutation: str, model: Any, gate: Callable[..., Any]) -> None:
    mutant = changed(model, *MUTATIONS[mutation])
    assert mutant != model
    with pytest.raises(Caught, match=r"test images: largest"):
        gate(mutant, reporter=UntilCaught())


def test_gate_catches_another_probability_of_being_a_digit(
    model: Any, gate: Callable[..., Any]
) -> None:
    mutant = changed(model, "is_digit.weight", nudged(3))
    with pytest.raises(Caught, match="is_digit, error to float64"):
        gate(mutant, reporter=UntilCaught())


def test_gate_catches_transposed_images(model: Any, gate: Callable[..., Any]) -> None:
    proto = onnx.load_from_string(model)
    first = proto.graph.node[0]
    turned = onnx.helper.make_node("Transpose", ["image"], ["turned"], perm=[0, 2, 1])
    first.input[0] = "turned"
    proto.graph.node.insert(0, turned)
    with pytest.raises(Caught, match="test images: largest"):
        gate(proto.SerializeToString(), reporter=UntilCaught())


def test_gate_catches_an_answer_that_depends_on_its_batch_mates(
    model: Any, gate: Callable[..., Any]
) -> None:
    """The image's mean is taken over the batch: right for one image alone, wrong beside others."""
    proto = onnx.load_from_string(model)
    [node] = [n for n in proto.graph.node if n.op_type == "Split"]
    logits = node.input[0]
    mean = onnx.helper.make_node("ReduceMean", [logits], ["batch_mean"], keepdims=1)
    zero = onnx.helper.make_node("Mul", ["batch_mean", "tiny"], ["drift"])
    added = onnx.helper.make_node("Add", [logits, "drift"], ["drifted"])
    proto.graph.initializer.append(numpy_helper.from_array(np.array(1e-4, np.float32), "tiny"))
    node.input[0] = "drifted"
    at = list(proto.graph.node).index(node)
    for number, new in enumerate((mean, zero, added)):
        proto.graph.node.insert(at + number, new)
    report = gate(proto.SerializeToString())
    assert "batches: batch of 2 against 1" in report.failed
    assert "batches: neighbours replaced by noise" in report.failed


def test_gate_catches_a_dropped_softmax(model: Any, gate: Callable[..., Any]) -> None:
    proto = onnx.load_from_string(model)
    [softmax] = [node for node in proto.graph.node if node.op_type == "Softmax"]
    softmax.op_type = "Identity"
    del softmax.attribute[:]
    with pytest.raises(Caught, match="probability error to softmax"):
        gate(proto.SerializeToString(), reporter=UntilCaught())


@pytest.mark.full
def test_gate_catches_a_stale_file(
    checkpoint: Checkpoint, split: Split, gate: Callable[..., Any]
) -> None:
    other = trained(replace(CONFIG, seed=1, epochs=2), split)
    with pytest.raises(Caught, match="fresh process"):
        gate(
            export_model(other.model, name="digits", labels=LABELS),
            again=b"",
            reporter=UntilCaught(),
        )
    with pytest.raises(Caught, match="test images"):
        gate(export_model(other.model, name="digits", labels=LABELS), reporter=UntilCaught())


def test_gate_catches_a_truncated_file(model: Any, gate: Callable[..., Any]) -> None:
    with pytest.raises(Caught, match="onnx checker"):
        gate(model[:-1000], reporter=UntilCaught())


def test_gate_catches_a_fixed_batch_axis(model: Any, gate: Callable[..., Any]) -> None:
    proto = onnx.load_from_string(model)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    with pytest.raises(Caught, match="structure"):
        gate(proto.SerializeToString(), reporter=UntilCaught())


def test_gate_catches_wrong_labels_in_the_data(gate: Callable[..., Any], split: Split) -> None:
    wrong = Split(split.images, (split.labels + 1) % 10)
    with pytest.raises(Caught, match="confusion matrix"):
        gate(test=wrong, reporter=UntilCaught())


def test_gate_catches_two_exchanged_labels(
    gate: Callable[..., Any], checkpoint: Checkpoint, split: Split
) -> None:
    labels = split.labels.clone()
    right = predict_logits(checkpoint.model, split.images).argmax(dim=1) == labels
    rows = [int(((labels == digit) & right).nonzero()[0]) for digit in (3, 8)]
    labels[rows] = labels[rows[::-1]]
    with pytest.raises(Caught, match="confusion matrix"):
        gate(test=Split(split.images, labels), reporter=UntilCaught())


def test_gate_catches_wrong_labels_in_the_file(model: Any, gate: Callable[..., Any]) -> None:
    proto = onnx.load_from_string(model)
    for entry in proto.metadata_props:
        if entry.key == "labels":
            entry.value = json.dumps(list("1234567890"))
    with pytest.raises(Caught, match="metadata"):
        gate(proto.SerializeToString(), reporter=UntilCaught())


def test_gate_catches_nan(model: Any, gate: Callable[..., Any]) -> None:
    def spoil(values: Any) -> Any:
        values[0] = np.nan
        return values

    mutant = changed(model, "head.bias", spoil)
    with pytest.raises(Caught, match="NaN or infinite"):
        gate(mutant, reporter=UntilCaught())


@pytest.mark.parametrize(
    ("spoil", "name"),
    [
        (lambda p: setattr(p.graph.node[0], "doc_string", "/home/someone/model.py"), "paths"),
        (lambda p: setattr(p.opset_import[0], "version", 19), "operator sets"),
        (lambda p: setattr(p, "ir_version", 9), "IR version"),
        (lambda p: p.opset_import.add(domain="com.microsoft", version=1), "sets.*com.microsoft"),
        (lambda p: p.metadata_props.add(key="host", value="somewhere"), "metadata"),
        (lambda p: setattr(p.graph.output[1], "name", "scores"), "checker"),
    ],
)
def test_gate_catches_a_wrong_structure(
    spoil: Callable[..., Any], name: str, model: Any, gate: Callable[..., Any]
) -> None:
    proto = onnx.load_from_string(model)
    spoil(proto)
    with pytest.raises(Caught, match=name):
        gate(proto.SerializeToString(), reporter=UntilCaught())


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_weights_that_look_like_a_path_are_no_leak(model: Any, gate: Callable[..., Any]) -> None:
    proto = onnx.load_from_string(model)
    tensor = initializer(proto, "network.1.convolution.weight")
    tensor.raw_data = b"/home/someone/model.py".ljust(len(tensor.raw_data), b"x")
    assert "structure: paths or stack traces" not in gate(proto.SerializeToString()).failed


def test_gate_catches_a_second_export_that_differs(model: Any, gate: Callable[..., Any]) -> None:
    with pytest.raises(Caught, match="fresh process"):
        gate(again=model + b"\0", reporter=UntilCaught())


def test_near_ties_are_one_grey_level_from_another_digit(
    checkpoint: Checkpoint, split: Split
) -> None:
    def decide(images: np.ndarray) -> Any:
        return predict_logits(checkpoint.model, torch.from_numpy(images)).argmax(dim=1).numpy()

    images = near_ties(split.images.numpy(), decide)
    assert len(images) == len(split) // 20
    logits = predict_logits(checkpoint.model, torch.from_numpy(images)).sort(dim=1).values
    tied = logits[:, -1] - logits[:, -2]
    usual = predict_logits(checkpoint.model, split.images).sort(dim=1).values
    assert float(tied.median()) < 0.01 * float((usual[:, -1] - usual[:, -2]).median())


def test_digest_sees_every_bit(model: Any, split: Split) -> None:
    outputs = run_session(serving_session(model), split.images.numpy()[:8])
    before = digest(outputs)
    outputs.logits[3, 3] = np.nextafter(outputs.logits[3, 3], np.float32(np.inf))
    assert digest(outputs) != before


def test_report_is_one_check_a_line_and_reads_back() -> None:
    report = GateReport("abc", [at_most("a", "b", 1, 2), at_most("a", "c", float("nan"), 2)])
    assert report.failed == ["a: c"]
    data = write_reports({"fp32": report, "int8": report})
    assert read_reports(data) == {"fp32": report, "int8": report}
    assert sum(b'"group"' in line for line in data.splitlines()) == 4
    for content in (b'{"fp32": {"checks": 3}}', b"[]", b"{", b'{"int8": 3}'):
        with pytest.raises(ArtifactError, match="not a gate report"):
            read_reports(content)


def test_report_without_checks_has_not_passed() -> None:
    assert not GateReport("abc").passed


def test_decisions_are_judged_by_the_reference_error_not_by_the_model_s_own(
    references: Any,
) -> None:
    """A model that is far off may not excuse its flips as rounding."""
    reference = references[0]
    wrong = np.random.default_rng(0).normal(size=reference.trained.shape).astype(np.float32)
    softmax = torch.softmax(torch.from_numpy(wrong), dim=1).numpy()
    [decided, *_] = check_decisions(
        reference, Outputs(wrong, softmax, np.ones(len(wrong), np.float32))
    )
    assert not decided.passed
    assert int(decided.figure.split()[0]) > len(wrong) / 2


def test_nan_under_any_option_fails(
    model: Any, references: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nan(*_: Any) -> Outputs:
        zeros = np.zeros((8, 10), np.float32)
        return Outputs(np.full((8, 10), np.nan, np.float32), zeros, zeros[:, 0])

    monkeypatch.setattr("export.parity.run_session", nan)
    images, oracle = references[0].images[:8], references[0].oracle[:8]
    levels = [c for c in check_options(model, images, oracle, 1.0) if "optimisation" in c.name]
    assert len(levels) == len(LEVELS)
    assert not any(check.passed for check in levels)


def test_what_is_run_in_many_ways_is_spread_over_every_probe() -> None:
    assert spread(10, 400).tolist() == list(range(10))
    rows = spread(6_600, 400)
    assert (len(set(rows)), rows[0], rows[-1]) == (400, 0, 6_599)
