"""How much a caller may ask for, a log may hold, an address may send: one token bucket each."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from service.serving.request import Request

# The burst after a pause, in seconds of the rate.
BURST_S = 1.0
# Keys that are remembered; of more, those that have been quiet for longest are forgotten.
MAX_KEYS = 4096


class TokenBuckets:
    """A rate for each key. Thread-safe.

    A key has saved up at most one second's worth. It may take anything as long as something is
    left, even more than that; it then waits until the rest is paid. So a request of any size can be
    served, and over time nobody gets more than the rate. Source: the generic cell rate algorithm,
    ITU-T I.371; it needs one number a key.

    Args:
        per_s: Units a second, of each key.
    """

    def __init__(self, per_s: float) -> None:
        self._seconds_per_unit = 1 / per_s
        self._lock = threading.Lock()
        self._paid_until: dict[str, float] = {}

    def take(self, key: str, units: float, now: float) -> float:
        """Takes units; returns 0, or the seconds after which they may be had.

        Args:
            key: Whose.
            units: How many.
            now: Monotonic seconds.
        """
        with self._lock:
            paid_until = max(self._paid_until.pop(key, 0.0), now - BURST_S)
            if paid_until > now:
                self._paid_until[key] = paid_until
                return paid_until - now
            self._paid_until[key] = paid_until + units * self._seconds_per_unit
            if len(self._paid_until) > MAX_KEYS:
                self._forget(now)
            return 0.0

    def _forget(self, now: float) -> None:
        """Drops keys of which nothing would be known a moment later, else the oldest."""
        quiet = [key for key, until in self._paid_until.items() if until <= now - BURST_S]
        for key in quiet or [next(iter(self._paid_until))]:
            del self._paid_until[key]


class RateLimit:
    """Refuses requests of callers that ask for more images than their rate; see ``Gate``.

    Args:
        images_per_s: The rate of each caller.
        clock: Monotonic seconds.
    """

    def __init__(self, images_per_s: float, clock: Any) -> None:
        self._buckets = TokenBuckets(images_per_s)
        self._clock = clock

    def __call__(self, requests: Sequence[Request]) -> list[Request]:
        """Charges the callers; returns the requests to refuse, each with when to come back."""
        refused = []
        now = self._clock()
        for request in requests:
            caller = getattr(request.origin, "caller", "")
            request.retry_after_s = self._buckets.take(caller, request.count, now)
            if request.retry_after_s:
                refused.append(request)
        return refused
