"""Folders of runs: named by date, and never overwritten."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

RUNS = Path("runs")
LATEST = RUNS / "latest"
CHECKPOINT = "checkpoint.pt"
STATE = "state.pt"


class RunError(RuntimeError):
    """A run's folder can not be used; the message says why."""


def new_run(given: Path | None, arch: str) -> Path:
    """Makes the folder of a run, and lets ``runs/latest`` point at it if it is under ``runs``.

    Raises:
        RunError: If the folder holds a run already.
    """
    name = f"{datetime.now().astimezone():%Y%m%d-%H%M%S}-{arch}"
    folder = given or RUNS / name
    if any((folder / each).exists() for each in (CHECKPOINT, STATE)):
        raise RunError(
            f"--run-dir: {folder} holds a run already: expected a new folder, or --resume"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if given is None:
        _point(LATEST, name)
    return folder


def resumed_run(given: Path | None) -> Path:
    """The folder of a run that goes on.

    Raises:
        RunError: If there is no state to go on from.
    """
    folder = given or LATEST
    if not (folder / STATE).exists():
        raise RunError(f"--resume: {folder / STATE}: no such file: no epoch was finished")
    return folder


def _point(link: Path, target: str) -> None:
    """Replaces a link in one step."""
    temporary = link.with_name(f".{link.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)
