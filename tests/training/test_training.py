from __future__ import annotations

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.conftest import SAMPLES
from training import __main__ as command
from training import commands, sets
from training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from training.config import TrainingConfig, make_config
from training.corruptions import CORRUPTIONS
from training.data import Split, hold_out
from training.evaluate import (
    evaluate,
    evaluate_corruptions,
    predict,
    predict_logits,
)
from training.model import Classifier
from training.report import CAPTIONS
from training.train import Trainer

QUICK = TrainingConfig(epochs=2, batch_size=50, seed=3, validation=0, drawn=0, not_digits=False)


def judged(model: Any, split: Any) -> Any:
    return evaluate(predict_logits(model, split.images), split.labels)


def quiet() -> Any:
    return Console(file=io.StringIO())


def state_of(model: Any) -> dict[Any, Any]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def train(config: Any, split: Any, console: Any = None) -> tuple[Any, Trainer]:
    nothing = Split(split.images[:0], split.labels[:0])
    trainer = Trainer(config, split, nothing, console or quiet())
    return trainer.run(), trainer


def assert_same_weights(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_same_seed_gives_the_same_weights(split: Split) -> None:
    first, second = (state_of(train(QUICK, split)[0]) for _ in range(2))
    assert_same_weights(first, second)


def test_another_seed_gives_other_weights(split: Split) -> None:
    first = state_of(train(QUICK, split)[0])
    other = state_of(train(replace(QUICK, seed=4), split)[0])
    assert not torch.equal(first["network.1.0.weight"], other["network.1.0.weight"])


def test_training_learns_and_reports_each_epoch(split: Split) -> None:
    output = io.StringIO()
    config = replace(QUICK, epochs=15, ema_decay=0.9)
    kept, held = hold_out(split, 100)
    trainer = Trainer(config, kept, held, Console(file=output, width=150))
    assert evaluate(predict_logits(trainer.run(), split.images), split.labels)["accuracy"] > 0.9
    lines = [line for line in output.getvalue().splitlines() if line.startswith("epoch")]
    assert len(lines) == len(trainer.history) == 15
    assert "images/s  validation" in lines[0]
    assert trainer.seconds > 0


def test_classic_recipe_prints_its_running_loss(split: Split) -> None:
    output = io.StringIO()
    config = make_config("classic", {"arch": "conv16", "epochs": 1, "batch_size": 2})
    train(config, split, Console(file=output, width=150))
    lines = [line for line in output.getvalue().splitlines() if " batch " in line]
    assert [line.split()[3] for line in lines] == ["100/250", "200/250"]


def test_classic_recipe_takes_plain_sgd_with_its_usual_rate() -> None:
    assert make_config("classic", {"optimizer": "sgd"}).max_lr == 0.01
    assert make_config("classic", {"optimizer": "sgd", "max_lr": 0.1}).max_lr == 0.1
    assert make_config("classic", {}).max_lr == 1e-3


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_every_optimizer_lowers_the_loss(split: Split, optimizer: str) -> None:
    rate = 0.02 if optimizer == "sgd" else 1e-3
    config = make_config(
        "classic", {"arch": "mlp", "optimizer": optimizer, "max_lr": rate, "epochs": 4}
    )
    _, trainer = train(config, split)
    assert trainer.history[-1]["loss"] < 0.8 * trainer.history[0]["loss"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"epochs": 0}, "epochs: expected 1 to 10000, got 0"),
        ({"kernel_size": 4}, "kernel_size: expected one of 3, 5, got 4"),
        ({"optimizer": "lion"}, "optimizer: expected one of adamw, adam, sgd, got 'lion'"),
        ({"max_lr": float("nan")}, "max_lr: expected"),
        ({"dropout": 1.0}, "dropout: expected"),
    ],
)
def test_setting_out_of_bounds_is_refused_by_name(setting: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config("default", setting)


def test_unknown_recipe_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="recipe: expected one of default, classic, got 'x'"):
        make_config("x", {})


def test_split_smaller_than_a_batch_is_refused(split: Split) -> None:
    with pytest.raises(ValueError, match="batch_size: expected at most 10, got 50"):
        train(QUICK, Split(split.images[:10], split.labels[:10]))


def test_held_out_images_are_not_trained_on_and_are_always_the_same(split: Split) -> None:
    kept, held = hold_out(split, 120)
    assert (len(kept), len(held)) == (380, 120)
    everything = {image.numpy().tobytes() for image in split.images}
    train_side = {image.numpy().tobytes() for image in kept.images}
    held_side = {image.numpy().tobytes() for image in held.images}
    assert train_side | held_side == everything
    assert not train_side & held_side
    assert torch.equal(hold_out(split, 120)[1].images, held.images)


