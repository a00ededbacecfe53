"""When a call or a stream is retried: as the server asks, else with exponential backoff."""

from __future__ import annotations

import random
import time

import grpc

from digits.errors import DigitError

# Source: gRFC A6 (client retries), whose policy this is, with the server's hint in addition.
MAX_ATTEMPTS = 5
INITIAL_BACKOFF_S, MAX_BACKOFF_S = 0.05, 1.0
# Callers that were refused together do not come back together.
JITTER = (0.8, 1.2)
# What grpc.aio puts in place of the server's status where it was sending when the server ended the
# stream. Source: grpc/grpc#36066.
LOST_STATUS = (grpc.StatusCode.INTERNAL, "Internal error from Core")


class Retry:
    """The attempts of one call or stream: how long to wait before the next, when to give up.

    Args:
        give_up_s: Seconds of nothing but errors after which there is no other attempt.
        timeout_s: Seconds that all of it may take, or None.
        attempts: How many may be made, not counting those after which the server said when to come
            back; None for any number.
    """

    def __init__(
        self, give_up_s: float, timeout_s: float | None, attempts: int | None = None
    ) -> None:
        self._give_up_s = give_up_s
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._attempts = attempts
        self.reset()

    def reset(self) -> None:
        """There was an answer: errors and backoff count from the next error on."""
        self._failing_since: float | None = None
        self._backoff_s = INITIAL_BACKOFF_S

    def time_left_s(self) -> float | None:
        """Seconds to the deadline, None without one."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def wait_s(self, error: DigitError) -> float:
        """Seconds to wait before the next attempt.

        Raises:
            DigitError: The same, if it is permanent, or if it is too late for another attempt.
        """
        if not error.transient and (error.code, error.message) != LOST_STATUS:
            raise error
        now = time.monotonic()
        if self._failing_since is None:
            self._failing_since = now
        wait_s = error.retry_after_s
        if wait_s is None:
            wait_s = self._next_backoff_s(error)
        again = now + wait_s
        if again > self._failing_since + self._give_up_s:
            raise error
        if self._deadline is not None and again > self._deadline:
            raise error
        return wait_s

    def _next_backoff_s(self, error: DigitError) -> float:
        if self._attempts is not None:
            self._attempts -= 1
            if not self._attempts:
                raise error
        backoff_s = self._backoff_s * random.uniform(*JITTER)  # noqa: S311 - not a secret
        self._backoff_s = min(2 * self._backoff_s, MAX_BACKOFF_S)
        return backoff_s
