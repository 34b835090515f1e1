"""The processes of one run, started by a launcher (`torchrun`, `accelerate launch`), and their barriers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from accelerate import PartialState  # type: ignore[import-untyped]

__all__ = ["are_launched", "join", "leave", "meet", "together"]

_PATIENCE = timedelta(days=7)  # a finished process waits so long for the others


def are_launched() -> bool:
    """True if a launcher has started this process."""
    return "LOCAL_RANK" in os.environ


def join(*, on_cpu: bool) -> PartialState:
    """Join the process group; without a launcher it has one process. Returns this process's number and device.

    Processes exchange little, so the backend is gloo on GPUs too: a waiting process leaves its GPU idle.

    Args:
        on_cpu: use no accelerator even where there is one.
    """
    from accelerate import PartialState

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = on_cpu or accelerator is None or accelerator.type == "mps"  # a machine has one such device
    launched = {"backend": "gloo", "timeout": _PATIENCE} if are_launched() else {}
    return PartialState(cpu=on_cpu, **launched)


def meet() -> None:
    """Wait for every process.

    Accelerate's `wait_for_everyone` uses the GPU with this process's number, which need not exist for a CPU process.

    Raises:
        RuntimeError: another process has ended early.
    """
    if torch.distributed.is_initialized():
        with together():
            torch.distributed.barrier()


def leave() -> None:
    """Leave the process group, without waiting for the others."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def together() -> Iterator[None]:
    """Name the cause of a collective operation that fails because another process has ended."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError("another process of this run has ended early; its message says why") from error
