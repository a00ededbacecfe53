"""``digits serve`` whose hot path can be told not to count: what counting costs is the difference.

Two servers would differ by more than that: each process has its own luck with memory and cores.
"""

from __future__ import annotations

import functools
import signal
import sys
from collections.abc import Callable
from typing import Any

from service import cli
from service.metrics import Metrics

COUNT, COUNT_NOT = signal.SIGUSR1, signal.SIGUSR2


class Switch:
    """Whether methods do what they are for; patched in before anybody holds on to one of them."""

    def __init__(self) -> None:
        self._on = True

    def turn(self, number: int, _frame: object) -> None:
        """On a signal."""
        self._on = number == COUNT

    def guard(self, method: Callable[..., None]) -> Callable[..., None]:
        """The method where it is on, and nothing where it is off."""

        @functools.wraps(method)
        def guarded(*arguments: Any) -> None:
            if self._on:
                method(*arguments)

        return guarded


if __name__ == "__main__":
    switch = Switch()
    for name in ("started", "batch"):
        setattr(Metrics, name, switch.guard(getattr(Metrics, name)))
    signal.signal(COUNT, switch.turn)
    signal.signal(COUNT_NOT, switch.turn)
    sys.exit(cli.main())
