"""The server's life, in reading order: listen, load, serve, drain.

Start here. ``Server`` wires the parts together and owns the order in which they start and stop;
service/classify.py is where a call goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from service import oip
from service.announce import announce
from service.artifact import ArtifactError, KeyFileError
from service.background import in_daemon_thread
from service.batcher import Batcher
from service.call import RpcListener
from service.classify import Classify
from service.config import ServerConfig
from service.cpu import cpu_quota
from service.engine import DeviceError
from service.http import HttpServer, Offer
from service.http.describe import describe
from service.metrics import SERVICE, Metrics
from service.model import ModelLoader, ServedModel
from service.oip.servicer import InferenceService
from service.private_folder import SOCKET, private_folder, remove
from service.reload import Reloader
from service.request_log import RequestLog
from service.security.access import Access
from service.security.rotation import CredentialError
from service.servicers import DigitClassifier
from service.standard import NOT_SERVING, SERVING, Health, Reflection, add_channelz
from service.tracing import Tracing, TracingError
from service.transports import (
    CLASSIFY,
    TransportError,
    choose_transport,
    grpcio,
    limits_of,
    socket_address,
)
from service.transports.arrivals import Arrivals, BoundedServer
from service.watchdog import Watchdog

if TYPE_CHECKING:
    from service.transports.native import NativeTransport, Route

logger = logging.getLogger(__name__)

# HTTP answers NOT_SERVING while a model takes longer than this to load.
QUICK_LOAD_S = 1.0
# What connections get to send their last bytes when the grace is over.
FLUSH_S = 0.2
LIVENESS, READINESS = "", SERVICE

T = TypeVar("T")


class Server:
    """One server process. Made and run on its event loop.

    Args:
        config: The settings.
        started: Monotonic seconds at which the process began, for the time to SERVING.

    Raises:
        CredentialError: If a certificate, key or token file can not be used.
        TransportError: If the transport can not be had.
    """

    def __init__(self, config: ServerConfig, started: float) -> None:
        self._config = config
        self._started = started
        self._instances = config.instances or cpu_quota()
        self._stop = asyncio.Event()
        self._serving = asyncio.Event()
        self._metrics = Metrics(
            triton_names=config.triton_metric_names,
            services={oip.SERVICE: oip.METHODS} if config.oip else {},
        )
        self._tracing = Tracing(config.otlp_endpoint) if config.otlp_endpoint else None
        self._listeners: list[RpcListener] = [self._tracing] if self._tracing else []
        if config.request_log_per_s:
            self._listeners.append(RequestLog(config.request_log_per_s))
        self._access = Access(config, self._metrics)
        self._loader = ModelLoader(
            Path(config.model_repository),
            pinned=config.model_version,
            device=config.device,
            intra_op_threads=config.intra_op_threads,
            max_batch_size=config.max_batch_size,
            public_key=Path(config.model_public_key) if config.model_public_key else None,
            metrics=self._metrics,
        )
        self._classify = Classify(
            partial(
                Batcher,
                slots=self._instances,
                max_batch_size=config.max_batch_size,
                max_queue_images=config.max_queue_images,
                max_queue_delay_s=config.max_queue_delay_ms / 1000,
            ),
            max_images_per_request=config.max_images_per_request,
            metrics=self._metrics,
            listeners=self._listeners,
            rate_limit=self._access.rate_limit,
        )
        self._reloader = Reloader(
            self._loader, self._classify, self._metrics, config.reload_interval_s
        )
        self._metrics.watch_queue(self._classify.batcher, config.max_queue_images)
        self._metrics.watch_readiness(self._is_ready)
        self._guard = self._access.guard(self._classify, self._listeners)
        self._receive = self._guard.receive if self._guard else self._classify.receive
        self._servicer = DigitClassifier(
            self._classify,
            self._metrics,
            self._listeners,
            max_ahead_images=config.max_queue_images // 2,
            max_streams=config.max_streams,
            idle_s=config.stream_idle_s,
            guard=self._guard,
        )
        self._inference = self._open_inference() if config.oip else None
        self._health = Health()
        self._reflection: Reflection | None = None
        self._alive = True
        self._transport, self._transport_reason = choose_transport(config)
        self._metrics.transport(self._transport)
        self._native: NativeTransport | None = None
        self._private: Path | None = None
        self._limits = limits_of(config)

    async def run(self) -> int:
        """Serves until a signal; returns the exit code.

        Raises:
            TransportError: If a port can not be had.
            ArtifactError: If no model version holds.
            DeviceError: If the device can not serve.
            KeyFileError: If the key for signatures can not be used.
        """
        self._handle_signals()
        with private_folder() if self._transport == "native" else nullcontext() as private:
            self._private = private
            await self._listen()
            http = asyncio.create_task(self._start_http())
            if not await self._serve_first():
                logger.info("stopped while loading")
                return 0
            await http
            watching = [
                asyncio.create_task(watch) for watch in (self._reloader.run(), self._access.watch())
            ]
            watchdog = self._watchdog()
            watchdog.start()
            await self._stop.wait()
            for task in watching:
                task.cancel()
            watchdog.stop()
            return await self._drain()

    async def _serve_first(self) -> bool:
        """Loads a model and serves it; False if a signal came before."""
        model = await self._unless_stopped(in_daemon_thread(self._loader.load))
        if model is None:
            return False
        self._serve(model)
        return True

    def _open_inference(self) -> InferenceService:
        return InferenceService(
            self._classify,
            self._receive,
            self._metrics,
            self._listeners,
            max_images=self._config.max_images_per_request,
            max_queue_delay_ms=self._config.max_queue_delay_ms,
            is_live=lambda: self._alive,
            is_ready=self._is_ready,
        )

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        loop.add_signal_handler(signal.SIGHUP, self._reloader.look_now)

    def _on_signal(self, number: int) -> None:
        if self._stop.is_set():
            logger.warning("second signal: stopping now")
            if self._private is not None:
                remove(self._private)
            os._exit(128 + number)
        logger.info("%s: draining", signal.Signals(number).name)
        self._stop.set()

    async def _listen(self) -> None:
        """Opens every port; health says NOT_SERVING and calls are refused until a model serves."""
        config = self._config
        guards = [self._guard] if self._guard else []
        self._server = grpcio.make_server(
            self._limits, private=self._transport == "native", interceptors=guards
        )
        address = socket_address(config.host, config.grpc_port)
        if self._private is not None:
            from service.transports.native import NativeTransport  # noqa: PLC0415 - may be absent

            self._native = NativeTransport(
                config.host,
                config.grpc_port,
                fallback=str(self._private / SOCKET),
                routes=self._native_routes(),
                refuse=self._classify.fail,
                limits=self._limits,
            )
            self.grpc_port = self._native.port
            grpcio.bind(self._server, f"unix:{self._private / SOCKET}")
        else:
            tls = self._access.tls
            credentials = tls.server_credentials() if tls else None
            self.grpc_port = grpcio.bind(self._server, address, credentials)
        http_host = config.http_host or config.host
        self._http = HttpServer(http_host, config.http_port, self._http_offer())
        self._add_services()
        self._health.set(LIVENESS, SERVING)
        self._health.set(READINESS, NOT_SERVING)
        await self._server.start()
        self._classify.start()
        if self._native is not None:
            self._native.start()

    def _native_routes(self) -> list[Route]:
        """The methods that the native front answers itself."""
        from service.oip.native import NativeInference  # noqa: PLC0415 - needs pygrpc-native
        from service.transports.native import NativeCall, Route  # noqa: PLC0415

        admit = self._guard.admit if self._guard else list
        classify = self._classify.receive
        routes = [Route(CLASSIFY, NativeCall, self._metrics.started, admit, classify)]
        if self._inference is not None:
            inference = NativeInference(
                self._classify,
                reader=self._inference.reader,
                statistics=self._inference.statistics,
                metrics=self._metrics,
                listeners=self._listeners,
            )
            routes.append(inference.route(admit))
        return routes

    async def _start_http(self) -> None:
        """Starts HTTP once a model serves, or loads slowly: its import would slow a quick load."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._serving.wait(), QUICK_LOAD_S)
        await self._http.start()

    def _http_offer(self) -> Offer:
        config = self._config
        return Offer(
            registry=self._metrics.registry,
            is_ready=self._is_ready,
            is_alive=lambda: self._alive,
            describe=partial(
                describe, self._classify, f"{self._transport} ({self._transport_reason})"
            ),
            classify=self._receive if config.classifies_over_http else None,
            refusal=self._guard.refusal if self._guard else None,
            count=self._metrics.http_request,
            requests_per_s=config.http_classify_rate,
            playground=config.playground,
        )

    def _add_services(self) -> None:
        handlers = self._servicer.handlers()
        if self._transport == "grpcio":
            handler = grpcio.ClassifyHandler(self._receive, self._metrics)
            handlers["Classify"] = handler.method_handler
        limits = self._limits
        arrivals = Arrivals(limits.arriving, limits.arrival_s, limits.young_s)
        server = BoundedServer(self._server, arrivals)
        service = grpc.method_handlers_generic_handler(SERVICE, handlers)
        server.add_generic_rpc_handlers((service,))
        names = [SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME]
        if self._inference is not None:
            inference = self._inference.handlers()
            service = grpc.method_handlers_generic_handler(oip.SERVICE, inference)
            server.add_generic_rpc_handlers((service,))
            names.append(oip.SERVICE)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if self._config.channelz:
            names.append(add_channelz(server))
        if self._config.reflection:
            self._reflection = Reflection(names)
            reflection_pb2_grpc.add_ServerReflectionServicer_to_server(self._reflection, server)

    def _serve(self, model: ServedModel) -> None:
        self._classify.serve(model)
        self._classify.open()
        self._metrics.serving(model)
        self._health.set(READINESS, SERVING)
        announce(
            self._config,
            model,
            grpc_port=self.grpc_port,
            http_port=self._http.port,
            instances=self._instances,
            transport=f"{self._transport} ({self._transport_reason})",
            access=self._access,
            seconds=time.monotonic() - self._started,
        )
        self._serving.set()

    def _watchdog(self) -> Watchdog:
        """Keeps the process from looking healthy while it can not answer."""
        loop = asyncio.get_running_loop()

        def report(trouble: str, *, stuck: bool) -> None:
            self._on_trouble(trouble)
            if stuck and self._native is not None:
                self._native.relieve()
            loop.call_soon_threadsafe(self._set_health, not trouble)

        return Watchdog(
            self._classify,
            self._threads,
            report,
            self._metrics,
            stall_timeout_s=self._config.stall_timeout_s,
            golden_interval_s=self._config.golden_interval_s,
        )

    def _threads(self) -> list[threading.Thread]:
        return [*self._classify.threads, *([self._native.thread] if self._native else [])]

    def _on_trouble(self, trouble: str) -> None:
        """Refuses calls while there is trouble. Called from the watchdog's thread."""
        if not trouble:
            logger.info("serving again")
            self._classify.open()
            return
        logger.error("not serving: %s", trouble)
        self._classify.close("the server is in trouble; its log says why")

    def _set_health(self, healthy: bool) -> None:
        if self._stop.is_set():  # draining: what it said stands
            return
        self._alive = healthy
        for service in (LIVENESS, READINESS):
            self._health.set(service, SERVING if healthy else NOT_SERVING)

    def _is_ready(self) -> bool:
        return self._classify.is_open and not self._stop.is_set()

    async def _drain(self) -> int:
        """Leaves the balancer first, then finishes what is in flight. 0 if nothing was lost."""
        self._health.set(READINESS, NOT_SERVING)
        await asyncio.sleep(self._config.drain_delay_s)
        self._classify.close("the server is shutting down")
        self._servicer.close()
        self._health.close()
        if self._reflection is not None:
            self._reflection.close()
        give_up = time.monotonic() + self._config.grace_s
        answered = await in_daemon_thread(partial(self._classify.stop, self._config.grace_s))
        streams = await self._servicer.finished(max(0.0, give_up - time.monotonic()))
        if self._inference is not None:
            streams &= await self._inference.finished(max(0.0, give_up - time.monotonic()))
        sent = self._native is None or await self._native.finished(give_up - time.monotonic())
        # Waits for what grpcio itself has not sent yet, then ends what is left.
        await self._server.stop(max(FLUSH_S, give_up - time.monotonic()))
        await self._http.close()
        if self._native is not None:
            self._native.close()
        if self._tracing is not None:
            await self._tracing.flush()
        if not (answered and streams and sent):
            logger.error("calls were still in flight after %g s of grace", self._config.grace_s)
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
    """Runs a server on uvloop where that is installed; returns the exit code."""
    try:
        import uvloop  # noqa: PLC0415 - may be absent
    except ImportError:
        loop_factory = None
    else:
        loop_factory = uvloop.new_event_loop

    async def main() -> int:
        return await Server(config, started).run()

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        try:
            return runner.run(main())
        except CredentialError as error:
            logger.error("can not serve: %s", error)
            return 2  # as for other settings that are wrong
        except (TransportError, ArtifactError, DeviceError, KeyFileError, TracingError) as error:
            logger.error("can not serve: %s", error)
            return 1
