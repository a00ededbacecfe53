"""TLS and mutual TLS of the real server, with certificates that are replaced while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import shutil
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption
from hyperframe.frame import PingFrame, SettingsFrame

from digits.cli.main import main
from digits.client import AsyncDigitClient, DigitClient, DigitError, Tls
from service.security import tls as tls_module
from service.security.tls import Tls as ServerTls
from tests.attacks.attacks import PREFACE
from tests.calls import scrape
from tests.certificates import Authority
from tests.conftest import SAMPLES, RunningServer, start_process, wait_until
from tests.http2.echo import ROUTES
from tests.http2.wire import running

BLANK = np.zeros((28, 28), np.uint8)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "root")


@pytest.fixture
def files(authority: Authority, tmp_path: Path) -> tuple[Path, Path]:
    """The server's own certificate and key, where the server looks for them."""
    install(authority.issue("first"), tmp_path)
    return tmp_path / "server.pem", tmp_path / "server.key"


def install(issued: Any, folder: Path) -> None:
    certificate, key = issued
    shutil.copy(certificate, folder / "server.pem")
    shutil.copy(key, folder / "server.key")


def flags_of(files: Any) -> tuple[str, str]:
    return f"--tls-cert={files[0]}", f"--tls-key={files[1]}"


def loads(server: Any, result: Any) -> Any:
    return scrape(server)[f'digits_credential_loads_total{{kind="tls",result="{result}"}}']


def served_certificate(server: Any) -> Any:
    host, port = server.address.rsplit(":", 1)
    return ssl.get_server_certificate((host, int(port)))


def refusal(server: Any, tls: Any) -> Any:
    """How a call ends that can not get a connection."""
    client = DigitClient(server.address, tls=tls, timeout_s=10)
    with client, pytest.raises(DigitError) as caught:
        client.classify(BLANK)
    return caught.value


def test_auto_takes_grpcio_for_tls_and_says_so(
    start_server: Callable[..., RunningServer], authority: Authority, files: tuple[Path, Path]
) -> None:
    server = start_server(*flags_of(files))
    assert server.announced["transport"] == ("http2")
    assert server.announced["access"] == "TLS, no tokens"
    assert "--tls-ca" in server.announced["try"]


