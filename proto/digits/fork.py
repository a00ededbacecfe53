"""Which clients work in a process that was forked.

gRPC's threads do not survive a fork, and a call that waits for them hangs beyond its deadline. Left
are blocking clients, where at the fork no client was open and none for asyncio had ever been
(tried with gRPC 1.76 and 1.83).
"""

from __future__ import annotations

import os
import weakref

from digits.errors import ClientStateError


class _Process:
    """What was done with gRPC in this process, and before it was forked."""

    def __init__(self) -> None:
        self.open_clients: weakref.WeakSet[object] = weakref.WeakSet()
        self.used = self.used_async = False
        self.inherited = self.inherited_async = False

    def after_fork(self) -> None:
        """In the child."""
        self.inherited |= self.used_async or len(self.open_clients) > 0
        self.inherited_async |= self.used
        self.open_clients = weakref.WeakSet()


_process = _Process()
os.register_at_fork(after_in_child=_process.after_fork)


def opening(client: object, *, is_async: bool) -> None:
    """A client is about to open its channel.

    Raises:
        ClientStateError: If its calls would hang in this process.
    """
    if _process.inherited or (is_async and _process.inherited_async):
        raise ClientStateError(
            "this process was forked from one that used a client, and gRPC does not survive that: "
            "start processes by spawn or forkserver, or fork before the first call"
        )
    _process.open_clients.add(client)
    _process.used = True
    _process.used_async |= is_async


def closed(client: object) -> None:
    """A client has closed its channel, or is about to."""
    _process.open_clients.discard(client)
