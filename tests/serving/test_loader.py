"""Versions that do not hold are refused with their reason; the best that holds serves."""

from __future__ import annotations

import errno
import io
import os
import resource
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from export.artifact import promote, sign_release
from service.artifact.errors import ArtifactError, KeyFileError
from service.artifact.format import (
    MANIFEST,
    MAX_MODEL_BYTES,
    PARITY,
    SIGNATURE,
    load_artifact,
    sha256,
)
from service.artifact.golden import GOLDEN, Golden, read_golden, write_golden
from service.artifact.repository import ANY, PROMOTED, promoted
from service.artifact.signature import load_private_key
from service.config import ServerConfig, wanted_releases
from service.host.files import read_regular
from service.serving.engine import Engine
from service.serving.loader import FAILED, LOADED, REFUSED, ModelLoader, load_model
from tests.conftest import REPOSITORY
from tests.releases import FP32, INT8, change_manifest, copy_release, rewrite, write_keys

DEFAULT = REPOSITORY / "1"


def only(number):
    """What ``--model-version`` with a number allows."""
    return range(number, number + 1)


@pytest.fixture
def repository(tmp_path):
    """A copy of the default version, free to be damaged."""
    shutil.copytree(DEFAULT, tmp_path / "digits/1")
    return tmp_path / "digits"


def load(repository, wanted=ANY, public_key=None):
    """The model that serves, and what became of each version that was tried."""
    results = []
    return loader(repository, results, wanted=wanted, public_key=public_key).load(), results


def loader(repository, results, wanted=ANY, public_key=None, precision="auto"):
    return ModelLoader(
        repository, wanted=wanted, device="cpu", precision=precision, intra_op_threads=1,
        max_batch_size=4, public_key=public_key, on_load=results.append,
    )  # fmt: skip


def load_one(folder, device="cpu", public_key=None, precision="auto"):
    return load_model(
        folder, "digits", device=device, intra_op_threads=1, max_batch_size=4,
        public_key=public_key, precision=precision,
    )  # fmt: skip


def test_default_version_loads_with_its_identity():
    model, results = load(REPOSITORY)
    assert model.name == "digits"
    assert (model.version, model.precision) == ("2", "int8")
    assert model.sha256 == sha256((REPOSITORY / "2" / INT8).read_bytes())
    assert model.provider == "CPUExecutionProvider"
    assert list(model.batch_seconds) == [1, 2, 4]
    assert results == [LOADED]


@pytest.mark.parametrize("name", [FP32, GOLDEN, PARITY])
def test_changed_file_is_refused_by_its_hash(repository, name):
    path = repository / "1" / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(ArtifactError, match=f"{name}: expected sha256"):
        load_artifact(path.parent)


@pytest.mark.parametrize("name", [FP32, GOLDEN, PARITY, MANIFEST])
def test_missing_file_is_refused_by_name(repository, name):
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
def test_manifest_that_says_something_else_is_refused(repository, field, value):
    change_manifest(repository / "1", **{field: value})
    with pytest.raises(ArtifactError, match=f"{field}: expected"):
        load_artifact(repository / "1")


@pytest.mark.parametrize(
    "content", ["", "[]", "{", '{"schema_version": 1}', "null", "[" * 200_000, '{"x": NaN}']
)
def test_manifest_that_is_no_manifest_is_refused(repository, content):
    (repository / "1" / MANIFEST).write_text(content)
    with pytest.raises(ArtifactError, match="manifest"):
        load_artifact(repository / "1")


def test_model_that_onnxruntime_refuses_is_refused(repository):
    model = onnx.load(repository / "1" / FP32)
    model.graph.node[0].op_type = "NoSuchOperator"
    rewrite(repository / "1", FP32, model.SerializeToString())
    with pytest.raises(ArtifactError, match="onnxruntime rejects it"):
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
    model = onnx.load(repository / "1" / FP32)
    change(model)
    rewrite(repository / "1", FP32, model.SerializeToString())
    with pytest.raises(ArtifactError, match=message):
        load_one(repository / "1")