def test_clients_are_answered_over_tls(
    start_server: Callable[..., RunningServer],
    authority: Authority,
    files: tuple[Path, Path],
    sample: dict[str, np.ndarray],
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = start_server(*flags_of(files))
    tls = Tls(ca=authority.root)
    with DigitClient(server.address, tls=tls) as client:
        digits = client.classify(sample["images"][:20]).digits
        assert client.get_model()[0].name == "digits"

    async def ask() -> Any:
        async with AsyncDigitClient(server.address, tls=tls) as client:
            return (await client.classify(sample["images"][:20])).digits

    assert asyncio.run(ask()) == digits
    seven = str(SAMPLES / "7.png")
    flags = ["--address", server.address, "--tls-ca", str(authority.root)]
    assert main(["classify", *flags, seven]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == [seven, "7"]


def test_connections_with_tls_are_bounded_and_the_idle_one_makes_room(
    start_server: Callable[..., RunningServer], authority: Authority, files: tuple[Path, Path]
) -> None:
    bound = {"service.assembly.MAX_TLS_CONNECTIONS": 2}
    server = start_server(*flags_of(files), constants=bound)
    context = ssl.create_default_context(cafile=str(authority.root))
    context.set_alpn_protocols(["h2"])
    host, port = server.address.rsplit(":", 1)
    with contextlib.ExitStack() as stack:
        peers = []
        for _ in range(3):
            plain = socket.create_connection((host, int(port)), timeout=30)
            peer = stack.enter_context(context.wrap_socket(plain, server_hostname=host))
            peer.sendall(PREFACE + SettingsFrame(0).serialize())
            assert peer.recv(2**16)
            peers.append(peer)
        with contextlib.suppress(ConnectionError, ssl.SSLError):
            while peers[0].recv(2**16):  # ends: a timeout is no ConnectionError
                pass
        ping = PingFrame(0, opaque_data=b"in there")
        for peer in peers[1:]:
            peer.sendall(ping.serialize())
            read = b""
            while b"in there" not in read:
                part = peer.recv(2**16)
                assert part
                read += part


def test_caller_that_does_not_trust_the_server_sends_it_nothing(
    start_server: Callable[..., RunningServer], files: tuple[Path, Path], tmp_path: Path
) -> None:
    server = start_server(*flags_of(files))
    stranger = Authority(tmp_path, "stranger")
    for tls in (Tls(ca=stranger.root), None):
        assert refusal(server, tls).code is grpc.StatusCode.UNAVAILABLE
    started = [n for s, n in scrape(server).items() if s.startswith("grpc_server_started_total")]
    assert started
    assert set(started) == {0}


def test_mutual_tls_lets_in_who_has_a_certificate_and_nobody_else(
    start_server: Callable[..., RunningServer],
    authority: Authority,
    files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    server = start_server(*flags_of(files), f"--tls-client-ca={authority.root}")
    assert server.announced["access"] == "mutual TLS, no tokens"
    callers = {
        "none": (None, None),
        "wrong": Authority(tmp_path, "stranger").issue("wrong"),
        "expired": authority.issue("expired", days=-1),
    }
    for name, (certificate, key) in callers.items():
        error = refusal(server, Tls(ca=authority.root, cert=certificate, key=key))
        # The handshake fails: there is no call yet that a status of the server could end.
        assert error.code is grpc.StatusCode.UNAVAILABLE, name
        assert str(tmp_path) not in error.message
    certificate, key = authority.issue("right")
    with DigitClient(server.address, tls=Tls(authority.root, certificate, key)) as client:
        assert len(client.classify(BLANK).digits) == 1


class Caller:
    """Calls all the time, on one connection, until told to stop."""

    def __init__(self, server: Any, tls: Any) -> None:
        self.answered = 0
        self.errors: list[Any] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(server, tls))
        self._thread.start()

    def _run(self, server: Any, tls: Any) -> None:
        with DigitClient(server.address, tls=tls, timeout_s=30) as client:
            while not self._stop.is_set():
                try:
                    client.classify(BLANK)
                except DigitError as error:
                    self.errors.append(error)
                self.answered += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def test_certificate_is_replaced_under_load_without_a_failed_call(
    start_server: Callable[..., RunningServer],
    authority: Authority,
    files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    server = start_server(*flags_of(files))
    caller = Caller(server, Tls(ca=authority.root))
    try:
        wait_until(lambda: caller.answered > 10)
        successor = Authority(tmp_path, "successor")
        install(successor.issue("second"), tmp_path)
        wait_until(lambda: served_certificate(server) == files[0].read_text())
        with DigitClient(server.address, tls=Tls(ca=successor.root)) as client:
            assert len(client.classify(BLANK).digits) == 1
        assert refusal(server, Tls(ca=authority.root)).code is grpc.StatusCode.UNAVAILABLE
        before = caller.answered
        wait_until(lambda: caller.answered > before + 10)
    finally:
        caller.stop()
    assert caller.errors == []


def test_files_that_do_not_match_keep_the_old_certificate_and_are_logged_once(
    start_server: Callable[..., RunningServer],
    authority: Authority,
    files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    server = start_server(*flags_of(files))
    served = served_certificate(server)
    certificate, key = authority.issue("second")

    shutil.copy(certificate, files[0])  # its key is still on the way
    wait_until(lambda: loads(server, "refused") == 1)
    assert served_certificate(server) == served
    files[0].write_bytes(certificate.read_bytes()[:300])  # and it is written half
    wait_until(lambda: loads(server, "refused") == 2)
    assert served_certificate(server) == served
    files[1].unlink()
    wait_until(lambda: loads(server, "refused") == 3)
    assert served_certificate(server) == served

    install((certificate, key), tmp_path)
    wait_until(lambda: served_certificate(server) == certificate.read_text())
    refused = [
        line
        for line in server.log_text().splitlines()
        if "still using what was read before" in line
    ]
    assert len(refused) == loads(server, "refused")
    assert "got the key of another certificate" in refused[0]
    assert "PRIVATE" not in server.log_text()


def test_caller_whose_root_is_taken_away_is_refused_and_its_successor_let_in(
    start_server: Callable[..., RunningServer],
    authority: Authority,
    files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    roots = tmp_path / "callers.pem"
    shutil.copy(authority.root, roots)
    server = start_server(*flags_of(files), f"--tls-client-ca={roots}")
    old = Tls(authority.root, *authority.issue("old"))
    successor = Authority(tmp_path, "successor")
    new = Tls(authority.root, *successor.issue("new"))
    with DigitClient(server.address, tls=old) as client:
        client.classify(BLANK)
    assert refusal(server, new).code is grpc.StatusCode.UNAVAILABLE
    shutil.copy(successor.root, roots)
    wait_until(lambda: loads(server, "loaded") == 1)
    assert refusal(server, old).code is grpc.StatusCode.UNAVAILABLE
    with DigitClient(server.address, tls=new) as client:
        assert len(client.classify(BLANK).digits) == 1


@pytest.mark.parametrize(
    ("spoil", "flag", "message"),
    [
        ("absent", "--tls-cert", "No such file or directory"),
        ("junk", "--tls-cert", "expected PEM certificates, got something else"),
        ("half", "--tls-cert", "expected PEM certificates, got something else"),
        ("ed25519", "--tls-cert", "got one with an Ed25519 key, which gRPC's TLS does not take"),
        ("swapped key", "--tls-key", "got the key of another certificate"),
        ("junk key", "--tls-key", "expected the unencrypted PEM private key of --tls-cert"),
        ("locked key", "--tls-key", "expected the unencrypted PEM private key of --tls-cert"),
        ("junk roots", "--tls-client-ca", "expected PEM certificates, got something else"),
    ],
)
def test_file_that_can_not_be_used_is_an_error_at_the_start(
    authority: Authority,
    files: tuple[Path, Path],
    tmp_path: Path,
    spoil: str,
    flag: str,
    message: str,
) -> None:
    certificate, key = files
    roots = tmp_path / "roots.pem"
    shutil.copy(authority.root, roots)
    secret = key.read_text().splitlines()[1]
    if spoil == "absent":
        certificate.unlink()
    elif spoil == "half":
        certificate.write_bytes(certificate.read_bytes()[:300])
    elif spoil == "ed25519":
        install(authority.issue("edwards", key=Ed25519PrivateKey.generate()), tmp_path)
    elif spoil == "swapped key":
        shutil.copy(authority.issue("other")[1], key)
    elif spoil == "locked key":
        locked = authority.issue("locked", encryption=BestAvailableEncryption(b"secret"))
        install(locked, tmp_path)
    else:
        spoilt = {"junk": certificate, "junk key": key, "junk roots": roots}[spoil]
        spoilt.write_text(f"not PEM: {secret}")
    log = tmp_path / "log"
    process = start_process(log, *flags_of(files), f"--tls-client-ca={roots}")
    assert process.wait(60) == 2
    [line] = log.read_text().splitlines()
    assert f"can not serve: {flag}: " in line
    assert message in line
    assert secret not in line


def resumed(server: Any, authority: Any, pair: Any, version: Any) -> Any:
    """Whether a second handshake goes without a look at the caller's certificate."""
    context = ssl.create_default_context(cafile=authority.root)
    context.load_cert_chain(*pair)
    context.set_alpn_protocols(["h2"])
    context.minimum_version = context.maximum_version = version
    session = None
    for _ in range(2):
        raw = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        with context.wrap_socket(raw, server_hostname="localhost", session=session) as talking:
            assert talking.recv(9), "SETTINGS, and tickets before them"
            session, was_resumed = talking.session, talking.session_reused
    return was_resumed


def test_mutual_tls_resumes_no_session(authority: Authority) -> None:
    """The certificate of a session that is resumed may have expired since."""
    server_pair, caller_pair = authority.issue("server"), authority.issue("caller")
    one_sided = ServerTls(*server_pair, None)
    mutual = ServerTls(*server_pair, authority.root)
    with running(ROUTES, tls=one_sided.context) as server:
        assert resumed(server, authority, caller_pair, ssl.TLSVersion.TLSv1_2)
    with running(ROUTES, tls=mutual.context) as server:
        assert not resumed(server, authority, caller_pair, ssl.TLSVersion.TLSv1_3)
        with pytest.raises(OSError, match=r"(?i)version|reset|alert|eof"):
            resumed(server, authority, caller_pair, ssl.TLSVersion.TLSv1_2)


@pytest.mark.parametrize(
    ("days", "trouble"),
    [
        (-1, "one that expired at "),
        (-9, "one that expired at "),
        (9000, ""),  # beyond 2050 times are written otherwise
        (1, ""),
    ],
)
def test_certificate_that_has_expired_is_warned_about_at_the_start(
    authority: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture, days: int, trouble: str
) -> None:
    install(authority.issue("first", days=days), tmp_path)
    assert ServerTls(tmp_path / "server.pem", tmp_path / "server.key", None).context()
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == bool(trouble)
    assert all(trouble in line and line.endswith("callers will refuse to connect") for line in said)


def test_certificate_that_is_not_valid_yet_is_told_from_one_that_is(authority: Authority) -> None:
    pem = authority.issue("later")[0].read_bytes()
    der = tls_module._first_certificate(pem)
    now = dt.datetime.now(dt.UTC)
    assert tls_module._time_trouble(der, now) == ""
    assert "got one from" in tls_module._time_trouble(der, now - dt.timedelta(days=11))
    assert "that expired" in tls_module._time_trouble(der, now + dt.timedelta(days=2))


def test_certificate_that_has_expired_does_not_replace_one(
    start_server: Callable[..., RunningServer],
    authority: Authority,
    files: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    server = start_server(*flags_of(files))
    before = served_certificate(server)
    install(authority.issue("late", days=-1), tmp_path)
    wait_until(lambda: loads(server, "refused") == 1)
    assert "got one that expired at " in server.log_text()
    assert served_certificate(server) == before
    install(authority.issue("second"), tmp_path)
    wait_until(lambda: loads(server, "loaded") == 1)
    assert served_certificate(server) != before
