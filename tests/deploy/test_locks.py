"""The locks: exact versions of what both pyproject.toml ask for; of the images, with hashes."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.conftest import ROOT

SERVER = tomllib.loads((ROOT / "pyproject.toml").read_text())
CLIENT = tomllib.loads((ROOT / "proto/pyproject.toml").read_text())
OWN = {each["project"]["name"]: each["project"] for each in (SERVER, CLIENT)}
LOCKS = {
    "cpu": ["cpu", "signing", "otel", "top"],
    "cuda": ["gpu", "signing", "otel", "top"],
    "build": [],
    "dev": ["dev"],
}
EACH_LOCK = pytest.mark.parametrize("lock", LOCKS)
OF_IMAGES = pytest.mark.parametrize("lock", sorted(LOCKS.keys() - {"dev"}))
PLATFORMS = [
    {
        "python_version": version,
        "python_full_version": f"{version}.0",
        "platform_machine": machine,
        "platform_system": "Linux",
        "sys_platform": "linux",
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
        "extra": "",
    }
    for version in ("3.11", "3.12", "3.13")
    for machine in ("x86_64", "aarch64")
]


def path_of(lock: str) -> Path:
    return ROOT / ("" if lock == "dev" else "deploy") / f"requirements-{lock}.lock"


def entries(lock: str) -> Iterator[tuple[Requirement, list[str]]]:
    """Each requirement of a lock with its hashes."""
    text = re.sub(r"^\s*#.*\n", "", path_of(lock).read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        requirement, *hashes = line.split("--hash=")
        yield Requirement(requirement), [each.strip() for each in hashes]


def asked_for(lock: str) -> list[Requirement]:
    """The requirements of both pyproject.toml, own distributions and extras resolved."""
    if lock == "build":
        both = SERVER["build-system"]["requires"] + CLIENT["build-system"]["requires"]
        return [Requirement(each) for each in both]
    todo = [Requirement(f"digits-serving[{','.join(LOCKS[lock])}]")]
    found = []
    while todo:
        requirement = todo.pop()
        own = OWN.get(requirement.name)
        if own is None:
            found.append(requirement)
            continue
        asked = [*own["dependencies"]]
        for extra in requirement.extras:
            asked += own["optional-dependencies"][extra]
        todo += [Requirement(each) for each in asked]
    return found


def applies(requirement: Requirement, platform: dict[str, str]) -> bool:
    return requirement.marker is None or requirement.marker.evaluate(platform)


@EACH_LOCK
@pytest.mark.parametrize(
    "platform", PLATFORMS, ids=lambda p: f"{p['python_version']}-{p['platform_machine']}"
)
def test_lock_satisfies_what_the_project_asks_for(lock: str, platform: dict[str, str]) -> None:
    pinned = {}
    for requirement, _ in entries(lock):
        if applies(requirement, platform):
            name = canonicalize_name(requirement.name)
            assert name not in pinned, f"{name} is pinned twice"
            (pin,) = requirement.specifier
            assert pin.operator == "=="
            pinned[name] = pin.version
    for requirement in asked_for(lock):
        if applies(requirement, platform):
            version = pinned.get(canonicalize_name(requirement.name))
            assert version is not None, f"{requirement} is not in the lock: make lock"
            assert requirement.specifier.contains(version), (
                f"{requirement}, got {version}: make lock"
            )


@EACH_LOCK
def test_own_distributions_are_built_here_and_not_locked(lock: str) -> None:
    assert not OWN.keys() & {
        canonicalize_name(requirement.name) for requirement, _ in entries(lock)
    }


@OF_IMAGES
def test_every_package_has_its_hashes_and_no_place_is_named(lock: str) -> None:
    found = list(entries(lock))
    assert found
    for requirement, hashes in found:
        assert hashes, requirement
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in hashes), requirement
        assert requirement.url is None
    text = path_of(lock).read_text()
    assert "://" not in text
    assert not re.search(r"^\s*-(?!-hash=)", text, flags=re.MULTILINE)


def test_image_takes_the_cpu_runtime_and_neither_torch_nor_cuda() -> None:
    names = {requirement.name for requirement, _ in entries("cpu")}
    assert "onnxruntime" in names
    assert not [name for name in names if name.startswith(("torch", "nvidia", "onnxruntime-gpu"))]


def test_cuda_lock_holds_the_gpu_wheel_alone() -> None:
    names = {requirement.name for requirement, _ in entries("cuda")}
    assert "onnxruntime-gpu" in names
    assert "onnxruntime" not in names
    assert any(name.startswith("nvidia-cudnn") for name in names)


def test_image_installs_nothing_that_is_not_locked() -> None:
    """Each pip command takes packages by hash, or none at all but the project itself."""
    dockerfile = (ROOT / "deploy/Dockerfile").read_text().replace("\\\n", " ")
    commands = re.findall(r"\bpip (?:--python \S+ )?(?:install|wheel) [^&\n]*", dockerfile)
    assert len(commands) == 4
    for command in commands:
        locked = "--require-hashes" in command and "--only-binary :all:" in command
        offline = "--no-index" in command or "--no-build-isolation" in command
        assert locked or ("--no-deps" in command and offline), command
