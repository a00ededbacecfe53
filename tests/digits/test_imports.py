"""What the client imports, which is what it costs to start, and what it leaves alone."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, warnings
import numpy, grpc
filters = list(warnings.filters)
import {module}
assert warnings.filters == filters
print(json.dumps(sorted(sys.modules)))
"""
OPTIONAL = {"PIL", "cv2", "rich", "torch", "pandas", "onnxruntime", "aiohttp", "service"}
# These are for who needs them: errors with details, pictures, the command.
LATER = {
    "google.rpc", "grpc_health", "digits.images", "digits.files", "digits.cli", "digits.oip",
    "importlib.metadata", "argparse",
}  # fmt: skip


@pytest.mark.parametrize("module", ["digits", "digits.client"])
def test_nothing_is_imported_before_it_is_needed(module: str) -> None:
    script = SCRIPT.format(module=module)
    loaded = set(json.loads(subprocess.check_output([sys.executable, "-c", script], timeout=300)))
    grpcs = "import json, sys, numpy, grpc; print(json.dumps(sorted(sys.modules)))"
    before = set(json.loads(subprocess.check_output([sys.executable, "-c", grpcs], timeout=300)))
    assert module in loaded
    assert not (loaded - before) & (OPTIONAL | LATER)
