"""Versions that do not hold are refused with their reason; the best that holds serves."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from service.artifact.format import (
    GOLDEN,
    MANIFEST,
    MAX_BYTES,
    MODEL,
    PARITY,
    SIGNATURE,
    ArtifactError,
    Golden,
    KeyFileError,
    load_artifact,
    read_golden,
    sha256,
    write_golden,
)
from service.artifact.repository import PROMOTED
from service.host.files import read_regular
from service.serving.engine import Engine
from service.serving.loader import FAILED, LOADED, REFUSED, ModelLoader, load_model
from tests.conftest import REPOSITORY

DEFAULT = REPOSITORY / "1"


@pytest.fixture
def repository(tmp_path):
    """A copy of the default version, free to be damaged."""
    shutil.copytree(DEFAULT, tmp_path / "digits/1")
    return tmp_path / "digits"


def rewrite(folder, name, data):
    """Replaces a file and makes the manifest agree with it."""
    (folder / name).write_bytes(data)
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = sha256(data)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def load(repository, pinned=0, public_key=None):
    """The model that serves, and what became of each version that was tried."""
    results = []
    return loader(repository, results, pinned=pinned, public_key=public_key).load(), results


def loader(repository, results, pinned=0, public_key=None):
    return ModelLoader(
        repository, pinned=pinned, device="cpu", intra_op_threads=1, max_batch_size=4,
        public_key=public_key, on_load=results.append,
    )  # fmt: skip


def load_one(folder, device="cpu", public_key=None):
    return load_model(
        folder, "digits", device=device, intra_op_threads=1, max_batch_size=4,
        public_key=public_key,
    )  # fmt: skip


def test_default_version_loads_with_its_identity():
    model, results = load(REPOSITORY)
    assert model.name == "digits"
    assert model.sha256 == sha256((REPOSITORY / model.version / MODEL).read_bytes())
    assert model.provider == "CPUExecutionProvider"
    assert list(model.batch_seconds) == [1, 2, 4]
    assert results == [LOADED]


@pytest.mark.parametrize("name", [MODEL, GOLDEN, PARITY])
def test_changed_file_is_refused_by_its_hash(repository, name):
    path = repository / "1" / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match=f"{name}: expected sha256"):
        load_artifact(path.parent)


@pytest.mark.parametrize("name", [MODEL, GOLDEN, PARITY, MANIFEST])
def test_missing_file_is_refused_by_name(repository, name):
    (repository / "1" / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name}: No such file"):
        load_artifact(repository / "1")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", 2),
        ("version", 7),
        ("opset", 12),
        ("labels", ["a"]),
        ("input", {}),
        ("precision", 32),
        ("precision", None),
    ],
)
def test_manifest_that_says_something_else_is_refused(repository, field, value):
    path = repository / "1" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(ArtifactError, match=f"{field}: expected"):
        load_artifact(path.parent)


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"schema_version": 1}', "null", "[" * 200_000, '{"x": NaN}']
)
def test_manifest_that_is_no_manifest_is_refused(repository, content):
    (repository / "1" / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match="manifest"):
        load_artifact(repository / "1")


def test_model_that_onnxruntime_refuses_is_refused(repository):
    model = onnx.load(repository / "1" / MODEL)
    model.graph.node[0].op_type = "NoSuchOperator"
    rewrite(repository / "1", MODEL, model.SerializeToString())
    with pytest.raises(ArtifactError, match="onnxruntime refuses it"):
        load_one(repository / "1")


def rename(model, old, new):
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
def test_model_of_another_contract_is_refused(repository, change, message):
    model = onnx.load(repository / "1" / MODEL)
    change(model)
    rewrite(repository / "1", MODEL, model.SerializeToString())
    with pytest.raises(ArtifactError, match=message):
        load_one(repository / "1")


@pytest.mark.parametrize("data", [b"not a model", b"", bytes(100)])
def test_model_that_is_no_model_is_refused(repository, data):
    rewrite(repository / "1", MODEL, data)
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        load_one(repository / "1")


def test_golden_arrays_of_another_form_are_refused(repository):
    buffer = io.BytesIO()
    np.savez(buffer, images=np.zeros(3), labels=np.int64(3), probabilities=np.zeros(3))
    rewrite(repository / "1", GOLDEN, buffer.getvalue())
    with pytest.raises(ArtifactError, match=r"golden\.npz"):
        load_artifact(repository / "1")


def test_golden_file_that_unfolds_into_a_large_one_is_refused_unread():
    buffer = io.BytesIO()
    images = np.zeros((50_000, 28, 28), np.uint8)
    np.savez_compressed(buffer, images=images, labels=images[:, 0, 0].astype(np.int64))
    assert len(buffer.getvalue()) < 100_000
    with pytest.raises(ArtifactError, match=r"expected 4194304 bytes at most, got 39600\d\d\d"):
        read_golden(buffer.getvalue())


def test_golden_member_that_is_no_array_is_refused():
    buffer = io.BytesIO((DEFAULT / GOLDEN).read_bytes())
    with zipfile.ZipFile(buffer) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (members | {"images.npy": b"no array"}).items():
            archive.writestr(name, data)
    with pytest.raises(ArtifactError, match=r"golden\.npz: images: expected uint8"):
        read_golden(buffer.getvalue())


def test_golden_probability_that_is_infinite_is_refused():
    golden = read_golden((DEFAULT / GOLDEN).read_bytes())
    answered = golden.probabilities.copy()
    answered[0, golden.labels[0]] = golden.probabilities[0, golden.labels[0]] = np.inf
    with pytest.raises(ArtifactError, match="golden digits: expected probabilities within"):
        golden.check(answered, "fp32")


def test_golden_digits_that_do_not_hold_refuse_the_model(repository):
    golden = read_golden((repository / "1" / GOLDEN).read_bytes())
    off = golden.probabilities.copy()
    off[0] += np.float32(1e-4)
    rewrite(repository / "1", GOLDEN, write_golden(Golden(golden.images, golden.labels, off)))
    with pytest.raises(ArtifactError, match="golden digits: expected probabilities within"):
        load_one(repository / "1")


def test_golden_label_that_is_wrong_refuses_the_model(repository):
    golden = read_golden((repository / "1" / GOLDEN).read_bytes())
    labels = (golden.labels + 1) % 10
    rewrite(
        repository / "1", GOLDEN, write_golden(Golden(golden.images, labels, golden.probabilities))
    )
    with pytest.raises(ArtifactError, match="labels are wrong"):
        load_one(repository / "1")


@pytest.mark.parametrize("count", [0, 31])
def test_too_few_golden_digits_are_refused(count):
    golden = Golden(
        np.zeros((count, 28, 28), np.uint8),
        np.zeros(count, np.int64),
        np.zeros((count, 10), np.float32),
    )
    with pytest.raises(ArtifactError, match="at least 32"):
        read_golden(write_golden(golden))


def test_golden_probability_that_is_nan_is_refused():
    golden = read_golden((DEFAULT / GOLDEN).read_bytes())
    answered = golden.probabilities.copy()
    answered[0, golden.labels[0]] = np.nan
    with pytest.raises(ArtifactError):
        golden.check(answered, "fp32")


def copy_version(repository, number):
    folder = repository / str(number)
    shutil.copytree(repository / "1", folder)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"version": number}))
    return folder


def test_highest_version_serves_and_hidden_folders_are_passed_over(repository):
    copy_version(repository, 9)
    copy_version(repository, 10)
    (repository / ".export-half").mkdir()
    assert load(repository)[0].version == "10"


def test_highest_version_that_is_damaged_yields_to_the_next(repository, caplog):
    (copy_version(repository, 2) / MODEL).write_bytes(b"half a file")
    model, results = load(repository)
    assert model.version == "1"
    assert results == [REFUSED, LOADED]
    assert "version 2 rejected: model.onnx: expected sha256" in caplog.text


@pytest.mark.parametrize("precision", [32, ["fp32"]])
def test_any_defect_of_the_highest_version_yields_to_the_next(repository, precision):
    folder = copy_version(repository, 2)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"precision": precision}))
    assert load(repository)[0].version == "1"


def test_link_to_a_repository_names_it(repository, tmp_path):
    """Operators swap links; callers know the model by the name of the link."""
    target = tmp_path / "release-7"
    repository.rename(target)
    repository.symlink_to(target)
    model, _ = load(repository)
    assert model.name == "digits"


@pytest.mark.parametrize("name", ["01", "+1", "\u0661", "1 ", "11111111111", "0", "1.0"])
def test_names_that_are_no_version_are_passed_over(repository, name):
    (repository / "1").rename(repository / name)
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)


def test_dangling_link_is_no_version(repository):
    (repository / "9").symlink_to(repository / "8")
    model, _ = load(repository)
    assert model.version == "1"


def test_version_of_another_model_is_refused(repository, caplog):
    """Another model may have been signed with the same key."""
    path = repository / "1" / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"name": "fashion-mnist"}))
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)
    assert "name: expected 'digits', the name of the repository, got 'fashion" in caplog.text


@pytest.mark.parametrize("name", [MODEL, MANIFEST, GOLDEN])
def test_pipe_in_place_of_a_file_is_refused_and_blocks_nobody(repository, name, caplog):
    (repository / "1" / name).unlink()
    os.mkfifo(repository / "1" / name)
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)
    assert f"{name}: expected a regular file" in caplog.text


def test_device_without_end_is_refused(repository, caplog):
    (repository / "1" / MODEL).unlink()
    (repository / "1" / MODEL).symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)
    assert f"{MODEL}: expected a regular file" in caplog.text


def test_file_that_is_too_large_is_refused_unread(repository, caplog):
    """It has holes only, and takes no space on the disk."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (repository / "1" / MODEL).open("r+b") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)
    assert f"{MODEL}: expected at most {MAX_BYTES[MODEL]} bytes, got {3 * 2**30}" in caplog.text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10


