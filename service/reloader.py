"""Another version of the model comes into service while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial

from service.artifact.format import ArtifactError, KeyFileError
from service.host import memory
from service.host.background import in_daemon_thread
from service.serving.engine import DeviceError
from service.serving.gate import Gate
from service.serving.loader import ModelLoader
from service.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

# Loading a version takes about a tenth of a second.
LOAD_TIMEOUT_S = 60.0


class Reloader:
    """Looks at the repository again and again. Whatever is wrong there, something serves.

    Args:
        loader: Knows which version should serve.
        gate: Serves it.
        metrics: Tell which one does.
        interval_s: Seconds between looks; 0 looks only when asked to.
    """

    def __init__(
        self, loader: ModelLoader, gate: Gate, metrics: Metrics, interval_s: float
    ) -> None:
        self._loader = loader
        self._gate = gate
        self._metrics = metrics
        self._interval_s = interval_s
        self._asked = asyncio.Event()

    def look_now(self) -> None:
        """Looks at once, at versions that were refused, too."""
        self._asked.set()

    async def run(self) -> None:
        """Serves what the repository says, until cancelled."""
        said = ""
        while True:
            await self._until_next_look()
            try:
                if await self._serve_other():
                    await in_daemon_thread(memory.give_back)
            except (ArtifactError, DeviceError, KeyFileError) as error:
                if str(error) != said:  # not again at every look
                    logger.error("reload failed: %s; still serving the current version", error)
                said = str(error)
                continue
            except Exception:  # ending here would end every later reload
                logger.exception("reload failed; this is a bug")
                continue
            said = ""

    async def _serve_other(self) -> bool:
        """Serves another version if there should be one; True if so.

        The old one is let go once the batches that it is in have run.

        Raises:
            ArtifactError: If the repository can not be read.
            DeviceError: If the device can not serve.
            KeyFileError: If the key for signatures can not be used.
        """
        loading = in_daemon_thread(partial(self._loader.load_other_than, self._gate.model))
        try:
            await asyncio.wait({loading}, timeout=LOAD_TIMEOUT_S)
            if not loading.done():  # a thread can not be ended; what hangs must be removed
                logger.error(
                    "reload: not done after %g s: a version or storage hangs", LOAD_TIMEOUT_S
                )
            model = await loading
        finally:
            del loading  # an error that it holds leads back to this frame, and to the old model
        if model is None:
            return False
        self._gate.serve(model)
        self._metrics.serving(model)
        fields = {"version": model.version, "sha256": model.sha256}
        logger.info("now serving another version", extra={"fields": fields})
        return True

    async def _until_next_look(self) -> None:
        """Waits for the interval, or until asked."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._asked.wait(), self._interval_s or None)
            self._asked.clear()
            self._loader.forget_refusals()
