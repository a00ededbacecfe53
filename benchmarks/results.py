"""Results as JSON: what a run measured, and what is committed to compare with."""

from __future__ import annotations

import json
import subprocess
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.figures import Figure
from benchmarks.harness import served_artifact, served_variant
from benchmarks.machine import kind, machine

COMMITTED = Path(__file__).with_name("results")
# Not kept by git.
LOCAL = Path("runs/bench.json")


@dataclass(frozen=True)
class Result:
    """One run.

    Attributes:
        date: When it ended, UTC.
        source: Commit of the code, with ``+`` where files were changed.
        model: What was served.
        machine: What it ran on.
        rounds: Of each figure.
        scale: Length of a round.
        figures: In the order of their measurement.
    """

    date: str
    source: str
    model: str
    machine: dict[str, Any]
    rounds: int
    scale: float
    figures: list[Figure]

    def write(self, path: Path) -> None:
        """Stores it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, allow_nan=False) + "\n")

    def regressions(self, committed: Result) -> list[str]:
        """A line for each figure that is worse than the committed one by more than may be."""
        before = {figure.key: figure for figure in committed.figures}
        found = [f.regression(before[f.key]) for f in self.figures if f.key in before]
        return [line for line in found if line is not None]


def new(rounds: int, scale: float, figures: list[Figure]) -> Result:
    """The result of a run that has just ended here."""
    manifest = served_artifact().manifest
    precision = served_variant().precision
    model = f"{manifest['name']} release {manifest['version']}, {precision}"
    date = datetime.now(UTC).strftime("%Y-%m-%d")
    return Result(date, _source(), model, machine(), rounds, scale, figures)


def read(path: Path) -> Result:
    """A stored one."""
    fields = json.loads(path.read_text())
    return Result(**fields | {"figures": [Figure(**each) for each in fields["figures"]]})


def committed_path() -> Path:
    """Where the result of machines like this one is committed."""
    return COMMITTED / f"{kind()}.json"


def all_committed() -> dict[str, Result]:
    """Every committed result by its name."""
    return {path.stem: read(path) for path in sorted(COMMITTED.glob("*.json"))}


def _source() -> str:
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(
        command, cwd=COMMITTED.parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
