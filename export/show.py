"""Readable views of what is in a repository. Needs neither PyTorch nor onnx."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from export.check import GateReport
from service.artifact.errors import ArtifactError
from service.artifact.format import Artifact, load_artifact
from service.artifact.repository import in_serving_order, promoted, releases

COLOURS = {"better": "green", "worse": "bold red"}


@dataclass(frozen=True)
class Row:
    """One release of a repository.

    Attributes:
        number: Of the release.
        artifact: What it holds; None if it is invalid.
        error: Why it is invalid; empty if it is not.
        serves: Whether a server would serve it.
    """

    number: int
    artifact: Artifact | None
    error: str
    serves: bool

    @property
    def is_accepted(self) -> bool:
        """Whether it is valid and was judged fit to serve."""
        return self.artifact is not None and self.artifact.is_published


def rows(repository: Path) -> list[Row]:
    """Every release, the lowest first; the first valid one in serving order is what serves.

    Raises:
        ArtifactError: If the repository or its note can not be read.
    """
    found = {folder: _load(folder) for folder in releases(repository)}
    note = promoted(repository)
    able = [
        folder
        for folder in in_serving_order(repository, note=note)
        if isinstance(loaded := found[folder], Artifact)
        and (loaded.is_published or int(folder.name) == note)
    ]
    return [
        Row(
            number=int(folder.name),
            artifact=loaded if isinstance(loaded, Artifact) else None,
            error=str(loaded) if isinstance(loaded, ArtifactError) else "",
            serves=bool(able) and folder == able[0],
        )
        for folder, loaded in reversed(found.items())
    ]


def serving(repository: Path) -> Artifact | None:
    """The release that serves, if any does."""
    if not repository.is_dir():
        return None
    return next((row.artifact for row in rows(repository) if row.serves), None)


def _load(folder: Path) -> Artifact | ArtifactError:
    try:
        return load_artifact(folder)
    except ArtifactError as error:
        return error


def repository_table(listed: list[Row]) -> Table:
    """What ``list`` prints."""
    table = Table("", "release", "accuracy", "architecture", "created", "state")
    for row in listed:
        mark = "serves" if row.serves else ""
        if row.artifact is None:
            table.add_row(mark, str(row.number), "", "", "", "invalid")
            continue
        manifest = row.artifact.manifest
        accuracy = [f"{p} {v.accuracy['accuracy']:.2%}" for p, v in row.artifact.variants.items()]
        table.add_row(
            mark,
            str(row.number),
            ", ".join(accuracy),
            manifest["training"]["architecture"],
            manifest["created"][:10],
            "valid" if row.is_accepted else "not published",
        )
    return table


def remarks(listed: list[Row]) -> list[str]:
    """Why releases are invalid, or were not published."""
    lines = []
    for row in listed:
        if row.artifact is None:
            lines.append(f"release {row.number} is invalid: {row.error}")
        elif not row.is_accepted:
            first, *rest = row.artifact.manifest["comparison"]["reasons"]
            more = f", and {len(rest)} more (show {row.number})" if rest else ""
            lines.append(f"release {row.number} was not published: {first}{more}")
    return lines


def comparison_table(comparison: dict[str, Any]) -> Table:
    """How a release compares with the one that it was judged against.

    Args:
        comparison: Of the manifest.
    """
    table = Table("", f"release {comparison['against']}", "new", "difference", "")
    for measure in comparison["measures"]:
        colour = COLOURS.get(measure["verdict"], "")
        table.add_row(
            measure["name"], measure["serving"], measure["new"], measure["difference"],
            measure["verdict"], style=colour,
        )  # fmt: skip
    return table


def summary(found: Artifact) -> dict[str, str]:
    """The manifest in a dozen lines."""
    manifest = found.manifest
    training = manifest["training"]
    lines = {"release": f"{manifest['name']} {found.version}"}
    for precision, variant in found.variants.items():
        accuracy = variant.accuracy
        low, high = accuracy["accuracy_ci95"]
        lines[precision] = (
            f"{accuracy['accuracy']:.2%} of {accuracy['images']:,} test images (95 % interval "
            f"{low:.2%} to {high:.2%}), NLL {accuracy['nll']:.4f}, ECE {accuracy['ece']:.2%}, "
            f"{_worst(accuracy['corruptions'])}{len(variant.model):,} bytes, "
            f"sha256 {variant.sha256}"
        )
    reference = next(iter(manifest["variants"].values()))["reference"]
    against = manifest["comparison"]["against"]
    return {
        **lines,
        "labels": ", ".join(found.labels),
        "architecture": f"{training['architecture']}, {training['parameters']:,} parameters",
        "training": f"{training['config']['epochs']} epochs, seed {training['config']['seed']}, "
        f"{training['seconds']:.0f} s; {training['selection']}",
        "data": f"{manifest['dataset']['name']}, train "
        f"{manifest['dataset']['sha256']['train'][:16]}…",
        "drift reference": f"{sum(reference['digit']['counts']):,} {reference['images']} images",
        "judged against": f"release {against}" if against else "nothing: it was the first",
        "tools": ", ".join(f"{tool} {number}" for tool, number in manifest["tools"].items()),
        "source commit": manifest["source_commit"],
        "created": manifest["created"],
    }


def _worst(corruptions: dict[str, float]) -> str:
    worst = min(corruptions, key=lambda name: corruptions[name], default="")
    return f"worst corruption {worst} {corruptions[worst]:.2%}, " if worst else ""


def card_markdown(found: Artifact) -> str:
    """The figures of a model card: a column for each variant."""
    variants = [found.variants[name].accuracy for name in found.variants]

    def row(name: str, cells: Iterable[str]) -> str:
        return f"| {name} | {' | '.join(cells)} |"

    def rows(names: Iterable[str], cell: Callable[[dict[str, Any], str], float]) -> list[str]:
        return [row(name, (f"{cell(each, name):.2%}" for each in variants)) for name in names]

    lines = [row("", found.variants), row("---", ("---" for _ in variants))]
    intervals = [each["accuracy_ci95"] for each in variants]
    lines += rows(["accuracy"], lambda each, _: each["accuracy"])
    lines.append(row("95 % interval", (f"{low:.2%} to {high:.2%}" for low, high in intervals)))
    lines.append(row("negative log likelihood", (f"{each['nll']:.4f}" for each in variants)))
    lines.append(row("expected calibration error", (f"{each['ece']:.2%}" for each in variants)))
    labels = [f"class {label}" for label in found.labels]
    lines += rows(labels, lambda each, name: each["class_accuracy"][labels.index(name)])
    lines += rows(variants[0]["corruptions"], lambda each, name: each["corruptions"][name])
    if others := variants[0].get("not_digits"):
        scores = (f"{each['not_digits']['threshold']:.3f}" for each in variants)
        lines.append(row("score that 99 % of the digits reach", scores))
        kinds = {f"{kind} that reach it": kind for kind in others if kind != "threshold"}
        lines += rows(kinds, lambda each, name: each["not_digits"][kinds[name]])
    return "\n".join(lines)


def gate_markdown(report: GateReport) -> str:
    """One line for each check, with long digests and lists cut."""
    lines = ["| group | check | figure | bound |", "|---|---|---|---|"]
    for check in report.checks:
        figure, bound = (_cut(text) for text in (check.figure, check.bound))
        lines.append(f"| {check.group} | {check.name} | {figure} | {bound} |")
    return "\n".join(lines)


def _cut(text: str, width: int = 72) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
