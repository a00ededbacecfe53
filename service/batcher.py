"""Owns the queue: two lanes, one condition, N slots. Knows neither gRPC nor onnxruntime.

Timer-free: a free slot takes everything that waits, up to a batch that takes about half a
millisecond, or ``max_batch_size`` images of large requests. While one slot infers, a second wakes
only when that many wait, so small calls gather into larger batches behind one slot while bulk calls
use every core.

Large requests wait in a lane of their own. While both lanes wait, each batch is half of one and
half of the other: one caller with thousands of images does not stand before everybody else.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from service.job import Batch, Job, Lane, Refusal
from service.scheduling import run_patiently

logger = logging.getLogger(__name__)

# A batch of small jobs of this length is long beside the tenth of a millisecond that handing it
# over costs. A longer one gains nothing more and loses twice: its activations outgrow the CPU's L2
# cache, and all callers wait in lock-step, for inference first and for the network then, not half
# for each. Large jobs fill batches by themselves.
TARGET_BATCH_S = 0.6e-3
# A job of more than this share of a batch (one in so many) waits among the large ones.
BULK_SHARE = 4
# Images that a lone job may have to be run on the thread that brings it.
LONE_IMAGES = 4


class Batcher:
    """Gathers jobs of many callers into batches.

    Thread-safe. Every admitted job is handed to ``complete`` exactly once.

    Args:
        run: Takes the images of a batch, back to back, and their number; returns bytes in which
            each image has an equal share, and what made them. Called from slot threads, outside the
            lock.
        complete: Takes a batch with its ``finished`` jobs, on the thread that ran it.
        image_bytes: Bytes of one image.
        slots: Batches that may run at the same time.
        max_batch_size: Images in a batch at most, larger jobs are split and rejoined; and images
            that must wait before a second slot wakes while one infers.
        max_queue_images: Images that may wait in each lane. A job that is larger is admitted to
            an empty one.
        max_queue_delay_s: How long a batch that is not full may wait for more, in seconds.
        clock: Monotonic seconds.

    Attributes:
        threads: The slots.
    """

    def __init__(
        self,
        run: Callable[[bytes | memoryview, int], tuple[bytes, Any]],
        complete: Callable[[Batch], None],
        *,
        image_bytes: int,
        slots: int,
        max_batch_size: int,
        max_queue_images: int,
        max_queue_delay_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._complete = complete
        self._image_bytes = image_bytes
        self._slots = slots
        self._max_batch_size = max_batch_size
        self._max_queue_images = max_queue_images
        self._max_queue_delay_s = max_queue_delay_s
        self._clock = clock
        self._condition = threading.Condition(threading.Lock())
        self._small, self._bulk = Lane(), Lane()
        self._turn = 0
        self._running = 0
        self._idle = 0
        self._stopping = False
        self.threads: list[threading.Thread] = []
        # When each batch that is in the engine got there. Written without the lock: one key each.
        self._inferring: dict[int, float] = {}
        self._batch_size = max_batch_size
        # Seconds one more image adds to the wait; 0 until measured, which admits every deadline.
        self._wait_per_image_s = 0.0

    @property
    def queued_images(self) -> int:
        """Images that wait, cancelled ones included until a batch passes them over."""
        return self._small.images + self._bulk.images

    @property
    def oldest_inference_began(self) -> float:
        """Clock value at which the longest inference that is running began; now if none is."""
        return min(list(self._inferring.values()), default=self._clock())

    @property
    def queued_jobs(self) -> int:
        """Jobs that wait, or of which some images do."""
        return len(self._small.jobs) + len(self._bulk.jobs)

    def tune(self, seconds_per_image: float) -> None:
        """Fits batch size and admission to what an image costs one slot, in seconds."""
        doublings = round(math.log2(TARGET_BATCH_S / seconds_per_image))
        self._batch_size = max(1, min(self._max_batch_size, 2 ** max(0, doublings)))
        self._wait_per_image_s = seconds_per_image / self._slots

    def start(self) -> None:
        """Starts the slots' threads."""
        for number in range(self._slots):
            thread = threading.Thread(target=self._serve_slot, name=f"slot-{number}", daemon=True)
            thread.start()
            self.threads.append(thread)

    def stop(self, grace_s: float) -> bool:
        """Refuses new jobs, finishes those admitted; True if all were answered within the grace."""
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        give_up = time.monotonic() + grace_s
        for thread in self.threads:
            thread.join(max(0.0, give_up - time.monotonic()))
        with self._condition:  # a lone job may be running on its transport's thread
            idle = self._condition.wait_for(
                lambda: not self._running, max(0.0, give_up - time.monotonic())
            )
        return idle and not any(thread.is_alive() for thread in self.threads)

    def submit(self, jobs: Sequence[Job]) -> list[Job]:
        """Admits jobs in order, under one lock for the whole burst.

        A lone small job on an idle server is run right here: handing it to a slot and waiting for
        that to wake would take as long as the inference.

        Returns:
            Those that were refused, with ``refusal`` set; they are not handed to ``complete``.
        """
        refused, lone = [], None
        with self._condition:
            now = self._clock()
            for job in jobs:
                job.enqueued = now
                job.refusal = self._admission(job, now)
                if job.refusal is None:
                    lane = self._lane(job)
                    lane.jobs.append(job)
                    lane.images += job.count
                else:
                    refused.append(job)
            if self._is_lone(jobs):
                lone = self._start_batch()
            elif self._idle and self._wanted():
                self._condition.notify()
        if lone is not None:
            self._run_lone(lone)
        return refused

    def _is_lone(self, jobs: Sequence[Job]) -> bool:
        """Whether all there is to do is one small job."""
        return (
            len(jobs) == 1
            and self._running == 0
            and self.queued_images == jobs[0].count <= LONE_IMAGES
            and not self._max_queue_delay_s
            and bool(self.threads)
        )

    def _run_lone(self, batch: Batch) -> None:
        self.infer(batch)
        with self._condition:
            self._running -= 1
            if self._stopping:
                self._condition.notify_all()
            elif self._waiting():
                self._condition.notify()
        self.distribute(batch)
        self._answer(batch)

    def _admission(self, job: Job, now: float) -> Refusal | None:
        if self._stopping:
            return Refusal.STOPPED
        if job.deadline is not None and now >= job.deadline:
            return Refusal.EXPIRED
        lane = self._lane(job)
        if not lane.images:
            return None  # a retry would find nothing better
        # Of what waits in the other lane, as much as this one holds gets its turn before.
        ahead = min(self.queued_images, 2 * lane.images)
        if lane.images + job.count > self._max_queue_images:
            job.retry_after_s = ahead * self._wait_per_image_s
            return Refusal.QUEUE_FULL
        wait = (ahead + job.count) * self._wait_per_image_s
        if job.deadline is not None and now + wait > job.deadline:
            job.retry_after_s = ahead * self._wait_per_image_s
            return Refusal.DEADLINE_UNREACHABLE
        return None

    def _lane(self, job: Job) -> Lane:
        return self._bulk if job.count * BULK_SHARE > self._max_batch_size else self._small

    def _wanted(self) -> bool:
        """The second-slot rule: an idle slot is needed for a first batch or for a full one."""
        if self._running == 0:
            return self._waiting()
        # A queue that is shorter than a batch must wake it, too.
        return self.queued_images >= min(self._max_batch_size, self._max_queue_images)

    def _waiting(self) -> bool:
        return bool(self._small.jobs or self._bulk.jobs)

    def _serve_slot(self) -> None:
        run_patiently()
        while self._serve_batch():
            pass

    def _serve_batch(self) -> bool:
        """Waits for a batch and runs it; False when stopped and drained.

        A slot that waits holds nothing of its last batch: neither calls nor the model it ran on.
        """
        batch = self._next_batch()
        if batch is None:
            return False
        self.infer(batch)
        with self._condition:
            self._running -= 1
        # Whatever arrives meanwhile wakes another slot.
        self.distribute(batch)
        self._answer(batch)
        return True

    def _answer(self, batch: Batch) -> None:
        try:
            self._complete(batch)
        except Exception:
            logger.exception("answering a batch failed; this is a bug")
        finally:
            batch.error = None  # its traceback leads back to the batch

    def _next_batch(self) -> Batch | None:
        """Waits for work; None when stopped and drained."""
        with self._condition:
            while True:
                delay = None
                if self._wanted():
                    delay = self._delay_left()
                    if delay <= 0:
                        return self._start_batch()
                elif self._stopping and not self._waiting():
                    self._condition.notify_all()
                    return None
                self._idle += 1
                self._condition.wait(delay)
                self._idle -= 1

    def _start_batch(self) -> Batch:
        self._running += 1
        batch = self.form_batch()
        if self._idle and self._waiting() and self._wanted():
            self._condition.notify()
        return batch

    def _delay_left(self) -> float:
        """Seconds that the oldest job may still wait for company, counted from its arrival."""
        if self._stopping or not self._max_queue_delay_s or self.queued_images >= self._batch_size:
            return 0.0
        oldest = min(lane.jobs[0].enqueued for lane in (self._small, self._bulk) if lane.jobs)
        return oldest + self._max_queue_delay_s - self._clock()

    def form_batch(self) -> Batch:
        """Takes waiting images up to ``max_batch_size``; the lock must be held.

        Jobs nobody waits for any more are passed over and put straight into ``finished``.
        """
        batch = Batch()
        size = self._max_batch_size if self._bulk.jobs else self._batch_size
        if self._small.jobs and self._bulk.jobs:
            self._turn ^= 1  # of an odd size, each gets the larger half in turn
            self._take(self._small, batch, (size + self._turn) // 2)
        self._take(self._bulk, batch, size)
        self._take(self._small, batch, size)
        return batch

    def _take(self, lane: Lane, batch: Batch, limit: int) -> None:
        """Moves images from a lane to a batch until that holds ``limit``."""
        now = self._clock()
        while lane.jobs and batch.images < limit:
            job = lane.jobs[0]
            job.refusal = self._dead(job, now)
            if job.refusal is not None:
                lane.jobs.popleft()
                lane.images -= job.count - job.taken
                batch.finished.append(job)
                continue
            if job.taken == 0:
                job.started = now
            taken = min(job.count - job.taken, limit - batch.images)
            self._add_part(batch, job, taken)
            batch.images += taken
            job.taken += taken
            lane.images -= taken
            if job.taken == job.count:
                lane.jobs.popleft()

    def _add_part(self, batch: Batch, job: Job, taken: int) -> None:
        """Adds images of a job, to those of it that the batch may hold already."""
        if job.taken:
            for place, (other, first, count) in enumerate(batch.parts):
                if other is job:
                    batch.parts[place] = (job, first, count + taken)
                    return
        batch.parts.append((job, job.taken, taken))

    def _dead(self, job: Job, now: float) -> Refusal | None:
        if job.deadline is not None and now >= job.deadline:
            return Refusal.EXPIRED
        return Refusal.CANCELLED if job.cancelled else None

    def infer(self, batch: Batch) -> None:
        """Runs a batch; an error stays with it."""
        if not batch.images:  # everything in it was dropped
            return
        started = self._inferring[id(batch)] = self._clock()
        try:
            batch.pixels = self._gather(batch)
            batch.result, batch.source = self._run(batch.pixels, batch.images)
        except Exception as error:
            batch.error = error
        del self._inferring[id(batch)]
        batch.seconds = self._clock() - started

    def _gather(self, batch: Batch) -> bytes | memoryview:
        size = self._image_bytes
        images = [
            job.images if count == job.count else job.images[first * size : (first + count) * size]
            for job, first, count in batch.parts
        ]
        return images[0] if len(images) == 1 else b"".join(images)

    def distribute(self, batch: Batch) -> None:
        """Gives each job its share; the jobs that are complete by that go to ``finished``."""
        result = batch.result
        share = 0 if result is None else len(result) // batch.images
        position = 0
        for job, first, count in batch.parts:
            start, position = position, position + count * share
            if count != job.count:
                batch.split = True
                rows = None if result is None else result[start:position]
                if not self._add_piece(batch, job, first, rows, count):
                    continue
            else:
                job.batch_images = batch.images
                job.inference_s = batch.seconds
                if result is None:
                    job.refusal = Refusal.FAILED
                else:
                    job.result = result[start:position]
            batch.finished.append(job)

    def _add_piece(
        self, batch: Batch, job: Job, first: int, rows: bytes | None, count: int
    ) -> bool:
        """Adds a piece of a split job, whose other pieces may be finishing on another thread.

        Returns:
            Whether this piece decided the job.
        """
        with self._condition:
            if job.refusal is not None:
                return False  # an earlier piece failed, or the rest was dropped: already answered
            job.batch_images = max(job.batch_images, batch.images)
            job.inference_s += batch.seconds
            if rows is None:
                job.refusal = Refusal.FAILED
                if job.taken < job.count:  # the rest has no use any more
                    lane = self._lane(job)
                    lane.jobs.remove(job)
                    lane.images -= job.count - job.taken
                return True
            if job.returned == 0:
                job.pieces, job.source = [], batch.source
            job.mixed = job.mixed or batch.source is not job.source
            job.returned += count
            job.pieces.append((first, rows))
            if job.returned < job.count:
                return False
            if job.mixed:
                self._start_over(job)
                return False
            ordered = [piece for _, piece in sorted(job.pieces, key=itemgetter(0))]
            job.result = b"".join(ordered)
            return True

    def _start_over(self, job: Job) -> None:
        """Puts a job first in its lane again; the lock must be held.

        Another model came into service between its batches, and an answer names one model. It was
        admitted, so no bound can refuse it now.
        """
        job.taken = job.returned = job.batch_images = 0
        job.inference_s = 0.0
        job.mixed = False
        lane = self._lane(job)
        lane.jobs.appendleft(job)
        lane.images += job.count
        if self._idle and self._wanted():
            self._condition.notify()
