"""Build hook: generates the protobuf and gRPC stubs beside their .proto on every build."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = ("digits/v1/digits.proto", "digits/oip/inference.proto")


class StubsHook(BuildHookInterface):
    """Runs protoc with this folder as include root and output root: imports need no rewriting."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        from grpc_tools import protoc

        root = Path(self.root)
        sources = [str(root / source) for source in SOURCES]
        outputs = [f"--{kind}_out={root}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", f"-I{root}", *outputs, *sources]):
            raise RuntimeError(f"protoc failed on {', '.join(sources)}")
        build_data["artifacts"].append("/digits/*/*_pb2*")
