"""A bar for large inputs, where rich is installed."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TypeAlias

# Called after each answer with the number of images answered since the last call.
Progress: TypeAlias = Callable[[int], object]


@contextlib.contextmanager
def progress_bar(total: int | None = None, *, what: str = "images") -> Iterator[Progress]:
    """Shows a bar on standard error, while it is a terminal and rich is there; else nothing.

    Args:
        total: Images to come, None if that is not known.
        what: To say what is counted.

    Yields:
        What to give a client as ``progress``.
    """
    try:
        from rich.console import Console  # noqa: PLC0415 - optional
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn  # noqa: PLC0415
        from rich.progress import Progress as Bar  # noqa: PLC0415
    except ImportError:
        yield lambda _: None
        return
    bar = Bar(
        BarColumn(),
        MofNCompleteColumn(),
        what,
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=False,  # may be a file
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda images: bar.advance(task, images)
