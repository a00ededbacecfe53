"""Which addresses the clients reach through a proxy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from digits.client import DigitError
from digits.target import is_loopback, proxy_of
from tests.digits.faults import (
    CLIENTS,
    Servicer,
)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a machine with a proxy, which is down."""
    for name in ("grpc_proxy", "https_proxy", "no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://anna:secret@127.0.0.1:1")


@CLIENTS
@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize("form", ["127.0.0.1:{}", "localhost:{}", "dns:///localhost:{}"])
def test_loopback_is_not_proxied(serve: Callable[..., Any], classify: Any, form: str) -> None:
    address = form.format(serve(Servicer()).rpartition(":")[2])
    assert classify(address).digits == [5]


@CLIENTS
@pytest.mark.usefixtures("proxy")
def test_error_names_the_proxy_without_its_credentials(classify: Any) -> None:
    with pytest.raises(DigitError) as caught:
        classify("digits.example:50051")
    assert "(digits.example:50051 through proxy http://127.0.0.1:1: " in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.usefixtures("proxy")
@pytest.mark.parametrize(
    ("address", "no_proxy", "proxied"),
    [
        ("digits.example:1", "", True),
        ("digits.example:1", "other.example", True),
        ("digits.example:1", "other.example, example", False),
        ("digits.example:1", "DIGITS.example", False),
        ("dns:///digits.example:1", ".example", False),
        ("192.0.2.1:1", "192.0.2.0/24", False),
        ("192.0.2.1:1", "198.51.100.0/24", True),
        ("[2001:db8::1]:1", "2001:db8::/32", False),
        ("unix:/run/socket", "", False),
    ],
)
def test_no_proxy_is_read_as_grpc_reads_it(
    monkeypatch: pytest.MonkeyPatch, address: str, no_proxy: str, proxied: bool
) -> None:
    monkeypatch.setenv("no_proxy", no_proxy)
    assert proxy_of(address) == ("http://127.0.0.1:1" if proxied else None)


@pytest.mark.parametrize(
    ("address", "loopback"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.10:1", True),
        ("[::1]:1", True),
        ("::1", True),
        ("0.0.0.0:1", True),
        ("LocalHost:1", True),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", True),
        ("ipv4:127.0.0.1:1,192.0.2.1:1", False),
        ("localhost.example:1", False),
        ("10.0.0.1:1", False),
    ],
)
def test_loopback_is_told_from_the_address(address: str, loopback: bool) -> None:
    assert is_loopback(address) is loopback
