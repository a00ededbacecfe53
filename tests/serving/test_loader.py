"""Versions that do not hold are refused with their reason; the best that holds serves."""

from __future__ import annotations

import io
import os
import resource
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from service.artifact.errors import ArtifactError
from service.artifact.format import (
    MANIFEST,
    MAX_MODEL_BYTES,
    PARITY,
    load_artifact,
    sha256,
)
from service.artifact.golden import GOLDEN, Golden, read_golden, write_golden
from service.serving.loader import LOADED
from tests.conftest import REPOSITORY
from tests.releases import FP32, INT8, change_manifest, rewrite
from tests.serving.loading import DEFAULT, load, load_one


def test_default_version_loads_with_its_identity() -> None:
    model, results = load(REPOSITORY)
    assert model.name == "digits"
    assert (model.version, model.precision) == ("2", "int8")
    assert model.sha256 == sha256((REPOSITORY / "2" / INT8).read_bytes())
    assert model.provider == "CPUExecutionProvider"
    assert list(model.batch_seconds) == [1, 2, 4]
    assert results == [LOADED]


@pytest.mark.parametrize("name", [FP32, GOLDEN, PARITY])
def test_changed_file_is_refused_by_its_hash(repository: Path, name: Any) -> None:
    path = repository / "1" / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match=f"{name}: expected sha256"):
        load_artifact(path.parent)


@pytest.mark.parametrize("name", [FP32, GOLDEN, PARITY, MANIFEST])
def test_missing_file_is_refused_by_name(repository: Path, name: Any) -> None:
    (repository / "1" / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: No such file"):
        load_artifact(repository / "1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", 1),
        ("version", 7),
        ("opset", 12),
        ("labels", ["a"]),
        ("input", {}),
        ("labels", [*"012345678", "8"]),
        ("labels", [*"012345678", "\x1b[2J"]),
        ("labels", [*"012345678", 65 * "9"]),
        ("variants", {}),
        ("variants", None),
        ("variants", {"fp64": {}}),
    ],
)
def test_manifest_that_says_something_else_is_refused(
    repository: Path, field: str, value: Any
) -> None:
    change_manifest(repository / "1", **{field: value})
    with pytest.raises(ArtifactError, match=f"{field}: expected"):
        load_artifact(repository / "1")


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"schema_version": 1}', "null", "[" * 200_000, '{"x": NaN}']
)
def test_manifest_that_is_no_manifest_is_refused(repository: Path, content: Any) -> None:
    (repository / "1" / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match="manifest"):
        load_artifact(repository / "1")


def test_model_that_onnxruntime_refuses_is_refused(repository: Path) -> None:
    model = onnx.load(repository / "1" / FP32)
    model.graph.node[0].op_type = "NoSuchOperator"
    rewrite(repository / "1", FP32, model.SerializeToString())
    with pytest.raises(ArtifactError, match="onnxruntime rejects it"):
        load_one(repository / "1")


def rename(model: Any, old: Any, new: Any) -> None:
    for value in (*model.graph.input, *model.graph.output):
        value.name = new if value.name == old else value.name
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: rename(model, "image", "picture"), "inputs: expected"),
        (lambda model: model.graph.output.pop(0), "outputs: expected"),
    ],
)
def test_model_of_another_contract_is_refused(
    repository: Path, change: Callable[..., Any], message: str
) -> None:
    model = onnx.load(repository / "1" / FP32)
    change(model)
    rewrite(repository / "1", FP32, model.SerializeToString())
    with pytest.raises(ArtifactError, match=message):
        load_one(repository / "1")


@pytest.mark.parametrize("data", [b"not a model", b"", bytes(100)])
def test_model_that_is_no_model_is_refused(repository: Path, data: bytes) -> None:
    rewrite(repository / "1", FP32, data)
    with pytest.raises(ArtifactError, match=r"model\.fp32\.onnx"):
        load_one(repository / "1")


def test_golden_arrays_of_another_form_are_refused(repository: Path) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, images=np.zeros(3), labels=np.int64(3), probabilities=np.zeros(3))
    rewrite(repository / "1", GOLDEN, buffer.getvalue())
    with pytest.raises(ArtifactError, match=r"golden\.npz"):
        load_artifact(repository / "1")


def test_golden_file_that_unfolds_into_a_large_one_is_refused_unread() -> None:
    buffer = io.BytesIO()
    images = np.zeros((50_000, 28, 28), np.uint8)
    np.savez_compressed(buffer, images=images, labels=images[:, 0, 0].astype(np.int64))
    assert len(buffer.getvalue()) < 100_000
    with pytest.raises(ArtifactError, match=r"expected 4194304 bytes at most, got 39600\d\d\d"):
        read_golden(buffer.getvalue(), ["fp32"])


