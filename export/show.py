"""Readable views of what is in a repository."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from export.check import GateReport, read_report
from service.artifact.format import PARITY, Artifact, ArtifactError, load_artifact
from service.artifact.repository import in_serving_order, versions


@dataclass(frozen=True)
class Row:
    """One version of a repository.

    Attributes:
        number: The version.
        artifact: What it holds; None when it was refused.
        refusal: Why it was refused; empty when it was not.
        serves: Whether a server would serve it.
    """

    number: int
    artifact: Artifact | None
    refusal: str
    serves: bool


def rows(repository: Path) -> list[Row]:
    """Every version, the lowest first; the first in serving order that holds is what serves.

    Raises:
        ArtifactError: If the repository or its note can not be read.
    """
    looked_at = {folder: _look(folder) for folder in versions(repository)}
    holding = [f for f in in_serving_order(repository) if isinstance(looked_at[f], Artifact)]
    result = []
    for folder, found in reversed(looked_at.items()):
        result.append(
            Row(
                number=int(folder.name),
                artifact=found if isinstance(found, Artifact) else None,
                refusal=str(found) if isinstance(found, ArtifactError) else "",
                serves=bool(holding) and folder == holding[0],
            )
        )
    return result


def _look(folder: Path) -> Artifact | ArtifactError:
    try:
        return load_artifact(folder)
    except ArtifactError as error:
        return error


def repository_table(listed: list[Row]) -> Table:
    """What ``list`` prints."""
    table = Table("", "version", "precision", "accuracy", "architecture", "created", "state")
    for row in listed:
        mark = "serves" if row.serves else ""
        if row.artifact is None:
            table.add_row(mark, str(row.number), "", "", "", "", f"refused: {row.refusal}")
            continue
        manifest = row.artifact.manifest
        table.add_row(
            mark,
            str(row.number),
            row.artifact.precision,
            f"{manifest['accuracy']['accuracy']:.2%}",
            manifest["training"]["architecture"],
            manifest["created"],
            "holds",
        )
    return table


def summary(found: Artifact) -> dict[str, str]:
    """The manifest in a dozen lines."""
    manifest = found.manifest
    training, accuracy = manifest["training"], manifest["accuracy"]
    low, high = accuracy["accuracy_ci95"]
    corruptions: dict[str, Any] = accuracy["corruptions"]
    worst = min(corruptions, key=lambda name: float(corruptions[name]), default="")
    return {
        "model": f"{manifest['name']} version {found.version}, {found.precision}",
        "model.onnx": f"{len(found.model):,} bytes, sha256 {manifest['files']['model.onnx']}",
        "architecture": f"{training['architecture']}, {training['parameters']:,} parameters",
        "accuracy": f"{accuracy['accuracy']:.2%} of {accuracy['images']:,} test images "
        f"(95 % interval {low:.2%} to {high:.2%})",
        "calibration": f"NLL {accuracy['nll']:.4f}, ECE {accuracy['ece']:.2%}, "
        f"temperature {training['temperature']:.3f}",
        "worst corruption": f"{worst} {corruptions[worst]:.2%}" if worst else "not measured",
        "training": f"{training['config']['epochs']} epochs, seed {training['config']['seed']}, "
        f"{training['seconds']:.0f} s; {training['selection']}",
        "data": f"{manifest['dataset']['name']}, train "
        f"{manifest['dataset']['sha256']['train'][:16]}…",
        "drift reference": _reference(manifest),
        "tools": ", ".join(f"{tool} {number}" for tool, number in manifest["tools"].items()),
        "source commit": manifest["source_commit"],
        "created": manifest["created"],
    }


def _reference(manifest: dict[str, Any]) -> str:
    if "reference" not in manifest:
        return "none"
    reference = manifest["reference"]
    return f"{sum(reference['digit']['counts']):,} {reference['images']} images"


def read_gate(folder: Path) -> GateReport:
    """The gate report of a version.

    Raises:
        ArtifactError: If it can not be read.
    """
    try:
        return read_report((folder / PARITY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{PARITY}: {error}") from None


def gate_markdown(report: GateReport) -> str:
    """One line for each check, with long digests and lists cut."""
    lines = ["| group | check | figure | bound |", "|---|---|---|---|"]
    for check in report.checks:
        figure, bound = (_cut(text) for text in (check.figure, check.bound))
        lines.append(f"| {check.group} | {check.name} | {figure} | {bound} |")
    return "\n".join(lines)


def _cut(text: str, width: int = 72) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