def test_model_with_weights_in_another_file_is_refused(repository):
    folder = repository / "1"
    model = onnx.load(folder / MODEL)
    onnx.external_data_helper.convert_model_to_external_data(model, size_threshold=0)
    onnx.save(model, folder / MODEL)
    rewrite(folder, MODEL, (folder / MODEL).read_bytes())
    with pytest.raises(ArtifactError, match="external data: expected all weights in the file"):
        load_artifact(folder)


def test_repository_named_by_a_dot_keeps_its_name(repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert load(Path())[0].name == "digits"


def test_pinned_version_is_the_only_one_considered(repository):
    copy_version(repository, 2)
    assert load(repository, pinned=1)[0].version == "1"
    with pytest.raises(ArtifactError, match="expected version 3"):
        load(repository, pinned=3)


def test_repository_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="is not a folder"):
        load(tmp_path / "nowhere")


def test_promoted_version_comes_first_and_yields_when_it_does_not_hold(repository, caplog):
    copy_version(repository, 2)
    copy_version(repository, 3)
    (repository / PROMOTED).write_text("2\n")
    assert load(repository)[0].version == "2"
    (repository / "2" / MODEL).write_bytes(b"half a file")
    assert load(repository)[0].version == "1", "3 was staged, or rolled back from"
    assert "version 2 rejected" in caplog.text
    (repository / "1" / MODEL).write_bytes(b"half a file")
    assert load(repository)[0].version == "3"


