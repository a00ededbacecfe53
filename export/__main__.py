"""``python -m export``: make a release of a checkpoint, judge it, and look after a repository."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from export import show
from export.artifact import check_signing_key, promote, sign_release
from export.check import read_reports
from export.progress import Progress
from service.artifact.errors import ArtifactError, KeyFileError
from service.artifact.format import PARITY, PRECISIONS, Artifact, load_artifact

# Of PyTorch, here and in fresh processes; see training/__main__.py. Read as it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LOCAL = Path("models/local")
COMMITTED = Path(__file__).parents[1] / "models"
# Exit codes beside 0: the command failed; it was called wrongly (argparse's); a release was written
# and not published, since it is not as good as the one in service.
FAILED, STAGED = 1, 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    create = verbs.add_parser(
        "create", help="prove, judge and write the trained model (the default)"
    )
    create.add_argument(
        "--checkpoint", type=Path, default=Path("runs/latest/checkpoint.pt"),
        help="what training wrote (default %(default)s)",
    )  # fmt: skip
    create.add_argument(
        "--data", type=Path, metavar="PATH",
        help="images of your own that it was trained on, as for python -m training",
    )  # fmt: skip
    create.add_argument(
        "--data-dir", type=Path, help="folder of the data sets (default $DIGITS_DATA, else data/)"
    )
    create.add_argument(
        "--precision", choices=("best", "fp32", "int8"), default="best",
        help="best adds int8 to fp32 if it passes; int8 fails if it does not (default %(default)s)",
    )  # fmt: skip
    create.add_argument(
        "--min-accuracy", type=_share, metavar="SHARE",
        help="accuracy on the test split below which nothing is published (default: 0.97 for "
        "mnist, 0.85 for fashion-mnist, 0.9 for images of your own)",
    )  # fmt: skip
    create.add_argument(
        "--stage", action="store_true", help="write, but let the present release go on serving"
    )
    create.add_argument("--signing-key", type=Path, help="Ed25519 private key that signs it, PEM")
    create.add_argument(
        "--model-repository", type=Path,
        help=f"folder of releases, named after the model (default {LOCAL}/<name of the model>)",
    )  # fmt: skip
    check = verbs.add_parser("verify", help="check a release again, without PyTorch")
    check.add_argument("--public-key", type=Path, help="Ed25519 key that must have signed it, PEM")
    view = verbs.add_parser("show", help="print a release's manifest, comparison and gate")
    view.add_argument(
        "--markdown",
        choices=("card", *PRECISIONS),
        help="only a table for the docs: the model card's figures, or the gate of a variant",
    )
    sign = verbs.add_parser("sign", help="sign a release")
    sign.add_argument("--signing-key", type=Path, required=True, help="Ed25519 private key, PEM")
    listing = verbs.add_parser("list", help="print every release and which one serves")
    to_serve = verbs.add_parser("promote", help="choose the release that serves")
    to_serve.add_argument("release", help="a number, or latest")
    to_serve.add_argument(
        "--accept-lower", action="store_true", help="though it was judged lower than another"
    )
    back = verbs.add_parser("rollback", help="serve the release before the one that serves")
    for verb in (to_serve, back):
        verb.add_argument(
            "--signing-key", type=Path, help="Ed25519 private key that signs the choice, PEM: "
            "servers with --model-public-key take no other",
        )  # fmt: skip
    for verb in (check, view, sign):
        verb.add_argument("release", nargs="?", help="a number (default: the one that serves)")
    for verb in (check, view, sign, listing, to_serve, back):
        verb.add_argument(
            "--model-repository", type=Path, help="folder of releases (default "
            f"$DIGITS_MODEL_REPOSITORY, else {LOCAL}/digits, else models/digits)",
        )  # fmt: skip
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected 0 to 1, got {text}")
    return value


def main(argv: Sequence[str]) -> int:
    """Runs one verb; returns the exit code."""
    if not argv or (argv[0].startswith("-") and argv[0] not in {"-h", "--help"}):
        argv = ["create", *argv]
    arguments = _parser().parse_args(argv)
    verbs = {
        "create": _create, "verify": _verify, "show": _show, "sign": _sign,
        "list": _list, "promote": _promote, "rollback": _rollback,
    }  # fmt: skip
    console = Console(soft_wrap=True, highlight=False)
    try:
        return verbs[arguments.verb](arguments, console)
    except (ArtifactError, KeyFileError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("export: interrupted, nothing was published", file=sys.stderr)
        return 130


def _create(arguments: argparse.Namespace, console: Console) -> int:
    console.print("loading PyTorch, the checkpoint and the data")
    # PyTorch, for this verb alone.
    from export.check import GateError  # noqa: PLC0415
    from export.create import check_data, make_release, publish  # noqa: PLC0415
    from export.judge import Candidate, compare  # noqa: PLC0415
    from training.checkpoint import CheckpointError, load_checkpoint  # noqa: PLC0415
    from training.data import DATASETS, DataError, data_dir  # noqa: PLC0415
    from training.sets import load_sets  # noqa: PLC0415

    if arguments.signing_key is not None:
        check_signing_key(arguments.signing_key)  # before the work, not after it
    try:
        checkpoint = load_checkpoint(arguments.checkpoint)
        sets = load_sets(checkpoint.config, data_dir(arguments.data_dir), arguments.data)
        check_data(checkpoint, sets)
        with Progress(console) as progress:
            made = make_release(checkpoint, sets, precision=arguments.precision, reporter=progress)
            repository = _target(arguments.model_repository, made.candidate.name)
            baseline = _in_service(repository)
            progress.stage("comparing it with the release in service")
            against = None if baseline is None else Candidate.of(baseline)
            floor = DATASETS[checkpoint.config.dataset].min_accuracy
            if arguments.min_accuracy is not None:
                floor = arguments.min_accuracy
            comparison = compare(made.candidate, against, sets.test, floor)
    except GateError as error:
        print(f"export: gate failed, nothing was written: {error}", file=sys.stderr)
        return FAILED
    except (CheckpointError, DataError) as error:
        print(f"export: {error}", file=sys.stderr)
        return FAILED
    folder = publish(
        repository, made, comparison, stage=arguments.stage, signing_key=arguments.signing_key
    )
    if comparison.measures:
        console.print(show.comparison_table(comparison.to_manifest()))
    if made.left_out:
        console.print(f"[yellow]int8 was left out: {made.left_out}[/]")
    console.print(f"wrote {folder}", markup=False)
    console.print(show.repository_table(show.rows(repository)))
    if not comparison.publish:
        return _say_staged(folder, comparison.reasons)
    models = _relative(repository)
    console.print(f"serve it:  make serve MODELS={models}", markup=False)
    console.print(f"ship it:   make image MODELS={models}", markup=False)
    return 0


def _target(given: Path | None, name: str) -> Path:
    """The repository of a model.

    Raises:
        ArtifactError: If the folder that was asked for has another name: no server would take it.
    """
    repository = (given or LOCAL / name).resolve()
    if repository.name != name:
        expected = f"a folder named {name}, as the model"
        raise ArtifactError(f"--model-repository: expected {expected}, got {repository}")
    return repository


def _in_service(repository: Path) -> Artifact | None:
    """What serves there; in a new repository, what serves from the one that is committed."""
    return show.serving(repository) or show.serving(COMMITTED / repository.name)


def _relative(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _say_staged(folder: Path, reasons: Sequence[str]) -> int:
    print(f"export: {folder} was written and is not published:", file=sys.stderr)
    for reason in reasons:
        print(f"  {reason}", file=sys.stderr)
    command = f"python -m export promote {folder.name} --accept-lower"
    print(
        f"to serve it all the same: {command} --model-repository {_relative(folder.parent)}",
        file=sys.stderr,
    )
    return STAGED


def _repository(arguments: argparse.Namespace) -> Path:
    """The repository of the verbs that look after one."""
    environment = os.environ.get("DIGITS_MODEL_REPOSITORY")
    given: Path | None = arguments.model_repository or (Path(environment) if environment else None)
    local = LOCAL / "digits"
    return (given or (local if local.is_dir() else COMMITTED / "digits")).absolute()


def _folder(arguments: argparse.Namespace) -> Path:
    """The release that was named, else the one that serves.

    Raises:
        ArtifactError: If there is no such release.
    """
    repository = _repository(arguments)
    listed = show.rows(repository)
    wanted = [row for row in listed if str(row.number) == arguments.release]
    if arguments.release is None:
        wanted = [row for row in listed if row.serves]
    if not wanted:
        expected = ", ".join(str(row.number) for row in listed) or "none, the repository is empty"
        raise ArtifactError(f"release: expected one of {expected}, got {arguments.release}")
    return repository / str(wanted[0].number)


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    from export.verify import verify  # noqa: PLC0415 - onnxruntime, for this verb alone

    folder, passed = _folder(arguments), True
    with Progress(console) as progress:
        for check in verify(folder, arguments.public_key):
            progress.check(check)
            passed = passed and check.passed
    if not passed:
        print(f"export: {folder} is invalid", file=sys.stderr)
    return 0 if passed else FAILED


def _show(arguments: argparse.Namespace, console: Console) -> int:
    folder = _folder(arguments)
    release = load_artifact(folder)
    reports = read_reports((folder / PARITY).read_bytes())
    if arguments.markdown == "card":
        print(show.card_markdown(release))
        return 0
    if arguments.markdown:
        if arguments.markdown not in reports:
            raise ArtifactError(f"--markdown: expected {' or '.join(reports)}")
        print(show.gate_markdown(reports[arguments.markdown]))
        return 0
    for key, value in show.summary(release).items():
        console.print(f"{key:>17}  {value}", markup=False)
    comparison = release.manifest["comparison"]
    if comparison["measures"]:
        console.print(show.comparison_table(comparison))
    for precision, report in reports.items():
        console.print(f"\n[bold]gate of {precision}[/]")
        lines = Progress(console)
        for check in report.checks:
            lines.check(check)
    return 0


def _sign(arguments: argparse.Namespace, console: Console) -> int:
    folder = _folder(arguments)
    sign_release(folder, arguments.signing_key)
    console.print(f"signed {folder}", markup=False)
    return 0


def _list(arguments: argparse.Namespace, console: Console) -> int:
    repository = _repository(arguments)
    console.print(str(repository), markup=False)
    return _print_table(repository, console)


def _print_table(repository: Path, console: Console) -> int:
    listed = show.rows(repository)
    console.print(show.repository_table(listed))
    for remark in show.remarks(listed):
        console.print(remark, markup=False)
    return 0


def _promote(arguments: argparse.Namespace, console: Console) -> int:
    repository = _repository(arguments)
    valid = [row for row in show.rows(repository) if row.artifact]
    latest = arguments.release == "latest"
    chosen = [row for row in valid if str(row.number) == arguments.release]
    if latest:
        chosen = valid[-1:]
    if not chosen:
        numbers = ", ".join(str(row.number) for row in valid)
        raise ArtifactError(
            f"release: expected latest or one of {numbers}, got {arguments.release}"
        )
    (row,) = chosen
    if not row.is_accepted and not arguments.accept_lower:
        assert row.artifact is not None
        reasons = "\n  ".join(row.artifact.manifest["comparison"]["reasons"])
        raise ArtifactError(
            f"release {row.number} was judged and not published:\n  {reasons}\n"
            "--accept-lower promotes it all the same"
        )
    number = None if latest and row.is_accepted else row.number
    promote(repository, number, arguments.signing_key)
    return _print_table(repository, console)


def _rollback(arguments: argparse.Namespace, console: Console) -> int:
    repository = _repository(arguments)
    before: int | None = None
    for row in show.rows(repository):
        if row.serves:
            break
        before = row.number if row.is_accepted else before
    if before is None:
        raise ArtifactError("rollback: expected a lower release that is valid and was published")
    promote(repository, before, arguments.signing_key)
    return _print_table(repository, console)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
