"""From options to answers: checks the tokenizer, loads the pair and decodes prompts."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from apd.cli.report import say
from apd.cli.results import Prompt
from apd.cli.usage import LOADING, STANDARD, UsageError, sampling_of
from apd.config import APDConfig
from apd.generation.many import Generated
from apd.included.known import unknown_words
from apd.models.loading import load_tokenizer
from apd.sampler import APDSampler

INCLUDED = "the included pair"
#: A hole in a text: its length, or its shortest and its longest.
HOLE = r"<mask:([0-9]{1,9})(?:-([0-9]{1,9}))?>"


def load(
    arguments: argparse.Namespace,
    config: APDConfig,
    *,
    chats: bool = False,
    check: Callable[[Any], None] = lambda tokenizer: None,
) -> APDSampler:
    """The pair that the options name, with their knobs and strategy. The tokenizer is looked at before weights are read.

    Args:
        chats: whether prompts will go through the chat template.
        check: raises if the tokenizer cannot read what will be decoded; called before weights are read.

    Raises:
        UsageError: the device does not exist.
        ValueError: there is no tokenizer, or no chat template where one is needed.
    """
    given = vars(arguments)
    if arguments.drafter is None:
        sampler = APDSampler.from_included(config, strategy=arguments.strategy)
        _check_tokenizer(sampler.tokenizer, INCLUDED, chats=chats)
        check(sampler.tokenizer)
    else:
        if str(arguments.device_map).startswith("cuda") and not torch.cuda.is_available():
            raise UsageError(f"--device-map must be a device of this machine, got {arguments.device_map}. Try cpu.")
        tokenizer = load_tokenizer(arguments.drafter, revision=arguments.revision)
        _check_tokenizer(tokenizer, arguments.drafter, chats=chats)
        check(tokenizer)
        loading = {name: given[name] for name in LOADING} | _quantization(given.get("quantization"))
        sampler = APDSampler.from_pretrained(
            arguments.drafter, arguments.verifier, config=config, strategy=arguments.strategy, **loading
        )
    return sampler.compile() if given.get("compile") else sampler


def _check_tokenizer(tokenizer: Any, of: str, *, chats: bool) -> None:
    if tokenizer is None:
        if of != INCLUDED and not os.path.isdir(of):
            raise ValueError(
                f"{of} is no folder here, and no model of the hub with tokenizer files that can be reached or is in the cache. "
                "Check the name."
            )
        raise ValueError(f"{of} has no tokenizer files. Put the tokenizer's files beside the weights.")
    if chats and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"A chat needs a chat template, and the tokenizer of {of} has none. Leave out --chat and --system, or "
            "put chat_template.jinja beside the weights."
        )


def _quantization(bits: str | None) -> dict[str, Any]:
    if bits is None:
        return {}
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(**{f"load_in_{bits}": True})}


def decode(
    sampler: APDSampler,
    prompts: Sequence[Prompt],
    arguments: argparse.Namespace,
    on_error: Callable[[int, Exception], None],
) -> Iterator[Generated]:
    """Decode prompts, each with the seed of its own index; for a file, yield every answer as soon as it is done."""
    mask = sampler.tokenizer.mask_token
    asked: dict[int, Any] = {}
    is_noted = False
    for prompt in prompts:
        try:
            text = readable(prompt.asked, sampler.tokenizer)
            hole = None
            if isinstance(text, str):
                hole = re.search(rf"{HOLE}|{re.escape(mask)}" if mask else HOLE, text)
            if isinstance(text, str) and not is_noted and (len(prompts) == 1 or arguments.drafter is None):
                line = f", line {prompt.index + 1}" if arguments.input is not None else ""
                is_noted = note_unknown_words(text, sampler.tokenizer, line)
            if hole is not None:
                raise ValueError(f"A prompt must have no hole, got {hole[0]!r}. Use `apd infill`.")
        except ValueError as error:
            on_error(prompt.index, error)
        else:
            asked[prompt.index] = text
    return sampler.generate_many(
        [_as_chat(each) if arguments.chat else each for each in asked.values()],
        indices=list(asked),
        batch_size=arguments.batch_size,
        ordered=arguments.output == STANDARD,
        seed=arguments.seed,
        on_error=on_error,
        max_new_tokens=arguments.max_new_tokens,
        num_return_sequences=arguments.num_return_sequences,
        **sampling(arguments),
    )


def note_unknown_words(text: str, tokenizer: Any, where: str = "") -> bool:
    """Name the words that no model can read; the library's warning has only ids, in which they are all the same."""
    words = unknown_words(text, tokenizer)
    if words:
        say(
            f"apd: warning: not in the tokenizer's vocabulary{where}: {', '.join(words[:8])}{', …' * (len(words) > 8)}"
        )
    return bool(words)


def readable(asked: Any, tokenizer: Any) -> Any:
    """What is asked, as the tokenizer can read it: without a chat template, the text of the only message, which is the user's.

    Raises:
        ValueError: there is no template, and there are more messages, or others.
    """
    if not isinstance(asked, list) or getattr(tokenizer, "chat_template", None):
        return asked
    match asked:
        case [{"role": "user", "content": str(text)}] if text.strip():
            return text
    raise ValueError(
        "A chat needs a chat template, and the tokenizer has none: without one, `messages` must be one message of role user with "
        f"text, got roles {[message['role'] for message in asked]}. Write a line per prompt, or put chat_template.jinja beside the "
        "weights."
    )


def _as_chat(asked: Any) -> Any:
    return [{"role": "user", "content": asked}] if isinstance(asked, str) else asked


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of sampling and stopping that were given, by their names in `generate()`."""
    options = {"do_sample": arguments.do_sample, **sampling_of(arguments)}
    if arguments.stop_string is not None:  # None would override those in the drafter's generation config
        options["stop_strings"] = arguments.stop_string
    return options
