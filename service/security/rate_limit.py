"""How many images each caller may ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from service.host.token_bucket import TokenBuckets
from service.serving.request import Request


class RateLimit:
    """Rejects requests of callers that ask for more images than their rate; see ``Gate``.

    Args:
        images_per_s: The rate of each caller.
        clock: Monotonic seconds.
    """

    def __init__(self, images_per_s: float, clock: Callable[[], float]) -> None:
        self._buckets = TokenBuckets(images_per_s)
        self._clock = clock

    def __call__(self, requests: Sequence[Request]) -> list[Request]:
        """Charges the callers; returns the requests to reject, each with when to come back."""
        rejected = []
        now = self._clock()
        for request in requests:
            caller = getattr(request.origin, "caller", "")
            request.retry_after_s = self._buckets.take(caller, request.count, now)
            if request.retry_after_s:
                rejected.append(request)
        return rejected
