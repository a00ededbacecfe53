from __future__ import annotations

from pathlib import Path

import pytest

from service.host import cpu


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    ("content", "expected"),
    [("max 100000", 8), ("200000 100000", 2), ("150000 100000", 1), ("50000 100000", 1),
     ("1600000 100000", 8), ("nonsense", 8)],
)  # fmt: skip
def test_quota_of_cgroup_v2_limits_the_cpus(tmp_path: Path, content: str, expected: int) -> None:
    (tmp_path / "cpu.max").write_text(content)
    assert cpu.cpu_quota(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [("-1", 8), ("300000", 3)])
def test_quota_of_cgroup_v1_limits_the_cpus(tmp_path: Path, quota: str, expected: int) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu/cpu.cfs_quota_us").write_text(quota)
    (tmp_path / "cpu/cpu.cfs_period_us").write_text("100000")
    assert cpu.cpu_quota(tmp_path) == expected


def test_no_cgroup_leaves_the_affinity(tmp_path: Path) -> None:
    assert cpu.cpu_quota(tmp_path) == 8
