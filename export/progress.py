"""What a person sees while a gate runs: a row for each check, and what is being done now."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape

from export.check import Check

NAME_WIDTH = 58


class Progress:
    """Rows above, a line with the current stage below, on a terminal; rows alone anywhere else.

    Args:
        console: Where it is written.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status = console.status("")
        self._group = ""
        self._done = 0

    def __enter__(self) -> Self:
        self._status.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._status.stop()

    def stage(self, text: str) -> None:
        """Says what is being done."""
        self._status.update(f"{escape(text)}  [dim]{self._done} checks done[/]")

    def check(self, check: Check) -> None:
        """Adds a row; a new group gets a heading."""
        if check.group != self._group:
            self._group = check.group
            self._console.print(f"[bold]{escape(check.group)}[/]")
        self._done += 1
        self.stage(check.group)
        verdict = "[green]pass[/]" if check.passed else "[bold red]FAIL[/]"
        name, bound = escape(check.name.ljust(NAME_WIDTH)), escape(_short(check.bound))
        self._console.print(f"  {verdict}  {name}  {escape(_short(check.figure))}  [dim]{bound}[/]")


def _short(text: str, width: int = 80) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
