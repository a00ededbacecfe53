"""Takes over another release of the model while the server runs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from functools import partial

from service.artifact.errors import ArtifactError, KeyFileError
from service.host import memory
from service.host.background import in_daemon_thread
from service.serving.engine import DeviceError
from service.serving.gate import Gate
from service.serving.loader import ModelLoader
from service.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

# Loading a release takes about a tenth of a second. It is given up after a minute for each variant,
# unless its storage does not answer.
TELL_EVERY_S = 180.0


class Reloader:
    """Polls the repository. Whatever is wrong there, the release in service goes on serving.

    Args:
        loader: Knows which release should serve.
        gate: Serves it.
        metrics: Export which one does.
        interval_s: Seconds between polls; 0 polls only when asked to.
    """

    def __init__(
        self, loader: ModelLoader, gate: Gate, metrics: Metrics, interval_s: float
    ) -> None:
        self._loader = loader
        self._gate = gate
        self._metrics = metrics
        self._interval_s = interval_s
        self._asked = asyncio.Event()

    def poll_now(self) -> None:
        """Polls at once, and tries rejected releases again."""
        self._asked.set()

    async def run(self) -> None:
        """Serves what the repository says, until cancelled."""
        said = ""
        while True:
            await self._until_next_poll()
            try:
                if await self._serve_other():
                    await in_daemon_thread(memory.give_back)
            except (ArtifactError, DeviceError, KeyFileError) as error:
                if str(error) != said:  # not again at every poll
                    logger.error("reload failed: %s; still serving the current release", error)
                said = str(error)
                continue
            except Exception:  # ending here would end every later reload
                logger.exception("reload failed; this is a bug")
                continue
            said = ""

    async def _serve_other(self) -> bool:
        """Serves another release if there should be one; True if so.

        The old one is freed once its batches have run.

        Raises:
            ArtifactError: If the repository can not be read.
            DeviceError: If the device can not serve.
            KeyFileError: If the key for signatures can not be used.
        """
        loading = in_daemon_thread(partial(self._loader.load_other_than, self._gate.model))
        try:
            await asyncio.wait({loading}, timeout=TELL_EVERY_S)
            while not loading.done():
                logger.error("reload: not done after another %g s: storage hangs", TELL_EVERY_S)
                await asyncio.wait({loading}, timeout=TELL_EVERY_S)
            model = await loading
        finally:
            del loading  # an error that it holds leads back to this frame, and to the old model
        if model is None:
            return False
        self._gate.serve(model)
        self._metrics.serving(model)
        fields = {
            "version": model.version, "precision": model.precision, "sha256": model.sha256,
        }  # fmt: skip
        logger.info("now serving another release", extra={"fields": fields})
        return True

    async def _until_next_poll(self) -> None:
        """Waits for the interval, or until asked."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._asked.wait(), self._interval_s or None)
            self._asked.clear()
            self._loader.forget_refusals()
