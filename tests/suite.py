"""The run as a whole: its workers, what they share, which skips are right, and how long it took."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Skips that are right wherever the suite runs. Any other names a program or a package that
# `make test` or .ci/run installs, so there it says that tests are missing.
ACCEPTED_SKIPS = (
    r"(go|node|java|mvn|cargo|grpcurl|h2spec) is not installed",  # other toolchains
    r"node and npm are not installed|npm reaches no registry",
    r"Go, or its packages of Debian, are not installed",
    r"\S*/(go|npm|mvn|cargo) .* failed: ",  # they download what they build
    r"curl was built without HTTP/2",
    r".*\(make bench ARGS=",  # servers of others, in environments of their own
    r"TEST_IMAGE names no image|podman is not installed",  # make image-test
    r"CLUSTER_PROGRAMS names no folder",  # make cluster-test
    r".*checkov is not there: make manifests installs it",
    r"no other kubectl|.*/kubectl has kustomize",
    r"the full MNIST data is not under|.* is not under ",  # DIGITS_DATA
    r"the schema of \w+ is not here",  # CRD_SCHEMAS
    r"there is (a|no) GPU|downloads onnxruntime-gpu",
    r"no IPv6 on this machine",
    r"a PID namespace can not be made here",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--fail-on-skip``: for a machine on which everything was installed."""
    parser.addoption(
        "--fail-on-skip", action="store_true", help="fail on a skip that is not among the accepted"
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two a core for ``-n auto``: most tests wait for a server's process."""
    return 2 * len(os.sched_getaffinity(0))


def fixed_job() -> float:
    """Seconds that a fixed amount of work takes one core now."""
    began = time.perf_counter()
    sum(number * number for number in range(5_000_000))
    return time.perf_counter() - began


class WholeRun:
    """What the process that hands tests out to workers, or runs all, tells at the end."""

    def __init__(self, config: pytest.Config) -> None:
        self._strict = config.getoption("fail_on_skip")
        self._distributed = bool(config.getoption("numprocesses", None))
        self._unexpected: list[str] = []
        self._job_s = fixed_job() if self._distributed else 0.0
        self._began = time.perf_counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            self._look_at(report.nodeid, report.longrepr[2])

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped and isinstance(report.longrepr, tuple):
            self._look_at(report.nodeid, report.longrepr[2])

    def _look_at(self, name: str, message: str) -> None:
        reason = message.removeprefix("Skipped: ")
        if self._strict and not any(re.match(each, reason) for each in ACCEPTED_SKIPS):
            self._unexpected.append(f"{name}: {reason}")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._unexpected:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for line in self._unexpected:
            terminalreporter.write_line(f"SKIP THAT IS NOT ACCEPTED {line}", red=True)
        if self._distributed:
            wall_s = time.perf_counter() - self._began
            job_s = (self._job_s + fixed_job()) / 2
            terminalreporter.write_line(
                f"wall time {wall_s:.0f} s, {wall_s / job_s:.0f} times a fixed job of one core, "
                f"which took {job_s:.2f} s (mean of before and after)"
            )


def pytest_configure(config: pytest.Config) -> None:
    """Workers report to the first process, which speaks for all."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(WholeRun(config))


@contextlib.contextmanager
def one_at_a_time(file: Path) -> Iterator[None]:
    """Keeps other processes out that lock the same file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the first worker fills with ``make(folder)``; the others wait and use it."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # of all workers of this run
    folder, unfinished = root / name, root / f"{name}.unfinished"
    with one_at_a_time(root / f"{name}.lock"):
        if not folder.exists():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            make(unfinished)
            unfinished.rename(folder)
    return folder
