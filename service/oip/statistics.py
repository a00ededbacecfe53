"""What ModelInfer has done with the version in service, as Triton counts it."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from digits.oip import inference_pb2
from digits.v1 import digits_pb2
from service.call import Call

STAGES = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass
class _Counts:
    """Of one version."""

    version: str = ""
    answered: int = 0
    answered_s: float = 0.0
    failed: int = 0
    failed_s: float = 0.0
    images: int = 0
    batches: float = 0.0
    last_ms: int = 0
    stages_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))


class Statistics:
    """Counts of one version; what is known of another one is forgotten. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = _Counts()

    def _of(self, version: str) -> _Counts:
        """The counts of a version; the lock must be held."""
        if self._counts.version != version:
            self._counts = _Counts(version)
        return self._counts

    def answer(self, version: str, call: Call, now: float) -> None:
        """A call was answered with a version's predictions."""
        infer_s = min(call.inference_s, now - call.started)  # parts may have run side by side
        with self._lock:
            counts = self._of(version)
            counts.answered += 1
            counts.answered_s += now - call.received
            counts.images += call.count
            # Its share of them: the same as their number where it had them for itself.
            counts.batches += call.count / call.batch_images
            counts.last_ms = time.time_ns() // 10**6
            counts.stages_s["compute_input"] += call.enqueued - call.received
            counts.stages_s["queue"] += call.started - call.enqueued
            counts.stages_s["compute_infer"] += infer_s
            counts.stages_s["compute_output"] += now - call.started - infer_s

    def fail(self, version: str, seconds: float) -> None:
        """A call ended otherwise, while a version was in service."""
        with self._lock:
            counts = self._of(version)
            counts.failed += 1
            counts.failed_s += seconds

    def message(self, ref: digits_pb2.ModelRef) -> inference_pb2.ModelStatistics:
        """The statistics so far."""
        with self._lock:
            counts = self._of(ref.version)
            stages = {
                stage: _duration(counts.answered, seconds)
                for stage, seconds in counts.stages_s.items()
            }
            return inference_pb2.ModelStatistics(
                name=ref.name,
                version=ref.version,
                last_inference=counts.last_ms,
                inference_count=counts.images,
                execution_count=round(counts.batches),
                inference_stats=inference_pb2.InferStatistics(
                    success=_duration(counts.answered, counts.answered_s),
                    fail=_duration(counts.failed, counts.failed_s),
                    **stages,
                ),
            )


def _duration(count: int, seconds: float) -> inference_pb2.StatisticDuration:
    return inference_pb2.StatisticDuration(count=count, ns=int(seconds * 1e9))
