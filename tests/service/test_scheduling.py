"""Threads that compute leave the cores to those that answer."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from service import scheduling
from service.scheduling import PATIENT_S, PROMPT_S, ask_for_slices, run_patiently, slices_of


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


def test_where_nothing_is_known_of_the_machine_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(scheduling, "_CALLS", {})
    run_patiently()
    assert slices_of(0) == 0.0
