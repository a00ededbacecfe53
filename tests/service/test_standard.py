"""Health and reflection: a caller that does not read or leave holds nothing up."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from service.rpc.classify import SERVICE
from tests.attacks.attacks import unread_watch
from tests.calls import TRANSPORTS
from tests.conftest import RunningServer, wait_until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@TRANSPORTS
def test_watcher_that_reads_nothing_does_not_hold_up_readiness_or_the_drain(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}", "--drain-delay-s=1", "--grace-s=1")
    with (
        unread_watch(server.address, SERVICE),
        unread_watch(server.address, ""),
        grpc.insecure_channel(server.address) as channel,
    ):
        health = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=SERVICE)
        assert health.Check(request, timeout=20).status == SERVING
        stopping = time.monotonic()
        server.process.terminate()
        wait_until(lambda: health.Check(request, timeout=20).status == NOT_SERVING)
        assert server.process.wait(30) == 0
        # grpcio itself ends such a connection after twenty seconds.
        assert time.monotonic() - stopping < 15


@TRANSPORTS
def test_watch_tells_every_change(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}", "--drain-delay-s=0.5")
    with grpc.insecure_channel(server.address) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service=SERVICE), timeout=30
        )
        unknown = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(service="nobody"), timeout=30
        )
        assert next(watch).status == SERVING
        assert next(unknown).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        server.process.terminate()
        assert next(watch).status == NOT_SERVING
        with pytest.raises(grpc.RpcError) as error:
            next(watch)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE
        unknown.cancel()
    assert server.process.wait(30) == 0


def test_check_of_a_service_that_is_not_known_is_not_found(channel: grpc.Channel) -> None:
    with pytest.raises(grpc.RpcError) as error:
        health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="nobody"), timeout=20
        )
    assert error.value.code() == grpc.StatusCode.NOT_FOUND


@TRANSPORTS
def test_reflection_stream_that_stays_open_does_not_delay_the_drain(
    start_server: Callable[..., RunningServer], transport: str
) -> None:
    server = start_server(f"--transport={transport}", "--grace-s=60")
    left = threading.Event()

    def questions() -> Iterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        left.wait(60)

    with grpc.insecure_channel(server.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        answers = stub.ServerReflectionInfo(questions())
        names = {service.name for service in next(answers).list_services_response.service}
        assert SERVICE in names
        stopping = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - stopping < 20
        left.set()
        with contextlib.suppress(grpc.RpcError):
            list(answers)
