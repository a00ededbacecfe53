"""What ModelInfer has done with the version in service, as Triton counts it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from digits.oip import inference_pb2
from digits.v1 import digits_pb2
from service.call import Call

STAGES = ("queue", "compute_input", "compute_infer", "compute_output")


@dataclass
class Statistics:
    """Counts of one version. Lives on the event loop.

    Attributes:
        version: Of the model; what is known of another one is forgotten.
    """

    version: str = ""
    answered: int = 0
    answered_s: float = 0.0
    failed: int = 0
    failed_s: float = 0.0
    images: int = 0
    batches: float = 0.0
    last_ms: int = 0
    stages_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    def answer(self, call: Call, now: float) -> None:
        """A call was answered with predictions."""
        self.answered += 1
        self.answered_s += now - call.received
        self.images += call.count
        # Its share of them: the same as their number where it had them for itself.
        self.batches += call.count / call.batch_images
        self.last_ms = time.time_ns() // 10**6
        infer_s = min(call.inference_s, now - call.started)  # parts may have run side by side
        self.stages_s["compute_input"] += call.enqueued - call.received
        self.stages_s["queue"] += call.started - call.enqueued
        self.stages_s["compute_infer"] += infer_s
        self.stages_s["compute_output"] += now - call.started - infer_s

    def fail(self, seconds: float) -> None:
        """A call ended otherwise."""
        self.failed += 1
        self.failed_s += seconds

    def message(self, ref: digits_pb2.ModelRef) -> inference_pb2.ModelStatistics:
        """The statistics so far."""
        stages = {
            stage: _duration(self.answered, seconds) for stage, seconds in self.stages_s.items()
        }
        return inference_pb2.ModelStatistics(
            name=ref.name,
            version=ref.version,
            last_inference=self.last_ms,
            inference_count=self.images,
            execution_count=round(self.batches),
            inference_stats=inference_pb2.InferStatistics(
                success=_duration(self.answered, self.answered_s),
                fail=_duration(self.failed, self.failed_s),
                **stages,
            ),
        )


def _duration(count: int, seconds: float) -> inference_pb2.StatisticDuration:
    return inference_pb2.StatisticDuration(count=count, ns=int(seconds * 1e9))