@pytest.mark.parametrize("data", [b"not a model", b"", bytes(100)])
def test_model_that_is_no_model_is_refused(repository, data):
    rewrite(repository / "1", FP32, data)
    with pytest.raises(ArtifactError, match=r"model\.fp32\.onnx"):
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
        read_golden(buffer.getvalue(), ["fp32"])


def test_golden_member_that_is_no_array_is_refused():
    buffer = io.BytesIO((DEFAULT / GOLDEN).read_bytes())
    with zipfile.ZipFile(buffer) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (members | {"images.npy": b"no array"}).items():
            archive.writestr(name, data)
    with pytest.raises(ArtifactError, match=r"golden\.npz: images: expected uint8"):
        read_golden(buffer.getvalue(), ["fp32"])


def test_golden_probability_that_is_infinite_is_refused():
    golden = read_golden((DEFAULT / GOLDEN).read_bytes(), ["fp32"])
    answered = golden.probabilities["fp32"].copy()
    answered[0, golden.labels[0]] = golden.probabilities["fp32"][0, golden.labels[0]] = np.inf
    with pytest.raises(ArtifactError, match="golden digits: expected probabilities within"):
        golden.check(answered, golden.is_digit["fp32"], "fp32")


def test_golden_digits_that_do_not_hold_refuse_the_model(repository):
    golden = read_golden((repository / "1" / GOLDEN).read_bytes(), ["fp32"])
    off = golden.probabilities["fp32"].copy()
    off[0] += np.float32(1e-4)
    rewrite(repository / "1", GOLDEN, write_golden(replace(golden, probabilities={"fp32": off})))
    with pytest.raises(ArtifactError, match="golden digits: expected probabilities within"):
        load_one(repository / "1")


def test_golden_label_that_is_wrong_refuses_the_model(repository):
    golden = read_golden((repository / "1" / GOLDEN).read_bytes(), ["fp32"])
    labels = (golden.labels + 1) % 10
    rewrite(repository / "1", GOLDEN, write_golden(replace(golden, labels=labels)))
    with pytest.raises(ArtifactError, match="labels are wrong"):
        load_one(repository / "1")


@pytest.mark.parametrize("count", [0, 31])
def test_too_few_golden_digits_are_refused(count):
    golden = Golden(
        np.zeros((count, 28, 28), np.uint8),
        np.zeros(count, np.int64),
        {"fp32": np.zeros((count, 10), np.float32)},
        {"fp32": np.ones(count, np.float32)},
    )
    with pytest.raises(ArtifactError, match="at least 32"):
        read_golden(write_golden(golden), ["fp32"])


def test_golden_probability_that_is_nan_is_refused():
    golden = read_golden((DEFAULT / GOLDEN).read_bytes(), ["fp32"])
    answered = golden.probabilities["fp32"].copy()
    answered[0, golden.labels[0]] = np.nan
    with pytest.raises(ArtifactError):
        golden.check(answered, golden.is_digit["fp32"], "fp32")


def test_highest_version_serves_and_hidden_folders_are_passed_over(repository):
    copy_release(repository, 9, repository / "1")
    copy_release(repository, 10, repository / "1")
    (repository / ".export-half").mkdir()
    assert load(repository)[0].version == "10"


def test_highest_version_that_is_damaged_yields_to_the_next(repository, caplog):
    (copy_release(repository, 2, repository / "1") / FP32).write_bytes(b"half a file")
    model, results = load(repository)
    assert model.version == "1"
    assert results == [REFUSED, LOADED]
    assert "release 2 rejected: model.fp32.onnx: expected sha256" in caplog.text


def test_any_defect_of_the_highest_release_yields_to_the_next(repository):
    change_manifest(copy_release(repository, 2, repository / "1"), variants={"fp32": {}})
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
    change_manifest(repository / "1", name="fashion-mnist")
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)
    assert "name: expected 'digits', the name of the repository, got 'fashion" in caplog.text


@pytest.mark.parametrize("name", [FP32, MANIFEST, GOLDEN])
def test_pipe_in_place_of_a_file_is_refused_and_blocks_nobody(repository, name, caplog):
    (repository / "1" / name).unlink()
    os.mkfifo(repository / "1" / name)
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)
    assert f"{name}: expected a regular file" in caplog.text


