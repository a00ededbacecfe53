"""What a figure was measured on."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# Instructions that int8 inference is many times faster with; as Linux spells them.
VNNI_FLAGS = {"avx_vnni", "avx512_vnni"}


@functools.cache
def machine() -> dict[str, Any]:
    """CPU, whether it has VNNI, and the versions of what was run."""
    info = Path("/proc/cpuinfo").read_text()
    flags = re.search(r"^flags\s*: (.*)", info, re.MULTILINE)
    versions = {"python": platform.python_version(), "linux": platform.release()}
    for name in ("onnxruntime", "grpcio", "numpy", "protobuf"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "cpu": _cpu(info),
        "cores": len(os.sched_getaffinity(0)),
        "vnni": bool(flags and VNNI_FLAGS & set(flags[1].split())),
        "versions": versions,
    }


def _cpu(info: str) -> str:
    """Its name; family and model too, since a hypervisor may leave nothing of the name."""
    fields = dict(re.findall(r"^(model name|cpu family|model)\s*: (.*)", info, re.MULTILINE))
    if "model name" not in fields:
        return platform.machine()
    return "{model name} (family {cpu family}, model {model})".format(**fields)


def kind() -> str:
    """Machines whose ratios may be compared have the same; also the name of a committed result."""
    found = machine()
    return f"{found['cores']}-cores-{'vnni' if found['vnni'] else 'no-vnni'}"


def by_vnni(*, without: float, having: float) -> float:
    """What a figure should reach depends on how large the share of inference is."""
    return having if machine()["vnni"] else without
