"""Which threads the kernel lets run as soon as they have work, and which may wait a moment.

Each thread asks for the length of the slices in which it gets its share of the cores. One that
wakes and asks for shorter slices than the one that runs goes first; over time neither gets more
than the other, nor more than other processes leave them. A thread that is started asks for what its
starter does. Linux before 6.12 takes no notice. Source: docs.kernel.org/scheduler/sched-eevdf.html,
man 2 sched_setattr.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import struct
import sys

# Number of the system call sched_setattr, for which C libraries have no name.
_CALLS = {"x86_64": 314, "aarch64": 274}
# struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
# The shortest that the kernel knows, and well beyond the length of a batch.
PROMPT_S = 0.1e-3
PATIENT_S = 10e-3


def run_promptly() -> None:
    """For threads that receive and answer calls, each in less time than a batch takes."""
    ask_for_slices(PROMPT_S)


def run_patiently() -> None:
    """For threads that compute: those that receive and answer go first."""
    ask_for_slices(PATIENT_S)


def ask_for_slices(seconds: float) -> None:
    """Asks the kernel to run this thread in slices of so long; what refuses or can not is left be.

    A thread that somebody gave another policy than the normal ones keeps it.
    """
    call = _CALLS.get(platform.machine()) if sys.platform == "linux" else None
    if call is None:
        return
    with contextlib.suppress(OSError):
        policy = os.sched_getscheduler(0)
        if policy in (os.SCHED_OTHER, os.SCHED_BATCH):
            _set_slices(call, policy, seconds)


def _set_slices(call: int, policy: int, seconds: float) -> None:
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, 0, nice, 0, round(seconds * 1e9), 0, 0)
    ctypes.CDLL(None).syscall(call, 0, attributes, 0)
