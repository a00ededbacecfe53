"""Servers that stop and come back behind Envoy, with health checks, under load: no call fails."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from digits.client import DigitClient
from tests.calls import TRANSPORTS
from tests.conftest import ROOT, RunningServer, wait_until
from tests.service.envoy import CHECK_INTERVAL_S, CHECK_TIMEOUT_S, TEMPLATE, Envoy, envoy_program
from tests.service.load import Load

pytestmark = pytest.mark.full

# What the template asks for: until Envoy has seen NOT_SERVING, and a little for it to act on it.
ENOUGH_DELAY_S = CHECK_INTERVAL_S + CHECK_TIMEOUT_S + 0.25


@pytest.fixture
def behind_envoy(
    tmp_path: Path, start_server: Callable[..., RunningServer], sample: dict[str, np.ndarray]
) -> Iterator[Callable[..., tuple[list[Any], Envoy, Any]]]:
    """Two servers, Envoy in front of them, and load on it."""
    envoy_program()
    with contextlib.ExitStack() as stack:

        def start(*flags: str) -> tuple[list[Any], Envoy, Any]:
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
    behind_envoy: Callable[..., tuple[list[Any], Envoy, Any]],
    start_server: Callable[..., RunningServer],
    transport: str,
) -> None:
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
def test_without_a_drain_delay_the_same_load_sees_failures(
    behind_envoy: Callable[..., tuple[list[Any], Envoy, Any]], transport: str
) -> None:
    """Or the test above would prove nothing."""
    (first, _), envoy, load = behind_envoy(f"--transport={transport}", "--drain-delay-s=0")
    load.wait_for(50)
    first.process.terminate()
    wait_until(lambda: envoy.healthy() == 1)
    load.wait_for(50)
    assert load.failures
    # What our client resumes did not fail even so.
    assert {failure.split(":")[0] for failure in load.failures} <= {"unary", "stream"}


def test_template_is_valid_as_it_is(tmp_path: Path) -> None:
    command = [envoy_program(), "--mode", "validate", "-c", TEMPLATE, "--use-dynamic-base-id"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr


def test_template_and_the_manifests_agree_on_the_drain_delay() -> None:
    (cluster,) = yaml.safe_load(TEMPLATE.read_text())["static_resources"]["clusters"]
    (check,) = cluster["health_checks"]
    seen_s = sum(float(check[name].removesuffix("s")) for name in ("interval", "timeout"))
    (generator,) = yaml.safe_load((ROOT / "deploy/base/kustomization.yaml").read_text())[
        "configMapGenerator"
    ]
    variables = dict(literal.split("=", 1) for literal in generator["literals"])
    assert float(variables["DIGITS_DRAIN_DELAY_S"]) > seen_s
