"""How many CPUs this process may really use, which inside a container is not ``os.cpu_count()``."""

from __future__ import annotations

import os
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")


def cpu_quota(root: Path = CGROUP_ROOT) -> int:
    """CPUs granted by affinity and by the cgroup's quota (v2, else v1), at least 1.

    A fractional quota is rounded down: one thread more than the quota gets throttled.
    """
    available = len(os.sched_getaffinity(0))
    for read in (_quota_v2, _quota_v1):
        quota = read(root)
        if quota is not None:
            return max(1, min(available, int(quota)))
    return available


def _quota_v2(root: Path) -> float | None:
    try:
        limit, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) / int(period)


def _quota_v1(root: Path) -> float | None:
    try:
        limit = int((root / "cpu/cpu.cfs_quota_us").read_text())
        period = int((root / "cpu/cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return None
    return None if limit < 0 else limit / period
