"""Process-wide settings; only the command line changes them."""

import os

import torch
from transformers.utils import logging

from apd.cli.usage import UsageError


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
