"""Build hook: generates the protobuf and gRPC stubs beside their .proto on every build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class StubsHook(BuildHookInterface):
    """Runs protoc with ``proto/`` as include root and output root, so imports need no rewriting."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        from grpc_tools import protoc

        root = Path(self.root, "proto")
        source = root / "digits/v1/digits.proto"
        outputs = [f"--{kind}_out={root}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", f"-I{root}", *outputs, str(source)]):
            raise RuntimeError(f"protoc failed on {source}")
        build_data["artifacts"].append("/proto/digits/v1/*_pb2*")
