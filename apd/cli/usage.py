"""Refuses options that contradict each other or are out of range, before a model is loaded."""

from __future__ import annotations

import argparse
import importlib.util
import json
import zlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from apd.cli.parsing import flag
from apd.config import KNOBS, APDConfig
from apd.text import check_text

if TYPE_CHECKING:
    import torch

#: Options of sampling, by their names in `generate()`.
SAMPLING = ("temperature", "top_k", "top_p", "min_p")
#: Options of loading, by their names in `from_pretrained()`.
LOADING = (
    *("spec", "mask_token_id", "block_size", "dtype", "device_map", "attn_implementation"),
    *("revision", "verifier_revision"),
)
STANDARD = "-"  # as a file: standard input or standard output

# These do not change an answer.
_NOT_IN_FINGERPRINT = ("run", "prompt", "text", "input", "output", "batch_size", "on_error", "color", "show_steps")


class UsageError(ValueError):
    """Options that contradict each other or have values out of range: exit code 2."""


def config_of(arguments: argparse.Namespace) -> APDConfig:
    """The given knobs as an `APDConfig`.

    Raises:
        UsageError: a knob is out of range.
    """
    given = vars(arguments)
    try:
        return APDConfig(**{name: given[name] for name in KNOBS if name in given})
    except ValueError as error:
        raise UsageError(error) from None


def check_usage(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other or are out of range, before a model is loaded.

    Raises:
        UsageError: the message names the options.
    """
    check_options(arguments)
    check_decoding(arguments)


def check_options(arguments: argparse.Namespace) -> None:
    """The part of `check_usage` that does not import torch.

    Raises:
        UsageError: the message names the options.
    """
    given = vars(arguments)
    if (arguments.input is None) != (arguments.output is None):
        raise UsageError("--input and --output go together: prompts are read from one file, results go to the other.")
    if arguments.show_steps and arguments.input:
        raise UsageError("--show-steps goes with --prompt, got --input. Leave it out, or decode a single prompt.")
    rows = "batch_size" if given["batch_size"] is not None else "max_batch_size"
    for name, least in ((rows, 1), ("max_new_tokens", 0 if "text" in given else 1)):
        if given[name] is not None and given[name] < least:
            raise UsageError(f"{flag(name)} must be at least {least}, got {given[name]}.")
    useless = [flag(name) for name in SAMPLING if given[name] is not None and not arguments.do_sample]
    if useless:
        raise UsageError(f"{', '.join(useless)} without --do-sample has no effect. Add --do-sample or leave it out.")
    if arguments.num_return_sequences < 1:
        raise UsageError(f"--num-return-sequences must be at least 1, got {arguments.num_return_sequences}.")
    if arguments.num_return_sequences > 1 and not arguments.do_sample:
        raise UsageError(
            f"--num-return-sequences {arguments.num_return_sequences} needs --do-sample: greedy answers would all be equal."
        )
    check_loading(arguments, ("verifier", "quantization", *LOADING))
    if arguments.quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(
            f"--quantization {arguments.quantization} needs a package: pip install bitsandbytes. Weights that are stored "
            "quantised need no option."
        )
    if arguments.prompt == "":
        raise UsageError("--prompt must not be empty. Give it a text, or - for standard input.")
    if not all(arguments.stop_string or ()):
        raise UsageError("--stop-string must not be empty. Leave it out.")
    if arguments.verifier is None and arguments.verifier_revision is not None:
        raise UsageError("--verifier-revision without --verifier has no effect. Leave it out.")


def check_decoding(arguments: argparse.Namespace) -> None:
    """The part of `check_usage` that looks at sampling and strategies.

    Raises:
        UsageError: the message names the options.
    """
    from apd.generation.arguments import check_order, effective_config
    from apd.strategies.registry import apd_of, settle

    given = vars(arguments)
    try:
        check_text(arguments.prompt or "", "--prompt")
        for stop in arguments.stop_string or ():
            check_text(stop, "--stop-string")
        effective_config(None, [], {"do_sample": arguments.do_sample, **sampling_of(arguments)})
        chosen, config = settle(
            arguments.strategy, APDConfig(), {name: given[name] for name in KNOBS if name in given}
        )
        strategy = chosen or apd_of(config)
        check_order(strategy, config)
    except ValueError as error:
        raise UsageError(error) from None
    if arguments.drafter is not None and arguments.verifier is None and strategy.needs_verifier:
        raise UsageError("--drafter needs --verifier, or -R 1 to trust the drafter alone.")


def check_loading(arguments: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse options about a drafter without one, and a `--dtype` that is none.

    Raises:
        UsageError: the message names the options.
    """
    homeless = [flag(name) for name in names if getattr(arguments, name) is not None]
    if arguments.drafter is None and homeless:
        raise UsageError(f"{', '.join(homeless)} without --drafter: the included pair is complete. Add --drafter.")
    if arguments.dtype not in (None, "auto"):
        dtype_of(arguments.dtype)


def dtype_of(name: str) -> torch.dtype:
    """The dtype of torch with this name.

    Raises:
        UsageError: there is none.
    """
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise UsageError(f"--dtype must be a dtype of torch, got {name}. Use float32, bfloat16 or float16.")
    return dtype


def check_files(arguments: argparse.Namespace, num_processes: int) -> None:
    """Refuse unusable files before a model is loaded, and follow the links of the output.

    Raises:
        UsageError: the message names the option.
    """
    from apd.cli.results import output_file

    source, output = arguments.input, arguments.output
    if num_processes > 1:
        if output == STANDARD:
            raise UsageError(f"--output - takes one process, got {num_processes}. Name a file.")
        if source == STANDARD or (source.exists() and not source.is_file()):
            raise UsageError(
                f"--input must be a regular file where {num_processes} processes read it, got {source}. Write it to one."
            )
    if source != STANDARD and not source.exists():
        raise FileNotFoundError(f"--input must be a file, got {source}: there is none. Use - for standard input.")
    if source != STANDARD and source.is_dir():
        raise IsADirectoryError(f"--input must be a file, got the folder {source}. Name a file in it.")
    if output != STANDARD:
        arguments.output = output = output_file(output)
        if source != STANDARD and output.exists() and output.samefile(source):
            raise UsageError(f"--output must be another file than --input, got {output} for both.")


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given, by their names in `generate()`."""
    return {name: value for name in SAMPLING if (value := getattr(arguments, name)) is not None}


def fingerprint(arguments: argparse.Namespace, config: APDConfig) -> str:
    """Eight hex digits (CRC-32) of all settings that change an answer: results of another run are recognised by it."""
    settings = {name: value for name, value in vars(arguments).items() if name not in _NOT_IN_FINGERPRINT}
    settings = {name: value for name, value in settings.items() if value is not None} | asdict(config)
    settings["device_map"] = str(arguments.device_map).split(":")[0]  # which of several GPUs does not matter
    return f"{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}"
