"""No client works in a process that was forked from one that used a client.

gRPC's threads do not survive a fork, and a call that waits for them hangs beyond its deadline. Of
new clients in forked processes nearly all hang where a call was running at the fork or one for
asyncio was used; and a few of a thousand where there was a blocking client, long closed.
"""

from __future__ import annotations

import os

from digits.errors import ClientStateError


class _Process:
    """Records the use of clients in this process, and before it was forked."""

    def __init__(self) -> None:
        self.used = self.used_before_fork = False

    def after_fork(self) -> None:
        self.used_before_fork = self.used


_process = _Process()
os.register_at_fork(after_in_child=_process.after_fork)


def is_forked() -> bool:
    """True if this process was forked from one that had used a client."""
    return _process.used_before_fork


def check_process() -> None:
    """Raises ClientStateError in such a process."""
    if _process.used_before_fork:
        raise ClientStateError(
            "this process was forked from one that used a client, and gRPC does not survive that: "
            "start processes by spawn or forkserver, or fork before the first call"
        )


def mark_used() -> None:
    """A client is about to be used."""
    _process.used = True
