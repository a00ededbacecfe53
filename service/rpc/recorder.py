"""How every RPC ended, said in one place; metrics, request log and traces listen."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from grpc import StatusCode

from service.rpc.call import Call

logger = logging.getLogger(__name__)

CODES = {code.value[0]: code for code in StatusCode}
# A listener that is broken fails thousands of times a second, always for the same reason.
FAILURE_LOG_INTERVAL_S = 1.0


@dataclass(frozen=True, eq=False)  # a constant each; looked up by identity for every call
class Method:
    """A method of a service.

    Attributes:
        service: Its full name.
        name: Its own.
        kind: ``unary``, ``server_stream``, ``client_stream`` or ``bidi_stream``.
    """

    service: str
    name: str
    kind: str = "unary"

    @property
    def path(self) -> str:
        """As a request names it."""
        return f"/{self.service}/{self.name}"


class RpcListener(Protocol):
    """Is told of RPCs, from any thread."""

    def began(self, method: Method, count: int) -> None:
        """So many RPCs of a method have begun."""

    def ended(
        self, method: Method, calls: Sequence[Call], code: StatusCode, message: str, now: float
    ) -> None:
        """RPCs have ended.

        Args:
            method: Theirs.
            calls: They; ``state`` of one that was admitted to the core is its ``Request``.
            code: How.
            message: What their callers were told; empty for OK.
            now: Monotonic seconds.
        """


class Recorder:
    """Tells the listeners of RPCs. One that raises loses what it was told, and nothing else.

    Args:
        methods: Every method, by its path: those of others are not recorded.
        listeners: Are told in this order.
        clock: Monotonic seconds.
    """

    def __init__(
        self,
        methods: Mapping[str, Method],
        listeners: Sequence[RpcListener],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._methods = methods
        self._listeners = listeners
        self._clock = clock
        self._failure_logged_at = -FAILURE_LOG_INTERVAL_S

    def began(self, method: Method, count: int = 1) -> None:
        """RPCs have begun."""
        for listener in self._listeners:
            try:
                listener.began(method, count)
            except Exception as error:
                self._log(listener, error)

    def ended(
        self, method: Method, calls: Sequence[Call], code: StatusCode, message: str = ""
    ) -> None:
        """RPCs have ended; each is told of once."""
        now = self._clock()
        for listener in self._listeners:
            try:
                listener.ended(method, calls, code, message, now)
            except Exception as error:
                self._log(listener, error)

    def refused(self, call: Call, code: int, message: str) -> None:
        """An RPC has begun and ended without its method: see ``Hooks.refused``."""
        method = self._methods.get(call.path)
        if method is not None:
            self.began(method)
            self.ended(method, [call], CODES[code], message)

    def _log(self, listener: Any, error: Exception) -> None:
        now = self._clock()
        if now >= self._failure_logged_at + FAILURE_LOG_INTERVAL_S:
            self._failure_logged_at = now
            logger.error("%s failed; this is a bug", type(listener).__name__, exc_info=error)
