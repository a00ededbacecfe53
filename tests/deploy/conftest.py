"""Rendered manifests: what kustomize makes of deploy/, and what the server makes of that."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml

from service.config import ServerConfig, load_config
from tests.conftest import ROOT
from tests.deploy.containers import Containers

DEPLOY = ROOT / "deploy"
COMPONENTS = sorted(path.name for path in (DEPLOY / "components").iterdir())
EXAMPLES = sorted(path.name for path in (DEPLOY / "examples").iterdir() if path.is_dir())
# Those that are added to the base, as components are.
ADDED_EXAMPLES = ("keda", "model-volume")


def combinations() -> Iterator[tuple[str, ...]]:
    """Every set of components."""
    counts = range(len(COMPONENTS) + 1)
    return itertools.chain(*(itertools.combinations(COMPONENTS, count) for count in counts))


def tool(name: str) -> str:
    """A program that pip installs beside Python."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed beside {sys.executable}: make test installs it")
    return str(path)


def checkov() -> str:
    """Has an environment of its own: it pins versions that others need newer."""
    program = ROOT / ".venv-checkov/bin/checkov"
    if not program.exists():
        pytest.skip(f"{program} is not there: make manifests installs it")
    return str(program)


Object = dict[str, Any]


class Manifests:
    """The objects that one kustomization renders."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.objects: list[Object] = list(yaml.safe_load_all(text))

    def all(self, kind: str) -> list[Object]:
        return [document for document in self.objects if document["kind"] == kind]

    def one(self, kind: str) -> Object:
        (only,) = self.all(kind)
        return only

    @property
    def template(self) -> Object:
        return dict(self.one("Deployment")["spec"]["template"])

    @property
    def pod(self) -> Object:
        return dict(self.template["spec"])

    @property
    def container(self) -> Object:
        (only,) = self.pod["containers"]
        return dict(only)

    @property
    def ports(self) -> dict[str, int]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def config_map(self) -> Object:
        """The one that the pod takes its environment from."""
        (source,) = self.container["envFrom"]
        name = source["configMapRef"]["name"]
        (found,) = [each for each in self.all("ConfigMap") if each["metadata"]["name"] == name]
        return found

    @property
    def settings(self) -> dict[str, str]:
        return dict(self.config_map["data"])

    @property
    def config(self) -> ServerConfig:
        """What the server in the pod runs with."""
        return load_config([], image_variables() | self.settings)


def kustomize(folder: Path, kubectl: str | None = None) -> Manifests:
    """Renders a folder; an error is a failure."""
    command = [kubectl or tool("kubectl"), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # such as a warning of a deprecated field
    return Manifests(done.stdout)


@functools.cache
def rendered(name: str) -> Manifests:
    """A folder of deploy/, rendered once: treat it as read-only."""
    return kustomize(DEPLOY / name)


def combined(folder: Path, components: Sequence[str], base: str = "base", **more: Any) -> Manifests:
    """Base, or an overlay, with components, as a user's own overlay has them."""
    folder.mkdir(parents=True, exist_ok=True)
    relative = Path(os.path.relpath(DEPLOY, folder))
    kustomization = {
        "resources": [str(relative / base)],
        "components": [
            str(relative / ("components" if name in COMPONENTS else "examples") / name)
            for name in components
        ],
        **more,
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return kustomize(folder)


@pytest.fixture(scope="session")
def with_component(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Manifests]:
    """Base with one component, or with an example that is one: each rendered once."""
    return functools.cache(lambda name: combined(tmp_path_factory.mktemp(name), [name]))


@pytest.fixture(params=["base", "overlays/cpu", "examples/gpu", "examples/canary"])
def manifests(request: pytest.FixtureRequest) -> Manifests:
    """All that runs the server in a Deployment."""
    return rendered(request.param)


@pytest.fixture
def start() -> Iterator[Containers]:
    """Starts containers of the image."""
    with Containers() as started:
        yield started


@functools.cache
def dockerfile() -> list[tuple[str, str]]:
    """Every instruction as (name, arguments), without comments and line breaks."""
    text = (DEPLOY / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (name, " ".join(arguments.split()))
        for name, _, arguments in (line.partition(" ") for line in text.splitlines() if line)
    ]


@functools.cache
def image() -> dict[str, list[str]]:
    """The instructions of the last stage: name -> arguments of each."""
    last_from = max(i for i, (name, _) in enumerate(dockerfile()) if name == "FROM")
    stage: dict[str, list[str]] = {}
    for name, arguments in dockerfile()[last_from:]:
        stage.setdefault(name, []).append(arguments)
    return stage


def image_variables() -> dict[str, str]:
    """The environment that the image sets."""
    defaults = dict(a.split("=", 1) for name, a in dockerfile() if name == "ARG" and "=" in a)
    pairs = (pair.split("=", 1) for arguments in image()["ENV"] for pair in arguments.split())
    return {name: Template(value).safe_substitute(defaults) for name, value in pairs}
