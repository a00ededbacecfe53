"""Digits of one's own: every form is read, what is wrong is told, and a release goes on."""

from __future__ import annotations

import gzip
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from service.artifact.format import load_artifact
from tests.conftest import REPOSITORY, SAMPLES
from training import __main__ as command
from training import sets
from training.checkpoint import CheckpointError, load_checkpoint
from training.data import DataError, Split
from training.evaluate import predict_logits
from training.own import MIN_OF_A_CLASS, read_own, train_and_test
from training.sets import Sets
from training.start import load_start


def idx(path: Any, array: Any, magic: Any) -> None:
    head = struct.pack(f">I{array.ndim}I", magic, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def as_npz(folder: Path, images: np.ndarray, labels: Any) -> Path:
    np.savez(folder / "own.npz", images=images, labels=labels)
    return folder / "own.npz"


def as_csv(folder: Path, images: np.ndarray, labels: Any) -> Path:
    rows = np.column_stack([labels, images.reshape(len(images), -1)])
    np.savetxt(folder / "own.csv", rows, "%d", delimiter=",", header="label,pixels", comments="")
    return folder / "own.csv"


def as_idx(folder: Path, images: np.ndarray, labels: Any) -> Path:
    idx(folder / "train-images-idx3-ubyte.gz", images, 0x803)
    idx(folder / "train-labels-idx1-ubyte.gz", labels, 0x801)
    return folder


@pytest.mark.parametrize("write", [as_npz, as_csv, as_idx])
def test_arrays_are_read_as_they_are(
    write: Callable[..., Any], sample: dict[str, np.ndarray], tmp_path: Path
) -> None:
    images, labels = sample["images"][:40], sample["labels"][:40]
    found = read_own(write(tmp_path, images, labels))
    assert np.array_equal(found.split.images.numpy(), images)
    assert np.array_equal(found.split.labels.numpy(), labels)


def test_folders_of_pictures_are_brought_to_the_form_that_serves(tmp_path: Path) -> None:
    for digit in range(10):
        (tmp_path / str(digit)).mkdir()
        picture = Image.open(SAMPLES / f"{digit}.png").convert("L")
        picture.resize((90, 90)).save(tmp_path / f"{digit}/large.jpg")
    (tmp_path / "3/broken.png").write_bytes(b"no picture")
    (tmp_path / "4/notes.txt").write_text("no picture either")
    found = read_own(tmp_path)
    assert found.split.labels.tolist() == list(range(10))
    assert found.split.images.shape == (10, 28, 28)
    assert [reason.partition(":")[0] for reason in found.skipped] == ["3/broken.png", "4/notes.txt"]
    remarks = "\n".join(found.remarks())
    assert "2 files were skipped" in remarks
    assert f"fewer than {MIN_OF_A_CLASS} images of 0, 1" in remarks


def test_duplicates_are_dropped_and_told(sample: dict[str, np.ndarray], tmp_path: Path) -> None:
    twice = np.concatenate([sample["images"][:30]] * 2)
    found = read_own(as_npz(tmp_path, twice, np.concatenate([sample["labels"][:30]] * 2)))
    assert (len(found.split), found.duplicates) == (30, 30)
    assert "30 duplicates were dropped" in found.remarks()


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": np.zeros((3, 28, 28))}, "expected images uint8"),
        ({"images": np.zeros((3, 14, 14), np.uint8)}, "expected images uint8"),
        ({"labels": np.array([1, 2, 10])}, "labels: expected 0 to 9, got 10 at 2"),
        ({"labels": np.array([1])}, "expected images uint8"),
        ({"images": np.zeros((0, 28, 28), np.uint8), "labels": np.zeros(0)}, "expected images"),
    ],
)
def test_arrays_of_another_form_are_refused(arrays: Any, said: str, tmp_path: Path) -> None:
    good = {"images": np.zeros((3, 28, 28), np.uint8), "labels": np.array([1, 2, 3])}
    with pytest.raises(DataError, match=said):
        read_own(as_npz(tmp_path, **(good | arrays)))


