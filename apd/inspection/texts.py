"""Text that models are tried on: ten short prompts with an answer each, or a text of the caller's."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from apd.generation.many import encode
from apd.inspection.canvases import Stretch
from apd.models.chat_turns import ChatTurns
from apd.models.retokenized import Language

#: Tokens of an answer at most, and of a prompt with its answer.
MOST_ANSWER, MOST_TOKENS = 48, 512
#: Prompts with answers of the caller's that are tried at most; of more, as many are taken, evenly spread.
MOST_PAIRS = 48
#: Stretches that a text of the caller's is cut into, and their tokens.
_LEAST_STRETCHES, _MOST_STRETCHES, _LEAST_TOKENS, _TOKENS = 4, 12, 16, 48


#: What to do where weights seem to know nothing of the text.
TEXT_OF_THEIRS = (
    "If they were trained on other text than this, give some of it: --text FILE, or --text FILE.jsonl with a "
    '{"prompt": "...", "answer": "..."} per line; in Python text=[(prompt, answer), ...].'
)


class Example(NamedTuple):
    """A prompt and a good answer, which begins with what stands between the two in plain text."""

    prompt: str
    answer: str


EXAMPLES = tuple(
    Example(prompt, "\n" + answer)
    for prompt, answer in (
        (
            "Count from one to twenty in words.",
            "one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen, fourteen, fifteen, sixteen, "
            "seventeen, eighteen, nineteen, twenty",
        ),
        (
            "Write a Python function that adds the numbers of a list.",
            "def add(numbers):\n    total = 0\n    for number in numbers:\n        total = total + number\n    return total\n\n"
            "print(add([1, 2, 3]))",
        ),
        (
            "Name the days of the week and the months of the year.",
            "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday. January, February, March, April, May, June, July, "
            "August, September, October, November, December.",
        ),
        (
            "Why does ice float on water?",
            "Ice floats on water because it is less dense than liquid water. When water freezes, its molecules form a crystal "
            "with more space between them, so the same mass takes up more volume.",
        ),
        (
            "Write the nine times table.",
            "9 x 1 = 9\n9 x 2 = 18\n9 x 3 = 27\n9 x 4 = 36\n9 x 5 = 45\n9 x 6 = 54\n9 x 7 = 63",
        ),
        (
            "Tell me how to make a cup of tea.",
            "First, boil some water. Then put a tea bag into a cup and pour the hot water over it. Wait for about three minutes, "
            "take the tea bag out of the cup, and add milk or sugar if you like.",
        ),
        (
            "Write a short letter that asks for a day off.",
            "Dear Ms. Miller,\n\nI would like to take a day off next Friday, because my sister is getting married. I will finish "
            "my work before I leave. Thank you very much.\n\nBest regards,\nAnna",
        ),
        (
            "Repeat this sentence twice: The quick brown fox jumps over the lazy dog.",
            "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog.",
        ),
        (
            "A train goes 60 km in one hour. How far does it go in three hours?",
            "In one hour the train goes 60 km. In three hours it goes 3 times as far: 3 x 60 km = 180 km. The answer is 180 km.",
        ),
        (
            "Give me a JSON object for a person named Tom, aged 30, who lives in Paris.",
            '{\n  "name": "Tom",\n  "age": 30,\n  "city": "Paris",\n  "country": "France"\n}',
        ),
    )
)


def stretches_of(tokenizer: Any, examples: Sequence[Example], stop: int | None = None) -> list[Stretch]:
    """Examples as ids: chats, where the tokenizer has a template.

    Args:
        tokenizer: the drafter's.
        stop: the token that ends an answer, if it is known.
    """
    language, is_chat = Language(tokenizer), ChatTurns.of(tokenizer) is not None
    made = []
    for prompt, answer in examples:
        if is_chat:
            ids = encode([{"role": "user", "content": prompt}], tokenizer)[0].tolist()
        else:
            ids = [*language.leading, *language.encode(prompt).ids]
        said = language.encode(answer.strip() if is_chat else answer).ids[:MOST_ANSWER]
        ended = [stop] if stop is not None and len(said) < MOST_ANSWER else []
        made.append(Stretch(tuple(ids), (*said, *ended)))
    return made


def cut(tokenizer: Any, text: str) -> list[Stretch]:
    """A text as stretches, a few from all of it; the first two thirds of each are its prompt.

    Stretches are paragraphs, or lines where there are no empty ones, if there are four or more; else pieces of equal length.

    Raises:
        ValueError: it is too short.
    """
    language = Language(tokenizer)
    paragraphs = [
        part for part in re.split(r"\n\s*\n" if re.search(r"\n\s*\n", text) else r"\n", text) if part.strip()
    ]
    if len(paragraphs) >= _LEAST_STRETCHES:
        pieces = [language.encode(part).ids[:_TOKENS] for part in paragraphs]
        pieces = [piece for piece in pieces if len(piece) >= _LEAST_TOKENS]
    else:
        ids = language.encode(text).ids
        pieces = [ids[first : first + _TOKENS] for first in range(0, len(ids) - _TOKENS + 1, _TOKENS)]
    if not pieces:
        raise ValueError(
            f"`text` must have at least {_TOKENS} tokens of the drafter's tokenizer, or {_LEAST_STRETCHES} paragraphs of "
            f"{_LEAST_TOKENS}, got {len(language.encode(text).ids)} tokens. Give more of it."
        )
    count = min(len(pieces), _MOST_STRETCHES)
    kept = [pieces[i * len(pieces) // count] for i in range(count)]
    return [
        Stretch((*language.leading, *piece[: 2 * len(piece) // 3]), tuple(piece[2 * len(piece) // 3 :]))
        for piece in kept
    ]


def random_stretches(vocab_size: int, banned: Sequence[int], most: int) -> list[Stretch]:
    """Ten stretches of random ids, for a model without a tokenizer.

    Args:
        vocab_size: ids are below it.
        banned: ids that are left out, such as the mask token.
        most: tokens of a stretch, at most.
    """
    rng = random.Random(0)
    ids = sorted(set(range(vocab_size)) - set(banned))
    answer = max(min(MOST_ANSWER, most) // 2, 1)
    return [
        Stretch(
            tuple(rng.choices(ids, k=rng.randint(1, max(most // 2 - 1, 1)))),
            tuple(rng.choices(ids, k=answer)),
        )
        for _ in range(10)
    ]


def unknown_share(tokenizer: Any, stretches: Sequence[Stretch]) -> float:
    """The share of tokens that are the tokenizer's unknown token."""
    ids = [token for stretch in stretches for token in stretch.ids]
    return ids.count(tokenizer.unk_token_id) / len(ids) if tokenizer.unk_token_id is not None else 0.0
