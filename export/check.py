"""One named check with its figure, bound and verdict, and the report they add up to."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from service.artifact.errors import ArtifactError
from service.artifact.format import PARITY, PRECISIONS


class GateError(RuntimeError):
    """A model did not pass; the message names the checks that failed."""


@dataclass(frozen=True)
class Check:
    """One named check.

    Attributes:
        group: What part of the gate it belongs to.
        name: What was checked.
        figure: What was found.
        bound: What had to hold.
        passed: The verdict.
    """

    group: str
    name: str
    figure: str
    bound: str
    passed: bool


def equal(group: str, name: str, got: object, wanted: object) -> Check:
    """Passes when both are the same."""
    figure, bound = (f"{v:,}" if type(v) is int else str(v) for v in (got, wanted))
    return Check(group, name, figure, f"== {bound}", got == wanted)


def at_most(group: str, name: str, got: float, bound: float, *, note: str = "") -> Check:
    """Passes when the figure is a number no larger than the bound."""
    return Check(group, name, f"{got:.3g}{note}", f"<= {bound:.3g}", bool(got <= bound))


@dataclass(frozen=True)
class GateReport:
    """All checks of one model.

    Attributes:
        model_sha256: Digest of the model that was checked.
        checks: In the order in which they ran.
    """

    model_sha256: str
    checks: list[Check] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there were checks and every one passed."""
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[str]:
        """Names of the checks that did not pass."""
        return [f"{check.group}: {check.name}" for check in self.checks if not check.passed]


def write_reports(reports: Mapping[str, GateReport]) -> bytes:
    """The content of parity.json, by precision: one check a line, so that files can be compared."""
    head: dict[str, Any] = {
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
        "tools": {tool: version(tool) for tool in ("torch", "onnx", "onnxruntime", "numpy")},
    }
    parts = [json.dumps(head, indent=2).removesuffix("\n}")]
    for precision, report in reports.items():
        checks = ",\n".join(f"      {json.dumps(asdict(check))}" for check in report.checks)
        sha256 = json.dumps(report.model_sha256)
        opening = f'  "{precision}": {{\n    "model_sha256": {sha256},\n    "checks": [\n'
        parts.append(f"{opening}{checks}\n    ]\n  }}")
    return (",\n".join(parts) + "\n}\n").encode()


def read_reports(data: bytes) -> dict[str, GateReport]:
    """Parses parity.json.

    Raises:
        ArtifactError: If it is no gate report.
    """
    try:
        content = json.loads(data)
        reports = {
            precision: GateReport(
                content[precision]["model_sha256"],
                [Check(**check) for check in content[precision]["checks"]],
            )
            for precision in PRECISIONS
            if precision in content
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{PARITY}: not a gate report: {error}") from None
    if not reports:
        raise ArtifactError(f"{PARITY}: not a gate report: expected {' or '.join(PRECISIONS)}")
    return reports
