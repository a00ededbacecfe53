"""Checkpoint to written version, the verbs, and what a crash can do."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import pytest

from export import __main__ as command
from export import create
from export.artifact import TEMPORARY, next_version, promote, write_version
from export.create import make_variants, write_variants
from export.golden import MIN_MARGIN, PER_CLASS
from export.graph import export_model
from export.sessions import in_fresh_process
from export.show import gate_markdown, read_gate
from service.artifact.format import (
    GOLDEN_TOLERANCE,
    MANIFEST,
    MODEL,
    PARITY,
    SIGNATURE,
    load_artifact,
)
from service.artifact.repository import PROMOTED, in_serving_order, promoted, versions
from service.serving.loader import load_model
from tests.conftest import REPOSITORY, ROOT, wait_until
from tests.export.conftest import Silent, trained
from training import data
from training.checkpoint import Checkpoint, save_checkpoint
from training.config import make_config
from training.model import ARCHITECTURES

FILES = {MODEL: b"model", PARITY: b"{}"}


def serving(repository):
    return int(in_serving_order(repository)[0].name)


def test_same_checkpoint_exports_to_the_same_bytes_in_another_process(model, checkpoint):
    assert in_fresh_process(export_model_of, checkpoint.model) == model


def export_model_of(classifier):
    return export_model(classifier, name="digits")


def test_graph_takes_raw_bytes_and_says_so(model):
    proto = onnx.load_from_string(model)
    [image] = proto.graph.input
    assert image.type.tensor_type.elem_type == onnx.TensorProto.UINT8
    assert "Softmax" in {node.op_type for node in proto.graph.node}
    assert {p.key for p in proto.metadata_props} == {"labels", "input"}
    assert not any(node.metadata_props or node.doc_string for node in proto.graph.node)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_trains_exports_with_parity_and_serves(
    arch, split, tmp_path, monkeypatch
):
    # That another process exports the same bytes is shown above, once.
    monkeypatch.setattr(create, "in_fresh_process", lambda function, *given: function(*given))
    config = make_config("classic", {"arch": arch, "epochs": 6, "validation": 0})
    checkpoint = trained(config, split)
    [variant] = make_variants(
        checkpoint, split, split, name="digits", precision="fp32", reporter=Silent()
    )
    folders = []
    write_variants(
        tmp_path / "digits", [variant], checkpoint, on_written=lambda f, _: folders.append(f)
    )
    served = load_model(folders[0], "digits", device="cpu", intra_op_threads=1, max_batch_size=8)
    labels = served.engine.run(split.images.numpy()).argmax(axis=1)
    assert int((labels == split.labels.numpy()).sum()) == checkpoint.metrics["correct"]


def test_written_versions_load_and_tell_how_they_were_made(repository, checkpoint, variants):
    assert sorted(path.name for path in repository.iterdir()) == ["1", "2"]
    for number, variant in enumerate(variants, start=1):
        found = load_artifact(repository / str(number))
        assert found.precision == variant.precision
        assert found.manifest["training"]["config"] == checkpoint.config.to_dict()
        assert found.manifest["accuracy"] == variant.accuracy
        assert found.manifest["tools"].keys() >= {"python", "torch", "onnx", "onnxruntime"}
        assert json.loads((repository / str(number) / PARITY).read_text())["passed"] is True
        load_model(
            repository / str(number), "digits", device="cpu", intra_op_threads=1, max_batch_size=8
        )
    assert serving(repository) == 2


def test_golden_digits_cover_every_class_from_hard_to_easy(variants):
    for variant in variants:
        golden = variant.golden
        assert np.bincount(golden.labels).tolist() == [PER_CLASS] * 10
        top = np.sort(golden.probabilities, axis=1)
        margins = top[:, -1] - top[:, -2]
        assert margins.min() > 2 * GOLDEN_TOLERANCE[variant.precision]
        assert margins.min() >= MIN_MARGIN
        assert margins.min() < margins.max()


def test_versions_count_up(tmp_path):
    assert next_version(tmp_path / "new") == 1
    for name in ("1", "9", "x", ".export-1"):
        (tmp_path / name).mkdir()
    assert next_version(tmp_path) == 10


def test_failing_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def full_disk(path, data):
        if path.name == MANIFEST:
            raise OSError(28, "No space left on device")
        path.write_bytes(data)

    monkeypatch.setattr("export.artifact._write_synced", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_version(tmp_path / "digits", FILES, {})
    assert list((tmp_path / "digits").iterdir()) == []


WRITER = """
import sys
from pathlib import Path
from export.artifact import promote, write_version
repository, number = Path(sys.argv[1]), 0
while True:
    write_version(repository, {"model.onnx": bytes(300_000), "parity.json": b"{}"}, {"name": "x"})
    number += 1
    promote(repository, number)
