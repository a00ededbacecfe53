"""Threads that compute leave the cores to those that answer."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
import threading
from pathlib import Path

import pytest

from service.host import scheduling
from service.host.scheduling import PATIENT_S, PROMPT_S, ask_for_slices, run_patiently

# Numbers of the system call sched_getattr, for which C libraries have no name.
SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}


def slices_of(thread: int) -> float:
    """The length of a thread's slices in seconds, by its id; 0 where the kernel does not tell."""
    call = SCHED_GETATTR.get(platform.machine()) if sys.platform == "linux" else None
    attributes = ctypes.create_string_buffer(48)
    if call is None or ctypes.CDLL(None).syscall(call, thread, attributes, 48, 0):
        return 0.0
    return struct.unpack("=IIQiIQQQ", attributes.raw)[5] / 1e9


def in_thread(work):
    """What ``work`` returns on a thread of its own."""
    results = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    return results[0]


def asked(seconds):
    """The slices and the niceness of a thread that has asked for slices."""

    def work():
        ask_for_slices(seconds)
        return slices_of(0), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    return in_thread(work)


@pytest.fixture
def kernel_tells():
    if asked(PROMPT_S)[0] != PROMPT_S:
        pytest.skip("slices of a thread's own need Linux 6.12 or newer")


@pytest.mark.usefixtures("kernel_tells")
def test_a_thread_gets_the_slices_it_asks_for_and_no_more_of_the_cores():
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    assert asked(PATIENT_S) == (PATIENT_S, nice)
    assert asked(PROMPT_S) == (PROMPT_S, nice)


@pytest.mark.usefixtures("kernel_tells")
def test_only_threads_that_compute_are_patient(server):
    threads = [int(thread.name) for thread in Path(f"/proc/{server.process.pid}/task").iterdir()]
    slices = [slices_of(thread) for thread in threads]
    assert slices_of(server.process.pid) == PROMPT_S
    # The event loop and what reads and writes sockets; slots, and the one that decodes files. Those
    # of libraries that were there before are neither, and have nothing to do.
    assert slices.count(PROMPT_S) > 2
    assert slices.count(PATIENT_S) >= 2


@pytest.mark.usefixtures("kernel_tells")
@pytest.mark.parametrize("name", ["machine", "policy"])
def test_another_machine_and_another_policy_are_left_alone(monkeypatch, name):
    if name == "machine":
        monkeypatch.setattr(scheduling, "_CALLS", {})
    else:
        monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_IDLE)
    before = slices_of(0)
    assert asked(PATIENT_S if before == PROMPT_S else PROMPT_S)[0] == before


def test_a_system_that_does_not_tell_the_policy_is_left_alone(monkeypatch):
    def unknown(_):
        raise OSError(errno.ENOSYS, "Function not implemented")  # as musl's does

    monkeypatch.setattr(os, "sched_getscheduler", unknown)
    run_patiently()