def test_device_without_end_is_refused(repository, caplog):
    (repository / "1" / FP32).unlink()
    (repository / "1" / FP32).symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)
    assert f"{FP32}: expected a regular file" in caplog.text


def test_file_that_is_too_large_is_refused_unread(repository, caplog):
    """It has holes only, and takes no space on the disk."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with (repository / "1" / FP32).open("r+b") as file:
        file.truncate(3 * 2**30)
    with pytest.raises(ArtifactError, match="found none"):
        load(repository)
    assert f"{FP32}: expected at most {MAX_MODEL_BYTES} bytes, got {3 * 2**30}" in caplog.text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10


def test_model_with_weights_in_another_file_is_refused(repository):
    folder = repository / "1"
    model = onnx.load(folder / FP32)
    onnx.external_data_helper.convert_model_to_external_data(model, size_threshold=0)
    onnx.save(model, folder / FP32)
    rewrite(folder, FP32, (folder / FP32).read_bytes())
    with pytest.raises(ArtifactError, match="external data: expected all weights in the file"):
        load_artifact(folder)


def test_entry_for_weights_in_another_file_is_seen_in_any_order(repository):
    """Readers take the fields of a message in any order, and a length with needless zeros."""
    for location in (b"\x12\x01x\n\x08location", b"\n\x88\x00location\x12\x01x"):
        rewrite(repository / "1", FP32, location)
        with pytest.raises(ArtifactError, match="external data: expected all weights in the file"):
            load_artifact(repository / "1")


def test_repository_named_by_a_dot_keeps_its_name(repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert load(Path())[0].name == "digits"


def test_pinned_version_is_the_only_one_considered(repository):
    copy_release(repository, 2, repository / "1")
    assert load(repository, wanted=only(1))[0].version == "1"
    with pytest.raises(ArtifactError, match="expected release 3"):
        load(repository, wanted=only(3))


def test_repository_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ArtifactError, match="is not a folder"):
        load(tmp_path / "nowhere")


def test_promoted_version_comes_first_and_yields_when_it_does_not_hold(repository, caplog):
    copy_release(repository, 2, repository / "1")
    copy_release(repository, 3, repository / "1")
    (repository / PROMOTED).write_text("2\n")
    assert load(repository)[0].version == "2"
    (repository / "2" / FP32).write_bytes(b"half a file")
    assert load(repository)[0].version == "1", "3 was staged, or rolled back from"
    assert "release 2 rejected" in caplog.text
    (repository / "1" / FP32).write_bytes(b"half a file")
    assert load(repository)[0].version == "3"


def test_promotion_of_a_version_that_is_not_there_leaves_the_highest(repository):
    copy_release(repository, 2, repository / "1")
    (repository / PROMOTED).write_text("7\n")
    assert load(repository)[0].version == "2"


@pytest.mark.parametrize("text", ["", "two", "-1", "1 2", "²", "07", "9" * 11])
def test_note_that_is_no_version_is_refused_by_name(repository, text):
    (repository / PROMOTED).write_text(text)
    with pytest.raises(ArtifactError, match="PROMOTED: expected the number of a release"):
        load(repository)
    assert load(repository, wanted=only(1))[0].version == "1", "which needs no note"


@pytest.fixture
def key(tmp_path):
    """A new private key, and the PEM file of its public half."""
    folder = write_keys(tmp_path)
    return load_private_key(folder / "private.pem"), folder / "public.pem"


def test_required_signature_admits_what_the_key_signed(repository, key):
    private, public_key = key
    manifest = (repository / "1" / MANIFEST).read_bytes()
    (repository / "1" / SIGNATURE).write_bytes(private.sign(manifest))
    assert load(repository, public_key=public_key)[0].version == "1"


@pytest.fixture
def signed(repository, key, tmp_path):
    """Three releases of one owner, and what opens a server's view of them."""
    signing_key, public_key = tmp_path / "private.pem", key[1]
    for number in (2, 3):
        copy_release(repository, number, repository / "1")
    for number in "123":
        sign_release(repository / number, signing_key)
    return repository, signing_key, public_key