def test_promotion_of_a_version_that_is_not_there_leaves_the_highest(repository):
    copy_version(repository, 2)
    (repository / PROMOTED).write_text("7\n")
    assert load(repository)[0].version == "2"


@pytest.mark.parametrize("text", ["", "two", "-1", "1 2", "²", "07", "9" * 11])
def test_note_that_is_no_version_is_refused_by_name(repository, text):
    (repository / PROMOTED).write_text(text)
    with pytest.raises(ArtifactError, match="PROMOTED: expected the number of a version"):
        load(repository)


@pytest.fixture
def key(tmp_path):
    """A new private key, and the PEM file of its public half."""
    private = Ed25519PrivateKey.generate()
    path = tmp_path / "key.pem"
    pem = private.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    path.write_bytes(pem)
    return private, path


def test_required_signature_admits_what_the_key_signed(repository, key):
    private, public_key = key
    manifest = (repository / "1" / MANIFEST).read_bytes()
    (repository / "1" / SIGNATURE).write_bytes(private.sign(manifest))
    assert load(repository, public_key=public_key)[0].version == "1"


def test_required_signature_refuses_everything_else(repository, key):
    private, public_key = key
    with pytest.raises(ArtifactError, match=r"manifest\.sig: No such file"):
        load_one(repository / "1", public_key=public_key)
    manifest = (repository / "1" / MANIFEST).read_bytes()
    stranger = Ed25519PrivateKey.generate()
    for signature in (stranger.sign(manifest), private.sign(manifest + b" "), b"", bytes(64)):
        (repository / "1" / SIGNATURE).write_bytes(signature)
        with pytest.raises(ArtifactError, match="not made by the required key"):
            load_one(repository / "1", public_key=public_key)


def test_file_behind_a_signed_manifest_can_not_be_exchanged(repository, key):
    private, public_key = key
    manifest = (repository / "1" / MANIFEST).read_bytes()
    (repository / "1" / SIGNATURE).write_bytes(private.sign(manifest))
    (repository / "1" / MODEL).write_bytes(b"another model")
    with pytest.raises(ArtifactError, match=r"model\.onnx: expected sha256"):
        load_one(repository / "1", public_key=public_key)


@pytest.mark.parametrize("content", [b"", b"no key", None])
def test_key_that_can_not_be_used_is_an_error_of_its_own(repository, tmp_path, content):
    """Not a refusal of the version: with a broken key nothing may serve."""
    path = tmp_path / "broken.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KeyFileError, match=r"broken\.pem"):
        load(repository, public_key=path)