@pytest.mark.parametrize("name", ["none", "own.npz", "own.csv", "own.txt", "folder"])
def test_what_is_no_data_set_is_refused_by_name(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name != "none":
        path.write_bytes(b"1,2,3\n")
    with pytest.raises(DataError, match=rf"--data: .*{name}|expected a folder"):
        read_own(path)


def test_test_images_are_of_every_class_and_always_the_same(split: Split) -> None:
    train, test = train_and_test(split)
    assert len(train) + len(test) == len(split)
    assert set(test.labels.tolist()) == set(range(10))
    assert torch.equal(train_and_test(split)[1].images, test.images)
    one = Split(split.images[:1], split.labels[:1])
    with pytest.raises(DataError, match="expected at least 2 images, got 1"):
        train_and_test(one)


def test_own_images_are_repeated_in_a_mix_and_never_validated_with(split: Split) -> None:
    own = Split(255 - split.images[:50], split.labels[:50])
    kept, validation = Sets({"mnist": split, "own": own}, {}).hold_out(110)
    trained = [image.numpy().tobytes() for image in kept.images]
    assert len(validation) == 110
    assert not set(trained) & {image.numpy().tobytes() for image in validation.images}
    ours = {image.numpy().tobytes() for image in own.images} & set(trained)
    share = sum(image in ours for image in trained) / len(trained)
    assert 0.15 < share < 0.35


def test_validation_images_may_be_a_set_of_their_own(
    split: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sets, "load_split", lambda *_: split)
    held = as_npz(tmp_path, split.images.numpy()[:60], split.labels.numpy()[:60])
    flags = ["--recipe=classic", "--arch=mlp", "--epochs=1", f"--run-dir={tmp_path / 'run'}"]
    assert command.main([*flags, f"--validation-data={held}"]) == 0
    assert "60 of 60 validation images are trained on, too" in capsys.readouterr().out
    found = load_checkpoint(tmp_path / "run/checkpoint.pt")
    assert (found.config.validation, found.metrics["validation"]["images"]) == (0, 60)


def test_release_goes_on_as_the_function_that_it_is(split: Split) -> None:
    release = load_artifact(REPOSITORY / "2")
    model, sha256 = load_start(REPOSITORY / "2", split)
    assert sha256 == release.variants["fp32"].sha256
    images = torch.from_numpy(release.golden.images.copy())
    answers = predict_logits(model, images)
    expected = torch.from_numpy(release.golden.probabilities["fp32"])
    torch.testing.assert_close(answers.softmax(dim=1), expected, atol=1e-4, rtol=1e-3)
    model.train()  # as the first step of training sees it
    assert float((model(split.images).argmax(dim=1) == split.labels).float().mean()) > 0.98


def test_what_is_no_start_is_refused(split: Split, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "2", tmp_path / "2")
    (tmp_path / "2/model.fp32.onnx").unlink()
    for path in (tmp_path / "2", tmp_path):
        with pytest.raises(CheckpointError, match="expected a release with an fp32 model"):
            load_start(path, split)


def test_command_goes_on_from_a_release_and_compares(
    split: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sets, "load_split", lambda *_: split)
    monkeypatch.setattr("training.commands.load_split", lambda *_: split)
    mirrored = split.images.numpy()[::2, :, ::-1].copy()
    own = as_npz(tmp_path, mirrored, split.labels.numpy()[::2])
    flags = [f"--data={own}", f"--init={REPOSITORY / '2'}", f"--run-dir={tmp_path / 'run'}"]
    flags += ["--epochs=6", "--max-lr=1e-3", "--batch-size=25", "--validation=40"]
    assert command.main(flags) == 0
    printed = capsys.readouterr().out
    assert "250 images, by digit 0: " in printed
    [ours] = [line for line in printed.splitlines() if "own test images" in line]
    before, after = (float(percent) for percent in re.findall(r"([\d.]+)%", ours))
    assert after > before
    assert "500 mnist test images" in printed
    assert "own test images" in (tmp_path / "run/report.html").read_text()
