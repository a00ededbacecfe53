"""Notices an engine that is stuck, or that no longer answers as it did when it was exported."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from service.artifact.errors import ArtifactError

if TYPE_CHECKING:
    from service.serving.gate import Gate
    from service.serving.model import ServedModel
    from service.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

# An inference takes milliseconds; one that takes this long does not return.
STALL_TIMEOUT_S = 10.0
# Between two runs of the golden digits, which take a few milliseconds of one core.
GOLDEN_INTERVAL_S = 60.0
# Looks per stall timeout, and seconds between them at most.
LOOKS_PER_TIMEOUT = 4
MAX_PERIOD_S = 1.0


class Report(Protocol):
    """Takes what a watchdog found."""

    def __call__(self, trouble: str, *, stuck: bool) -> None:
        """New trouble, or an empty string at its end; whether an inference is ``stuck``."""


class Watchdog:
    """Watches the engine in service, on a thread of its own: the event loop may be what is stuck.

    Three things are trouble: an inference that does not return, a thread of ours that has died, and
    golden digits that are no longer answered as the artifact says.

    Args:
        gate: What serves; a model must be in service.
        threads: Tells the threads that must be alive.
        report: Called from the thread.
        metrics: Told of stalls and golden checks.
        stall_timeout_s: An inference that takes longer is stuck.
        golden_interval_s: Seconds between two checks of the golden digits.
    """

    def __init__(
        self,
        gate: Gate,
        threads: Callable[[], Iterable[threading.Thread]],
        report: Report,
        metrics: Metrics,
        *,
        stall_timeout_s: float,
        golden_interval_s: float,
    ) -> None:
        self._gate = gate
        self._threads = threads
        self._report = report
        self._metrics = metrics
        self._stall_timeout_s = stall_timeout_s
        self._said = ""
        self._stopped = threading.Event()
        self._golden = GoldenCheck(gate, metrics, golden_interval_s)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Reports nothing from here on."""
        self._stopped.set()
        self._thread.join()  # it blocks on nothing

    def _watch(self) -> None:
        while not self._stopped.wait(min(MAX_PERIOD_S, self._stall_timeout_s / LOOKS_PER_TIMEOUT)):
            try:
                self._look()
            except Exception:  # such as no thread for a check; the next one may work
                logger.exception("a check of the watchdog failed")

    def _look(self) -> None:
        stuck = self._stuck()
        self._metrics.engine_stalled(bool(stuck))
        trouble = stuck or self._dead() or self._golden.wrong
        if trouble != self._said:
            self._said = trouble
            self._report(trouble, stuck=bool(stuck))
        self._golden.follow()

    def _stuck(self) -> str:
        began = min(self._gate.batcher.oldest_inference_began, self._golden.running_since)
        if time.monotonic() - began <= self._stall_timeout_s:
            return ""
        return f"an inference has not returned within {self._stall_timeout_s:g} s"

    def _dead(self) -> str:
        dead = [thread.name for thread in self._threads() if not thread.is_alive()]
        return f"thread {dead[0]} has died; this is a bug" if dead else ""


class GoldenCheck:
    """Runs the golden digits on the engine in service from time to time.

    Each check has a thread of its own, because it may not come back.

    Args:
        gate: What serves.
        metrics: Counts the checks.
        interval_s: Seconds between two checks; 0 for none.

    Attributes:
        wrong: What the last check that ended found; empty if all was well.
    """

    def __init__(self, gate: Gate, metrics: Metrics, interval_s: float) -> None:
        self._gate = gate
        self._metrics = metrics
        self._interval_s = interval_s
        self._began = time.monotonic()
        self._checked = ""  # version of the model that was checked last
        self._thread: threading.Thread | None = None
        self.wrong = ""

    @property
    def running_since(self) -> float:
        """Monotonic seconds at which the check that runs began; infinity if none does."""
        running = self._thread is not None and self._thread.is_alive()
        return self._began if running else float("inf")

    def follow(self) -> None:
        """Begins a check if one is due and none runs."""
        model = self._gate.model
        # What another model got wrong says nothing of the one that took its place.
        if model is None or not self._interval_s or self.running_since < float("inf"):
            return
        exchanged = bool(self.wrong) and model.version != self._checked
        if not exchanged and time.monotonic() < self._began + self._interval_s:
            return
        self._checked, self._began = model.version, time.monotonic()
        self._thread = threading.Thread(
            target=self._check, args=(model,), name="golden-check", daemon=True
        )
        self._thread.start()

    def _check(self, model: ServedModel) -> None:
        golden = model.artifact.golden
        try:
            golden.check(*model.engine.answer(golden.images), model.precision)
        except ArtifactError as error:
            logger.error("golden check failed: %s", error)
        except Exception:  # onnxruntime raises many types
            logger.exception("golden check failed: the engine raised an error")
        else:
            self.wrong = ""
            self._metrics.golden_check(passed=True)
            return
        self.wrong = "the model no longer answers its golden digits as it should"
        self._metrics.golden_check(passed=False)
