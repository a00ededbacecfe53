"""``python -m export``: checkpoint to verified artifact; on any doubt, nothing is written."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from export import show
from export.artifact import check_signing_key, promote, sign_version
from export.progress import Progress
from export.verify import verify
from service.artifact.format import ArtifactError, KeyFileError, load_artifact

REPOSITORY = Path("models/digits")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m export", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    create = verbs.add_parser("create", help="prove and write the trained model (the default)")
    create.add_argument("--checkpoint", type=Path, default=Path("runs/default/checkpoint.pt"))
    create.add_argument("--data-dir", type=Path, help="default $DIGITS_DATA, else data/")
    create.add_argument(
        "--precision",
        choices=("best", "fp32", "int8"),
        default="best",
        help="best adds int8 to fp32 if it passes; int8 fails if it does not",
    )
    create.add_argument(
        "--stage", action="store_true", help="write, but let the present version go on serving"
    )
    create.add_argument("--signing-key", type=Path, help="Ed25519 private key, PEM")
    check = verbs.add_parser("verify", help="check a written version again, without PyTorch")
    check.add_argument("folder", type=Path)
    check.add_argument("--public-key", type=Path, help="Ed25519 key that must have signed it, PEM")
    view = verbs.add_parser("show", help="print a version's manifest and gate")
    view.add_argument("folder", type=Path)
    view.add_argument("--markdown", action="store_true", help="the gate as a Markdown table")
    sign = verbs.add_parser("sign", help="sign a written version")
    sign.add_argument("folder", type=Path)
    sign.add_argument("--signing-key", type=Path, required=True, help="Ed25519 private key, PEM")
    reference = verbs.add_parser(
        "reference", help="add what drift is measured against to a version that has none"
    )
    reference.add_argument("folder", type=Path)
    reference.add_argument("--data-dir", type=Path, help="default $DIGITS_DATA, else data/")
    reference.add_argument("--signing-key", type=Path, help="Ed25519 private key, PEM")
    listing = verbs.add_parser("list", help="print every version and which one serves")
    to_serve = verbs.add_parser("promote", help="choose the version that serves")
    to_serve.add_argument("version", help="a number, or latest")
    back = verbs.add_parser("rollback", help="serve the version before the one that serves")
    for verb in (create, listing, to_serve, back):
        verb.add_argument("--model-repository", type=Path, default=REPOSITORY)
    return parser


def main(argv: list[str]) -> int:
    """Runs one verb; returns the exit code."""
    if not argv or (argv[0].startswith("-") and argv[0] not in {"-h", "--help"}):
        argv = ["create", *argv]
    arguments = _parser().parse_args(argv)
    verbs = {
        "create": _create, "verify": _verify, "show": _show, "sign": _sign,
        "reference": _reference, "list": _list, "promote": _promote, "rollback": _rollback,
    }  # fmt: skip
    console = Console(soft_wrap=True, highlight=False)
    try:
        return verbs[arguments.verb](arguments, console)
    except (ArtifactError, KeyFileError, OSError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("export: interrupted", file=sys.stderr)
        return 130


def _create(arguments: argparse.Namespace, console: Console) -> int:
    # PyTorch, for this verb alone.
    from export.create import (  # noqa: PLC0415
        GateError,
        check_data,
        make_variants,
        write_variants,
    )
    from training.checkpoint import CheckpointError, load_checkpoint  # noqa: PLC0415
    from training.data import DataError, data_dir, load_split  # noqa: PLC0415

    repository: Path = arguments.model_repository.resolve()
    if arguments.signing_key is not None:
        check_signing_key(arguments.signing_key)  # before the work, not after it
    try:
        checkpoint = load_checkpoint(arguments.checkpoint)
        root = data_dir(arguments.data_dir)
        train, test = (load_split(checkpoint.config.dataset, s, root) for s in ("train", "test"))
        check_data(checkpoint, train, test)
        with Progress(console) as progress:
            variants = make_variants(
                checkpoint,
                train,
                test,
                name=repository.name,
                precision=arguments.precision,
                reporter=progress,
            )
    except GateError as error:
        print(f"export: gate failed, nothing was written: {error}", file=sys.stderr)
        return 1
    except (CheckpointError, DataError) as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    write_variants(
        repository,
        variants,
        checkpoint,
        stage=arguments.stage,
        signing_key=arguments.signing_key,
        on_written=lambda folder, variant: console.print(
            f"wrote {folder}: {variant.precision}, {len(variant.model):,} bytes, "
            f"{variant.accuracy['accuracy']:.2%}, sha256 {variant.report.model_sha256}"
        ),
    )
    if arguments.precision == "best" and len(variants) == 1:
        console.print("[yellow]int8 was left out: it did not pass, or has nothing to gain[/]")
    return _list(arguments, console)


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    passed = True
    with Progress(console) as progress:
        for check in verify(arguments.folder.resolve(), arguments.public_key):
            progress.check(check)
            passed = passed and check.passed
    if not passed:
        print(f"export: {arguments.folder} does not hold", file=sys.stderr)
    return 0 if passed else 1


def _show(arguments: argparse.Namespace, console: Console) -> int:
    report = show.read_gate(arguments.folder)
    if arguments.markdown:
        print(show.gate_markdown(report))
        return 0
    for key, value in show.summary(load_artifact(arguments.folder.resolve())).items():
        console.print(f"{key:>17}  {value}", markup=False)
    lines = Progress(console)
    for check in report.checks:
        lines.check(check)
    return 0


def _sign(arguments: argparse.Namespace, console: Console) -> int:
    sign_version(arguments.folder, arguments.signing_key)
    console.print(f"signed {arguments.folder}")
    return 0


def _reference(arguments: argparse.Namespace, console: Console) -> int:
    # PyTorch's data sets, for this verb.
    from export.reference import add_reference  # noqa: PLC0415
    from training.data import DataError, data_dir, load_split  # noqa: PLC0415

    folder: Path = arguments.folder.resolve()
    dataset = load_artifact(folder).manifest["dataset"]["name"]
    try:
        train = load_split(dataset, "train", data_dir(arguments.data_dir))
    except DataError as error:
        print(f"export: {error}", file=sys.stderr)
        return 1
    reference = add_reference(folder, train, arguments.signing_key)
    images = sum(reference["digit"]["counts"])
    console.print(f"added to {folder}: {images:,} {reference['images']} images")
    return 0


def _list(arguments: argparse.Namespace, console: Console) -> int:
    console.print(show.repository_table(show.rows(arguments.model_repository)))
    return 0


def _promote(arguments: argparse.Namespace, console: Console) -> int:
    repository = arguments.model_repository
    if arguments.version == "latest":
        promote(repository, None)
        return _list(arguments, console)
    holding = [str(row.number) for row in show.rows(repository) if row.artifact]
    if arguments.version not in holding:
        raise ArtifactError(
            f"version: expected latest or one of {', '.join(holding)}, got {arguments.version}"
        )
    promote(repository, int(arguments.version))
    return _list(arguments, console)


def _rollback(arguments: argparse.Namespace, console: Console) -> int:
    before: int | None = None
    for row in show.rows(arguments.model_repository):
        if row.serves:
            break
        before = row.number if row.artifact else before
    if before is None:
        raise ArtifactError("there is no lower version that holds")
    promote(arguments.model_repository, before)
    return _list(arguments, console)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
