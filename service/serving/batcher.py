"""Owns the queue: two lanes, one condition, N slots. Knows neither gRPC nor onnxruntime.

Timer-free: a free slot takes everything that waits, up to a batch that takes about
``cost.TARGET_BATCH_S``, or ``max_batch_size`` images of large requests. While one slot runs a
batch, a second wakes only when what waits would keep one busy for ``cost.SECOND_SLOT_S``: so small
requests gather into larger batches behind one slot, while bulk requests use every core.

Large requests wait in a lane of their own. While both lanes wait, each batch is half of one and
half of the other: a caller with thousands of images does not delay all others by them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from service.serving.batch import Batch, BatchListener, Lane, Split
from service.serving.cost import BatchCost
from service.serving.model import Predictions
from service.serving.replies import Replies
from service.serving.request import Refusal, Request

logger = logging.getLogger(__name__)

# A request of more than this share of a batch (one in so many) waits among the large ones.
BULK_SHARE = 4
# A lane is full from this share of its bound on: a batch has just been taken from one that was.
FULL = 0.9
# Images that a lone request may have to be run on the thread that submits it.
LONE_IMAGES = 4
# A broken engine fails hundreds of batches a second, each with the same traceback.
FAILURE_LOG_INTERVAL_S = 1.0


class Batcher:
    """Gathers requests of many callers into batches.

    Thread-safe. Every request is given to its reply exactly once, without the lock: on the thread
    that submitted it if it is refused, else on the thread that ran its last batch.

    Args:
        run: Takes the images of a batch, back to back, and their number. Called from slots and,
            for lone requests, from threads that submit.
        slots: Batches that may run at the same time.
        max_batch_size: Images in a batch at most; larger requests are split and rejoined.
        max_queue_images: Images that may wait in each lane. A request that is larger is admitted
            to an empty one.
        listener: Is notified of batches and of refused requests.
        clock: Monotonic seconds.

    Attributes:
        threads: The slots.
    """

    def __init__(
        self,
        run: Callable[[bytes | memoryview, int], Predictions],
        *,
        slots: int,
        max_batch_size: int,
        max_queue_images: int,
        listener: BatchListener | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run = run
        self._slots = slots
        self._max_batch_size = max_batch_size
        self._max_queue_images = max_queue_images
        self._bulk_above = max_batch_size // BULK_SHARE
        self._replies = Replies(listener)
        self._clock = clock
        self._cost = BatchCost(max_batch_size, max_queue_images, clock)
        self._condition = threading.Condition(threading.Lock())
        self._small, self._bulk = Lane(), Lane()
        self._turn = 0
        # Slots that wait; batches in the engine; batches whose split requests may start over; lone
        # requests that are not replied to.
        self._idle = self._running = self._splitting = self._lone = 0
        self._stopping = False
        self.threads: list[threading.Thread] = []
        # When each batch that is in the engine got there. Written without the lock: one key each.
        self._inferring: dict[int, float] = {}
        self._failure_logged_at = -FAILURE_LOG_INTERVAL_S

    @property
    def batch_images(self) -> int:
        """Images in a batch of small requests."""
        return self._cost.batch_images

    @property
    def image_cost_s(self) -> float:
        """Seconds that an image adds to such a batch; 0 while unknown."""
        return self._cost.image_cost_s

    @property
    def queued_images(self) -> int:
        """Images that wait, cancelled ones included until a batch passes them over."""
        return self._small.images + self._bulk.images

    @property
    def overload_s(self) -> float:
        """Seconds of work that wait while a lane is full; 0 while none is."""
        full = max(self._small.images, self._bulk.images) >= FULL * self._max_queue_images
        return self.queued_images * self._cost.image_cost_s / self._slots if full else 0.0

    @property
    def queued_requests(self) -> int:
        """Requests that wait, or of which some images do."""
        return len(self._small.requests) + len(self._bulk.requests)

    @property
    def oldest_inference_began(self) -> float:
        """Clock value at which the longest inference that is running began; now if none is."""
        return min(list(self._inferring.values()), default=self._clock())

    def expect(self, batch_seconds: Mapping[int, float]) -> None:
        """Fits batches, slots and admission to a model.

        Args:
            batch_seconds: Size of a batch to its duration on one slot.
        """
        with self._condition:
            self._cost.expect(batch_seconds)
        self._cost.log_change()

    def start(self) -> None:
        """Starts the slots' threads."""
        for number in range(self._slots):
            thread = threading.Thread(target=self._serve_slot, name=f"slot-{number}", daemon=True)
            thread.start()
            self.threads.append(thread)

    def stop(self, grace_s: float) -> bool:
        """Refuses new requests, finishes those admitted; True if all were replied to in time."""
        give_up = time.monotonic() + grace_s
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        for thread in self.threads:
            thread.join(max(0.0, give_up - time.monotonic()))
        with self._condition:  # a lone request may be running on its caller's thread
            alone = self._condition.wait_for(
                lambda: not self._lone, max(0.0, give_up - time.monotonic())
            )
            done = alone and not self._waiting()
        return done and not any(thread.is_alive() for thread in self.threads)

    def submit(self, requests: Sequence[Request]) -> None:
        """Admits requests in order, under one lock for the whole burst.

        A lone small request on an idle server is run right here: handing it to a slot and waiting
        for that to wake would take as long as the inference.
        """
        refused: list[Request] = []
        lone = None
        with self._condition:
            now = self._clock()
            for request in requests:
                self._admit(request, now, refused)
            if self._is_lone(requests):
                self._lone += 1
                lone = self._start_batch()
            elif self._idle and self._wanted():
                self._condition.notify()
        if refused:
            self._replies.refuse(refused)
        if lone is not None:
            self._run_lone(lone)

    def _admit(self, request: Request, now: float, refused: list[Request]) -> None:
        count = request.count
        lane = self._bulk if count > self._bulk_above else self._small
        request.enqueued = now
        if (
            request.deadline is not None
            or lane.images + count > self._max_queue_images
            or self._stopping
        ):
            refusal = self._refusal(request, lane, now)
            if refusal is not None:
                request.refusal = refusal
                refused.append(request)
                return
        lane.requests.append(request)
        lane.images += count

    def _refusal(self, request: Request, lane: Lane, now: float) -> Refusal | None:
        if self._stopping:
            return Refusal.STOPPED
        deadline = request.deadline
        if deadline is not None and now >= deadline:
            return Refusal.EXPIRED
        if not lane.images:
            return None  # a retry would find nothing better
        # Of what waits in the other lane, as much as this one holds gets its turn before.
        ahead = min(self.queued_images, 2 * lane.images)
        wait_per_image_s = self._cost.image_cost_s / self._slots
        if lane.images + request.count > self._max_queue_images:
            request.retry_after_s = ahead * wait_per_image_s
            return Refusal.QUEUE_FULL
        if deadline is not None and now + (ahead + request.count) * wait_per_image_s > deadline:
            request.retry_after_s = ahead * wait_per_image_s
            return Refusal.DEADLINE_UNREACHABLE
        return None

    def _is_lone(self, requests: Sequence[Request]) -> bool:
        """Whether all there is to do is one small request.

        While another is being replied to, none is: replies may submit, and would pile up.
        """
        return (
            len(requests) == 1
            and not self._running
            and not self._lone
            and self.queued_images == requests[0].count <= LONE_IMAGES
            and bool(self.threads)
        )

    def _run_lone(self, batch: Batch) -> None:
        try:
            self.infer(batch)
            with self._condition:
                self._end_inference(batch)
                if self._idle and self._waiting():
                    self._condition.notify()
            self._finish(batch)
        finally:
            with self._condition:
                self._lone -= 1
                if self._stopping:
                    self._condition.notify_all()

    def _lane(self, request: Request) -> Lane:
        return self._bulk if request.count > self._bulk_above else self._small

    def _wanted(self) -> bool:
        """The second-slot rule: a slot is needed for a first batch, or if one slot is too slow."""
        if not self._running:
            return self._waiting()
        return self.queued_images >= self._cost.wake_images

    def _waiting(self) -> bool:
        return bool(self._small.requests or self._bulk.requests)

    def _serve_slot(self) -> None:
        while self._serve_batch():
            pass

    def _serve_batch(self) -> bool:
        """Waits for a batch and runs it; False when stopped and drained.

        A slot that waits holds nothing of its last batch: neither requests nor the model.
        """
        batch = self._next_batch()
        if batch is None:
            return False
        self.infer(batch)
        with self._condition:
            # Whatever arrives from here on wakes another slot.
            self._end_inference(batch)
        self._finish(batch)
        return True

    def _next_batch(self) -> Batch | None:
        """Waits for work; None when stopped and drained."""
        with self._condition:
            while not self._wanted():
                if self._stopping and not self._waiting() and not self._splitting:
                    self._condition.notify_all()
                    return None
                self._idle += 1
                self._condition.wait()
                self._idle -= 1
            return self._start_batch()

    def _start_batch(self) -> Batch:
        self._running += 1
        batch = self.form_batch()
        if batch.split:
            self._splitting += 1
        if self._idle and self._waiting() and self._wanted():
            self._condition.notify()
        return batch

    def form_batch(self) -> Batch:
        """Takes waiting images up to the size of a batch; the lock must be held."""
        batch = Batch()
        now = self._clock()
        size = self._max_batch_size if self._bulk.requests else self._cost.batch_images
        if self._small.requests and self._bulk.requests:
            self._turn ^= 1  # of an odd size, each gets the larger half in turn
            batch.take(self._small, (size + self._turn) // 2, now)
        batch.take(self._bulk, size, now)
        batch.take(self._small, size, now)
        return batch

    def infer(self, batch: Batch) -> None:
        """Runs a batch; an error stays with it."""
        if not batch.images:  # everything in it was dropped
            return
        started = self._inferring[id(batch)] = self._clock()
        try:
            batch.predictions = self._run(batch.pixels(), batch.images)
        except Exception as error:
            batch.error = error
        del self._inferring[id(batch)]
        batch.seconds = self._clock() - started

    def _end_inference(self, batch: Batch) -> None:
        """The engine is free for another batch; the lock must be held."""
        self._running -= 1
        if batch.error is None:
            self._cost.learn(batch.images, batch.seconds)

    def _finish(self, batch: Batch) -> None:
        """Gives the requests of a batch their results, and replies to those that have all."""
        try:
            self.distribute(batch)
        finally:
            if batch.split:
                with self._condition:
                    self._splitting -= 1
                    if self._stopping:
                        self._condition.notify_all()
        self._replies.end(batch)
        if batch.error is not None:
            self._log_failure(batch.error)
            batch.error = None  # its traceback leads back to the batch
        self._cost.log_change()

    def distribute(self, batch: Batch) -> None:
        """Gives each request its predictions; those that are complete by that are finished."""
        predictions, seconds, images = batch.predictions, batch.seconds, batch.images
        finished, row = batch.finished, 0
        for request, first, count in batch.parts:
            if count != request.count:
                self._add_part(batch, request, first, row, count)
            else:
                request.batch_images = images
                request.inference_s = seconds
                if predictions is None:
                    request.refusal = Refusal.FAILED
                    batch.refused.append(request)
                else:
                    request.result = predictions
                    request.first = row
                    finished.append(request)
            row += count

    def _add_part(self, batch: Batch, request: Request, first: int, row: int, count: int) -> None:
        """Adds a part of a split request, whose others may be finishing on another thread."""
        with self._condition:
            if request.refusal is not None:
                return  # another part failed, or the rest was dropped: already replied to
            request.batch_images = max(request.batch_images, batch.images)
            request.inference_s += batch.seconds
            if batch.predictions is None:
                self._fail(batch, request)
                return
            if request.split is None:
                request.split = Split()
            request.split.add(first, row, count, batch.predictions)
            if request.split.returned < request.count:
                return
            request.result = request.split.joined()
            request.split = None
            if request.result is None:
                self._start_over(request)
            else:
                batch.finished.append(request)

    def _fail(self, batch: Batch, request: Request) -> None:
        """Ends a request with the first part that failed; the lock must be held."""
        request.refusal = Refusal.FAILED
        request.split = None
        batch.refused.append(request)
        if request.taken < request.count:  # the rest has no use any more
            lane = self._lane(request)
            lane.requests.remove(request)
            lane.images -= request.count - request.taken

    def _start_over(self, request: Request) -> None:
        """Puts a request first in its lane again; the lock must be held.

        Another model came into service between its batches, and an answer names one model. It was
        admitted, so no bound can refuse it now.
        """
        request.taken = request.batch_images = 0
        request.inference_s = 0.0
        lane = self._lane(request)
        lane.requests.appendleft(request)
        lane.images += request.count
        if self._idle and self._wanted():
            self._condition.notify()

    def _log_failure(self, error: Exception) -> None:
        now = self._clock()
        if now >= self._failure_logged_at + FAILURE_LOG_INTERVAL_S:
            self._failure_logged_at = now
            logger.error("inference failed; its batch failed with it", exc_info=error)