def test_promotion_needs_its_owners_signature(signed):
    """Who can write to the repository can not turn a server back to an older signed release."""
    repository, signing_key, public_key = signed
    assert load(repository, public_key=public_key)[0].version == "3"
    promote(repository, 1)
    with pytest.raises(ArtifactError, match="PROMOTED: expected a signature of the required key"):
        load(repository, public_key=public_key)
    promote(repository, 1, signing_key)
    assert load(repository, public_key=public_key)[0].version == "1"
    assert load(repository)[0].version == "1", "who asks for no signature reads the number"


def test_signature_of_one_promotion_is_none_of_another(signed, tmp_path):
    repository, signing_key, public_key = signed
    promote(repository, 2, signing_key)
    number, signature = (repository / PROMOTED).read_text().split()
    of_the_manifest = (repository / "1" / SIGNATURE).read_bytes().hex()
    for note in (f"1\n{signature}", f"1\n{of_the_manifest}", f"{number}\n{64 * '00'}"):
        (repository / PROMOTED).write_text(note)
        with pytest.raises(ArtifactError, match="PROMOTED: not made by the required key"):
            load(repository, public_key=public_key)
    other = tmp_path / "fashion-mnist"
    other.mkdir()
    (other / PROMOTED).write_text(f"{number}\n{signature}\n")
    with pytest.raises(ArtifactError, match="PROMOTED: not made by the required key"):
        promoted(other, public_key)


def test_nothing_below_the_lowest_release_that_is_wanted_serves(signed, caplog):
    """Whatever is removed from the repository, or put back into it."""
    repository, signing_key, public_key = signed
    wanted = wanted_releases(ServerConfig(model_version="2+"))
    promote(repository, 1, signing_key)  # from before the owner raised the bound
    assert load(repository, wanted=wanted)[0].version == "3"
    promote(repository, 2, signing_key)
    assert load(repository, wanted=wanted, public_key=public_key)[0].version == "2"
    for number in "23":
        shutil.rmtree(repository / number)
    with pytest.raises(ArtifactError, match="expected a valid release from 2 on, found none"):
        load(repository, wanted=wanted, public_key=public_key)


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
    (repository / "1" / FP32).write_bytes(b"another model")
    with pytest.raises(ArtifactError, match=r"model\.fp32\.onnx: expected sha256"):
        load_one(repository / "1", public_key=public_key)


@pytest.mark.parametrize("content", [b"", b"no key", None])
def test_key_that_can_not_be_used_is_an_error_of_its_own(repository, tmp_path, content):
    """Not a refusal of the version: with a broken key nothing may serve."""
    path = tmp_path / "broken.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KeyFileError, match=r"broken\.pem"):
        load(repository, public_key=path)


@pytest.fixture
def both(tmp_path):
    """A copy of a release in two precisions, above one in fp32."""
    repository = tmp_path / "both/digits"
    repository.mkdir(parents=True)
    copy_release(repository, 1, "1")
    return copy_release(repository, 2, "2")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_precision_that_is_pinned_serves_and_no_other(both, precision):
    assert load_one(both, precision=precision).precision == precision


def test_precision_that_a_release_lacks_rejects_it(repository):
    expected = "precision: expected int8, got a release with fp32"
    with pytest.raises(ArtifactError, match=expected):
        load_one(repository / "1", precision="int8")


def test_fp32_serves_where_cuda_works(both, monkeypatch):
    monkeypatch.setattr("service.serving.loader.cuda_problem", lambda: None)
    monkeypatch.setattr("service.serving.engine.cuda_problem", lambda: "no GPU in this test")
    assert load_one(both, device="auto").precision == "fp32"
    assert load_one(both, device="cpu").precision == "int8"
    with pytest.raises(ArtifactError, match="expected fp32, since CUDA runs no int8"):
        load_one(both, device="auto", precision="int8")


def spoil_golden(folder, precision):
    """Makes the golden digits expect other answers of one variant."""
    golden = read_golden((folder / GOLDEN).read_bytes(), ["fp32", "int8"])
    other = golden.probabilities[precision][:, ::-1].copy()
    changed = replace(golden, probabilities={**golden.probabilities, precision: other})
    rewrite(folder, GOLDEN, write_golden(changed))


