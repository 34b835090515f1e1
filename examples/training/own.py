"""A pair of one's own: a data set of prompts and answers, its vocabulary, and its sizes."""

import json
import random
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from apd import APDSampler
from training.batches import Example, RowSource, Shape
from training.networks import Recipe
from training.table import SETTINGS, measure, print_sizes, print_table

LONGEST = 256  # tokens of a prompt with the canvas behind it; more is slow on a CPU
LEAST_VOCABULARY = 259  # all bytes, and the special tokens
SPECIAL_TOKENS = ("<pad>", "<eos>", "<mask>")

# Trained by the clock: only the ratio of their steps counts.
DRAFTER = Recipe(layers=3, width=96, heads=4, hidden=256, rows=32, causal_steps=1, masked_steps=3)
VERIFIER = Recipe(layers=2, width=32, heads=2, hidden=96, rows=32, causal_steps=1, masked_steps=0)


@dataclass(frozen=True)
class Line:
    """A prompt and its answer; the answer follows the prompt directly."""

    prompt: str
    answer: str

    @property
    def is_held_out(self) -> bool:
        """Whether it is kept for the table: one prompt in ten, by a hash of its text."""
        return zlib.crc32(self.prompt.encode()) % 10 == 0


def read(path: Path) -> list[Line]:
    """The lines of a file, to train on and to hold out.

    Raises:
        ValueError: a line is none, or there are too few.
    """
    lines = lines_of(path)
    for is_held_out, name in ((False, "train on"), (True, "hold out")):
        if not any(line.is_held_out == is_held_out for line in lines):
            raise ValueError(
                f"`--data` must have lines to {name}, got none among {len(lines)}: one prompt in ten is held out, by a hash. "
                "Add lines, hundreds at least."
            )
    return lines


def lines_of(path: Path) -> list[Line]:
    """The lines of a JSONL file of `{"prompt": …, "answer": …}`, at least one.

    Raises:
        ValueError: a line is none.
    """
    lines = []
    # Not `splitlines`: a text may hold U+2028 and the like.
    for number, text in enumerate(path.read_text("utf-8").rstrip("\n").split("\n"), 1):
        try:
            record = json.loads(text)
            line = Line(record["prompt"], record["answer"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'`--data` must hold one {{"prompt": "...", "answer": "..."}} per line, got line {number}: {error!r}.'
            ) from None
        if not (isinstance(line.prompt, str) and isinstance(line.answer, str) and line.prompt and line.answer.strip()):
            raise ValueError(f"`--data` must have texts that are not empty, got line {number}: {text[:80]}.")
        lines.append(line)
    return lines


def build_tokenizer(lines: Sequence[Line], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of the training lines, digits one by one; it spells any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (text for line in lines if not line.is_held_out for text in (line.prompt, line.answer))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def row_source(lines: Sequence[Line], tokenizer: PreTrainedTokenizerFast, seed: int) -> RowSource:
    """The training lines in random order, with the shape that all lines need.

    Raises:
        ValueError: a line is too long.
    """
    encode = tokenizer.backend_tokenizer.encode
    encoded = [Example(encode(line.prompt).ids, encode(line.answer).ids) for line in lines]
    longest_answer = max(len(example.answer) for example in encoded) + 1
    canvas = longest_answer + -longest_answer % 8
    for number, example in enumerate(encoded, 1):
        if len(example.prompt) + canvas > LONGEST:
            raise ValueError(
                f"`--data` must have prompts of at most {LONGEST - canvas} tokens beside answers of {canvas}, got "
                f"{len(example.prompt)} in line {number}. Shorten it, or leave it out."
            )
    longest_prompt = max(len(example.prompt) for example in encoded)
    longest_row = max(len(example.prompt) + len(example.answer) + 1 for example in encoded)
    shape = Shape(longest_prompt + canvas, canvas, longest_row, longest_answer)
    seen = [example for line, example in zip(lines, encoded, strict=True) if not line.is_held_out]

    def examples(rng: random.Random, count: int, half: int) -> Iterator[Example]:
        yield from rng.choices(seen, k=count)

    return RowSource(examples, shape, tokenizer.pad_token_id, tokenizer.eos_token_id, seed)


def content(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """`v` bool, the tokens that carry an answer: all but the special ones."""
    return torch.arange(len(tokenizer)) >= len(SPECIAL_TOKENS)


def print_tables(lines: Sequence[Line], drafter: Path, verifier: Path, canvas: int, count: int) -> None:
    """Accuracy (the same text) and tokens per forward, greedy, on held-out lines and on lines of the training."""
    sampler = APDSampler.from_pretrained(str(drafter), str(verifier))
    print(
        f"Greedy, {canvas} new tokens: accuracy @ tokens per drafter forward (of the verifier alone: per verifier forward)\n"
    )

    def rows() -> Iterator[tuple[str, list]]:
        for name, is_held_out in {"held out": True, "trained on": False}.items():
            some = [line for line in lines if line.is_held_out == is_held_out]
            some = random.Random(0).sample(some, min(count, len(some)))

            def is_right(i: int, text: str, some: list[Line] = some) -> bool:
                return text.strip() == some[i].answer.strip()

            prompts = [line.prompt for line in some]
            results = [measure(sampler, prompts, is_right, canvas, setting) for setting in SETTINGS.values()]
            yield f"{name} ({len(some)} lines)", results

    print_table("lines", rows(), total=False)
    print_sizes(sampler, drafter, verifier)
