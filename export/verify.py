"""Checks a written release again, without PyTorch: files, signature, graphs, golden digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from export.check import Check, read_reports
from service.artifact.errors import ArtifactError
from service.artifact.format import PARITY, Artifact, load_artifact
from service.serving.loader import load_model

BATCH = 64


def verify(folder: Path, public_key: Path | None = None) -> Iterator[Check]:
    """Every check, ending with the first that makes the rest meaningless.

    The structure of the graphs is checked where onnx is installed, which a server does not need.

    Args:
        folder: The release.
        public_key: PEM file of the Ed25519 key that must have signed it; None asks for none.

    Raises:
        KeyFileError: If the key can not be used.
    """
    found: list[Artifact] = []

    def read() -> str:
        found.append(load_artifact(folder, public_key))
        return f"release {found[0].version}: {', '.join(found[0].variants)}"

    asked = "manifest, hashes" + (", signature" if public_key else "")
    yield (files := _check("files", asked, read))
    if not files.passed:
        return
    for precision, variant in found[0].variants.items():
        if find_spec("onnx"):
            from export.structure import check_structure  # noqa: PLC0415 - needs onnx

            yield from check_structure(variant.model, found[0].labels)
        reported = "report passed and is of this model"
        yield _check(precision, reported, partial(_reported, folder, found[0], precision))
        golden = "golden digits, in the session that serves"
        yield _check(precision, golden, partial(_serve, folder, precision))


def _reported(folder: Path, found: Artifact, precision: str) -> str:
    report = read_reports((folder / PARITY).read_bytes()).get(precision)
    if report is None or not report.passed:
        failed = "there is none" if report is None else f"failed: {'; '.join(report.failed)}"
        raise ArtifactError(failed)
    if report.model_sha256 != found.variants[precision].sha256:
        raise ArtifactError(f"is of model {report.model_sha256}")
    return f"{len(report.checks)} checks"


def _serve(folder: Path, precision: str) -> str:
    served = load_model(
        folder, folder.parent.name, device="cpu", precision=precision, intra_op_threads=1,
        max_batch_size=BATCH,
    )  # fmt: skip
    return f"{len(served.artifact.golden.labels)} digits"


def _check(group: str, name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(group, name, look(), "valid", passed=True)
    except ArtifactError as error:
        return Check(group, name, str(error), "valid", passed=False)
