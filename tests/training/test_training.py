from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from rich.console import Console

from training import __main__ as command
from training import data
from training.checkpoint import Checkpoint, CheckpointError, load_checkpoint, save_checkpoint
from training.config import TrainingConfig
from training.data import DataError, Split, augment, load_split
from training.evaluate import evaluate, predict_logits, wilson_interval
from training.model import ARCHITECTURES, Classifier, parameter_count
from training.train import train

QUICK = TrainingConfig(epochs=2, batch_size=50, seed=3)


@pytest.fixture(scope="module")
def split(sample):
    return Split(torch.from_numpy(sample["images"]), torch.from_numpy(sample["labels"]))


def quiet():
    return Console(file=io.StringIO())


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_same_seed_gives_the_same_weights(split):
    first, second = (state_of(train(QUICK, split, quiet())[0]) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_another_seed_gives_other_weights(split):
    first = state_of(train(QUICK, split, quiet())[0])
    other = state_of(train(TrainingConfig(epochs=2, batch_size=50, seed=4), split, quiet())[0])
    assert not torch.equal(first["network.0.0.weight"], other["network.0.0.weight"])


def test_training_learns_and_reports_each_epoch(split):
    output = io.StringIO()
    config = TrainingConfig(epochs=15, batch_size=50, ema_decay=0.9)
    model, seconds = train(config, split, Console(file=output, width=120))
    assert evaluate(model, split)["accuracy"] > 0.9
    assert seconds > 0
    lines = [line for line in output.getvalue().splitlines() if line.startswith("epoch")]
    assert len(lines) == 15
    assert "images/s" in lines[0]


def test_split_smaller_than_a_batch_is_refused(split):
    with pytest.raises(ValueError, match="batch_size: expected at most 10, got 50"):
        train(QUICK, Split(split.images[:10], split.labels[:10]), quiet())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_maps_pixels_to_logits(arch):
    model = Classifier(arch).eval()
    with torch.inference_mode():
        logits = model(torch.zeros((3, 28, 28), dtype=torch.uint8))
    assert logits.shape == (3, 10)
    assert parameter_count(model) > 0


def test_unknown_architecture_is_refused_by_name():
    with pytest.raises(ValueError, match="arch: expected one of strided, got 'lenet'"):
        Classifier("lenet")


def test_normalisation_is_the_usual_mean_and_deviation(split):
    model = Classifier("strided").eval()
    images = split.images[:8]
    seen = []
    model.network.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.inference_mode():
        model(images)
    expected = (images.float() / 255 - 0.1307) / 0.3081
    torch.testing.assert_close(seen[0].squeeze(1), expected, atol=1e-5, rtol=1e-5)


def test_augmentation_is_seeded_and_keeps_shape_scale_and_background(split):
    pixels = split.images.float()
    first = augment(pixels, torch.Generator().manual_seed(1))
    again = augment(pixels, torch.Generator().manual_seed(1))
    other = augment(pixels, torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == pixels.shape
    assert 0 <= first.min() <= first.max() <= 255.001
    # Ink moves and changes size a little; it does not appear or vanish.
    ratio = first.mean(dim=(1, 2)) / pixels.mean(dim=(1, 2))
    assert 0.5 < ratio.min() < ratio.max() < 1.6


def test_predictions_do_not_depend_on_the_batch_size(split):
    model = Classifier("strided")
    whole = predict_logits(model, split.images, 500)
    torch.testing.assert_close(predict_logits(model, split.images, 7), whole, atol=1e-5, rtol=1e-5)


def test_evaluation_counts_by_hand(split):
    model = Classifier("strided")
    metrics = evaluate(model, split)
    predicted = predict_logits(model, split.images).argmax(dim=1).numpy()
    truth = split.labels.numpy()
    assert metrics["correct"] == int((predicted == truth).sum())
    for row in range(10):
        for column in range(10):
            cell = int(((truth == row) & (predicted == column)).sum())
            assert metrics["confusion"][row][column] == cell


def test_wilson_interval_matches_the_published_example():
    # 81 of 263: Newcombe 1998, Statistics in Medicine 17, table I, method 3.
    low, high = wilson_interval(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def checkpoint_of(model, split, config=QUICK):
    return Checkpoint(
        model=model,
        config=config,
        metrics=evaluate(model, split) | {"train_seconds": 1.0},
        dataset_sha256={"train": split.digest(), "test": split.digest()},
        versions={"torch": str(torch.__version__)},
        source_commit="unknown",
    )


def test_checkpoint_comes_back_as_it_was(split, tmp_path):
    model, _ = train(QUICK, split, quiet())
    saved = checkpoint_of(model, split)
    save_checkpoint(saved, tmp_path / "run/checkpoint.pt")
    loaded = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert (loaded.config, loaded.metrics) == (saved.config, saved.metrics)
    assert torch.equal(
        predict_logits(loaded.model, split.images), predict_logits(model, split.images)
    )


def test_checkpoint_that_is_not_there_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="run 'make train' first"):
        load_checkpoint(tmp_path / "none.pt")


def test_damaged_checkpoint_is_refused(split, tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(checkpoint_of(Classifier("strided"), split), path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(path)


def test_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (print, ("ran",))

    path = tmp_path / "checkpoint.pt"
    torch.save({"schema_version": 1, "weights": Payload()}, path)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(path)


def test_full_data_set_has_the_published_sizes(full_data):
    for name, size in (("train", 60_000), ("test", 10_000)):
        loaded = load_split("mnist", name, full_data)
        assert loaded.images.shape == (size, 28, 28)
        assert loaded.images.dtype == torch.uint8
        assert loaded.labels.unique().tolist() == list(range(10))


def test_truncated_data_set_is_refused(tmp_path, full_data):
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for path in (full_data / "MNIST/raw").iterdir():
        (raw / path.name).write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="mnist test split under"):
        load_split("mnist", "test", tmp_path)


def test_unknown_data_set_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="dataset: expected one of mnist, got 'cats'"):
        load_split("cats", "test", tmp_path)


def test_digest_depends_on_pixels_and_labels(split):
    images, labels = split.images.clone(), split.labels.clone()
    images[0, 0, 0] += 1
    labels[0] = (labels[0] + 1) % 10
    digests = {split.digest(), Split(images, split.labels).digest(),
               Split(split.images, labels).digest()}  # fmt: skip
    assert len(digests) == 3


def test_command_trains_and_leaves_checkpoint_and_metrics(split, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_split", lambda *_: split)
    run = tmp_path / "run"
    arguments = ["--epochs=2", "--batch-size=50", f"--run-dir={run}", "--seed=3"]
    assert command.main(arguments) == 0
    loaded = load_checkpoint(run / "checkpoint.pt")
    assert loaded.config == QUICK
    assert np.isfinite(loaded.metrics["nll"])
    assert (run / "metrics.json").is_file()
    assert "test accuracy" in capsys.readouterr().out


def test_command_without_data_fails_with_a_clear_error(tmp_path, monkeypatch, capsys):
    def nothing(*_, **__):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setitem(data.DATASETS, "mnist", nothing)
    assert command.main([f"--data-dir={tmp_path}"]) == 1
    assert "training: mnist train split under" in capsys.readouterr().err
