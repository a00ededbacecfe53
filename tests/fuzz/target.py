"""What every target of fuzzing within one process has."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar


class Target:
    """Something that takes hostile bytes.

    Args:
        folder: Scratch space, best in memory.

    Attributes:
        max_bytes: Inputs of the coverage-guided run are no longer.
    """

    max_bytes: ClassVar[int] = 4096

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def seeds(self) -> list[bytes]:
        """Valid inputs to start from."""
        raise NotImplementedError

    def run(self, data: bytes) -> None:
        """Takes one input.

        Raises:
            AssertionError: If the outcome is a wrong one; any other exception is a defect, too.
        """
        raise NotImplementedError

    def check_golden(self) -> None:
        """The target still does its work on a good input."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends what was started."""
