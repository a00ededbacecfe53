"""How often one address may ask."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

# Addresses remembered; the one that asked longest ago is forgotten first.
MAX_ADDRESSES = 1024
# Seconds' worth of requests that may come at once.
BURST_S = 1.0


class RateLimiter:
    """Counts by address, in one number each: when its next request would be due at a steady rate.

    Source: the generic cell rate algorithm, ITU-T I.371.

    Args:
        requests_per_s: Of one address.
        clock: Monotonic seconds.
    """

    def __init__(
        self, requests_per_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval_s = 1 / requests_per_s
        self._ahead_s = max(BURST_S, self._interval_s) - self._interval_s
        self._clock = clock
        self._due: OrderedDict[str, float] = OrderedDict()

    def take(self, address: str) -> float:
        """Takes one request of ``address``: 0, or the seconds to wait if it came too early."""
        now = self._clock()
        due = max(self._due.get(address, now), now)
        wait_s = due - self._ahead_s - now
        if wait_s > 0:
            return wait_s
        self._due[address] = due + self._interval_s
        self._due.move_to_end(address)
        if len(self._due) > MAX_ADDRESSES:
            self._due.popitem(last=False)
        return 0.0
