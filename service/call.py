"""One RPC, whatever carried it, and those who want to know how it ended."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from grpc import StatusCode

from service.job import Batch, Job
from service.status import Status


class Call(Job):
    """A Classify call, or one item of a stream: its request, its caller, and the way back.

    The transport that made it implements ``respond`` and ``fail``; exactly one of them is called,
    once, from any thread. Its images are set when its request was read.

    Attributes:
        request: Serialised ClassifyRequest.
        received: Monotonic seconds of arrival.
        metadata: Request metadata.
        peer: The caller's address, as gRPC spells it.
        caller: Whose token it shows; empty where none is needed.
        plausibility: float32[count] of images that came as files, for their ``digit_score``; None
            of raw pixels.
        is_rpc: Whether it counts as a Classify RPC; an item of a stream does not, nor a ModelInfer.
    """

    is_rpc: ClassVar[bool] = True
    count = 0
    caller = ""
    plausibility: npt.NDArray[np.float32] | None = None

    def __init__(
        self,
        request: bytes,
        received: float,
        deadline: float | None,
        metadata: Sequence[Any] = (),
        peer: str = "",
    ) -> None:
        self.request = request
        self.received = received
        self.deadline = deadline
        self.metadata = metadata
        self.peer = peer

    def respond(self, response: bytes) -> bool:
        """Sends the serialised ClassifyResponse; False if the caller has left."""
        raise NotImplementedError

    def fail(self, status: Status) -> bool:
        """Ends the call with a status other than OK; False if the caller has left."""
        raise NotImplementedError


class RpcListener(Protocol):
    """Is told how RPCs ended, from any thread. Times are monotonic seconds."""

    def answered(self, calls: Sequence[Call], batch: Batch, now: float) -> None:
        """Classify calls, or items of streams, were answered with OK; ``batch`` was their last."""

    def failed(self, calls: Sequence[Call], code: StatusCode, message: str, now: float) -> None:
        """Classify calls ended with another code."""

    def rpc(
        self,
        service: str,
        method: str,
        code: StatusCode,
        *,
        peer: str,
        metadata: Iterable[Any],
        began: float,
        now: float,
    ) -> None:
        """An RPC other than Classify ended."""
