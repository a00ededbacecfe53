"""From settings to parts: the only file that knows all of them."""

from __future__ import annotations

import logging
import resource
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from service import http2
from service.announce import announce
from service.config import ServerConfig, model_repository, wanted_releases
from service.host import memory
from service.host.addresses import socket_address
from service.host.cpu import cpu_quota
from service.oip.infer import MODEL_INFER, InferEdge
from service.oip.infer import SERVICE as OIP_SERVICE
from service.oip.servicer import Descriptions
from service.ops_http.server import HttpServer, Ops
from service.playground.describe import describe
from service.readiness import Readiness
from service.reloader import Reloader
from service.rpc import health, reflection
from service.rpc.call import Route, StreamRoute, Transport, TransportError, UnaryRoute
from service.rpc.classify import CLASSIFY, SERVICE, ClassifyEdge
from service.rpc.classify_stream import CLASSIFY_STREAM, MAX_STREAMS, STREAM_IDLE_S, StreamEdge
from service.rpc.get_model import (
    GET_MODEL,
    MAX_SMALL_MESSAGE_BYTES,
    SimpleMethod,
    answer_get_model,
)
from service.rpc.guard import Guard
from service.rpc.health import Health
from service.rpc.recorder import Recorder
from service.rpc.reflection import Reflection
from service.security.access import Access
from service.serving.batcher import Batcher
from service.serving.gate import Gate
from service.serving.loader import ModelLoader
from service.serving.model import ModelRunner, ServedModel
from service.serving.preparing import Preparer
from service.serving.request import IMAGE_BYTES
from service.telemetry.listener import Method, RpcListener
from service.telemetry.metrics import Metrics
from service.telemetry.request_log import RequestLog
from service.telemetry.samples import Listeners, Samples
from service.telemetry.tracing import Tracing
from service.watchdog import GOLDEN_INTERVAL_S, STALL_TIMEOUT_S, Report, Watchdog

if TYPE_CHECKING:
    from aiohttp.web import Application

logger = logging.getLogger(__name__)

# Room in a message beside the pixels of the largest request, and for files.
MESSAGE_SLACK_BYTES = 2**20
# Where the process may have more file descriptors than anybody needs: for Prometheus, a few probes
# and some browsers; for callers.
# Those of TLS take more memory: OpenSSL holds up to 64 KiB of each.
MAX_HTTP_CONNECTIONS, MAX_CONNECTIONS, MAX_TLS_CONNECTIONS = 256, 10_000, 4_096
# What one stream of images may send ahead: enough for a window of full batches.
STREAM_WINDOW_BYTES = 2**19
OIP_METHODS = {
    name: Method(OIP_SERVICE, name)
    for name in ("ServerLive", "ServerReady", "ModelReady", "ServerMetadata", "ModelMetadata")
} | {"ModelConfig": Method(OIP_SERVICE, "ModelConfig")}


