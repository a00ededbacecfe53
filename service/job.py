"""What the queue holds: images of one caller, and the batches that are made of them."""

from __future__ import annotations

import enum
from collections import deque
from dataclasses import dataclass, field
from typing import Any


class Refusal(enum.Enum):
    """Why a job was not run."""

    QUEUE_FULL = "queue_full"
    DEADLINE_UNREACHABLE = "deadline_unreachable"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    STOPPED = "stopped"
    FAILED = "failed"
    UNAUTHENTICATED = "unauthenticated"
    RATE_LIMITED = "rate_limited"


class Job:
    """Images of one caller, waiting for or going through inference.

    What few jobs need has its default on the class, so that making one stays cheap.

    Attributes:
        images: The images back to back, sliced by ``image_bytes`` when they must be split.
        count: Number of images.
        deadline: Clock value after which nobody waits for the answer, or None.
        cancelled: Set by the transport, from any thread, when the caller has left.
        enqueued: Clock value of admission.
        started: Clock value at which the first batch with one of its images started.
        inference_s: Seconds of inference, summed over its batches.
        batch_images: Images of the largest batch that held one of its images.
        result: Its share of what ``run`` returned, in the order of its images.
        refusal: Why it was not run, or None.
        retry_after_s: With ``QUEUE_FULL`` or ``DEADLINE_UNREACHABLE``, when the queue will have
            drained; with ``RATE_LIMITED``, when its caller may ask again.
    """

    cancelled = False
    enqueued = 0.0
    started = 0.0
    inference_s = 0.0
    batch_images = 0
    result = b""
    refusal: Refusal | None = None
    retry_after_s = 0.0
    # Of a job that is split: images handed to a batch, images that came back, what they brought,
    # what made the first of it, and whether something else made another piece.
    taken = 0
    returned = 0
    pieces: list[tuple[int, bytes]]
    source: Any = None
    mixed = False

    def __init__(self, images: memoryview, count: int, deadline: float | None) -> None:
        self.images = images
        self.count = count
        self.deadline = deadline


class Lane:
    """Jobs of one size class, in order of arrival.

    Attributes:
        jobs: The first may have given some of its images to a batch already.
        images: Images that wait in them.
    """

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()
        self.images = 0


@dataclass(slots=True)
class Batch:
    """One trip through the engine.

    Attributes:
        parts: The jobs in it, each with the first of its images and how many follow.
        images: Images in all parts.
        pixels: Its images, back to back.
        split: Whether it holds a part of a job whose other parts are in other batches.
        result: What ``run`` returned.
        finished: Jobs to answer now: complete, failed, or dropped before inference.
        source: What ``run`` said made the result.
        seconds: Duration of inference; 0 when nothing was run.
        error: What ``run`` raised, or None.
    """

    parts: list[tuple[Job, int, int]] = field(default_factory=list)
    images: int = 0
    pixels: bytes | memoryview = b""
    split: bool = False
    finished: list[Job] = field(default_factory=list)
    result: bytes | None = None
    source: Any = None
    seconds: float = 0.0
    error: Exception | None = None
