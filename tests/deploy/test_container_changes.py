"""What changes while containers serve: releases on their volume, and the containers themselves."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("kubernetes_validate", reason="make test installs it")

from digits.client import DigitClient
from service.artifact.format import MANIFEST
from service.artifact.repository import in_serving_order
from tests.calls import NO_RETRIES
from tests.conftest import COMMITTED, wait_until
from tests.deploy.containers import MODELS, NEEDS_IMAGE, Container, Containers, load, podman
from tests.releases import FP32, copy_release
from tests.service.envoy import Envoy
from tests.service.load import Load
from tests.service.nginx import Nginx

pytestmark = NEEDS_IMAGE

# A release after all that are committed.
NEXT = 1000
# As in deploy/base: a balancer needs a moment to see that a server stops.
DRAINS = {"DRAIN_DELAY_S": 5}


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A folder with the committed release, which the loader may write to."""
    release = in_serving_order(COMMITTED)[0]
    folder = tmp_path / "volume"
    shutil.copytree(release, folder / release.name)
    tmp_path.chmod(0o755)
    folder.chmod(0o777)  # the loader's fsGroup does it
    return folder


def archive(name: str, cut: int | None = None) -> bytes:
    """The committed release as NEXT, in the form in which ``kubectl cp`` sends it.

    Args:
        name: Folder in the archive.
        cut: Bytes of the fp32 model after which the rest is missing.
    """
    release = in_serving_order(COMMITTED)[0]
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for file in [release / FP32] if cut else release.iterdir():
            content = file.read_bytes()[:cut]
            if file.name == MANIFEST:
                content = json.dumps(json.loads(content) | {"version": NEXT}).encode()
            member = tarfile.TarInfo(f"{name}/{file.name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


class Writer:
    """What brings NEXT onto the volume: the loader of examples/model-volume, or others."""

    def __init__(self, volume: Path, loader: Container, server: Container) -> None:
        self.volume, self._loader, self._server = volume, loader, server

    def _run(self, *command: str, stdin: bytes | None = None) -> None:
        into = ("exec", "--interactive", f"--workdir={MODELS}", self._loader.name)
        podman(*into, *command, stdin=stdin)

    def _wait_until_the_server_looked(self) -> None:
        """It says why it does not take over what is not whole."""
        wait_until(lambda: f"release {NEXT} " in self._server.logs(), timeout_s=120)

    def copied_in_two_goes(self) -> None:
        self._run("tar", "-x", stdin=archive(str(NEXT), cut=1000))
        self._wait_until_the_server_looked()
        self._run("tar", "-x", stdin=archive(str(NEXT)))

    def renamed(self) -> None:
        self._run("tar", "-x", stdin=archive(".next"))
        self._run("mv", ".next", str(NEXT))

    def linked(self) -> None:
        self._run("tar", "-x", stdin=archive(".next"))
        self._run("ln", "-s", ".next", str(NEXT))

    def synchronised(self) -> None:
        """As rsync does it: each file under another name first; it is interrupted half-way."""
        folder = copy_release(self.volume.parent, NEXT, in_serving_order(COMMITTED)[0])
        files = sorted(folder.iterdir())
        models = [file for file in files if file.suffix == ".onnx"]
        (self.volume / folder.name).mkdir()
        for file in files:
            if file == models[0]:
                self._wait_until_the_server_looked()
            temporary = self.volume / folder.name / f".{file.name}.a1B2c3"
            shutil.copy(file, temporary)
            temporary.rename(self.volume / folder.name / file.name)

    def swapped(self) -> None:
        """As the kubelet renews a ConfigMap: all is seen through one link, which is exchanged."""
        (old,) = self.volume.iterdir()
        old.rename(self._made("..1") / old.name)
        self._point_to("..1")
        old.symlink_to(f"..data/{old.name}")
        shutil.copytree(self.volume / "..1", self._made("..2"), dirs_exist_ok=True)
        copy_release(self.volume / "..2", NEXT, in_serving_order(COMMITTED)[0])
        self._point_to("..2")
        (self.volume / str(NEXT)).symlink_to(f"..data/{NEXT}")
        shutil.rmtree(self.volume / "..1")

    def _made(self, name: str) -> Path:
        (self.volume / name).mkdir()
        return self.volume / name

    def _point_to(self, name: str) -> None:
        link = self.volume / "..data_tmp"
        link.symlink_to(name)
        link.rename(self.volume / "..data")


@pytest.mark.parametrize(
    "way",
    [Writer.copied_in_two_goes, Writer.renamed, Writer.linked, Writer.synchronised, Writer.swapped],
)
def test_release_that_comes_onto_the_volume_serves_and_no_call_is_lost(
    start: Containers,
    volume: Path,
    sample: dict[str, np.ndarray],
    way: Callable[[Writer], None],
) -> None:
    loader = start(f"--volume={volume}:{MODELS}", "--entrypoint=sleep", command=("9999",))
    container = start.serving(volume=volume, settings={"RELOAD_INTERVAL_S": 0.1})
    with load(container.address, sample["images"], callers=3) as (errors, answered):
        way(Writer(volume, loader, container))
        wait_until(lambda: errors or container.release() == str(NEXT), timeout_s=120)
        before = list(answered)
        wait_until(lambda: errors or all(a > b for a, b in zip(answered, before, strict=True)))
    assert not errors


@contextlib.contextmanager
def before_stopping(front: Envoy | Nginx, address: str) -> Iterator[None]:
    """Envoy sees for itself that a server stops; nginx has to be told."""
    if isinstance(front, Nginx):
        front.leave_out(address)
        yield
        front.leave_out()
    else:
        yield
        wait_until(lambda: front.healthy() == 2)


@pytest.mark.parametrize(("front", "options"), [(Envoy, NO_RETRIES), (Nginx, [])])
def test_release_is_exchanged_container_by_container_and_no_call_fails(
    start: Containers,
    volume: Path,
    tmp_path: Path,
    sample: dict[str, np.ndarray],
    front: type[Envoy | Nginx],
    options: list[tuple[str, int]],
) -> None:
    """Both releases answer alike, so each answer is checked too."""
    next_volume = tmp_path / "next"
    next_volume.mkdir()
    copy_release(next_volume, NEXT, in_serving_order(COMMITTED)[0])
    containers = [start(volume=volume, settings=DRAINS) for _ in range(2)]
    for container in containers:
        container.wait_for_serving()
    with DigitClient(containers[0].address) as client:
        expected = client.classify(sample["images"]).digits
    balancer = front(tmp_path, [container.address for container in containers])
    with (
        contextlib.closing(balancer),
        Load(balancer.address, sample["images"], expected, options=options) as callers,
    ):
        callers.wait_for(50)
        for old in containers:
            with before_stopping(balancer, old.address):
                old.signal(signal.SIGTERM)
                assert old.exit_code() == 0, old.logs()
                new = start.serving(volume=next_volume, port=old.port, settings=DRAINS)
            assert new.release() == str(NEXT)
            callers.wait_for(50)
    assert callers.failures == []
    assert min(callers.streams, callers.long_items) > 50
