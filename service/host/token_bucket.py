"""Token buckets: rates of images of a caller, of requests of an address, of lines of a log."""

from __future__ import annotations

import threading
from collections import OrderedDict

# Keys that are remembered; beyond that, the least recently used is evicted, and its debt with it.
MAX_KEYS = 4096


class TokenBucket:
    """Units that refill at a rate up to a burst. Not thread-safe.

    Args:
        per_s: Units a second.
        burst: Units that may be saved up; the bucket begins with so many.
    """

    __slots__ = ("_burst", "_left", "_per_s", "_refilled")

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s = per_s
        self._burst = burst
        self._left = burst
        self._refilled = 0.0

    def refill(self, now: float) -> float:
        """Adds what has come since the last refill; returns what there is, below 0 if in debt.

        Args:
            now: Monotonic seconds.
        """
        self._left = min(self._burst, self._left + (now - self._refilled) * self._per_s)
        self._refilled = now
        return self._left

    def take(self, units: float) -> None:
        """Takes units, more than there are if need be: the rest is debt."""
        self._left -= units

    @property
    def wait_s(self) -> float:
        """Seconds from the last refill until there is no debt."""
        return max(0.0, -self._left / self._per_s)


class TokenBuckets:
    """A bucket for each key, with a burst of one second's worth. Thread-safe.

    A key that is not in debt may take anything, even more than it has, and then waits until the
    debt is paid. So a request of any size can be served, and over time no key that is remembered
    exceeds the rate.

    Args:
        per_s: Units a second, of each key.
    """

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._lock = threading.Lock()
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def take(self, key: str, units: float, now: float) -> float:
        """Takes units; returns 0, or the seconds after which they may be had.

        Args:
            key: Whose.
            units: How many.
            now: Monotonic seconds.
        """
        with self._lock:
            bucket = self._buckets.get(key)
            if bucket is None:
                bucket = self._buckets[key] = TokenBucket(self._per_s, self._per_s)
                if len(self._buckets) > MAX_KEYS:
                    self._buckets.popitem(last=False)
            self._buckets.move_to_end(key)
            if bucket.refill(now) < 0:
                return bucket.wait_s
            bucket.take(units)
            return 0.0
