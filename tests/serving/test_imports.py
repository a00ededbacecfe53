"""The core stands without what carries requests to it, and the batcher without the engine."""

from __future__ import annotations

import subprocess
import sys


def loaded_by(module: str) -> set[str]:
    """Top-level packages in a new interpreter that imported one module."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True).split())


def test_gate_batcher_and_decoder_know_neither_transports_nor_the_engine() -> None:
    loaded = loaded_by("service.serving.gate")
    assert not loaded & {"grpc", "google", "aiohttp", "asyncio", "hpack", "onnxruntime"}


def test_loader_knows_no_transport() -> None:
    assert not loaded_by("service.serving.loader") & {"grpc", "aiohttp", "hpack"}
