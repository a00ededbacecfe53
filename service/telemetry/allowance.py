"""A rate limit for log lines."""

from __future__ import annotations

import threading


class Allowance:
    """A token bucket of log lines. Thread-safe.

    Args:
        per_s: Lines a second, which is also the largest burst (but at least one line).
    """

    def __init__(self, per_s: float) -> None:
        self._per_s = per_s
        self._most = max(1.0, per_s)
        self._left = self._most
        self._looked = 0.0
        self._passed_over = 0
        self._lock = threading.Lock()

    def take(self, wanted: int, now: float) -> tuple[int, int]:
        """Takes lines from the bucket.

        Returns:
            The lines granted, and the lines suppressed since the last grant.
        """
        with self._lock:
            self._left = min(self._most, self._left + (now - self._looked) * self._per_s)
            self._looked = now
            granted = min(wanted, int(self._left))
            self._left -= granted
            passed_over = self._passed_over
            self._passed_over = wanted - granted + (0 if granted else passed_over)
            return granted, passed_over
