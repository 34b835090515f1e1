"""Command-line options that all commands share."""

from __future__ import annotations

import argparse

import torch

from benchmarks.speed.pairs import Loading, Pair, load

__all__ = ["add_loading", "add_machine", "loading_of", "pair_of", "prepared"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options that change a pair."""
    parser.add_argument("--layers", type=int, metavar="N", help="most layers of a drafter with random weights")
    parser.add_argument("--prompt-length", type=int, metavar="N", help="tokens of a random prompt")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="most tokens of an answer")


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options for the device."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(_DTYPES), help="default: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=False, help="compiled passes; graphs on a GPU"
    )
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of torch (default %(default)s)")


def prepared(options: argparse.Namespace) -> None:
    """Check the numbers and set the threads.

    Raises:
        ValueError: a number is too small, or there is no GPU.
    """
    for name in ("count", "repetitions", "layers", "prompt_length", "new_tokens", "threads", "batch"):
        values = getattr(options, name, None)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value < 1:
                raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("`--device cuda` needs a GPU that torch can see, and there is none. Use --device cpu.")
    torch.set_num_threads(options.threads)


def loading_of(options: argparse.Namespace) -> Loading:
    """The `Loading` of the options."""
    return Loading(
        device=options.device,
        dtype=_DTYPES.get(options.dtype),
        layers=options.layers,
        prompt_length=options.prompt_length,
        new_tokens=options.new_tokens,
        is_compiled=options.compile,
    )


def pair_of(name: str, loading: Loading) -> Pair:
    """Load a pair, see `pairs.load`, without progress bars, which would break up the table."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    return load(name, loading)
