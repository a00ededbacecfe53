"""From a checkpoint to a release that loads and tells how it was made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from export import create
from export.check import GateError, read_reports
from export.create import make_release, publish
from export.golden import MIN_MARGIN, PER_CLASS, choose_golden
from export.graph import export_model
from export.judge import Comparison
from export.sessions import in_fresh_process
from service.artifact.format import PARITY, load_artifact
from service.artifact.golden import GOLDEN_TOLERANCE
from service.serving.loader import load_model
from tests.export.conftest import LABELS, Silent, correct, trained
from training.checkpoint import Checkpoint
from training.config import TrainingConfig, make_config
from training.data import DATASETS, Split
from training.model import ARCHITECTURES
from training.sets import Sets


@pytest.mark.full
def test_same_checkpoint_exports_to_the_same_bytes_in_another_process(
    model: Any, checkpoint: Checkpoint
) -> None:
    assert in_fresh_process(export_model_of, checkpoint.model) == model


def export_model_of(classifier: Any) -> Any:
    return export_model(classifier, name="digits", labels=LABELS)


def test_graph_takes_raw_bytes_and_says_so(model: Any) -> None:
    proto = onnx.load_from_string(model)
    [image] = proto.graph.input
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert "Softmax" in {node.op_type for node in proto.graph.node}
    assert {p.key for p in proto.metadata_props} == {"labels", "input"}
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)


@pytest.mark.full
@pytest.mark.parametrize("arch", [*ARCHITECTURES, TrainingConfig.arch])
def test_every_architecture_trains_exports_with_parity_and_serves(
    arch: Any, split: Split, sets: Sets, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # That another process exports the same bytes is shown above, once.
    monkeypatch.setattr(create, "in_fresh_process", lambda function, *given: function(*given))
    config = make_config("classic", {"arch": arch, "epochs": 6, "validation": 0})
    checkpoint = trained(config, split)
    made = make_release(checkpoint, sets, precision="fp32", reporter=Silent())
    folder = publish(tmp_path / "digits", made, Comparison(""))
    served = load_model(folder, "digits", device="cpu", intra_op_threads=1, max_batch_size=8)
    labels = served.engine.run(split.images.numpy()).argmax(axis=1)
    assert int((labels == split.labels.numpy()).sum()) == correct(checkpoint, split)


def test_written_release_loads_and_tells_how_it_was_made(
    repository: Path, checkpoint: Checkpoint, made: Any
) -> None:
    found = load_artifact(repository / "1")
    reports = read_reports((repository / "1" / PARITY).read_bytes())
    assert found.manifest["training"]["config"] == checkpoint.config.to_dict()
    assert found.manifest["training"]["selection"] == "weights of the last epoch"
    assert found.manifest["tools"].keys() >= {"python", "torch", "onnx", "onnxruntime"}
    for variant in made.variants:
        assert found.variants[variant.precision].accuracy == variant.accuracy
        assert reports[variant.precision].passed
        served = load_model(
            repository / "1", "digits", device="cpu", precision=variant.precision,
            intra_op_threads=1, max_batch_size=8,
        )  # fmt: skip
        assert served.precision == variant.precision


def test_golden_digits_cover_every_class_from_hard_to_easy(made: Any) -> None:
    assert np.bincount(made.golden.labels).tolist() == [PER_CLASS] * 10
    for precision, probabilities in made.golden.probabilities.items():
        top = np.sort(probabilities, axis=1)
        margins = top[:, -1] - top[:, -2]
        assert margins.min() > 2 * GOLDEN_TOLERANCE[precision]
        assert margins.min() >= MIN_MARGIN
        assert margins.min() < margins.max()


def test_model_that_misses_a_class_is_told_so(model: Any, split: Split) -> None:
    sevens = torch.where(split.labels == 7, 1, split.labels)
    wrong = Split(split.images, torch.where(split.labels == 1, 7, sevens))
    with pytest.raises(GateError, match="class '1': expected at least 3 training images that"):
        choose_golden({"fp32": model}, wrong, LABELS)


def test_fashion_model_has_its_own_name_and_labels(checkpoint: Checkpoint, made: Any) -> None:
    config = replace(checkpoint.config, dataset="fashion-mnist")
    other = replace(made, checkpoint=replace(checkpoint, config=config))
    assert other.candidate.name == "fashion-mnist"
    assert other.candidate.labels == DATASETS["fashion-mnist"].labels
    assert other.candidate.labels[9] == "Ankle boot"
