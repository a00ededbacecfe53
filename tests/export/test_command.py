"""``python -m export``: every verb, its exit codes and what it says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export import __main__ as command
from export import create, judge
from export.judge import Comparison
from export.show import rows
from service.artifact.errors import ArtifactError
from service.artifact.format import MANIFEST, PARITY, SIGNATURE, load_artifact, sha256
from service.artifact.repository import PROMOTED, promoted, releases
from tests.conftest import ROOT
from tests.releases import FP32, change_manifest
from training import sets as sets_module
from training.checkpoint import Checkpoint, save_checkpoint
from training.data import Split

LOWER = Comparison("1", reasons=["accuracy: 99.66% → 98.90% (p = 1e-12)"])


def serving(repository: Any) -> Any:
    """The release that a server takes; 0 for none."""
    return next((row.number for row in rows(repository) if row.serves), 0)


@pytest.fixture
def run_command(
    checkpoint: Checkpoint, split: Split, made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Any, Any]]:
    """The command as typed; the gate itself ran once for the whole session."""
    monkeypatch.setattr(sets_module, "load_split", lambda *_: split)
    monkeypatch.setattr(create, "make_release", lambda *_, **__: made)
    path, repository = tmp_path / "checkpoint.pt", tmp_path / "digits"

    def run(*flags: str, saved: Any = checkpoint) -> tuple[Any, Any]:
        save_checkpoint(saved, path)
        arguments = [f"--checkpoint={path}", f"--model-repository={repository}"]
        return command.main([*arguments, *flags]), repository

    return run


@pytest.fixture
def judged_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every release is found to be worse."""
    monkeypatch.setattr(judge, "compare", lambda *_: LOWER)


def test_command_gates_judges_writes_and_lists(
    checkpoint: Checkpoint,
    split: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sets_module, "load_split", lambda *_: split)
    save_checkpoint(checkpoint, tmp_path / "checkpoint.pt")
    repository = tmp_path / "digits"
    arguments = [f"--checkpoint={tmp_path / 'checkpoint.pt'}", f"--model-repository={repository}"]
    # The release in service, of the clone, is of other data and far better.
    assert command.main([*arguments, "--precision=fp32", "--min-accuracy=0.5"]) == 3
    printed = capsys.readouterr()
    assert "pass  largest logit difference to PyTorch" in printed.out
    assert "FAIL" not in printed.out
    assert f"wrote {repository / '1'}" in printed.out
    assert "int8 was left out: fp32 was asked for" in printed.out
    assert "1 was written and is not published" in printed.err
    assert "dataset: the release in service has mnist" in printed.err
    assert "promote 1 --accept-lower" in printed.err
    assert load_artifact(repository / "1").manifest["comparison"]["against"] == "1"
    assert serving(repository) == 0, "the only release, and not published"


@pytest.mark.full
def test_command_exits_with_1_and_writes_nothing_when_the_gate_fails(
    checkpoint: Checkpoint,
    split: Split,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sets_module, "load_split", lambda *_: split)
    measured = create._measured

    def other_truth(*given: Any) -> Any:
        metrics = measured(*given)
        return metrics | {"confusion": [row[::-1] for row in metrics["confusion"]]}

    monkeypatch.setattr(create, "_measured", other_truth)
    save_checkpoint(checkpoint, tmp_path / "checkpoint.pt")
    repository = tmp_path / "digits"
    flags = [f"--checkpoint={tmp_path / 'checkpoint.pt'}", f"--model-repository={repository}"]
    assert command.main(flags) == 1
    assert not repository.exists()
    error = capsys.readouterr().err
    assert "gate failed, nothing was written: fp32: test images: confusion matrix" in error


