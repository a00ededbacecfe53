"""The way into the core: is the server open, is the input valid, is its caller within the rate."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from service.serving.batch import BatchListener
from service.serving.batcher import Batcher
from service.serving.model import ModelRunner, ServedModel
from service.serving.picture_decoder import PictureDecoder
from service.serving.replies import Replies
from service.serving.request import IMAGE_BYTES, InvalidInputError, Refusal, Request

# Charges the callers of requests; returns those to refuse, each with ``retry_after_s`` set.
RateLimit = Callable[[Sequence[Request]], Sequence[Request]]


class Gate:
    """Lets requests in, and knows what serves them. Thread-safe.

    Args:
        batcher: Runs them.
        runner: Runs batches on the model in service.
        decoder: Reads image files, and submits to the same batcher.
        max_images_per_request: Images in one request at most.
        rate_limit: What each caller may ask for; None for no limit.
        listener: Is told of refused requests.
    """

    def __init__(
        self,
        batcher: Batcher,
        runner: ModelRunner,
        decoder: PictureDecoder,
        *,
        max_images_per_request: int,
        rate_limit: RateLimit | None = None,
        listener: BatchListener | None = None,
    ) -> None:
        self.batcher = batcher
        self._runner = runner
        self._decoder = decoder
        self._max_images = max_images_per_request
        self._rate_limit = rate_limit
        self._replies = Replies(listener)
        self._closed: str | None = "the model is loading"

    @property
    def model(self) -> ServedModel | None:
        """The model in service, or None while loading."""
        return self._runner.model

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
        return [*self.batcher.threads, self._decoder.thread]

    def start(self) -> None:
        """Starts the threads."""
        self._decoder.start()
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
        decoded = self._decoder.stop(grace_s)
        return self.batcher.stop(max(0.0, give_up - time.monotonic())) and decoded

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
        admitted = self._admit(requests)
        if admitted:
            self.batcher.submit(admitted)

    def refuse(self, requests: Sequence[Request]) -> None:
        """Ends requests that were turned away on their way here; their ``refusal`` says why."""
        self._replies.refuse(requests)

    def submit_pictures(
        self, request: Request, files: Sequence[bytes], name: str = "encoded.files"
    ) -> None:
        """Takes a request whose images come as files.

        Args:
            request: Its images, count and plausibility are set from the files.
            files: PNG, JPEG, WebP or BMP files; their number is checked with ``check_count``.
            name: What to call them in errors, without their index.
        """
        request.count = len(files)
        if self._admit([request]):
            self._decoder.submit(request, files, name)

    def _admit(self, requests: Sequence[Request]) -> Sequence[Request]:
        """Those that are let in; the others are replied to."""
        closed = self._closed
        if closed is not None:
            for request in requests:
                request.refusal = Refusal.STOPPED
                request.detail = closed
            self._replies.refuse(requests)
            return ()
        if self._rate_limit is None:
            return requests
        refused = self._rate_limit(requests)
        if not refused:
            return requests
        for request in refused:
            request.refusal = Refusal.RATE_LIMITED
        self._replies.refuse(refused)
        return [request for request in requests if request.refusal is None]
