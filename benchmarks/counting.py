"""``digits serve`` whose hot path can be told not to count: what counting costs is the difference.

Two servers would differ by more than that: each process has its own luck with memory and cores.
"""

from __future__ import annotations

import signal
import sys

from service import cli
from service.metrics import Metrics

COUNT, COUNT_NOT = signal.SIGUSR1, signal.SIGUSR2
HOT_PATH = {"started": Metrics.started, "batch": Metrics.batch}


def _nothing(*_: object) -> None:
    """Counts nothing."""


def _switch(number: int, _frame: object) -> None:
    for name, count in HOT_PATH.items():
        setattr(Metrics, name, count if number == COUNT else _nothing)


if __name__ == "__main__":
    signal.signal(COUNT, _switch)
    signal.signal(COUNT_NOT, _switch)
    sys.exit(cli.main())
