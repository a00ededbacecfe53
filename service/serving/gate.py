"""The way into the core: is the server open, is the input valid, is its caller within the rate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from digits.images import Normalised
from service.serving.batch import BatchListener
from service.serving.batcher import Batcher
from service.serving.model import ModelRunner, ServedModel
from service.serving.preparing import Preparer, Work
from service.serving.replies import Replies
from service.serving.request import IMAGE_BYTES, InvalidInputError, Refusal, Request

# Charges the callers of requests; returns those to refuse, each with ``retry_after_s`` set.
RateLimit = Callable[[Sequence[Request]], Sequence[Request]]


class Gate:
    """Lets requests in, and knows what serves them. Thread-safe.

    Args:
        batcher: Runs them.
        runner: Runs batches on the model in service.
        preparer: Makes images of what came in other forms.
        max_images_per_request: Images in one request at most.
        rate_limit: What each caller may ask for; None for no limit.
        listener: Is notified of refused requests.
    """

    def __init__(
        self,
        batcher: Batcher,
        runner: ModelRunner,
        preparer: Preparer,
        *,
        max_images_per_request: int,
        rate_limit: RateLimit | None = None,
        listener: BatchListener | None = None,
    ) -> None:
        self.batcher = batcher
        self._runner = runner
        self._preparer = preparer
        self._max_images = max_images_per_request
        self._rate_limit = rate_limit
        self._replies = Replies(listener)
        self._closed: str | None = "the model is loading"

    @property
    def model(self) -> ServedModel | None:
        """The model in service, or None while loading."""
        return self._runner.model

    def judge(self, reading: Normalised) -> tuple[int, float]:
        """The digit that the model in service takes a reading of a picture for, and its score."""
        result = self._runner.run(reading.pixels.tobytes(), 1)
        score = float(result.scores(0, 1)[0]) * reading.plausibility
        return int(result.probabilities[0].argmax()), score

    @property
    def is_open(self) -> bool:
        """Whether requests are taken."""
        return self._closed is None

    @property
    def closed_reason(self) -> str:
        """Why no requests are taken; empty if they are."""
        return self._closed or ""

    @property
    def threads(self) -> list[threading.Thread]:
        """What must live as long as requests are taken."""
        return [*self.batcher.threads, self._preparer.thread]

    def start(self) -> None:
        """Starts the threads."""
        self._preparer.start()
        self.batcher.start()

    def serve(self, model: ServedModel) -> None:
        """Answers with ``model`` from the next batch on."""
        self._runner.serve(model)
        self.batcher.expect(model.batch_seconds)

    def open(self) -> None:
        """Takes requests; a model must serve."""
        self._closed = None

    def close(self, reason: str) -> None:
        """Refuses requests from here on, with this reason; those admitted are still answered."""
        self._closed = reason

    def stop(self, grace_s: float) -> bool:
        """Finishes what was admitted; True if all of it was replied to within the grace."""
        give_up = time.monotonic() + grace_s
        prepared = self._preparer.stop(grace_s)
        return self.batcher.stop(max(0.0, give_up - time.monotonic())) and prepared

    def check_count(self, field: str, count: int) -> None:
        """Refuses a request of no images, or of too many.

        Raises:
            InvalidInputError: Naming ``field``.
        """
        if not 1 <= count <= self._max_images:
            raise InvalidInputError(field, f"1 to {self._max_images} images", str(count))

    def count_images(self, field: str, size: int) -> int:
        """The number of images in ``size`` bytes of pixels.

        Raises:
            InvalidInputError: Naming ``field``: if they are not whole images, none, or too many.
        """
        count, rest = divmod(size, IMAGE_BYTES)
        if rest:
            raise InvalidInputError(field, f"a multiple of {IMAGE_BYTES} bytes", f"{size} bytes")
        if not 1 <= count <= self._max_images:
            self.check_count(field, count)
        return count

    def submit(self, requests: Sequence[Request]) -> None:
        """Takes valid requests that came together; each is replied to once, maybe right here."""
        if self._is_open_for(requests):
            self._charge_and_queue(requests)

    def prepare(self, request: Request, work: Work) -> None:
        """Takes a request whose images must be made first.

        Args:
            request: With its count if that is known: its caller is then charged before the work,
                else after it.
            work: Sets its images and count.
        """
        if not self._is_open_for([request]):
            return
        if not request.count:
            self._preparer.submit(request, work, self._charge_and_queue)
        elif self._charge([request]):
            self._preparer.submit(request, work, self.batcher.submit)

    def _is_open_for(self, requests: Sequence[Request]) -> bool:
        closed = self._closed
        if closed is None:
            return True
        for request in requests:
            request.refusal = Refusal.STOPPED
            request.detail = closed
        self._replies.refuse(requests)
        return False

    def _charge_and_queue(self, requests: Sequence[Request]) -> None:
        charged = self._charge(requests)
        if charged:
            self.batcher.submit(charged)

    def _charge(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Those within their callers' rates; the others are replied to."""
        if self._rate_limit is None:
            return requests
        refused = self._rate_limit(requests)
        if not refused:
            return requests
        for request in refused:
            request.refusal = Refusal.RATE_LIMITED
        self._replies.refuse(refused)
        return [request for request in requests if request.refusal is None]
