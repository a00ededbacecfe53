"""Rendered manifests: what kustomize makes of deploy/, and what the server makes of that."""

from __future__ import annotations

import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from string import Template
from typing import Any

import pytest
import yaml

from service.config import load_config
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
COMPONENTS = sorted(path.name for path in (DEPLOY / "components").iterdir())
EXAMPLES = sorted(path.name for path in (DEPLOY / "examples").iterdir() if path.is_dir())
# Those that are added to the base, as components are.
ADDED_EXAMPLES = ("keda", "model-volume")


def combinations() -> Any:
    """Every set of components."""
    counts = range(len(COMPONENTS) + 1)
    return itertools.chain(*(itertools.combinations(COMPONENTS, count) for count in counts))


def tool(name: str) -> Any:
    """A program that pip installs beside Python."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        pytest.skip(f"{name} is not installed beside {sys.executable}: make test installs it")
    return path


class Manifests:
    """The objects that one kustomization renders."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.objects = list(yaml.safe_load_all(text))

    def all(self, kind: Any) -> list[Any]:
        return [document for document in self.objects if document["kind"] == kind]

    def one(self, kind: Any) -> Any:
        (only,) = self.all(kind)
        return only

    @property
    def template(self) -> Any:
        return self.one("Deployment")["spec"]["template"]

    @property
    def pod(self) -> Any:
        return self.template["spec"]

    @property
    def container(self) -> Any:
        (only,) = self.pod["containers"]
        return only

    @property
    def ports(self) -> dict[Any, Any]:
        return {port["name"]: port["containerPort"] for port in self.container["ports"]}

    @property
    def config_map(self) -> Any:
        """The one that the pod takes its environment from."""
        (source,) = self.container["envFrom"]
        name = source["configMapRef"]["name"]
        (found,) = [each for each in self.all("ConfigMap") if each["metadata"]["name"] == name]
        return found

    @property
    def settings(self) -> Any:
        return self.config_map["data"]

    @property
    def config(self) -> Any:
        """What the server in the pod runs with."""
        return load_config([], image_variables() | self.settings)


def kustomize(folder: Path, kubectl: Any = None) -> Manifests:
    """Renders a folder; an error is a failure."""
    command = [kubectl or tool("kubectl"), "kustomize", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, done.stderr  # such as a warning of a deprecated field
    return Manifests(done.stdout)


@functools.cache
def rendered(name: str) -> Manifests:
    """A folder of deploy/, rendered once: treat it as read-only."""
    return kustomize(DEPLOY / name)


def combined(folder: Path, components: Any, base: str = "base", **more: Any) -> Manifests:
    """Base, or an overlay, with components, as a user's own overlay has them."""
    write_overlay(folder, components, base, **more)
    return kustomize(folder)


def write_overlay(folder: Path, components: Any, base: str = "base", **more: Any) -> None:
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


@pytest.fixture(scope="session")
def with_component(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Base with one component, or with an example that is one: each rendered once."""
    return functools.cache(lambda name: combined(tmp_path_factory.mktemp(name), [name]))


@pytest.fixture(params=["base", "overlays/cpu", "examples/gpu", "examples/canary"])
def manifests(request: pytest.FixtureRequest) -> Manifests:
    """All that runs the server in a Deployment."""
    return rendered(request.param)


@functools.cache
def dockerfile() -> list[tuple[Any, str]]:
    """Every instruction as (name, arguments), without comments and line breaks."""
    text = (DEPLOY / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (name, " ".join(arguments.split()))
        for name, _, arguments in (line.partition(" ") for line in text.splitlines() if line)
    ]


@functools.cache
def image() -> dict[Any, Any]:
    """The instructions of the last stage: name -> arguments of each."""
    last_from = max(i for i, (name, _) in enumerate(dockerfile()) if name == "FROM")
    stage: dict[Any, Any] = {}
    for name, arguments in dockerfile()[last_from:]:
        stage.setdefault(name, []).append(arguments)
    return stage


def image_variables() -> dict[Any, Any]:
    """The environment that the image sets."""
    defaults = dict(a.split("=", 1) for name, a in dockerfile() if name == "ARG" and "=" in a)
    pairs = (pair.split("=", 1) for arguments in image()["ENV"] for pair in arguments.split())
    return {name: Template(value).safe_substitute(defaults) for name, value in pairs}