@pytest.mark.full
def test_release_that_is_no_worse_is_published_and_says_how_to_serve_it(
    run_command: Callable[..., tuple[Any, Any]],
    repository: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _ = run_command("--min-accuracy=0.5")
    assert (code, serving(repository), promoted(repository)) == (0, 3, None)
    printed = capsys.readouterr().out
    assert "accuracy" in printed
    assert f"make serve MODELS={repository}" in printed
    comparison = load_artifact(repository / "3").manifest["comparison"]
    assert (comparison["against"], comparison["publish"]) == ("2", True)
    assert {measure["verdict"] for measure in comparison["measures"]} <= {"same", "for information"}


def test_release_below_the_floor_is_staged(
    run_command: Callable[..., tuple[Any, Any]],
    repository: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _ = run_command("--min-accuracy=1")
    assert (code, serving(repository)) == (3, 2)
    assert "accuracy: expected at least 100.00%, got" in capsys.readouterr().err


def test_worse_release_is_staged_until_somebody_accepts_it(
    run_command: Callable[..., tuple[Any, Any]],
    repository: Path,
    judged_lower: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, _ = run_command()
    assert (code, serving(repository)) == (3, 2)
    flag = f"--model-repository={repository}"
    assert command.main(["list", flag]) == 0
    assert "release 3 was not published: accuracy: 99.66% → 98.90%" in capsys.readouterr().out
    for release in ("3", "latest"):
        assert command.main(["promote", release, flag]) == 1
        assert "98.90%" in capsys.readouterr().err
    assert serving(repository) == 2
    assert command.main(["promote", "3", flag, "--accept-lower"]) == 0
    assert serving(repository) == 3
    assert command.main(["rollback", flag]) == 0
    assert serving(repository) == 2


def test_rollback_passes_over_what_was_never_published(
    run_command: Callable[..., tuple[Any, Any]],
    repository: Path,
    judged_lower: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_command()
    monkeypatch.setattr(judge, "compare", lambda *_: Comparison("2"))
    assert run_command()[0] == 0
    assert serving(repository) == 4
    assert command.main(["rollback", f"--model-repository={repository}"]) == 0
    assert serving(repository) == 2


def test_command_stages_without_changing_what_serves(
    run_command: Callable[..., tuple[Any, Any]], repository: Path
) -> None:
    code, _ = run_command("--stage", "--min-accuracy=0.5")
    assert (code, serving(repository)) == (0, 2)
    run_command("--min-accuracy=0.5")
    assert serving(repository) == 4
    assert not (repository / PROMOTED).exists()


def test_command_signs(
    run_command: Callable[..., tuple[Any, Any]],
    repository: Path,
    keys: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_command(f"--signing-key={keys / 'private.pem'}", "--min-accuracy=0.5")
    assert load_artifact(repository / "3", keys / "public.pem")
    assert len((repository / "3" / SIGNATURE).read_bytes()) == 64
    verify = ["verify", "3", f"--model-repository={repository}"]
    assert command.main([*verify, f"--public-key={keys}/public.pem"]) == 0
    assert command.main([*verify, f"--public-key={keys}/other.pem"]) == 1
    assert "manifest.sig: not made by the required key" in capsys.readouterr().out
    code, _ = run_command(f"--signing-key={keys / 'public.pem'}")
    assert (code, len(releases(repository))) == (1, 3)
    assert "public.pem: not a usable PEM key" in capsys.readouterr().err


def test_release_is_signed_later(repository: Path, keys: Path) -> None:
    key = f"--signing-key={keys / 'private.pem'}"
    assert command.main(["sign", "1", f"--model-repository={repository}", key]) == 0
    assert load_artifact(repository / "1", keys / "public.pem")


def test_choice_of_what_serves_is_signed(repository: Path, keys: Path) -> None:
    """As a server with --model-public-key asks for."""
    flags = [f"--model-repository={repository}", f"--signing-key={keys / 'private.pem'}"]
    for verb, number in ((["rollback"], 1), (["promote", "2"], 2)):
        assert command.main([*verb, *flags]) == 0
        assert promoted(repository, keys / "public.pem") == promoted(repository) == number
        with pytest.raises(ArtifactError, match="PROMOTED: not made by the required key"):
            promoted(repository, keys / "other.pem")
    assert command.main(["promote", "latest", *flags]) == 0
    assert promoted(repository, keys / "public.pem") is None


def test_command_rejects_other_data_than_it_was_trained_on(
    run_command: Callable[..., tuple[Any, Any]],
    checkpoint: Checkpoint,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = Checkpoint(**{**vars(checkpoint), "dataset_sha256": {"train": "x", "test": "y"}})
    code, repository = run_command(saved=other)
    assert (code, repository.exists()) == (1, False)
    assert "train split: the checkpoint was made with x" in capsys.readouterr().err


def test_repository_of_another_name_is_rejected(
    run_command: Callable[..., tuple[Any, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run_command(f"--model-repository={tmp_path / 'letters'}")
    assert code == 1
    assert "--model-repository: expected a folder named digits" in capsys.readouterr().err


def test_command_without_a_checkpoint_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([f"--checkpoint={tmp_path / 'none.pt'}"]) == 1
    assert "run 'make train' first" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags", [["--precision=fp16"], ["--min-accuracy=2"], ["--bogus"], ["promote"]]
)
def test_wrong_use_exits_with_2(flags: Any) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(flags)
    assert left.value.code == 2


VERBS = {
    "list": [], "show": [], "verify": [], "promote": ["1"], "rollback": [],
}  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_of_operators_need_neither_torch_nor_onnx(repository: Path, verb: str) -> None:
    """They run where only the server is installed."""
    code = (
        "import sys; sys.modules.update(torch=None, onnx=None);"
        "from export.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, verb, *VERBS[verb], "--model-repository", str(repository)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    assert "release" in result.stdout


def test_verify_checks_graphs_where_onnx_is(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(["verify", f"--model-repository={repository}"]) == 0
    printed = capsys.readouterr().out
    for line in ("manifest, hashes", "onnx checker", "report passed", "golden digits"):
        assert f"pass  {line}" in printed


def damaged_file(folder: Path, name: str) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-3] + b"xyz")


def test_verify_names_what_is_wrong(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged_file(repository / "1", FP32)
    assert command.main(["verify", "1", f"--model-repository={repository}"]) == 1
    printed = capsys.readouterr()
    assert "FAIL  manifest, hashes" in printed.out
    assert "model.fp32.onnx: expected sha256" in printed.out
    assert "is invalid" in printed.err


def test_verify_rejects_a_report_of_another_model(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = repository / "2"
    report = json.loads((folder / PARITY).read_text())
    report["fp32"] = report["int8"]
    content = json.dumps(report).encode()
    (folder / PARITY).write_bytes(content)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    change_manifest(folder, files=files | {PARITY: sha256(content)})
    assert command.main(["verify", "2", f"--model-repository={repository}"]) == 1
    assert "FAIL  report passed and is of this model" in capsys.readouterr().out


def test_show_prints_manifest_and_gate(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = f"--model-repository={repository}"
    assert command.main(["show", "2", flag]) == 0
    printed = capsys.readouterr().out
    for text in ("digits 2", "weights of the last epoch", "500 train images", "gate of int8"):
        assert text in printed
    assert "decisions changed against fp32" in printed
    assert command.main(["show", flag, "--markdown=int8"]) == 0
    assert capsys.readouterr().out.startswith("| group | check | figure | bound |")
    assert command.main(["show", "9", flag]) == 1
    assert "release: expected one of 1, 2, got 9" in capsys.readouterr().err


def test_promote_rollback_and_list_say_what_serves(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flag = f"--model-repository={repository}"
    assert command.main(["list", flag]) == 0
    assert serving(repository) == 2
    assert command.main(["rollback", flag]) == 0
    assert serving(repository) == 1
    assert command.main(["rollback", flag]) == 1
    assert "expected a lower release" in capsys.readouterr().err
    assert command.main(["promote", "2", flag]) == 0
    assert (promoted(repository), serving(repository)) == (2, 2)
    assert command.main(["promote", "7", flag]) == 1
    assert "expected latest or one of 1, 2, got 7" in capsys.readouterr().err
    assert command.main(["promote", "latest", flag]) == 0
    assert promoted(repository) is None
    damaged_file(repository / "2", FP32)
    assert command.main(["list", flag]) == 0
    assert "release 2 is invalid: model.fp32.onnx: expected sha256" in capsys.readouterr().out
    assert command.main(["promote", "2", flag]) == 1


def test_repository_comes_from_the_environment_of_an_image(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DIGITS_MODEL_REPOSITORY", str(repository))
    assert command.main(["list"]) == 0
    assert str(repository) in capsys.readouterr().out.replace("\n", "")