def test_int8_yields_to_fp32_where_cuda_works(repository, monkeypatch, caplog):
    folder = copy_version(repository, 2)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"precision": "int8"}))
    assert load(repository)[0].precision == "int8"
    monkeypatch.setattr("service.serving.loader.cuda_problem", lambda: None)
    with pytest.raises(ArtifactError, match="int8 runs on the CPU, and this server uses CUDA"):
        load_one(folder, device="auto")
    assert load_one(folder, device="cpu").precision == "int8"


def test_damaged_model_is_tried_once_and_prints_nothing(repository, capfd):
    """By itself onnxruntime would load it a second time, and print that it does."""
    model = (repository / "1" / MODEL).read_bytes()
    rewrite(repository / "1", MODEL, model.replace(b"Conv", b"\xff\xfe\xfdv"))
    with pytest.raises(ArtifactError):
        load(repository)
    assert capfd.readouterr().out == ""


# What says nothing about a version: the system, the disk, a network volume, memory.
OF_THE_ENVIRONMENT = [
    *[OSError(number, os.strerror(number)) for number in (
        errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE, errno.EINTR,
    )],
    MemoryError("no memory"),
]  # fmt: skip


@pytest.fixture
def reading_fails(monkeypatch):
    """Reading the files of a version fails with what is set here."""
    errors = {}

    def read(path, max_bytes):
        error = errors.get(path.parent.name)
        if error is not None:
            raise error
        return read_regular(path, max_bytes)

    monkeypatch.setattr("service.artifact.format.read_regular", read)
    return errors


@pytest.mark.parametrize("error", OF_THE_ENVIRONMENT, ids=repr)
def test_error_of_the_environment_is_tried_again_at_every_look(
    repository, reading_fails, error, caplog
):
    results = []
    watched = loader(repository, results)
    current = watched.load()
    copy_version(repository, 2)
    reading_fails["2"] = error
    assert watched.load_other_than(current) is None
    assert watched.load_other_than(current) is None
    assert results == [LOADED, FAILED, FAILED]
    assert caplog.text.count("version 2 not loaded") == 1, "not again at every look"
    reading_fails.clear()
    assert watched.load_other_than(current).version == "2"


def test_version_below_one_that_can_not_be_read_now_does_not_take_over(repository, reading_fails):
    copy_version(repository, 2)
    copy_version(repository, 3)
    watched = loader(repository, [], pinned=0)
    reading_fails["3"] = reading_fails["2"] = OSError(errno.EIO, "I/O error")
    current = watched.load()
    assert current.version == "1", "at a start something must serve"
    del reading_fails["2"]
    assert watched.load_other_than(current) is None
    del reading_fails["3"]
    assert watched.load_other_than(current).version == "3"


def test_start_without_a_version_that_can_be_read_says_why(repository, reading_fails):
    reading_fails["1"] = OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(ArtifactError, match=r"found none; version 1: .*Too many open files"):
        load(repository)


@pytest.mark.parametrize("step", ["__init__", "run", "warm_up"])
@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("bad allocation")], ids=repr)
def test_engine_without_memory_says_nothing_about_the_version(repository, monkeypatch, step, error):
    def fails(*_, **__):
        raise error

    results = []
    watched = loader(repository, results)
    with monkeypatch.context() as patched:
        patched.setattr(Engine, step, fails)
        assert watched.load_other_than(None) is None
    assert watched.load_other_than(None).version == "1"
    assert results == [FAILED, LOADED]


def test_version_that_was_refused_is_not_tried_again_until_a_file_changes(repository, caplog):
    results = []
    watched = loader(repository, results)
    current = watched.load()
    folder = copy_version(repository, 2)
    good = (folder / MODEL).read_bytes()
    (folder / MODEL).write_bytes(b"half a file")
    for _ in range(3):
        assert watched.load_other_than(current) is None
    assert results == [LOADED, REFUSED]
    (folder / MODEL).write_bytes(good)
    assert watched.load_other_than(current).version == "2"


def test_refusal_that_is_forgotten_is_looked_into_again(repository):
    results = []
    watched = loader(repository, results)
    current = watched.load()
    (copy_version(repository, 2) / MODEL).write_bytes(b"half a file")
    assert watched.load_other_than(current) is None
    watched.forget_refusals()
    assert watched.load_other_than(current) is None
    assert results == [LOADED, REFUSED, REFUSED]


def test_repository_that_can_not_be_listed_now_is_an_error_of_its_own(repository, monkeypatch):
    def fails(_path):
        raise OSError(errno.ESTALE, "Stale file handle")

    watched = loader(repository, [])
    current = watched.load()
    monkeypatch.setattr(Path, "iterdir", fails)
    with pytest.raises(ArtifactError, match="Stale file handle"):
        watched.load_other_than(current)
