"""A rate limit for log lines."""

from __future__ import annotations

import threading

from service.host.token_bucket import TokenBucket


class Allowance:
    """Log lines that may be written. Thread-safe.

    Args:
        per_s: Lines a second, which is also the largest burst (but at least one line).
    """

    def __init__(self, per_s: float) -> None:
        self._bucket = TokenBucket(per_s, max(1.0, per_s))
        self._suppressed = 0
        self._lock = threading.Lock()

    def take(self, wanted: int, now: float) -> tuple[int, int]:
        """Takes lines.

        Args:
            wanted: How many.
            now: Monotonic seconds.

        Returns:
            The lines granted, and the lines suppressed since the last grant.
        """
        with self._lock:
            granted = min(wanted, int(self._bucket.refill(now)))
            self._bucket.take(granted)
            suppressed = self._suppressed
            self._suppressed = wanted - granted + (0 if granted else suppressed)
            return granted, suppressed
