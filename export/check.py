"""One named check with its figure, bound and verdict, and the report they add up to."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any


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

    def to_json(self) -> str:
        """The content of parity.json: one check a line, so that two reports can be compared."""
        head: dict[str, Any] = {
            "model_sha256": self.model_sha256,
            "passed": self.passed,
            "machine": {"processor": platform.machine(), "cpus": os.cpu_count()},
            "tools": {tool: version(tool) for tool in ("torch", "onnx", "onnxruntime", "numpy")},
        }
        checks = ",\n".join(f"    {json.dumps(asdict(check))}" for check in self.checks)
        opening = json.dumps(head, indent=2).removesuffix("\n}")
        return f'{opening},\n  "checks": [\n{checks}\n  ]\n}}\n'


def read_report(text: str) -> GateReport:
    """Parses parity.json.

    Raises:
        ValueError: If it is no gate report.
    """
    try:
        content = json.loads(text)
        checks = [Check(**check) for check in content["checks"]]
        return GateReport(content["model_sha256"], checks)
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a gate report: {error}") from None