def _share(most: int, part: int) -> int:
    """Connections that may take one in ``part`` file descriptors; files need some, too."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return min(most, descriptors // part)


class Parts:
    """Everything that a server is made of. Nothing of it runs yet, and no port is bound.

    Args:
        config: The settings.

    Raises:
        CredentialError: If a certificate, key or token file can not be used.
        SampleError: If samples can not be written.
        TracingError: If traces can not be sent.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self.slots = config.instances or cpu_quota()
        methods = [CLASSIFY, CLASSIFY_STREAM, GET_MODEL, MODEL_INFER, *OIP_METHODS.values()]
        self.metrics = Metrics(methods)
        self.tracing = Tracing(config.otlp_endpoint) if config.otlp_endpoint else None
        self._recorder = Recorder({m.path: m for m in methods}, self._listeners())
        self.access = Access(config, self.metrics)
        self.samples = None
        if config.sample_dir:
            folder = Path(config.sample_dir)
            self.samples = Samples(folder, config.sample_per_s, self.metrics.samples)
        self.gate = self._core()
        self.guard = Guard(
            self.access.tokens,
            self._recorder,
            self.metrics.dropped,
            lambda: self.gate.batcher.overload_s,
        )
        self.loader = self._loader()
        self.reloader = Reloader(self.loader, self.gate, self.metrics, config.reload_interval_s)
        self.health = Health()
        self.readiness = Readiness(self.gate, self.health)
        self.streams = StreamEdge(
            self.gate,
            self._recorder,
            max_streams=MAX_STREAMS,
            max_ahead_bytes=config.max_queue_images // 2 * IMAGE_BYTES,
            idle_s=STREAM_IDLE_S,
            is_admitted=self.guard.is_admitted,
        )
        self.reflection = Reflection(self._service_names()) if config.reflection else None
        self.metrics.watch_queue(self.gate.batcher, config.max_queue_images)
        self.metrics.watch_readiness(self.readiness.is_ready)
        self.metrics.transport(config.transport)

    def _listeners(self) -> list[RpcListener]:
        listeners: list[RpcListener] = [self.metrics]
        if self.tracing is not None:
            listeners.append(self.tracing)
        if self._config.request_log_per_s:
            listeners.append(RequestLog(self._config.request_log_per_s))
        return listeners

    def _core(self) -> Gate:
        config, runner = self._config, ModelRunner()
        batches = Listeners(self.metrics, self.samples) if self.samples else self.metrics
        batcher = Batcher(
            runner.run,
            slots=self.slots,
            max_batch_size=config.max_batch_size,
            max_queue_images=config.max_queue_images,
            listener=batches,
        )
        return Gate(
            batcher,
            runner,
            Preparer(self.metrics),
            max_images_per_request=config.max_images_per_request,
            rate_limit=self.access.rate_limit,
            listener=self.metrics,
        )

    def _loader(self) -> ModelLoader:
        config = self._config
        return ModelLoader(
            model_repository(config),
            wanted=wanted_releases(config),
            device=config.device,
            precision=config.precision,
            intra_op_threads=config.intra_op_threads,
            max_batch_size=config.max_batch_size,
            public_key=Path(config.model_public_key) if config.model_public_key else None,
            on_load=self.metrics.model_load,
        )

    def _service_names(self) -> list[str]:
        return [SERVICE, health.SERVICE, OIP_SERVICE]

    @property
    def _message_bytes(self) -> int:
        return self._config.max_images_per_request * IMAGE_BYTES + MESSAGE_SLACK_BYTES

    def _routes(self) -> dict[str, Route]:
        """What answers each method, by its path."""
        small = partial(UnaryRoute, max_message_bytes=MAX_SMALL_MESSAGE_BYTES)
        get_model = SimpleMethod(GET_MODEL, self._recorder, partial(answer_get_model, self.gate))
        classify = ClassifyEdge(self.gate, self._recorder)
        routes: dict[str, Route] = {
            CLASSIFY.path: UnaryRoute(classify.receive, self._message_bytes),
            CLASSIFY_STREAM.path: StreamRoute(
                self.streams.open, self._message_bytes, STREAM_WINDOW_BYTES
            ),
            GET_MODEL.path: small(get_model.receive),
            f"/{health.SERVICE}/Check": small(self.health.check),
            f"/{health.SERVICE}/Watch": StreamRoute(self.health.watch, MAX_SMALL_MESSAGE_BYTES),
        }
        if self.reflection is not None:
            route = StreamRoute(self.reflection.open, reflection.MAX_MESSAGE_BYTES)
            for name in reflection.SERVICES:
                routes[f"/{name}/{reflection.METHOD}"] = route
        return {**routes, **self._oip_routes()}

    def _oip_routes(self) -> dict[str, Route]:
        max_images = self._config.max_images_per_request
        infer = InferEdge(self.gate, self._recorder, max_images)
        # A pixel may be four bytes of typed contents, and no more than five on the wire.
        routes: dict[str, Route] = {
            MODEL_INFER.path: UnaryRoute(infer.receive, self._message_bytes)
        }
        descriptions = Descriptions(
            self.gate,
            max_images=max_images,
            is_live=self.readiness.is_alive,
            is_ready=self.readiness.is_ready,
        )
        for name, answer in descriptions.methods().items():
            method = OIP_METHODS[name]
            simple = SimpleMethod(method, self._recorder, answer)
            routes[method.path] = UnaryRoute(simple.receive, MAX_SMALL_MESSAGE_BYTES)
        return routes

    def listen(self) -> Transport:
        """The transport, bound to its port.

        Raises:
            TransportError: If the port can not be had.
        """
        config = self._config
        if config.transport == "grpcio":
            return self._grpcio()
        most = MAX_TLS_CONNECTIONS if config.tls_cert else MAX_CONNECTIONS
        limits = http2.Limits(
            connections=_share(most, 2),
            connection_age_s=config.max_connection_age_s,
            connection_grace_s=config.grace_s,
        )
        tls = self.access.tls.context if self.access.tls else None
        try:
            return http2.Server(
                config.host,
                config.grpc_port,
                self._routes(),
                hooks=self.guard,
                limits=limits,
                tls=tls,
            )
        except OSError as error:
            address = socket_address(config.host, config.grpc_port)
            raise TransportError(f"can not listen on {address}: {error.strerror}") from error

    def _grpcio(self) -> Transport:
        from service.rpc.grpcio import GrpcioLimits, GrpcioServer  # noqa: PLC0415 - seldom used

        config = self._config
        if config.host == "0.0.0.0":  # noqa: S104 - this does not listen
            logger.warning("--transport grpcio: gRPC listens on IPv6, too, where --host is 0.0.0.0")
        return GrpcioServer(
            socket_address(config.host, config.grpc_port),
            self._routes(),
            hooks=self.guard,
            limits=GrpcioLimits(
                message_bytes=self._message_bytes,
                connection_age_s=config.max_connection_age_s,
                connection_grace_s=config.grace_s,
            ),
            credentials=self.access.tls.server_credentials() if self.access.tls else None,
        )

    def announce(self, model: ServedModel, grpc_port: int, http_port: int, seconds: float) -> None:
        """Tells what is served, and everything that was decided."""
        announce(
            self._config,
            model,
            grpc_port=grpc_port,
            http_port=http_port,
            instances=self.slots,
            batch_images=self.gate.batcher.batch_images,
            access=self.access,
            seconds=seconds,
        )

    def watches(self) -> list[Coroutine[Any, Any, None]]:
        """What goes on at intervals while the server serves, on its event loop."""
        return [self.reloader.run(), self.access.watch(), self.streams.watch(), memory.watch()]

    def watchdog(self, transport: Transport, report: Report) -> Watchdog:
        """Keeps the process from reporting healthy while it can not answer."""
        return Watchdog(
            self.gate,
            lambda: [*self.gate.threads, *transport.threads],
            report,
            self.metrics,
            stall_timeout_s=STALL_TIMEOUT_S,
            golden_interval_s=GOLDEN_INTERVAL_S,
        )

    def listen_http(self) -> HttpServer:
        """The HTTP port, bound.

        Raises:
            TransportError: If it can not be had.
        """
        ops = Ops(
            registry=self.metrics.registry,
            is_ready=self.readiness.is_ready,
            is_alive=self.readiness.is_alive,
        )
        config, connections = self._config, _share(MAX_HTTP_CONNECTIONS, 8)
        return HttpServer(config.host, config.http_port, ops, self._add_playground, connections)

    def _add_playground(self, app: Application) -> None:

        from service.playground.app import Offer, add_playground  # noqa: PLC0415
        from service.playground.classify import REQUESTS_PER_S  # noqa: PLC0415

        config = self._config
        offer = Offer(
            is_ready=self.readiness.is_ready,
            describe=partial(describe, self.gate, config.transport),
            gate=self.gate if config.playground else None,
            refusal=self.guard.refusal if config.auth_token_file else None,
            count=self.metrics.http_request,
            is_draining=self.readiness.is_draining,
            requests_per_s=REQUESTS_PER_S,
        )
        add_playground(app, offer)