def spoil_model(folder, precision):
    """Makes onnxruntime reject one variant."""
    rewrite(folder, f"model.{precision}.onnx", b"no model")


@pytest.mark.parametrize("spoil", [spoil_golden, spoil_model])
def test_variant_that_can_not_serve_yields_to_the_other_one_of_the_release(both, spoil, caplog):
    spoil(both, "int8")
    results = []
    model = loader(both.parent, results).load()
    assert (model.version, model.precision, results) == ("2", "fp32", [LOADED])
    assert "release 2 serves fp32: " in caplog.text
    with pytest.raises(ArtifactError):
        load_one(both, precision="int8")
    spoil(both, "fp32")
    assert loader(both.parent, []).load().version == "1", "then to the release before"


def test_file_of_either_variant_that_is_damaged_rejects_the_release(both):
    """It may still be being copied, or not be what was signed."""
    (both / FP32).write_bytes(b"half a file")
    assert loader(both.parent, []).load().version == "1"


def test_release_with_other_labels_does_not_replace_the_one_in_service(both, caplog):
    watched = loader(both.parent, [])
    current = watched.load()
    change_manifest(copy_release(both.parent, 3, both), labels=list("abcdefghij"))
    assert watched.load_other_than(current) is None
    assert "release 3 rejected: manifest.json: labels: expected ['0', '1'," in caplog.text


def test_release_that_was_not_published_serves_only_where_it_is_asked_for(both, caplog):
    comparison = {"against": "1", "publish": False, "reasons": ["accuracy: lower"], "measures": []}
    change_manifest(both, comparison=comparison)
    watched = loader(both.parent, [])
    current = watched.load()
    assert current.version == "1"
    assert "release 2 rejected: it was not published, and is not promoted: accuracy" in caplog.text
    (both.parent / PROMOTED).write_text("2\n")
    assert watched.load_other_than(current).version == "2", "the note is a new reason to try it"
    (both.parent / PROMOTED).unlink()
    assert loader(both.parent, [], wanted=only(2)).load().version == "2"


def test_damaged_model_is_tried_once_and_prints_nothing(repository, capfd):
    """By itself onnxruntime would load it a second time, and print that it does."""
    model = (repository / "1" / FP32).read_bytes()
    rewrite(repository / "1", FP32, model.replace(b"Conv", b"\xff\xfe\xfdv"))
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
    copy_release(repository, 2, repository / "1")
    reading_fails["2"] = error
    assert watched.load_other_than(current) is None
    assert watched.load_other_than(current) is None
    assert results == [LOADED, FAILED, FAILED]
    assert caplog.text.count("release 2 not loaded") == 1, "not again at every look"
    reading_fails.clear()
    assert watched.load_other_than(current).version == "2"


def test_version_below_one_that_can_not_be_read_now_does_not_take_over(repository, reading_fails):
    copy_release(repository, 2, repository / "1")
    copy_release(repository, 3, repository / "1")
    watched = loader(repository, [])
    reading_fails["3"] = reading_fails["2"] = OSError(errno.EIO, "I/O error")
    current = watched.load()
    assert current.version == "1", "at a start something must serve"
    del reading_fails["2"]
    assert watched.load_other_than(current) is None
    del reading_fails["3"]
    assert watched.load_other_than(current).version == "3"


def test_start_without_a_version_that_can_be_read_says_why(repository, reading_fails):
    reading_fails["1"] = OSError(errno.EMFILE, "Too many open files")
    with pytest.raises(ArtifactError, match=r"found none; release 1: .*Too many open files"):
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
    folder = copy_release(repository, 2, repository / "1")
    good = (folder / FP32).read_bytes()
    (folder / FP32).write_bytes(b"half a file")
    for _ in range(3):
        assert watched.load_other_than(current) is None
    assert results == [LOADED, REFUSED]
    (folder / FP32).write_bytes(good)
    assert watched.load_other_than(current).version == "2"


def test_refusal_that_is_forgotten_is_looked_into_again(repository):
    results = []
    watched = loader(repository, results)
    current = watched.load()
    (copy_release(repository, 2, repository / "1") / FP32).write_bytes(b"half a file")
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