def test_golden_member_that_is_no_array_is_refused() -> None:
    buffer = io.BytesIO((DEFAULT / GOLDEN).read_bytes())
    with zipfile.ZipFile(buffer) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (members | {"images.npy": b"no array"}).items():
            archive.writestr(name, data)
    with pytest.raises(ArtifactError, match=r"golden\.npz: images: expected uint8"):
        read_golden(buffer.getvalue(), ["fp32"])


def test_golden_probability_that_is_infinite_is_refused() -> None:
    golden = read_golden((DEFAULT / GOLDEN).read_bytes(), ["fp32"])
    answered = golden.probabilities["fp32"].copy()
    answered[0, golden.labels[0]] = golden.probabilities["fp32"][0, golden.labels[0]] = np.inf
    with pytest.raises(ArtifactError, match="golden digits: expected probabilities within"):
        golden.check(answered, golden.is_digit["fp32"], "fp32")


def test_golden_digits_that_do_not_hold_refuse_the_model(repository: Path) -> None:
    golden = read_golden((repository / "1" / GOLDEN).read_bytes(), ["fp32"])
    off = golden.probabilities["fp32"].copy()
    off[0] += np.float32(1e-4)
    rewrite(repository / "1", GOLDEN, write_golden(replace(golden, probabilities={"fp32": off})))
    with pytest.raises(ArtifactError, match="golden digits: expected probabilities within"):
        load_one(repository / "1")


def test_golden_label_that_is_wrong_refuses_the_model(repository: Path) -> None:
    golden = read_golden((repository / "1" / GOLDEN).read_bytes(), ["fp32"])
    labels = (golden.labels + 1) % 10
    rewrite(repository / "1", GOLDEN, write_golden(replace(golden, labels=labels)))
    with pytest.raises(ArtifactError, match="labels are wrong"):
        load_one(repository / "1")


@pytest.mark.parametrize("count", [0, 31])
def test_too_few_golden_digits_are_refused(count: int) -> None:
    golden = Golden(
        np.zeros((count, 28, 28), np.uint8),
        np.zeros(count, np.int64),
        {"fp32": np.zeros((count, 10), np.float32)},
        {"fp32": np.ones(count, np.float32)},
    )
    with pytest.raises(ArtifactError, match="at least 32"):
        read_golden(write_golden(golden), ["fp32"])


def test_golden_probability_that_is_nan_is_refused() -> None:
    golden = read_golden((DEFAULT / GOLDEN).read_bytes(), ["fp32"])
    answered = golden.probabilities["fp32"].copy()
    answered[0, golden.labels[0]] = np.nan
    with pytest.raises(ArtifactError):
        golden.check(answered, golden.is_digit["fp32"], "fp32")


def test_version_of_another_model_is_refused(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another model may have been signed with the same key."""
    change_manifest(repository / "1", name="fashion-mnist")
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)
    assert "name: expected 'digits', the name of the repository, got 'fashion" in caplog.text


@pytest.mark.parametrize("name", [FP32, MANIFEST, GOLDEN])
def test_pipe_in_place_of_a_file_is_refused_and_blocks_nobody(
    repository: Path, name: Any, caplog: pytest.LogCaptureFixture
) -> None:
    (repository / "1" / name).unlink()
    os.mkfifo(repository / "1" / name)
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)
    assert f"{name}: expected a regular file" in caplog.text


def test_device_without_end_is_refused(repository: Path, caplog: pytest.LogCaptureFixture) -> None:
    (repository / "1" / FP32).unlink()
    (repository / "1" / FP32).symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)
    assert f"{FP32}: expected a regular file" in caplog.text


def test_file_that_is_too_large_is_refused_unread(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has holes only, and takes no space on the disk."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (repository / "1" / FP32).open("r+b") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)
    assert f"{FP32}: expected at most {MAX_MODEL_BYTES} bytes, got {3 * 2**30}" in caplog.text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10


def test_model_with_weights_in_another_file_is_refused(repository: Path) -> None:
    folder = repository / "1"
    model = onnx.load(folder / FP32)
    onnx.external_data_helper.convert_model_to_external_data(model, size_threshold=0)
    onnx.save(model, folder / FP32)
    rewrite(folder, FP32, (folder / FP32).read_bytes())
    with pytest.raises(ArtifactError, match="external data: expected all weights in the file"):
        load_artifact(folder)


def test_entry_for_weights_in_another_file_is_seen_in_any_order(repository: Path) -> None:
    """Readers take the fields of a message in any order, and a length with needless zeros."""
    for location in (b"\x12\x01x\n\x08location", b"\n\x88\x00location\x12\x01x"):
        rewrite(repository / "1", FP32, location)
        with pytest.raises(ArtifactError, match="external data: expected all weights in the file"):
            load_artifact(repository / "1")
