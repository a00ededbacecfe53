"""Checks a written version again, without PyTorch: files, signature, structure, golden digits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from export.check import Check, read_report
from export.structure import check_structure
from service.artifact.format import MODEL, PARITY, ArtifactError, load_artifact, sha256
from service.serving.loader import load_model

BATCH = 64


def verify(folder: Path, public_key: Path | None = None) -> Iterator[Check]:
    """Every check, ending with the first that makes the rest meaningless.

    Args:
        folder: The version.
        public_key: PEM file of the Ed25519 key that must have signed it; None asks for none.

    Raises:
        KeyFileError: If the key can not be used.
    """
    asked = "manifest, hashes" + (", signature" if public_key else "")

    def read() -> str:
        found = load_artifact(folder, public_key)
        return f"version {found.version}, {found.precision}"

    yield (files := _holds("files", asked, read))
    if not files.passed:
        return
    model = (folder / MODEL).read_bytes()
    yield from check_structure(model)
    yield _holds("gate", "report passed and is of this model", lambda: _reported(folder, model))

    def serve() -> str:
        served = load_model(
            folder, folder.parent.name, device="cpu", intra_op_threads=1, max_batch_size=BATCH
        )
        return f"{len(served.artifact.golden.labels)} digits"

    yield _holds("serving", "golden digits, in the session that serves", serve)


def _reported(folder: Path, model: bytes) -> str:
    try:
        report = read_report((folder / PARITY).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(str(error)) from None
    if not report.passed:
        raise ArtifactError(f"failed: {'; '.join(report.failed)}")
    if report.model_sha256 != sha256(model):
        raise ArtifactError(f"is of model {report.model_sha256}")
    return f"{len(report.checks)} checks"


def _holds(group: str, name: str, look: Callable[[], str]) -> Check:
    try:
        return Check(group, name, look(), "holds", passed=True)
    except ArtifactError as error:
        return Check(group, name, str(error), "holds", passed=False)
