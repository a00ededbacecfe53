"""Files that the server reads: artifacts, models and settings."""

from __future__ import annotations

import contextlib
import io
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from service.artifact.errors import ArtifactError, KeyFileError
from service.artifact.format import MANIFEST, PARITY, SIGNATURE, load_artifact
from service.artifact.golden import GOLDEN
from service.artifact.repository import PROMOTED, in_serving_order, promoted
from service.config import ServerConfig, load_config
from service.serving.loader import load_model
from service.settings import ConfigError
from tests.conftest import REPOSITORY
from tests.fuzz import inputs
from tests.fuzz.target import Target
from tests.releases import FP32, INT8


class Artifacts(Target):
    """Every file of an artifact, with right hashes. The first byte says which one."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.artifact = inputs.served_artifact()
        source = REPOSITORY / self.artifact.version
        self.good = {name: (source / name).read_bytes() for name in (FP32, INT8, GOLDEN, PARITY)}
        self.good[MANIFEST] = self.artifact.manifest_json.encode()
        self.members = inputs.npy_members(self.artifact)
        self.version = folder / self.artifact.version
        self.version.mkdir(exist_ok=True)
        self.kinds = (
            self._manifest, self._model, self._golden, *map(self._member, self.members),
            self._signature, self._key, self._promoted,
        )  # fmt: skip

    def seeds(self) -> list[bytes]:
        artifact = self.artifact
        contents = [
            self.good[MANIFEST], b"\x42\x02\x10\x14", self.good[GOLDEN],
            *self.members.values(), bytes(64), PUBLIC_KEY, b"3\n",
        ]  # fmt: skip
        assert len(contents) == len(self.kinds), artifact
        return [bytes((index,)) + content for index, content in enumerate(contents)]

    max_bytes = 32_768

    def run(self, data: Any) -> None:
        if not data:
            return
        kind = self.kinds[data[0] % len(self.kinds)]
        with contextlib.suppress(ArtifactError, KeyFileError):
            kind(data[1:])

    def check_golden(self) -> None:
        self._write()
        assert load_artifact(self.version).manifest == self.artifact.manifest

    def _write(self, **changed: bytes) -> None:
        names = {"model": FP32, "golden": GOLDEN, "manifest": MANIFEST}
        files = self.good | {names[part]: data for part, data in changed.items()}
        for name, data in files.items():
            (self.version / name).write_bytes(data)

    def _manifest(self, data: bytes) -> None:
        self._write(manifest=data)
        load_artifact(self.version)

    def _model(self, data: bytes) -> None:
        self._write(model=data, manifest=inputs.manifest_with(self.artifact, model=data))
        load_artifact(self.version)

    def _golden(self, data: bytes) -> None:
        self._write(golden=data, manifest=inputs.manifest_with(self.artifact, golden=data))
        expected = self.artifact.golden
        found = load_artifact(self.version).golden
        found.check(expected.probabilities["fp32"], expected.is_digit["fp32"], "fp32")

    def _member(self, name: str) -> Callable[..., None]:
        def run(data: bytes) -> None:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                for member, content in {**self.members, name: data}.items():
                    archive.writestr(member, content)
            self._golden(buffer.getvalue())

        return run

    def _signature(self, data: bytes) -> None:
        self._write()
        self._signed(PUBLIC_KEY, data)

    def _key(self, data: bytes) -> None:
        self._write()
        self._signed(data, bytes(64))

    def _signed(self, key: bytes, signature: bytes) -> None:
        (self.version / SIGNATURE).write_bytes(signature)
        (self.folder / "key.pem").write_bytes(key)
        load_artifact(self.version, self.folder / "key.pem")
        raise AssertionError("an artifact that nobody signed was accepted")

    def _promoted(self, data: bytes) -> None:
        (self.folder / PROMOTED).write_bytes(data)
        assert in_serving_order(self.folder, note=promoted(self.folder)) == [self.version]


PUBLIC_KEY = b"""-----BEGIN PUBLIC KEY-----
MCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=
-----END PUBLIC KEY-----
"""


class Models(Target):
    """A model with right hashes, up to a session of onnxruntime and its golden digits."""

    max_bytes = 110_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.artifacts = Artifacts(folder)

    def seeds(self) -> list[Any]:
        return [self.artifacts.good[FP32]]

    def run(self, data: Any) -> None:
        manifest = inputs.manifest_with(self.artifacts.artifact, model=data)
        self.artifacts._write(model=data, manifest=manifest)
        with contextlib.suppress(ArtifactError):
            self._load()

    def check_golden(self) -> None:
        self.artifacts._write()
        self._load()

    def _load(self) -> None:
        load_model(
            self.artifacts.version, "digits", device="cpu", intra_op_threads=1, max_batch_size=1
        )


class Config(Target):
    """Flags, one a line, then an empty line, then the environment."""

    def seeds(self) -> list[bytes]:
        file = b"DIGITS_GRPC_PORT=0\nDIGITS_LOG_FORMAT=json\nDIGITS_INSTANCES=2\n"
        return [
            b"--grpc-port=1\n--no-reflection\n--drain-delay-s\n1.5\n\n" + file,
            b"--host=::1\n--max-batch-size=64\n\n" + file,
            b"--transport=grpcio\n--reflection=false\n--device\ncpu\n\n",
        ]

    def run(self, data: Any) -> None:
        # No operating system passes a NUL in an argument or a variable.
        flags, _, file = data.replace(b"\0", b"").partition(b"\n\n")
        arguments = flags.decode("utf-8", "surrogateescape").split("\n")
        lines = file.decode("utf-8", "surrogateescape").split("\n")
        environ = dict(line.split("=", 1) for line in lines if "=" in line)
        with contextlib.suppress(ConfigError):
            check_bounds(load_config(arguments, environ))

    def check_golden(self) -> None:
        assert load_config(["--grpc-port=7"], {"DIGITS_INSTANCES": "2"}).grpc_port == 7


def check_bounds(config: ServerConfig) -> None:
    """Every setting is of its type and within its bounds."""
    for setting in fields(config):
        value, about = getattr(config, setting.name), setting.metadata
        assert type(value).__name__ == setting.type
        assert not about["choices"] or value in about["choices"]
        if setting.type in ("int", "float"):
            low, high = about["bounds"]
            assert low <= value <= high
