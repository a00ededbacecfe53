"""A student learns what its teachers say, not the label."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from training import __main__ as command
from training.checkpoint import Checkpoint, CheckpointError, build_classifier, save_checkpoint
from training.compare import compare
from training.config import TrainingConfig
from training.data import Split
from training.evaluate import predict_logits
from training.teachers import Teachers, load_teachers
from training.train import Trainer

CONFIG = TrainingConfig(
    epochs=25, batch_size=50, validation=0, ema_decay=0.9, augment=False, label_smoothing=0.0
)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def split(sample):
    return Split(torch.from_numpy(sample["images"]), torch.from_numpy(sample["labels"]))


def checkpoint_of(config, model):
    return Checkpoint(model.eval(), config, {}, {}, {}, "unknown")


def untrained(arch, seed):
    """Its batch norms and its temperature say something, as those of a trained one do."""
    torch.manual_seed(seed)
    config = TrainingConfig(arch=arch)
    model = build_classifier(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-1, 1)
            module.running_var.uniform_(0.5, 2)
    model.temperature.fill_(0.5)
    return checkpoint_of(config, model)


def trained(config, split, teachers=()):
    nothing = Split(split.images[:0], split.labels[:0])
    return Trainer(config, split, nothing, Console(file=io.StringIO()), teachers=teachers).run()


def test_teachers_say_the_mean_at_the_temperature_they_were_trained_with(split):
    checkpoints = [untrained("strided", 0), untrained("strided", 1), untrained("conv16", 2)]
    expected = torch.stack(
        [
            (predict_logits(each.model, split.images) * 0.5).softmax(dim=1)  # undone
            for each in checkpoints
        ]
    ).mean(dim=0)
    said = Teachers(checkpoints, CPU, bfloat16=False).probabilities(split.images)
    torch.testing.assert_close(said, expected, atol=1e-5, rtol=1e-4)


def test_student_learns_from_its_teacher_and_not_from_labels(split):
    teacher = trained(CONFIG, split)
    wrong = Split(split.images, (split.labels + 1) % 10)
    student = trained(replace(CONFIG, seed=1), wrong, [checkpoint_of(CONFIG, teacher)])
    agreed = predict_logits(student, split.images).argmax(dim=1)
    assert (agreed == split.labels).float().mean() > 0.9


def test_teachers_of_other_data_are_refused_by_name(tmp_path):
    path = tmp_path / "fashion.pt"
    made = untrained("mlp", 0)
    save_checkpoint(replace(made, config=replace(made.config, dataset="fashion-mnist")), path)
    expected = r"fashion.pt: expected one of mnist, got one of fashion-mnist"
    with pytest.raises(CheckpointError, match=expected):
        load_teachers([path], "mnist")


def test_comparison_keeps_students_apart(tmp_path):
    runs = []
    for number, teachers in enumerate([(), ("0" * 64,)]):
        made = untrained("mlp", number)
        config = replace(made.config, teachers=teachers)
        metrics = {"validation": {"accuracy": 0.9}, "train_seconds": 1.0}
        runs.append(tmp_path / str(number))
        save_checkpoint(replace(made, config=config, metrics=metrics), runs[-1] / "checkpoint.pt")
    assert {row["arch"] for row in compare(runs)[0]} == {"mlp", "mlp (taught)"}


def test_teacher_that_is_not_there_is_named(tmp_path, capsys):
    missing = tmp_path / "nobody.pt"
    assert command.main(["--teacher", str(missing), f"--run-dir={tmp_path / 'run'}"]) == 1
    assert f"{missing}: no such checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_settings_name_the_teachers_files(tmp_path):
    for name in ("one.pt", "two.pt"):
        save_checkpoint(untrained("mlp", 0), tmp_path / name)
    checkpoints, digests = load_teachers([tmp_path / "one.pt", tmp_path / "two.pt"], "mnist")
    config = replace(checkpoints[0].config, teachers=digests)
    assert TrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert len(checkpoints) == len(digests) == 2
    assert all(len(digest) == 64 for digest in digests)
