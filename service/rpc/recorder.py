"""How every RPC ended, said in one place; metrics, request log and traces listen."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from grpc import StatusCode

from service.rpc.call import RpcCall
from service.telemetry.listener import Method, RpcListener

logger = logging.getLogger(__name__)

CODES = {code.value[0]: code for code in StatusCode}
# A listener that is broken fails thousands of times a second, always for the same reason.
FAILURE_LOG_INTERVAL_S = 1.0


class Recorder:
    """Notifies the listeners of RPCs. One that raises loses that event, and nothing else.

    Args:
        methods: Every method, by its path: those of others are not recorded.
        listeners: Are notified in this order.
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
        self, method: Method, calls: Sequence[RpcCall], code: StatusCode, message: str = ""
    ) -> None:
        """RPCs have ended; each is notified of once."""
        now = self._clock()
        for listener in self._listeners:
            try:
                listener.ended(method, calls, code, message, now)
            except Exception as error:
                self._log(listener, error)

    def refused(self, calls: Sequence[RpcCall], code: int, message: str) -> None:
        """RPCs of one method have begun and ended without it: see ``Hooks.refused``."""
        method = self._methods.get(calls[0].path)
        if method is not None:
            self.began(method, len(calls))
            self.ended(method, calls, CODES[code], message)

    def _log(self, listener: Any, error: Exception) -> None:
        now = self._clock()
        if now >= self._failure_logged_at + FAILURE_LOG_INTERVAL_S:
            self._failure_logged_at = now
            logger.error("%s failed; this is a bug", type(listener).__name__, exc_info=error)
