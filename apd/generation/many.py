"""Continuous batching: a finished row makes room for the next prompt."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from apd.decoding.noise import SEED_MASK
from apd.decoding.request import Request
from apd.generation.batch import Batch, Generated
from apd.kinds import WHOLE
from apd.text import check_text

#: What a prompt may be: text, a chat (a list of messages), or token ids.
Prompt = str | list[dict[str, Any]] | list[int] | Tensor

_LONG = 16  # characters per token, above what texts have on average in any language


def check_prompts(prompts: Any) -> None:
    """Refuse iterables whose items are not prompts.

    Raises:
        TypeError: one text, the output of a tokenizer, or a padded batch.
    """
    if isinstance(prompts, (str, Mapping)) or hasattr(prompts, "keys"):
        raise TypeError(f"`prompts` must be many prompts, got one {type(prompts).__name__}. Put texts in a list.")
    if isinstance(prompts, Tensor):
        raise TypeError(
            f"`prompts` must be a list, got a tensor of shape {list(prompts.shape)}, where padding cannot be told from "
            "prompt. Give a list of ids for each prompt."
        )


def encode(prompt: Prompt, tokenizer: Any, most_tokens: int | None = None) -> Tensor:
    """A prompt as ids, `1 n` int64. A chat whose last message is the assistant's is left open, to be continued; so is a text
    behind which the tokenizer puts special tokens that close it, such as BERT's [SEP].

    Args:
        most_tokens: a text whose beginning has more than twice as many is refused without looking at the rest, which can
            take minutes to tokenise.
    Raises:
        ValueError: text without a tokenizer, too long or not to be written in UTF-8, or a chat that the template refuses.
        TypeError: `prompt` is none of the forms of `Prompt`.
    """
    if hasattr(prompt, "tolist"):  # a tensor, an array
        prompt = prompt.tolist()
        if len(prompt) == 1 and isinstance(prompt[0], list):
            prompt = prompt[0]
    if isinstance(prompt, list) and all(isinstance(token, numbers.Integral) for token in prompt):
        return torch.tensor([prompt], dtype=torch.int64, device="cpu")
    is_chat = isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt)
    if not is_chat and not isinstance(prompt, str):
        raise TypeError(
            "A prompt must be a string, a chat (list of messages) or a list of ids, got "
            f"{type(prompt).__name__} {reprlib.repr(prompt)}."
        )
    if tokenizer is None:
        raise ValueError("A prompt must be a list of ids, got text: the sampler has no tokenizer. Give it one.")
    if isinstance(prompt, str):
        _check_text_of_prompt(prompt, tokenizer, most_tokens)
        return torch.tensor([_open_ids(prompt, tokenizer)], dtype=torch.int64, device="cpu")
    chat: Any = prompt
    is_begun = chat[-1].get("role") == "assistant"
    render = partial(
        tokenizer.apply_chat_template,
        chat,
        add_generation_prompt=not is_begun,
        continue_final_message=is_begun,
        return_dict=False,
    )
    try:
        text = render(tokenize=False)
    except Exception as error:  # templates are programs and raise anything
        raise ValueError(
            f"The chat must suit the tokenizer's template, got {reprlib.repr(prompt)}: {type(error).__name__}: {error}"
        ) from error
    _check_text_of_prompt(text, tokenizer, most_tokens, add_special_tokens=False)
    check_chat(text, tokenizer)
    return torch.tensor([render(tokenize=True)], dtype=torch.int64, device="cpu")


def check_chat(text: str, tokenizer: Any) -> None:
    """Refuse a rendered chat with a mask token in it.

    Raises:
        ValueError: there is one.
    """
    if (mask := getattr(tokenizer, "mask_token", None)) and mask in text:
        raise ValueError(
            f"A message must not hold the tokenizer's mask token {mask!r}, got {reprlib.repr(text)}: a hole in a chat is hardly "
            "meant. Render the chat yourself and give its ids, or use `infill`."
        )


def _open_ids(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    if not ids or ids[-1] not in getattr(tokenizer, "all_special_ids", ()):
        return ids
    bare: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    for end in range(len(ids), max(len(bare), 1) - 1, -1):
        if ids[end - len(bare) : end] == bare:
            return ids[:end]
    return ids


def _check_text_of_prompt(text: str, tokenizer: Any, most_tokens: int | None, **kwargs: Any) -> None:
    check_text(text, "A prompt")
    if most_tokens is None or len(text) <= _LONG * most_tokens:
        return
    # No bound on a token's characters holds for all tokenizers: some drop spaces, or take any unknown word for one token.
    # So the beginning is tokenised. Its tokens differ from those of the whole where it was cut; twice allows for far more.
    beginning = text[: _LONG * most_tokens]
    num_tokens = len(tokenizer(beginning, **kwargs)["input_ids"])
    if num_tokens > 2 * most_tokens:
        raise ValueError(
            f"Prompt and new tokens must fit the models' {most_tokens} positions, got {num_tokens} tokens in the first "
            f"{len(beginning)} of {len(text)} characters. Shorten the prompt."
        )


class Queue:
    """Prompts that wait for a free row, drawn one by one, each `copies` times.

    Answer j to prompt i has the number i · copies + j.

    Args:
        prompts: pairs of the prompt's own number and the prompt; these numbers are all different.
        request_of: (number of the prompt, number among its answers, prompt) → checked request.
        on_error: called with number and error of a refused prompt, which is then left out; `None` raises.
        copies: answers to each prompt.

    Attributes:
        places: number of an answer → rank in the order of drawing, from 0.
        refused: ranks of the answers to refused prompts.
    """

    def __init__(
        self,
        prompts: Iterable[tuple[int, Prompt]],
        request_of: Callable[[int, int, Prompt], Request],
        on_error: Callable[[int, Exception], None] | None,
        *,
        copies: int = 1,
    ) -> None:
        self.copies = copies
        self.prompts = self._checked(prompts)
        self.request_of = request_of
        self.on_error = on_error
        self.places: dict[int, int] = {}
        self.refused: set[int] = set()

    def draw(self) -> tuple[Request, int] | None:
        """The next answer's request and number; `None` at the end.

        Raises:
            TypeError: the number of a prompt is not whole.
            ValueError: it is out of range or comes twice, or a prompt is refused and there is no `on_error`.
        """
        for index, copy, prompt in self.prompts:
            number = index * self.copies + copy
            self.places[number] = len(self.places)
            try:
                return self.request_of(index, copy, prompt), number
            except (ValueError, TypeError) as error:
                if self.on_error is None:
                    raise ValueError(f"Prompt {index}: {error}") from error
                self.refused.add(self.places[number])
                if not copy:  # told once
                    self.on_error(index, error)
        return None

    def _checked(self, prompts: Iterable[tuple[int, Prompt]]) -> Iterator[tuple[int, int, Prompt]]:
        for given, prompt in prompts:
            index = given.tolist() if hasattr(given, "tolist") else given  # a number of torch or numpy
            if not WHOLE.fits(index):
                raise TypeError(
                    f"`indices` must be whole numbers, one per prompt, got {given!r}. Leave them out for 0, 1, …"
                )
            if not 0 <= index <= SEED_MASK // self.copies:
                limit = f"2^63 / {self.copies}" if self.copies > 1 else "2^63"
                raise ValueError(
                    f"`indices` must be at least 0 and below {limit}, got {index}. Leave them out for 0, 1, …"
                )
            if index * self.copies in self.places:
                raise ValueError(f"`indices` must all be different, got {index} twice.")
            yield from ((index, copy, prompt) for copy in range(self.copies))


def answers(queue: Queue, batch: Batch, *, batch_size: int) -> Iterator[Generated]:
    """Decode the prompts, at most `batch_size` rows together, and yield each answer as soon as it is done."""
    _fill(batch, queue, batch_size)
    while batch.num_rows:
        stepped = batch.step()
        for answer in stepped.ended:
            index, sequence = divmod(answer.index, queue.copies)
            yield replace(answer, index=index, sequence=sequence)
        for error in stepped.failed.values():
            raise error
        _fill(batch, queue, batch_size)


def in_order(answers: Iterator[Generated], queue: Queue) -> Iterator[Generated]:
    """The answers in the order of their prompts; early ones wait."""
    early: dict[int, Generated] = {}
    wanted = 0
    for answer in answers:
        early[queue.places[answer.index * queue.copies + answer.sequence]] = answer
        while wanted in early or wanted in queue.refused:
            if wanted in early:
                yield early.pop(wanted)
            wanted += 1
    yield from (early[place] for place in sorted(early))


def _fill(batch: Batch, queue: Queue, batch_size: int) -> None:
    while batch.num_rows < batch_size and (newcomer := queue.draw()) is not None:
        batch.add(*newcomer)
