"""From options to answers: loads the pair and decodes prompts."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from apd.cli.options import LOADING, STANDARD, UsageError, sampling_of
from apd.cli.results import Prompt
from apd.config import APDConfig
from apd.generation.many import Generated
from apd.sampler import APDSampler

#: A hole in a text: its length, or its shortest and its longest.
HOLE = r"<mask:([0-9]{1,9})(?:-([0-9]{1,9}))?>"


def load(arguments: argparse.Namespace, config: APDConfig) -> APDSampler:
    """The pair that the options name, with their knobs and strategy.

    Raises:
        UsageError: the device does not exist.
        ValueError: there is no tokenizer.
    """
    if arguments.drafter is None:
        return APDSampler.from_embedded(config, strategy=arguments.strategy)
    if str(arguments.device_map).startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device-map must be a device of this machine, got {arguments.device_map}. Try cpu.")
    loading = {name: vars(arguments)[name] for name in LOADING}
    sampler = APDSampler.from_pretrained(
        arguments.drafter, arguments.verifier, config=config, strategy=arguments.strategy, **loading
    )
    if sampler.tokenizer is None:
        raise ValueError(f"{arguments.drafter} has no tokenizer files. Put the tokenizer's files beside the weights.")
    return sampler


def decode(
    sampler: APDSampler,
    prompts: Sequence[Prompt],
    arguments: argparse.Namespace,
    on_error: Callable[[int, Exception], None],
) -> Iterator[Generated]:
    """Decode prompts, each with the seed of its own index; for a file, yield every answer as soon as it is done."""
    mask = sampler.tokenizer.mask_token
    readable = []
    for prompt in prompts:
        hole = re.search(rf"{HOLE}|{re.escape(mask)}" if mask else HOLE, prompt.text)
        if hole is None:
            readable.append(prompt)
        else:
            on_error(prompt.index, ValueError(f"A prompt must have no hole, got {hole[0]!r}. Use `apd infill`."))
    prompts = readable
    return sampler.generate_many(
        [[{"role": "user", "content": prompt.text}] if arguments.chat else prompt.text for prompt in prompts],
        indices=[prompt.index for prompt in prompts],
        batch_size=arguments.batch_size,
        ordered=arguments.output == STANDARD,
        seed=arguments.seed,
        on_error=on_error,
        max_new_tokens=arguments.max_new_tokens,
        **sampling(arguments),
    )


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of sampling and stopping that were given, by their names in `generate()`."""
    options = {"do_sample": arguments.do_sample, **sampling_of(arguments)}
    if arguments.stop_string is not None:  # None would override those in the drafter's generation config
        options["stop_strings"] = arguments.stop_string
    return options
