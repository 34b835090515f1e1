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

    It returns large blocks to the system at once where a thread other than the main one frees them. The next step then waits for
    25,000 page faults, with a drafter of 32 small layers: a fifth of the processor time of decoding (`python -m benchmarks.serve`).
    Thresholds of the environment are left as they are.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for threshold in (_TRIM, _MMAP):
            mallopt(threshold, 1 << 30)
