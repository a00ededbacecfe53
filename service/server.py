"""The server's life, in reading order: listen, load, serve, drain.

Start here. ``assembly.py`` makes the parts; ``rpc/classify.py`` is where a call goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from functools import partial
from typing import Any, TypeVar

from service.artifact.errors import ArtifactError, KeyFileError
from service.assembly import Parts
from service.config import ServerConfig
from service.host.background import in_daemon_thread
from service.rpc.call import Transport, TransportError
from service.security.rotation import CredentialError
from service.serving.engine import DeviceError
from service.serving.model import ServedModel
from service.telemetry.logs import finish_logs
from service.telemetry.samples import SampleError
from service.telemetry.tracing import TracingError
from service.watchdog import Watchdog

logger = logging.getLogger(__name__)

# HTTP answers NOT_SERVING while a model takes longer than this to load.
QUICK_LOAD_S = 1.0
# For threads with nothing left to do to end.
STOP_S = 1.0

T = TypeVar("T")


class DigitsServer:
    """One server process. Made and run on its event loop, which RPCs do not touch.

    Args:
        config: The settings.
        started: Monotonic seconds at which the process began, for the time to SERVING.

    Raises:
        CredentialError, SampleError, TracingError: If a file or collector can not be used.
    """

    def __init__(self, config: ServerConfig, started: float) -> None:
        self._config = config
        self._started = started
        self._stop = asyncio.Event()
        self._serving = asyncio.Event()
        self._parts = Parts(config)

    async def run(self) -> int:
        """Serves until a signal; returns the exit code.

        Raises:
            TransportError: If a port can not be had.
            ArtifactError: If no release is valid.
            DeviceError: If the device can not serve.
            KeyFileError: If the key for signatures can not be used.
        """
        parts = self._parts
        self._handle_signals()
        transport = self._listen()
        self.grpc_port = transport.port
        http = asyncio.create_task(self._start_http())
        if not await self._serve_first(transport):
            logger.info("stopped while loading")
            return 0
        await http
        watching = [asyncio.create_task(each) for each in parts.watches()]
        watchdog = self._start_watchdog(transport)
        await self._stop.wait()
        for task in watching:
            task.cancel()
        watchdog.stop()
        return await self._drain(transport)

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._parts.reloader.poll_now)

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            logger.warning("second signal: stopping now")
            finish_logs()
            os._exit(128 + number)
        logger.info("%s: draining", signal.Signals(number).name)
        self._parts.readiness.leave()
        self._stop.set()

    def _listen(self) -> Transport:
        """Opens every port; health says NOT_SERVING and calls are refused until a model serves."""
        parts = self._parts
        transport = parts.listen()
        self._http = parts.listen_http()
        parts.readiness.load()
        parts.gate.start()
        transport.start()
        return transport

    async def _start_http(self) -> None:
        """Starts HTTP once a model serves, or loads slowly: its import would slow a quick load."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._serving.wait(), QUICK_LOAD_S)
        await self._http.start()

    async def _serve_first(self, transport: Transport) -> bool:
        """Loads a model and serves it; False if a signal came before."""
        model = await self._unless_stopped(in_daemon_thread(self._parts.loader.load))
        if model is None:
            return False
        self._serve(model, transport)
        return True

    def _serve(self, model: ServedModel, transport: Transport) -> None:
        parts = self._parts
        parts.gate.serve(model)
        parts.metrics.serving(model)
        parts.readiness.serve()
        seconds = time.monotonic() - self._started
        parts.announce(model, transport.port, self._http.port, seconds)
        self._serving.set()

    def _start_watchdog(self, transport: Transport) -> Watchdog:
        loop = asyncio.get_running_loop()
        readiness = self._parts.readiness

        def report(trouble: str, *, stuck: bool) -> None:
            readiness.block(trouble)
            if stuck:
                transport.relieve()
            loop.call_soon_threadsafe(partial(readiness.tell, healthy=not trouble))

        watchdog = self._parts.watchdog(transport, report)
        watchdog.start()
        return watchdog

    async def _drain(self, transport: Transport) -> int:
        """Leaves the balancer first, then finishes what is in flight. 0 if nothing was lost."""
        parts, grace_s = self._parts, self._config.grace_s
        await asyncio.sleep(self._config.drain_delay_s)
        parts.readiness.drain()
        give_up = time.monotonic() + grace_s
        parts.streams.close()
        parts.health.close()
        if parts.reflection is not None:
            parts.reflection.close()
        sent = await in_daemon_thread(partial(transport.drain, grace_s))
        transport.close()
        parts.gate.close("the server is shutting down")
        left_s = max(STOP_S, give_up - time.monotonic())
        answered = await in_daemon_thread(partial(parts.gate.stop, left_s))
        await self._http.close()
        if parts.samples is not None:
            await in_daemon_thread(parts.samples.close)
        if parts.tracing is not None:
            await parts.tracing.flush()
        if not (answered and sent):
            logger.error("calls were still in flight after %g s of grace", grace_s)
            return 1
        logger.info("drained: every call was answered")
        return 0

    async def _unless_stopped(self, work: asyncio.Future[T]) -> T | None:
        """The work's result, or None if a signal came first."""
        stopped = asyncio.create_task(self._stop.wait())
        either: set[asyncio.Future[Any]] = {work, stopped}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            return None
        stopped.cancel()
        return work.result()


def serve(config: ServerConfig, started: float) -> int:
    """Runs a server; returns the exit code."""

    async def main() -> int:
        return await DigitsServer(config, started).run()

    try:
        return asyncio.run(main())
    except (CredentialError, SampleError) as error:
        logger.error("can not serve: %s", error)
        return 2  # as for other settings that are wrong
    except (TransportError, ArtifactError, DeviceError, KeyFileError, TracingError) as error:
        logger.error("can not serve: %s", error)
        return 1
