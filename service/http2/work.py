"""What one turn of the loop has found to do, once no connection's lock is held any more."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from service.http2.messages import INTERNAL

if TYPE_CHECKING:
    from service.http2.call import Call

logger = logging.getLogger(__name__)


class Work:
    """Whole unary calls by their route, refused ones by status, and steps of streams in order.

    Args:
        hooks: Are notified of refused calls; None if there are none.
    """

    def __init__(self, hooks: Any = None) -> None:
        self.bursts: dict[Any, list[Call]] = {}
        self._hooks = hooks
        self._refused: dict[tuple[str, int, str], list[Call]] = {}
        self._steps: list[tuple[Callable[..., None], tuple[Any, ...]]] = []

    def add_call(self, call: Call) -> None:
        """A unary call whose request is whole."""
        burst = self.bursts.get(call.info.route)
        if burst is None:
            self.bursts[call.info.route] = [call]
        else:
            burst.append(call)

    def add_refused(self, call: Call, code: int, message: str) -> None:
        """A call that ended without its handler. Batched, so that a flood of them costs little."""
        self._refused.setdefault((call.path, code, message), []).append(call)

    def add_step(self, step: Callable[..., None], *args: Any) -> None:
        """Something to be done for one call."""
        self._steps.append((step, args))

    def do(self) -> None:
        """Does it all. What a handler raises ends its own calls and nothing else."""
        for route, burst in self.bursts.items():
            try:
                route.receive(burst)
            except Exception:
                logger.exception("%s failed; this is a bug", burst[0].path)
                for call in burst:
                    call.end(INTERNAL, "the server failed; its log says why")
        for (_, code, message), calls in self._refused.items():
            try:
                self._hooks.refused(calls, code, message)
            except Exception:
                logger.exception("recording refused calls failed; this is a bug")
        for step, args in self._steps:
            try:
                step(*args)
            except Exception:
                logger.exception("a step of a call failed; this is a bug")
                for call in args[:1]:
                    call.end(INTERNAL, "the server failed; its log says why")
