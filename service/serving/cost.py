"""What a batch costs, by its size, and what follows from that: how large, and when two at once.

Measured at warm-up, and kept current from the batches that run. A batch is never faster than the
hardware allows, but it is often slower: other threads had the core. So a measurement below what was
known is believed quickly, one above it hardly, and the estimate settles near the fastest batches,
wherever it began. A size that is not run follows its neighbours: a larger batch takes no less time
than a smaller one, and no more time an image. Without that, one warm-up on a busy machine would
lead to small batches, and those to no measurement of larger ones.
"""

from __future__ import annotations

import logging
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

# A batch of small requests of this length is long beside the tenth of a millisecond that handing it
# over costs. A longer one gains nothing more and loses twice: its activations outgrow the CPU's L2
# cache, and all callers wait in lock-step, for inference first and for the network then, not half
# for each.
TARGET_BATCH_S = 0.6e-3
# Another slot wakes when the images that wait would keep one slot busy for this long. Earlier, two
# slots share out what one larger batch does cheaper; later, a core is idle.
SECOND_SLOT_S = 1.3e-3
# No clock tells less; an image that costs nothing would fit any deadline.
MIN_BATCH_S = 1e-6
# Weight of one measurement below the estimate, and of one above it.
FALL, RISE = 0.5, 1 / 128
# A measurement counts as at most this many times the estimate: a batch may stall for seconds.
MAX_RATIO = 2.0
# A decision that differs by less than this share from what was logged is not logged again, nor is
# any within this many seconds.
LOGGED_SHARE = 0.25
LOG_INTERVAL_S = 10.0


class BatchCost:
    """Seconds of a batch by its size. Not thread-safe, except ``log_change`` and the attributes.

    Args:
        max_batch_size: Images in a batch at most.
        max_waiting: Images that can wait; so many always wake another slot.
        clock: Monotonic seconds.

    Attributes:
        batch_images: Images in a batch of small requests, which takes about ``TARGET_BATCH_S``.
        image_cost_s: Seconds that an image in such a batch adds to it; 0 before ``expect``.
        wake_images: Images that must wait before another slot wakes.
    """

    def __init__(
        self, max_batch_size: int, max_waiting: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_waiting = max_waiting
        self._clock = clock
        self._sizes = warm_up_sizes(max_batch_size)
        self._seconds: list[float] = []
        self._logged: tuple[int, float] = (0, 0.0)
        self._logged_at = -math.inf
        self.batch_images = max_batch_size
        self.image_cost_s = 0.0
        self.wake_images = min(max_batch_size, max_waiting)

    def expect(self, seconds: Mapping[int, float]) -> None:
        """Replaces what is known by measurements of another model.

        Args:
            seconds: Duration of a batch by its size; one size at least.
        """
        measured = sorted(seconds)
        self._seconds = []
        for size in self._sizes:
            nearest = measured[min(bisect_left(measured, size), len(measured) - 1)]
            self._seconds.append(max(MIN_BATCH_S, seconds[nearest] * size / nearest))
        # Other work makes some of them too long, none too short: the shorter one of two is right.
        for place in range(1, len(self._sizes)):
            most = self._seconds[place - 1] * self._sizes[place] / self._sizes[place - 1]
            self._seconds[place] = min(self._seconds[place], most)
        for place in reversed(range(len(self._sizes) - 1)):
            self._seconds[place] = min(self._seconds[place], self._seconds[place + 1])
        self._decide()

    def seconds(self, images: int) -> float:
        """What a batch of so many images takes; 0 before ``expect``."""
        if not self._seconds:
            return 0.0
        place = min(bisect_left(self._sizes, images), len(self._sizes) - 1)
        return self._between(place, images)

    def learn(self, images: int, seconds: float) -> None:
        """Takes the measurement of one batch."""
        if not self._seconds or seconds <= 0:
            return
        place = min(bisect_left(self._sizes, images), len(self._sizes) - 1)
        ratio = min(seconds / self._between(place, images), MAX_RATIO)
        self._seconds[place] *= 1 + (FALL if ratio < 1 else RISE) * (ratio - 1)
        self._spread(place)
        self._decide()

    def _between(self, place: int, images: int) -> float:
        """Interpolates between the size at ``place``, the first not below ``images``, and the last.

        Beyond the largest, an image costs what it does there.
        """
        size, seconds = self._sizes[place], self._seconds[place]
        if images == size:
            return seconds
        if images > size:
            return seconds * images / size
        low = self._sizes[place - 1]
        return seconds - (seconds - self._seconds[place - 1]) * (size - images) / (size - low)

    def _spread(self, place: int) -> None:
        """Brings the sizes around ``place`` within what its duration allows."""
        seconds, sizes = self._seconds, self._sizes
        for above in range(place + 1, len(sizes)):
            least = seconds[above - 1]
            most = least * sizes[above] / sizes[above - 1]
            if least <= seconds[above] <= most:
                break
            seconds[above] = least if seconds[above] < least else most
        for below in range(place - 1, -1, -1):
            most = seconds[below + 1]
            least = most * sizes[below] / sizes[below + 1]
            if least <= seconds[below] <= most:
                break
            seconds[below] = least if seconds[below] < least else most

    def _decide(self) -> None:
        place = bisect_left(self._seconds, TARGET_BATCH_S)
        if place == len(self._sizes):
            images = self._sizes[-1]
        elif place == 0:
            images = self._sizes[0]
        else:
            low, high = self._sizes[place - 1], self._sizes[place]
            base, step = self._seconds[place - 1], self._seconds[place] - self._seconds[place - 1]
            images = low + round((high - low) * (TARGET_BATCH_S - base) / step)
        self.batch_images = images
        self.image_cost_s = self.seconds(images) / images
        self.wake_images = min(math.ceil(SECOND_SLOT_S / self.image_cost_s), self._max_waiting)

    def log_change(self) -> None:
        """Logs what was decided, if it differs from what was logged, and not too often."""
        images, cost_s = self.batch_images, self.image_cost_s
        was_images, was_cost_s = self._logged
        if (
            abs(images - was_images) <= LOGGED_SHARE * was_images
            and abs(cost_s - was_cost_s) <= LOGGED_SHARE * was_cost_s
        ):
            return
        now = self._clock()
        if not cost_s or now < self._logged_at + LOG_INTERVAL_S:
            return
        self._logged, self._logged_at = (images, cost_s), now
        logger.info(
            "batches of small requests: %d images, at %.0f us an image", images, cost_s * 1e6
        )


def warm_up_sizes(max_batch_size: int) -> list[int]:
    """Sizes of batches to measure: 1, 2, 4, ... and the largest."""
    sizes = [1]
    while sizes[-1] * 2 < max_batch_size:
        sizes.append(sizes[-1] * 2)
    if max_batch_size > 1:
        sizes.append(max_batch_size)
    return sizes
