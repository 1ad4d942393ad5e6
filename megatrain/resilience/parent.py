"""A rank doesn't outlive its launcher.

Design choices:
- The kernel does it (Linux, prctl(2), PR_SET_PDEATHSIG). In training a rank would notice by itself, since the store is
  its launcher's; while it starts it would wait for the store for half an hour, with its GPU.
- The signal is SIGKILL: without a store the ranks can't agree on a step to save.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

LAUNCHER = "MEGATRAIN_LAUNCHER"
"""The environment variable in which a launcher says its process id."""
_PR_SET_PDEATHSIG = 1


def die_with_launcher() -> None:
    """Has this process killed when the one that started it dies; at once if that is gone. Only on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(os.environ.get(LAUNCHER, os.getppid())):
            os.kill(os.getpid(), signal.SIGKILL)
