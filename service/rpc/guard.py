"""Lets calls through that show a valid token, and no others but to the health service."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from service.rpc.call import Metadata, RpcCall
from service.rpc.recorder import Recorder
from service.rpc.status import REFUSALS, Status, fail
from service.security.tokens import Token, TokenFile, shown_digest
from service.serving.request import Refusal

# A prober has no token, and learns nothing but whether the server serves.
OPEN_METHODS = frozenset({"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"})
UNAUTHENTICATED = Status(*REFUSALS[Refusal.UNAUTHENTICATED])
# Callers whose headers are remembered.
MAX_KNOWN = 1024


class Guard:
    """Stands before every method; see ``Hooks``.

    What is not in ``OPEN_METHODS`` needs a token, a service that is added later too.

    Args:
        tokens: Those that are valid; None lets everybody call.
        recorder: Is notified of the RPCs that are refused here.
        dropped: Gets the reason.
        overload_s: Seconds of work that wait while the queue is full, else 0; see ``Hooks``.
    """

    def __init__(
        self,
        tokens: TokenFile | None,
        recorder: Recorder,
        dropped: Callable[[Sequence[Refusal]], None],
        overload_s: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._tokens = tokens
        self._recorder = recorder
        self._dropped = dropped
        self.overload_s = overload_s
        # Callers by the headers that show their tokens, as the file says at this time.
        self._known: dict[Any, str | None] = {}
        self._valid: Sequence[Token] | None = None

    def admit(self, call: RpcCall) -> bool:
        """See ``Hooks``: by the headers of a call, before its message is read."""
        if self._tokens is None or call.path in OPEN_METHODS:
            return True
        caller = self.caller(call.metadata)
        if caller is None:
            fail(call, UNAUTHENTICATED)
            self._dropped([Refusal.UNAUTHENTICATED])
            code = UNAUTHENTICATED.code.value[0]
            self._recorder.refused([call], code, UNAUTHENTICATED.message)
            return False
        call.caller = caller
        return True

    def refused(self, calls: Sequence[RpcCall], code: int, message: str) -> None:
        """See ``Hooks``."""
        self._recorder.refused(calls, code, message)

    def is_admitted(self, call: RpcCall) -> bool:
        """Whether a call that was admitted still would be: its token may be revoked."""
        return self._tokens is None or self.caller(call.metadata) is not None

    def caller(self, metadata: Metadata) -> str | None:
        """Whose valid token a call's metadata shows; None if it shows none."""
        assert self._tokens is not None
        valid = self._tokens.files.value
        if valid is not self._valid or len(self._known) > MAX_KNOWN:
            self._valid, self._known = valid, {}
        shown = shown_digest(metadata)
        if shown is None:
            return None
        if shown not in self._known:
            self._known[shown] = self._tokens.caller(shown)
        return self._known[shown]

    def refusal(self, metadata: Metadata) -> Status | None:
        """How to refuse an HTTP request by its headers; None if it shows a token."""
        if self._tokens is None or self.caller(metadata) is not None:
            return None
        self._dropped([Refusal.UNAUTHENTICATED])
        return UNAUTHENTICATED
