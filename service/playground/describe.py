"""The facts on the status page. None of them is a secret: GetModel and /metrics tell the same."""

from __future__ import annotations

import importlib.metadata
import time
from datetime import timedelta
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from service.serving.gate import Gate

STARTED = time.monotonic()


def describe(gate: Gate, transport: str) -> dict[str, str]:
    """What runs here and which model serves, by name, in the order of the page."""
    facts = {
        "version": importlib.metadata.version("digits-serving"),
        "uptime": str(timedelta(seconds=int(time.monotonic() - STARTED))),
        "transport": transport,
    }
    model = gate.model
    if model is None:
        return {**facts, "model": "loading"}
    return {
        **facts,
        "model": f"{model.name}, release {model.version}",
        "precision": model.precision,
        "runs on": model.provider,
        "sha256": model.sha256,
    }
