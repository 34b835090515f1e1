"""Process-wide settings; only the command line changes them."""

import contextlib
import ctypes
import os
import sys

import torch
from transformers.utils import logging

from apd.cli.usage import UsageError

_TRIM, _MMAP = -1, -3  # of <malloc.h>


def set_up(*, included: bool) -> None:
    """Set the number of torch's threads: `APD_NUM_THREADS`, by default 1 for the included pair, which is fastest so.

    The included pair also loads too fast for progress bars.

    Raises:
        UsageError: `APD_NUM_THREADS` is not a whole number of at least 1.
    """
    if included:
        logging.disable_progress_bar()
    wanted = os.environ.get("APD_NUM_THREADS", "1" if included else "")
    if not wanted:
        return
    if not wanted.isdigit() or int(wanted) < 1:
        raise UsageError(f"APD_NUM_THREADS must be a whole number of at least 1, got {wanted!r}. Unset it or use 1.")
    torch.set_num_threads(int(wanted))


def keep_memory() -> None:
    """Let glibc keep the memory that a decode step on the CPU has freed, for the next one.

    It may return large blocks to the system after every step, and the next one then waits for page faults. How much that costs
    is seen in the CPU time per token of `python -m benchmarks.serve --layers 32`, with a variable such as MALLOC_ARENA_MAX=8
    and without one: thresholds of the environment are left as they are.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for threshold in (_TRIM, _MMAP):
            mallopt(threshold, 1 << 30)
