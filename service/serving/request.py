"""What travels through the core: the images of one caller, and how it gets its answer."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from service.serving.batch import Split
    from service.serving.model import Predictions

# uint8[28, 28].
IMAGE_SIDE = 28
IMAGE_BYTES = IMAGE_SIDE * IMAGE_SIDE


class Refusal(enum.Enum):
    """Why a request got no prediction."""

    QUEUE_FULL = "queue_full"
    DEADLINE_UNREACHABLE = "deadline_unreachable"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    FAILED = "failed"
    NO_MEMORY = "no_memory"
    UNAUTHENTICATED = "unauthenticated"
    RATE_LIMITED = "rate_limited"
    # Nothing that load or a fault of the server explains: no listener is notified of it.
    INVALID = "invalid"


@dataclass(frozen=True, slots=True)
class Violation:
    """What is wrong with an input.

    Attributes:
        field: Its path in the request.
        expected: What would be right.
        got: What came instead.
        not_served: The input is well formed, but names what this server does not have.
    """

    field: str
    expected: str
    got: str
    not_served: bool = False

    def __str__(self) -> str:
        return f"{self.field}: expected {self.expected}, got {self.got}"


class InvalidInputError(ValueError):
    """An input that can not be classified, now or later.

    Attributes:
        violation: What is wrong with it. Keep this and not the error, whose traceback holds the
            request.
    """

    def __init__(self, field: str, expected: str, got: str, *, not_served: bool = False) -> None:
        self.violation = Violation(field, expected, got, not_served)
        super().__init__(str(self.violation))


class Origin(Protocol):
    """Whoever waits for a request's answer."""

    @property
    def cancelled(self) -> bool:
        """Whether nobody waits any more."""


# Takes requests that ended together, from any thread; each has ``result`` or ``refusal`` set.
Reply = Callable[[Sequence["Request"]], None]


class Request:
    """Images of one caller, waiting for or going through inference.

    Attributes:
        images: uint8, 784 bytes an image, back to back.
        count: Number of images.
        deadline: Clock value after which nobody waits for the answer, or None.
        reply: Gets the request back once, when it has ended.
        origin: Who asked; the core reads nothing but ``cancelled``.
        plausibility: float32[count] of images that came as files, see ``digits.images.Normalised``;
            None of raw pixels.
        enqueued: Clock value of admission; 0 before.
        started: Clock value at which the first batch with one of its images started.
        inference_s: Seconds of inference, summed over its batches.
        batch_images: Images of the largest batch that held one of its images.
        result: Predictions that hold its own, or None.
        first: The place of its first image in ``result``.
        refusal: Why it got none, or None.
        retry_after_s: With QUEUE_FULL, DEADLINE_UNREACHABLE, RATE_LIMITED or NO_MEMORY: when to
            come back.
        detail: With STOPPED: why the server takes no requests; empty if it is shutting down.
        violation: With INVALID: what is wrong.
        state: For whoever made it; the core does not read it.
        taken: Images that were given to batches.
        split: Of a request that is in several batches: what they returned so far, or None.
    """

    __slots__ = (
        "batch_images", "count", "deadline", "detail", "enqueued", "first", "images",
        "inference_s", "origin", "plausibility", "refusal", "reply", "result", "retry_after_s",
        "split", "started", "state", "taken", "violation",
    )  # fmt: skip

    def __init__(
        self,
        images: bytes | memoryview,
        count: int,
        deadline: float | None,
        reply: Reply,
        origin: Origin,
    ) -> None:
        self.images = images
        self.count = count
        self.deadline = deadline
        self.reply = reply
        self.origin = origin
        self.enqueued = self.started = self.inference_s = self.retry_after_s = 0.0
        self.batch_images = self.first = self.taken = 0
        self.detail = ""
        self.plausibility: npt.NDArray[np.float32] | None = None
        self.result: Predictions | None = None
        self.refusal: Refusal | None = None
        self.violation: Violation | None = None
        self.state: Any = None
        self.split: Split | None = None
