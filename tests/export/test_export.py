"""Export end to end on real digits, and the gate against models that are wrong."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from rich.console import Console

from export import __main__ as command
from export.artifact import next_version, write_artifact
from export.gate import BATCH_SIZES, run_gate
from export.golden import PER_CLASS, choose_golden
from export.graph import export_model
from service.artifact import MANIFEST, load_artifact, sha256
from service.engine import Engine
from service.model import load_model, versions
from tests.conftest import REPOSITORY
from training.checkpoint import Checkpoint, save_checkpoint
from training.config import TrainingConfig, make_config
from training.data import Split
from training.evaluate import evaluate
from training.model import ARCHITECTURES, Classifier
from training.train import Trainer

CONFIG = TrainingConfig(epochs=12, batch_size=50, ema_decay=0.9, validation=0)


@pytest.fixture(scope="module")
def split(sample):
    return Split(torch.from_numpy(sample["images"]), torch.from_numpy(sample["labels"]))


def trained(config, split):
    nothing = Split(split.images[:0], split.labels[:0])
    trainer = Trainer(config, split, nothing, Console(file=io.StringIO()))
    model = trainer.run()
    model.temperature.fill_(0.8)
    return Checkpoint(
        model=model,
        config=config,
        metrics=evaluate(model, split)
        | {"train_seconds": trainer.seconds, "temperature": 0.8, "corruptions": {}},
        dataset_sha256={"train": split.digest(), "test": split.digest()},
        versions={"torch": str(torch.__version__)},
        source_commit="unknown",
    )


@pytest.fixture(scope="module")
def checkpoint(split):
    return trained(CONFIG, split)


@pytest.fixture(scope="module")
def model(checkpoint):
    return export_model(checkpoint.model, name="digits")


def gate(model, checkpoint, split, **changed):
    arguments = {
        "export_again": lambda: model,
        "classifier": checkpoint.model,
        "split": split,
        "recorded_correct": checkpoint.metrics["correct"],
        "on_check": lambda _: None,
    }
    return run_gate(model, **(arguments | changed))


def failures(report):
    return [check.name for check in report.checks if not check.passed]


def test_gate_passes_a_faithful_export_at_every_batch_size(model, checkpoint, split):
    report = gate(model, checkpoint, split)
    assert failures(report) == []
    for size in BATCH_SIZES:
        assert any(f"same decision, batch {size}" == check.name for check in report.checks)


def test_one_checkpoint_exports_to_the_same_bytes(model, checkpoint):
    assert export_model(checkpoint.model, name="digits") == model


def test_same_checkpoint_exports_to_the_same_bytes_in_another_process(model, checkpoint, tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(checkpoint, path)
    code = (
        "import sys; from export.graph import export_model; from pathlib import Path;"
        "from training.checkpoint import load_checkpoint;"
        f"model = load_checkpoint(Path({str(path)!r})).model;"
        "sys.stdout.buffer.write(export_model(model, name='digits'))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], cwd=tmp_path)
    assert sha256(output) == sha256(model)


def test_graph_takes_raw_bytes_and_says_so(model):
    proto = onnx.load_from_string(model)
    [image] = proto.graph.input
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert "Softmax" in {node.op_type for node in proto.graph.node}
    assert {p.key for p in proto.metadata_props} == {"labels", "input"}
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)


def other_classifier(checkpoint, change):
    """The same weights, changed; the gate compares the model with it as if it was trained."""
    changed = Classifier(CONFIG.arch).eval()
    changed.load_state_dict(checkpoint.model.state_dict())
    with torch.no_grad():
        change(changed)
    return changed


def swap_classes(model):
    weight, bias = model.network[-1].weight, model.network[-1].bias
    order = [1, 0, *range(2, 10)]
    weight.copy_(weight[order].clone())
    bias.copy_(bias[order].clone())


def nudge_a_weight(model):
    model.network[0][0].weight[0, 0, 1, 1] += 1e-3


def forget_the_temperature(model):
    model.temperature.fill_(1.0)


@pytest.mark.parametrize("change", [swap_classes, nudge_a_weight, forget_the_temperature])
def test_gate_fails_when_the_model_is_not_the_trained_one(model, checkpoint, split, change):
    report = gate(model, checkpoint, split, classifier=other_classifier(checkpoint, change))
    assert any("logit difference" in name for name in failures(report))


def test_gate_fails_on_another_normalisation(checkpoint, split, monkeypatch):
    monkeypatch.setattr(checkpoint.model, "shift", 0.5)
    wrong = export_model(checkpoint.model, name="digits")
    monkeypatch.undo()
    assert failures(gate(wrong, checkpoint, split))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_trains_exports_with_parity_and_serves(arch, split, tmp_path):
    config = make_config("classic", {"arch": arch, "epochs": 6, "validation": 0})
    checkpoint = trained(config, split)
    model = export_model(checkpoint.model, name="digits")
    report = gate(model, checkpoint, split)
    assert failures(report) == []
    golden = choose_golden(model, split)
    folder = write_artifact(tmp_path / "digits", model, golden, report, checkpoint)
    served = load_model(folder, "digits", "cpu", 1, 8)
    labels = served.engine.run(split.images.numpy()).argmax(axis=1)
    assert int((labels == split.labels.numpy()).sum()) == checkpoint.metrics["correct"]


def test_gate_fails_on_transposed_images(model, checkpoint, split):
    transposed = Split(split.images.transpose(1, 2).contiguous(), split.labels)
    report = gate(model, checkpoint, transposed)
    assert any("correct digits as trained" in name for name in failures(report))


def test_gate_fails_when_a_second_export_differs(model, checkpoint, split):
    report = gate(model, checkpoint, split, export_again=lambda: model + b"\0")
    assert "second export, sha256" in failures(report)


def test_gate_fails_on_a_fixed_batch_axis(model, checkpoint, split):
    proto = onnx.load_from_string(model)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    assert failures(gate(proto.SerializeToString(), checkpoint, split))


def test_gate_fails_on_missing_softmax(model, checkpoint, split):
    proto = onnx.load_from_string(model)
    [softmax] = [node for node in proto.graph.node if node.op_type == "Softmax"]
    softmax.op_type = "Identity"
    del softmax.attribute[:]
    report = gate(proto.SerializeToString(), checkpoint, split)
    assert any("softmax" in name or "sum to 1" in name for name in failures(report))


def test_gate_fails_on_build_paths(model, checkpoint, split):
    proto = onnx.load_from_string(model)
    proto.graph.node[0].doc_string = "File /home/someone/model.py, line 3"
    assert "paths or stack traces" in failures(gate(proto.SerializeToString(), checkpoint, split))


def test_weights_that_look_like_a_path_are_no_leak(model, checkpoint, split):
    proto = onnx.load_from_string(model)
    proto.graph.initializer[0].raw_data = b"/home/someone/model.py".ljust(
        len(proto.graph.initializer[0].raw_data), b"x"
    )
    report = gate(proto.SerializeToString(), checkpoint, split)
    assert "paths or stack traces" not in failures(report)


def test_gate_fails_on_a_truncated_file(model, checkpoint, split):
    assert failures(gate(model[:-1000], checkpoint, split))


def test_written_artifact_loads_serves_and_tells_how_it_was_made(
    model, checkpoint, split, tmp_path
):
    repository = tmp_path / "digits"
    report = gate(model, checkpoint, split)
    golden = choose_golden(model, split)
    folder = write_artifact(repository, model, golden, report, checkpoint)
    assert folder == repository / "1"
    assert sorted(p.name for p in repository.iterdir()) == ["1"]
    served = load_model(folder, "digits", "cpu", 1, 8)
    assert served.ref.sha256 == sha256(model)
    manifest = load_artifact(folder).manifest
    assert manifest["training"]["config"] == CONFIG.to_dict()
    assert manifest["accuracy"]["correct"] == checkpoint.metrics["correct"]
    assert json.loads((folder / "parity.json").read_text())["passed"] is True
    assert write_artifact(repository, model, golden, report, checkpoint).name == "2"


def test_failed_gate_can_not_be_written(model, checkpoint, split, tmp_path):
    report = gate(model, checkpoint, split, recorded_correct=1)
    golden = choose_golden(model, split)
    with pytest.raises(ValueError, match="nothing may be written"):
        write_artifact(tmp_path / "digits", model, golden, report, checkpoint)
    assert not (tmp_path / "digits").exists()


def test_failing_write_leaves_nothing_behind(model, checkpoint, split, tmp_path, monkeypatch):
    report, golden = gate(model, checkpoint, split), choose_golden(model, split)

    def full_disk(path, data):
        if path.name == MANIFEST:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr("export.artifact._write_synced", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_artifact(tmp_path / "digits", model, golden, report, checkpoint)
    assert list((tmp_path / "digits").iterdir()) == []


def test_golden_digits_cover_every_class_from_hard_to_easy(model, split):
    golden = choose_golden(model, split)
    assert np.bincount(golden.labels).tolist() == [PER_CLASS] * 10
    golden.check(Engine(model).run(golden.images))
    margins = np.sort(golden.probabilities, axis=1)
    spread = margins[:, -1] - margins[:, -2]
    assert spread.min() < spread.max()


def test_versions_count_up(tmp_path):
    assert next_version(tmp_path / "new") == 1
    for name in ("1", "9", "x", ".export-1"):
        (tmp_path / name).mkdir()
    assert next_version(tmp_path) == 10


@pytest.fixture
def run_command(checkpoint, split, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_split", lambda *_: split)
    path, repository = tmp_path / "checkpoint.pt", tmp_path / "digits"

    def run(saved=checkpoint):
        save_checkpoint(saved, path)
        arguments = [f"--checkpoint={path}", f"--model-repository={repository}"]
        return command.main(arguments), repository

    return run


def test_command_writes_a_version_and_shows_each_check(run_command, capsys):
    code, repository = run_command()
    assert code == 0
    assert load_artifact(repository / "1")
    printed = capsys.readouterr().out
    assert "pass  max |logit difference|, batch 64" in printed
    assert "wrote " in printed


def test_command_exits_with_1_and_writes_nothing_when_the_gate_fails(
    run_command, checkpoint, capsys
):
    wrong = Checkpoint(**{**vars(checkpoint), "metrics": checkpoint.metrics | {"correct": 7}})
    code, repository = run_command(wrong)
    assert code == 1
    assert not repository.exists()
    assert "gate failed, nothing was written" in capsys.readouterr().err


def test_command_refuses_other_data_than_it_was_trained_on(run_command, checkpoint, capsys):
    other = Checkpoint(**{**vars(checkpoint), "dataset_sha256": {"train": "x", "test": "y"}})
    code, repository = run_command(other)
    assert (code, repository.exists()) == (1, False)
    assert "train split: the checkpoint was made with x" in capsys.readouterr().err


def test_command_without_a_checkpoint_says_what_to_do(tmp_path, capsys):
    assert command.main([f"--checkpoint={tmp_path / 'none.pt'}"]) == 1
    assert "run 'make train' first" in capsys.readouterr().err


def test_default_model_is_accurate_and_says_how_it_was_made():
    for folder in versions(REPOSITORY):
        manifest = load_artifact(folder).manifest
        assert manifest["accuracy"]["accuracy"] >= 0.995
        assert manifest["accuracy"]["images"] == 10_000
        assert manifest["training"]["seconds"] <= 15 * 60
        assert "dirty" not in manifest["source_commit"]