@pytest.mark.parametrize("recipe", ["default", "classic"])
def test_interrupted_run_resumes_to_the_same_weights(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.setattr(sets, "load_split", lambda *_: split)
    flags = [f"--recipe={recipe}", "--epochs=3", "--batch-size=50", "--no-not-digits"]
    flags += ["--validation=50"]
    flags += ["--arch=conv32-64-128", "--dropout=0.3"]  # dropout draws from the global generator
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command.main([*flags, f"--run-dir={whole}"]) == 0
    real, calls = Trainer._epoch, []

    def interrupted(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "_epoch", interrupted)
    assert command.main([*flags, f"--run-dir={broken}"]) == 130
    assert not (broken / "checkpoint.pt").exists()
    monkeypatch.setattr(Trainer, "_epoch", real)
    assert command.main([*flags, f"--run-dir={broken}", "--resume"]) == 0
    first, second = (load_checkpoint(run / "checkpoint.pt") for run in (whole, broken))
    assert_same_weights(state_of(first.model), state_of(second.model))
    assert len(second.metrics["history"]) == 3


def test_resuming_another_configuration_is_refused(
    split: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sets, "load_split", lambda *_: split)
    flags = ["--arch=mlp", "--recipe=classic", "--validation=50", f"--run-dir={tmp_path}"]
    assert command.main([*flags, "--epochs=1"]) == 0
    assert command.main([*flags, "--epochs=2", "--resume"]) == 1
    assert "was saved by another configuration" in capsys.readouterr().err


def test_resuming_nothing_is_refused(
    split: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sets, "load_split", lambda *_: split)
    assert command.main([f"--run-dir={tmp_path}", "--validation=0", "--resume"]) == 1
    assert "state.pt: no such file: no epoch was finished" in capsys.readouterr().err


def test_temperature_is_fitted_on_validation_and_applied(split: Split) -> None:
    model, _ = train(replace(QUICK, epochs=10, ema_decay=0.9), split)
    before = predict_logits(model, split.images)
    nll = judged(model, split)["nll"]
    commands.calibrate(model, split)
    temperature = float(model.temperature)
    assert temperature != 1
    torch.testing.assert_close(predict_logits(model, split.images) * temperature, before)
    assert judged(model, split)["nll"] < nll
    best = judged(model, split)["nll"]
    for other in (temperature * 0.9, temperature * 1.1):
        model.temperature.fill_(other)
        assert judged(model, split)["nll"] > best


def test_predictions_do_not_depend_on_the_batch_size(split: Split) -> None:
    model = Classifier(TrainingConfig.arch)
    whole = predict(model, split.images, 500)[0]
    torch.testing.assert_close(predict(model, split.images, 7)[0], whole, atol=1e-5, rtol=1e-5)


def checkpoint_of(model: Any, split: Any, config: Any = QUICK) -> Checkpoint:
    return Checkpoint(
        model=model,
        config=config,
        metrics={"validation": judged(model, split), "train_seconds": 1.0},
        dataset_sha256={"train": split.digest(), "test": split.digest()},
        versions={"torch": str(torch.__version__)},
        source_commit="unknown",
    )


def test_checkpoint_comes_back_as_it_was(split: Split, tmp_path: Path) -> None:
    model, _ = train(QUICK, split)
    saved = checkpoint_of(model, split)
    save_checkpoint(saved, tmp_path / "run/checkpoint.pt")
    loaded = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert (loaded.config, loaded.metrics) == (saved.config, saved.metrics)
    assert torch.equal(
        predict_logits(loaded.model, split.images), predict_logits(model, split.images)
    )


def test_checkpoint_that_is_not_there_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="run 'make train' first"):
        load_checkpoint(tmp_path / "none.pt")


