"""Virtual environments for what this project is compared with, one for each."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from benchmarks.harness import BenchmarkError

FOLDER = Path(__file__).parents[1] / ".venv-peers"
# What runs in them.
SERVERS = Path(__file__).with_name("servers")


def same_engine() -> tuple[str, ...]:
    """Requirements that give a peer the engine of this environment: all run the same kernels."""
    return tuple(f"{name}=={version(name)}" for name in ("onnxruntime", "numpy"))


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes:
        name: Of its folder.
        requirements: What it holds.
    """

    name: str
    requirements: tuple[str, ...]

    @property
    def programs(self) -> Path:
        """Folder of its programs."""
        return FOLDER / self.name / "bin"

    @property
    def is_installed(self) -> bool:
        """Whether it holds exactly these requirements."""
        return self._stamp.exists() and self._stamp.read_text() == "\n".join(self.requirements)

    @property
    def _stamp(self) -> Path:
        return FOLDER / self.name / "requirements.txt"

    def install(self) -> None:
        """Makes it, once for each set of requirements.

        Raises:
            BenchmarkError: If that fails.
        """
        if self.is_installed:
            return
        pip = [str(self.programs / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        try:
            subprocess.run([sys.executable, "-m", "venv", FOLDER / self.name], check=True)
            subprocess.run([*pip, *self.requirements], check=True)
        except subprocess.CalledProcessError as error:
            raise BenchmarkError(f"{self.name} could not be installed: {error}") from error
        self._stamp.write_text("\n".join(self.requirements))