"""


def test_kill_at_any_moment_leaves_whole_versions(tmp_path):
    """Killed mid-write twenty times: every version is complete, and the next writer cleans up."""
    repository, generator = tmp_path / "digits", random.Random(0)
    for _ in range(20):
        before = len(list(repository.glob("[0-9]*")))
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(repository)], cwd=ROOT)
        wait_until(lambda before=before: len(list(repository.glob("[0-9]*"))) > before)
        time.sleep(generator.random() * 0.01)  # the moment is what is being varied
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        for folder in repository.glob("[0-9]*"):
            manifest = json.loads((folder / MANIFEST).read_text())
            assert manifest["version"] == int(folder.name)
            for name, digest in manifest["files"].items():
                assert digest == create.artifact.sha256((folder / name).read_bytes())
        assert promoted(repository) is None or (repository / str(promoted(repository))).is_dir()
    write_version(repository, FILES, {})
    assert not list(repository.glob(f"{TEMPORARY}*"))


def test_two_writers_at_once_get_two_versions(tmp_path):
    code = WRITER.replace("while True:", "for _ in range(20):")
    command = [sys.executable, "-c", code, str(tmp_path / "digits")]
    writers = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    numbers = Counter(int(folder.name) for folder in versions(tmp_path / "digits"))
    assert numbers == Counter(range(1, 41))


@pytest.fixture
def run_command(checkpoint, split, variants, tmp_path, monkeypatch):
    """The command as typed; the gate itself ran once for the whole session."""
    monkeypatch.setattr(data, "load_split", lambda *_: split)
    monkeypatch.setattr(create, "make_variants", lambda *_, precision, **__: made[precision])
    made = {"best": variants, "int8": variants, "fp32": variants[:1]}
    path, repository = tmp_path / "checkpoint.pt", tmp_path / "digits"

    def run(*flags, saved=checkpoint):
        save_checkpoint(saved, path)
        arguments = [f"--checkpoint={path}", f"--model-repository={repository}"]
        return command.main([*arguments, *flags]), repository

    return run


def test_command_gates_writes_and_lists(checkpoint, split, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, "load_split", lambda *_: split)
    save_checkpoint(checkpoint, tmp_path / "checkpoint.pt")
    repository = tmp_path / "digits"
    arguments = [f"--checkpoint={tmp_path / 'checkpoint.pt'}", f"--model-repository={repository}"]
    assert command.main([*arguments, "--precision=fp32"]) == 0
    printed = capsys.readouterr().out
    assert "pass  largest logit difference to PyTorch" in printed
    assert "FAIL" not in printed
    assert f"wrote {repository / '1'}: fp32" in printed
    assert load_artifact(repository / "1")


def test_command_exits_with_1_and_writes_nothing_when_the_gate_fails(
    checkpoint, split, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(data, "load_split", lambda *_: split)
    confusion = [row[::-1] for row in checkpoint.metrics["confusion"]]
    wrong = replace(checkpoint, metrics=checkpoint.metrics | {"confusion": confusion})
    save_checkpoint(wrong, tmp_path / "checkpoint.pt")
    repository = tmp_path / "digits"
    flags = [f"--checkpoint={tmp_path / 'checkpoint.pt'}", f"--model-repository={repository}"]
    assert command.main(flags) == 1
    assert not repository.exists()
    error = capsys.readouterr().err
    assert "gate failed, nothing was written: fp32: test images: confusion matrix" in error


def test_command_stages_without_changing_what_serves(run_command):
    _, repository = run_command("--precision=fp32")
    code, _ = run_command("--stage")
    assert (code, serving(repository)) == (0, 1)
    assert len(versions(repository)) == 3
    run_command()
    assert serving(repository) == 5
    assert not (repository / PROMOTED).exists()


def test_command_signs(run_command, keys, capsys):
    _, repository = run_command(f"--signing-key={keys / 'private.pem'}")
    assert load_artifact(repository / "1", keys / "public.pem")
    assert len((repository / "1" / SIGNATURE).read_bytes()) == 64
    assert command.main(["verify", str(repository / "1"), f"--public-key={keys}/public.pem"]) == 0
    assert command.main(["verify", str(repository / "1"), f"--public-key={keys}/other.pem"]) == 1
    assert "manifest.sig: not made by the required key" in capsys.readouterr().out
    before = len(versions(repository))
    code, _ = run_command(f"--signing-key={keys / 'public.pem'}")
    assert (code, len(versions(repository))) == (1, before)
    assert "public.pem: not a usable PEM key" in capsys.readouterr().err


def test_command_refuses_other_data_than_it_was_trained_on(run_command, checkpoint, capsys):
    other = Checkpoint(**{**vars(checkpoint), "dataset_sha256": {"train": "x", "test": "y"}})
    code, repository = run_command(saved=other)
    assert (code, repository.exists()) == (1, False)
    assert "train split: the checkpoint was made with x" in capsys.readouterr().err


def test_command_without_a_checkpoint_says_what_to_do(tmp_path, capsys):
    assert command.main([f"--checkpoint={tmp_path / 'none.pt'}"]) == 1
    assert "run 'make train' first" in capsys.readouterr().err


def test_verify_needs_no_torch(repository):
    """It runs where only the server and onnx are installed."""
    code = (
        "import sys; sys.modules['torch'] = None;"
        "from export.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "verify", str(repository / "2")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for line in ("manifest, hashes", "onnx checker", "report passed", "golden digits"):
        assert f"pass  {line}" in result.stdout


def damaged_file(folder, name):
    path = folder / name
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")


def test_verify_names_what_does_not_hold(repository, capsys):
    damaged_file(repository / "1", MODEL)
    assert command.main(["verify", str(repository / "1")]) == 1
    printed = capsys.readouterr()
    assert "FAIL  manifest, hashes" in printed.out
    assert "model.onnx: expected sha256" in printed.out
    assert "does not hold" in printed.err


def test_verify_refuses_a_report_of_another_model(repository, capsys):
    folder = repository / "2"
    (folder / PARITY).write_bytes((repository / "1" / PARITY).read_bytes())
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][PARITY] = create.artifact.sha256((folder / PARITY).read_bytes())
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert command.main(["verify", str(folder)]) == 1
    assert "FAIL  report passed and is of this model" in capsys.readouterr().out


def test_show_prints_manifest_and_gate(repository, capsys):
    assert command.main(["show", str(repository / "2")]) == 0
    printed = capsys.readouterr().out
    assert "digits version 2, int8" in printed
    assert "decisions changed against fp32" in printed
    assert command.main(["show", str(repository / "2"), "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| group | check | figure | bound |")


def test_promote_rollback_and_list_say_what_serves(repository, capsys):
    flag = f"--model-repository={repository}"
    assert command.main(["list", flag]) == 0
    assert serving(repository) == 2
    assert command.main(["rollback", flag]) == 0
    assert serving(repository) == 1
    assert command.main(["rollback", flag]) == 1
    assert "no lower version" in capsys.readouterr().err
    assert command.main(["promote", "2", flag]) == 0
    assert (promoted(repository), serving(repository)) == (2, 2)
    assert command.main(["promote", "7", flag]) == 1
    assert "expected latest or one of 1, 2, got 7" in capsys.readouterr().err
    assert command.main(["promote", "latest", flag]) == 0
    assert promoted(repository) is None
    damaged_file(repository / "2", MODEL)
    assert command.main(["list", flag]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "refused" in printed
    assert command.main(["promote", "2", flag]) == 1


def test_promotion_is_one_file_that_latest_removes(repository):
    promote(repository, 1)
    assert (repository / PROMOTED).read_text() == "1\n"
    promote(repository, None)
    assert sorted(path.name for path in repository.iterdir()) == ["1", "2"]


def test_default_model_is_accurate_and_says_how_it_was_made():
    for folder in versions(REPOSITORY):
        manifest = load_artifact(folder).manifest
        assert manifest["accuracy"]["accuracy"] >= 0.995
        assert manifest["accuracy"]["images"] == 10_000
        # On one thread of a machine that did other work; docs/training.md has quiet times.
        assert manifest["training"]["seconds"] <= 25 * 60
        assert "dirty" not in manifest["source_commit"]


def test_documented_gate_is_what_the_default_versions_got():
    documented = (ROOT / "docs/artifact.md").read_text()
    int8, fp32 = in_serving_order(REPOSITORY)[:2]
    assert [load_artifact(f).precision for f in (int8, fp32)] == ["int8", "fp32"]
    for folder in (int8, fp32):
        assert gate_markdown(read_gate(folder)) in documented
