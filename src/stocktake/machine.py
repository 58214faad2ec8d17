"""How a process uses the machine that it shares with others."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def cores() -> int:
    """Cores that this process may use; at least 1."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_the_machine() -> None:
    """Two settings that only help before the libraries are loaded; neither changes a figure.

    Threads wait asleep: ones that spin slow everything down as soon as another process wants the cores. Freed memory
    is kept for the next batch: handing it back to the system and asking again costs a quarter of the training time on
    a CPU (GNU libc only).
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