def test_damaged_checkpoint_is_refused(split: Split, tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(checkpoint_of(Classifier(TrainingConfig.arch), split), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(path)


def test_checkpoint_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return (print, ("ran",))

    path = tmp_path / "checkpoint.pt"
    torch.save({"schema_version": 4, "weights": Payload()}, path)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(path)


def width_of(path: Any) -> Any:
    with Image.open(path) as picture:
        return picture.size[0]


def test_command_trains_and_leaves_a_report(
    split: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sets, "load_split", lambda *_: split)
    run = tmp_path / "run"
    arguments = ["--epochs=2", "--batch-size=50", "--validation=60", f"--run-dir={run}"]
    assert command.main(arguments) == 0
    loaded = load_checkpoint(run / "checkpoint.pt")
    assert (loaded.config.epochs, loaded.config.validation) == (2, 60)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["validation"]["images"] == 60
    assert np.isfinite(metrics["validation"]["nll"])
    assert set(metrics["validation"]["corruptions"]) == set(CORRUPTIONS)
    assert metrics["machine"]["threads"] >= 1
    assert metrics["selection"].endswith("temperature fitted to 60 validation images")
    assert len(metrics["history"]) == 2
    page = (run / "report.html").read_text()
    for name in ("curves", "confusion", "misclassified", "filters", "features", "reliability"):
        assert width_of(run / f"{name}.png") > 200
        assert CAPTIONS[name] in page
    assert page.count("data:image/png;base64,") == 7
    assert "://" not in page
    assert "validation accuracy" in capsys.readouterr().out
    assert command.main(["evaluate", str(run)]) == 0
    assert "of 500 mnist test images" in capsys.readouterr().out
    assert json.loads((run / "test.json").read_text())["mnist"]["images"] == 500


def test_report_of_a_network_without_convolutions_leaves_the_filters_out(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "load_split", lambda *_: split)
    flags = ["--arch=mlp", "--recipe=classic", "--epochs=1", "--validation=0"]
    assert command.main([*flags, f"--run-dir={tmp_path}"]) == 0
    assert not (tmp_path / "filters.png").exists()
    assert (tmp_path / "report.html").is_file()


@pytest.mark.full
def test_compare_averages_the_runs_of_an_architecture(
    split: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sets, "load_split", lambda *_: split)
    runs = []
    for arch, seed in (("mlp", 0), ("mlp", 1), ("conv16", 0)):
        runs.append(str(tmp_path / f"{arch}-{seed}"))
        flags = ["--recipe=classic", "--epochs=2", "--validation=50", f"--seed={seed}"]
        assert command.main([*flags, f"--arch={arch}", f"--run-dir={runs[-1]}"]) == 0
    capsys.readouterr()
    out = tmp_path / "out"
    # As a pattern gives them: with a file, a folder that is no run, and a link to a run.
    (tmp_path / "comparison.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "conv16-0")
    everything = sorted(str(path) for path in tmp_path.iterdir())
    assert command.main(["compare", *everything, f"--out={out}"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("skipped ") == 2
    [mlp_row] = [line for line in printed.splitlines() if line.startswith("| mlp")]
    cells = [cell.strip() for cell in mlp_row.split("|")[1:-1]]
    assert (cells[1], cells[2], cells[-1]) == ("101,770", "0.10 M", "2 of 2 epochs")
    assert all(float(cost) > 0 for cost in cells[3:7])
    assert "±" in cells[7]
    assert width_of(out / "comparison.png") > 800
    written = json.loads((out / "comparison.json").read_text())
    assert sorted((row["arch"], row["runs"]) for row in written["rows"]) == [
        ("conv16 (classic)", 1), ("mlp (classic)", 2),
    ]  # fmt: skip
    assert " over " not in printed  # one seed is shared: it says nothing


def test_explain_draws_the_steps_of_a_real_digit(split: Split, tmp_path: Path) -> None:
    save_checkpoint(
        checkpoint_of(Classifier(TrainingConfig.arch), split), tmp_path / "checkpoint.pt"
    )
    arguments = [f"--run-dir={tmp_path}", f"--out={tmp_path / 'out'}"]
    assert command.main(["explain", str(SAMPLES / "7.png"), *arguments]) == 0
    for name in ("steps", "layers"):
        assert width_of(tmp_path / f"out/{name}.png") > 500


def test_explain_of_what_is_no_digit_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["explain", __file__, f"--run-dir={tmp_path}"]) == 1
    assert "expected a PNG, JPEG, WebP or BMP file" in capsys.readouterr().err


@pytest.mark.full
def test_accuracy_is_told_for_every_corruption(split: Split) -> None:
    model, _ = train(replace(QUICK, epochs=15, ema_decay=0.9), split)
    accuracy = evaluate_corruptions(partial(predict_logits, model), split)
    assert set(accuracy) == set(CORRUPTIONS)
    assert accuracy["thick strokes"] > 0.6
    assert all(0 <= value <= 1 for value in accuracy.values())


@pytest.mark.parametrize(
    ("flags", "expected"), [([], True), (["--no-bfloat16"], False), (["--recipe=classic"], False)]
)
def test_default_recipe_takes_bfloat16_where_the_device_has_it(
    flags: Any, expected: bool, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sets, "load_split", lambda *_: split)
    monkeypatch.setattr(commands, "has_bfloat16", lambda _: True)
    flags = [*flags, "--arch=mlp", "--epochs=1", "--validation=50", "--drawn=0"]
    assert command.main([*flags, "--no-not-digits", f"--run-dir={tmp_path / 'run'}"]) == 0
    assert load_checkpoint(tmp_path / "run/checkpoint.pt").config.bfloat16 is expected


@pytest.mark.parametrize("bfloat16", [False, True])
def test_bfloat16_computes_in_it_and_keeps_float32_weights(
    split: Split, bfloat16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    forward = torch.nn.Conv2d.forward

    def noted(layer: Any, images: Any) -> Any:
        result = forward(layer, images)
        seen.add(result.dtype)
        return result

    monkeypatch.setattr(torch.nn.Conv2d, "forward", noted)
    model, _ = train(replace(QUICK, bfloat16=bfloat16), split)
    assert (torch.bfloat16 in seen) == bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
