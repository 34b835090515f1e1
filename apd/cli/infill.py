"""`apd infill`: fills the holes of one text, or of a file of texts."""

from __future__ import annotations

import argparse
import itertools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from apd.cli import generate
from apd.cli.answers import HOLE, sampling
from apd.cli.files import Task
from apd.cli.report import say
from apd.cli.results import Prompt, Row, kept
from apd.cli.usage import UsageError
from apd.config import KNOBS
from apd.decoding.noise import mix_seed
from apd.generation.infilling import Infilled, Part, texts_of
from apd.sampler import APDSampler
from apd.show.rows import number

#: A part as JSON has it: a string, a number of masks, or `{"range": [least, most]}`.
Given = str | int | dict[str, list[int]]


def run(arguments: argparse.Namespace) -> None:
    """Run the command with parsed arguments.

    Raises:
        UsageError: the options cannot be used together, one is out of range, or the text has no hole.
    """
    if arguments.text is not None:
        try:
            checked(parts_of(arguments.text))
        except (ValueError, TypeError) as error:
            raise UsageError(f"--text: {error}") from None
    generate.answer(arguments, INFILL, _answer_text, "--text")


def parts_of(text: str) -> list[Given]:
    """The parts of a text with holes written as `<mask:8>` or `<mask:4-12>`."""
    pieces: list[str | None] = re.split(HOLE, text)
    found: list[Given] = []
    for i in range(0, len(pieces), 3):
        if piece := pieces[i]:
            if "<mask:" in piece:
                at = piece.index("<mask:")
                raise ValueError(f"A hole must be written <mask:8> or <mask:4-12>, got {piece[at : at + 20]!r}.")
            found.append(piece)
        if i + 1 < len(pieces):
            least, most = pieces[i + 1 : i + 3]
            assert least is not None
            found.append(int(least) if most is None else {"range": [int(least), int(most)]})
    return found


def checked(given: Any) -> list[Part]:
    """Parts as JSON has them, as parts of `APDSampler.infill`.

    Raises:
        ValueError, TypeError: they are none, or have no hole.
    """
    (text,) = texts_of([[_part(each) for each in given]] if isinstance(given, list) and given else given)
    if all(isinstance(part, str) for part in text):
        raise ValueError(
            f"A text must have a hole, such as <mask:8>, got {text!r}. Use `apd generate` to continue a text."
        )
    return text


def _part(given: Any) -> Any:
    if not isinstance(given, dict):
        return given
    match given:
        case {"range": [int(least), int(most)]} if len(given) == 1 and 1 <= least <= most:
            return range(least, most + 1)
    raise ValueError(
        f'A hole of unknown length must be {{"range": [least, most]}} with 1 ≤ least ≤ most, got {json.dumps(given)}.'
    )


def _read_line(line: bytes) -> tuple[list[Given], Row]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
        has_text = isinstance(row["text"], str) if "text" in row else None
        is_known = ("parts" in row) != bool(has_text)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        is_known = False
    if not is_known:
        raise ValueError(
            'expected {"text": "... <mask:8> ..."} or {"parts": ["...", 8, "..."]}, got '
            f"{line[:60].decode(errors='replace').strip()!r}"
        )
    parts: list[Given] = row["parts"] if "parts" in row else parts_of(row["text"])
    try:
        checked(parts)
    except TypeError as error:
        raise ValueError(str(error)) from None
    return parts, {"given": parts} | kept(row, (), without=("text", "parts"))


def _decode(
    sampler: APDSampler,
    prompts: Sequence[Prompt],
    arguments: argparse.Namespace,
    on_error: Callable[[int, Exception], None],
) -> Iterator[tuple[int, Row]]:
    for prompt, found in infill(sampler, prompts, arguments, on_error):
        yield (
            prompt.index,
            {
                "text": found.text,
                "parts": found.parts,
                "holes": [asdict(hole) for hole in found.holes],
                "score": found.score,
                "new_tokens": found.new_tokens,
                "drafter_forwards": found.drafter_forwards,
                "verifier_forwards": found.verifier_forwards,
            },
        )


def infill(
    sampler: APDSampler,
    prompts: Sequence[Prompt],
    arguments: argparse.Namespace,
    on_error: Callable[[int, Exception], None],
) -> Iterator[tuple[Prompt, Infilled]]:
    """Fill texts, each with the seed of its own index, in batches; a text with holes of unknown length is one by itself."""
    options = {name: vars(arguments)[name] for name in KNOBS if name in arguments} | sampling(arguments)
    options["max_new_tokens"] = arguments.max_new_tokens

    def fill(batch: Sequence[Prompt]) -> list[Infilled]:
        seeds = [mix_seed(arguments.seed, prompt.index) for prompt in batch]
        seed = seeds[0] if _has_range(batch[0]) else seeds
        return sampler.infill([checked(prompt.asked) for prompt in batch], seed=seed, **options)

    for batch in _batches(prompts, arguments.batch_size):
        try:
            found = list(zip(batch, fill(batch), strict=True))
        except (ValueError, TypeError):  # of one of them
            found = []
            for prompt in batch:
                try:
                    found.append((prompt, fill([prompt])[0]))
                except (ValueError, TypeError) as error:
                    on_error(prompt.index, error)
        yield from found


def _has_range(prompt: Prompt) -> bool:
    return any(isinstance(part, dict) for part in prompt.asked)


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[list[Prompt]]:
    for has_range, group in itertools.groupby(prompts, _has_range):
        while batch := list(itertools.islice(group, 1 if has_range else size)):
            yield batch


def _answer_text(sampler: APDSampler, arguments: argparse.Namespace) -> None:
    def refuse(index: int, error: Exception) -> None:
        raise error

    _, found = next(infill(sampler, [Prompt(0, parts_of(arguments.text))], arguments, refuse))
    print(found.text)
    tokens = found.new_tokens
    rate = f" ({tokens / found.drafter_forwards:.1f} tokens each)" if found.drafter_forwards else ""
    say(
        f"{number(tokens, 'token')} in {number(len(found.holes), 'hole')}, "
        f"{number(found.drafter_forwards, 'drafter forward')}{rate}, "
        f"{number(found.verifier_forwards, 'verifier forward')}, score {found.score:.3f}"
    )


#: `apd infill`.
INFILL = Task(_read_line, _decode)
