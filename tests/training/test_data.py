"""Data sets are what their authors published, or are rejected."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from training import __main__ as command
from training import data
from training.data import DataError, Split, load_split


def test_full_data_set_has_the_published_sizes(full_data: Path) -> None:
    for name, size in (("train", 60_000), ("test", 10_000)):
        loaded = load_split("mnist", name, full_data)
        assert loaded.images.shape == (size, 28, 28)
        assert loaded.images.dtype == torch.uint8
        assert loaded.labels.unique().tolist() == list(range(10))


def test_truncated_data_set_is_refused(tmp_path: Path, full_data: Path) -> None:
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for path in (full_data / "MNIST/raw").iterdir():
        (raw / path.name).write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match="mnist test split under"):
        load_split("mnist", "test", tmp_path)


def test_data_set_with_one_changed_byte_is_refused(tmp_path: Path, full_data: Path) -> None:
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for path in (full_data / "MNIST/raw").iterdir():
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        (raw / path.name).write_bytes(content)
    with pytest.raises(DataError, match="a damaged file"):
        load_split("mnist", "test", tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_every_data_set_loads(full_data: Path, name: str) -> None:
    if not (full_data / data.DATASETS[name].source.__name__).is_dir():
        pytest.skip(f"{name} is not under {full_data}")
    assert len(load_split(name, "test", full_data)) == 10_000


def test_digest_depends_on_pixels_and_labels(split: Split) -> None:
    images, labels = split.images.clone(), split.labels.clone()
    images[0, 0, 0] += 1
    labels[0] = (labels[0] + 1) % 10
    digests = {split.digest(), Split(images, split.labels).digest(),
               Split(split.images, labels).digest()}  # fmt: skip
    assert len(digests) == 3


def test_command_without_data_fails_with_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setitem(data.DATASETS, "mnist", replace(data.DATASETS["mnist"], source=nothing))
    assert command.main([f"--data-dir={tmp_path}"]) == 1
    assert "training: mnist train split under" in capsys.readouterr().err
