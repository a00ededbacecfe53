"""How many images a caller may ask for: a token bucket each, in images."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from service.job import Refusal
from service.security.tokens import MAX_TOKENS

if TYPE_CHECKING:
    from service.call import Call

# What a caller that was quiet may ask for at once, in seconds of its rate.
BURST_S = 1.0


class RateLimit:
    """Refuses calls of callers that ask for more than their rate. Thread-safe.

    A caller has saved up at most one second's worth of images. Its call is admitted when anything
    is left, even if it asks for more than that; it then waits until the rest is paid. So a request
    of any size can be served, and over time nobody gets more than the rate.

    Args:
        images_per_s: The rate of each caller.
        clock: Monotonic seconds.
    """

    def __init__(self, images_per_s: float, clock: Callable[[], float]) -> None:
        self._seconds_per_image = 1 / images_per_s
        self._clock = clock
        self._lock = threading.Lock()
        # Caller -> until when its images are paid for; nothing is known of one long quiet.
        # Source: the generic cell rate algorithm, ITU-T I.371; it needs one number a bucket.
        self._paid_until: dict[str, float] = {}

    def refuse(self, calls: Sequence[Call]) -> list[Call]:
        """Charges the callers; returns the calls to refuse, each with when to come back."""
        refused = []
        now = self._clock()
        with self._lock:
            for call in calls:
                paid_until = max(self._paid_until.get(call.caller, 0.0), now - BURST_S)
                if paid_until > now:
                    call.refusal = Refusal.RATE_LIMITED
                    call.retry_after_s = paid_until - now
                    refused.append(call)
                else:
                    self._paid_until[call.caller] = (
                        paid_until + call.count * self._seconds_per_image
                    )
            if len(self._paid_until) > MAX_TOKENS:
                self._forget(now - BURST_S)
        return refused

    def _forget(self, before: float) -> None:
        """Drops callers that were quiet: nothing is known of them, and they may be gone."""
        quiet = [caller for caller, until in self._paid_until.items() if until <= before]
        for caller in quiet:
            del self._paid_until[caller]
