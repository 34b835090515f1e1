"""Tasks in the official row schema, with names, prompts and words of our own.

The tasks are those of ParallelBench (arXiv 2510.04767); all texts are ours. Our prompts specify two things that the
official prompts leave open: positions count from 1, and "alphabetical" means by first name, which is also by the
whole name since no two first names of a list are equal.

    >>> from benchmarks.parallelbench import score
    >>> row = generate("waiting_line/reverse", 1, seed=0)[0]
    >>> score(row.task, row.reference, row.answer)["score_strict"]
    1.0
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from apd.included.tasks import LIST_TASKS, NAMES, Instance, instances
from benchmarks.parallelbench.words import LAST_NAMES, THEMES

__all__ = ["GENERATED_TASKS", "Row", "generate", "included_rows", "latin_squares", "sudoku_grids"]

FIRST_NAMES = NAMES  # those of the included pair
_PEOPLE = (3, 4, 5, 6)

_OPENING = "A clerk keeps the list of people who queue at a counter.\n"
_CLOSING = "\nAnswer with the final list and nothing else."
# `{context}` is the list, `{word}` the new name, `{index}` a position.
_REQUESTS = {
    "copy": "The list is:\n{context}\nWrite it down once more, unchanged.",
    "sort": "The list is:\n{context}\nPut it in alphabetical order of the first names.",
    "reverse": "The list is:\n{context}\nTurn it around, so that the last person comes first.",
    "shuffle": "The list is:\n{context}\nPut the same people in a random order that is not the one above.",
    "replace_index": '"{word}" takes the place of number {index}, counting from 1. The list is:\n{context}\n'
    "Write the new list.",
    "replace_random": '"{word}" takes the place of one person, no matter whose. The list is:\n{context}\n'
    "Write the new list.",
    "insert_index": '"{word}" joins and is number {index} from now on, counting from 1. The list is:\n{context}\n'
    "Write the new list.",
    "insert_random": '"{word}" joins at any position. The list is:\n{context}\nWrite the new list.',
    "remove_index": "Number {index}, counting from 1, goes home. The list is:\n{context}\nWrite the new list.",
    "remove_random": "One person, no matter who, goes home. The list is:\n{context}\nWrite the new list.",
}
_LATIN_SQUARE = (
    "Arrange the symbols {symbols} in {size} rows of {size} so that no row and no column has a symbol twice. "
    "Answer with the rows only, the symbols of a row separated by commas."
)
_SUDOKU = (
    "In this {size} by {size} grid every row, every column and every quarter must contain the digits 1 to {size}. A 0 "
    "is an empty cell.\n{sudoku}\nAnswer with the complete grid and nothing else."
)
_SENTENCE = "Write one sentence in which all of these words appear: {words}."
_SYMBOLS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

GENERATED_TASKS = (
    *(f"waiting_line/{name}" for name in LIST_TASKS),
    "words_to_sentence/easy",
    "words_to_sentence/medium",
    "words_to_sentence/hard",
    "puzzle/latin_square_n4",
    "puzzle/sudoku_n4_12",
)


@dataclass(frozen=True)
class Row:
    """One question in the official schema.

    Args:
        task: the official name.
        prompt: the template that `input` is put into.
        input: the content of the prompt, without examples.
        answer: the label that `score` takes.
        output_format: the answer with a mask for every item, for infilling; None where its items are not known.
        metadata: "length" and other values that were drawn.
        examples: solved rows that come first.
    """

    task: str
    prompt: str
    input: dict[str, Any]
    answer: str | dict[str, Any]
    output_format: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    examples: tuple[Row, ...] = ()

    @property
    def reference(self) -> str:
        """One right answer, as text; the source itself where a paraphrase has none."""
        if isinstance(self.answer, str):
            return self.answer
        return next(self.answer[key] for key in ("example", "summary", "text") if key in self.answer)

    @property
    def messages(self) -> list[dict[str, str]]:
        """For a chat template: every example as a question and its answer, then the question."""
        turns = []
        for row in self.examples:
            turns += [{"role": "user", "content": row.question}, {"role": "assistant", "content": row.reference}]
        return [*turns, {"role": "user", "content": self.question}]

    @property
    def question(self) -> str:
        return self.prompt.format(**self.input)

    def to_json(self) -> dict[str, Any]:
        """The official form of a line, without task and prompt, which belong to the file."""
        inputs = self.input | ({"icl_examples": [row.to_json() for row in self.examples]} if self.examples else {})
        line = {"input": inputs, "answer": self.answer, "output_format": self.output_format, "metadata": self.metadata}
        return {key: value for key, value in line.items() if value is not None}


def generate(
    task: str, count: int, seed: int, *, n: int | Sequence[int] | None = None, shots: int | None = None
) -> list[Row]:
    """`count` rows of a task, a function of the seed.

    Args:
        task: one of `GENERATED_TASKS`.
        n: the difficulty, several alternate, so that any sub-sample is balanced: people in a list (3 to 6 when not
            given), words of a sentence (4), empty cells of a Sudoku (4); a Latin square is always of size 4.
        shots: solved examples before the question; when not given as many as the benchmark has, none for sentences
            and one elsewhere.
    Raises:
        ValueError: unknown task, or an impossible difficulty.
    """
    if task not in GENERATED_TASKS:
        raise ValueError(f"`task` must be one of {', '.join(GENERATED_TASKS)}, got {task!r}.")
    group, name = task.split("/")
    draw, sizes = _GENERATORS[group if group in _GENERATORS else name]
    sizes = sizes if n is None else (n,) if isinstance(n, int) else tuple(n)
    shots = int(group != "words_to_sentence") if shots is None else shots
    rng = random.Random(f"{task} {seed}")

    def row(size: int) -> Row:
        return draw(task, name, size, rng)

    rows = []
    for turn in range(count):
        examples = tuple(row(rng.choice(sizes)) for _ in range(shots))
        rows.append(replace(row(sizes[turn % len(sizes)]), examples=examples))
    return rows


def included_rows(name: str, count: int, seed: int) -> list[Row]:
    """Instances of a list task of the included pair as rows, in its own prompts and one-word names, without examples.

    Args:
        name: one of `apd.included.tasks.LIST_TASKS`.
    """
    return [_from_instance(instance) for instance in instances(name, count, seed)]


def _from_instance(instance: Instance) -> Row:
    label = _label(instance.task, list(instance.names), instance.newcomer, instance.answer.strip())
    metadata = {"length": len(instance.names), "index": instance.place, "word": instance.newcomer}
    return Row(f"waiting_line/{instance.task}", "{text}", {"text": instance.prompt}, label, None, metadata)


# --- Lists


def _draw_list(task: str, name: str, size: int, rng: random.Random) -> Row:
    if not 2 <= size < len(FIRST_NAMES):
        raise ValueError(f"`n` must be from 2 to {len(FIRST_NAMES) - 1} people, got {size}.")
    firsts, lasts = rng.sample(FIRST_NAMES, size + 1), rng.sample(LAST_NAMES, size + 1)
    *names, word = [f"{first} {last}" for first, last in zip(firsts, lasts, strict=True)]
    at = rng.randrange(size + name.startswith("insert"))
    answer = _solve(name, names, word, at, rng)
    drawn: dict[str, Any] = {}
    if name.startswith(("replace", "insert")):
        drawn["word"] = word
    if name.endswith("index"):
        drawn["index"] = at + 1
    context = _render(names)
    label = _label(name, names, drawn.get("word"), _render(answer))
    masks = _render(["[MASK]"] * len(answer))
    prompt = _OPENING + _REQUESTS[name] + _CLOSING
    return Row(task, prompt, {"context": context, **drawn}, label, masks, {"length": size, **drawn})


def _solve(name: str, names: list[str], word: str, at: int, rng: random.Random) -> list[str]:
    if name == "sort":
        return sorted(names)
    if name == "reverse":
        return names[::-1]
    if name == "shuffle":
        answer = names
        while answer == names:
            answer = rng.sample(names, len(names))
        return answer
    if name == "copy":
        return names
    new = [] if name.startswith("remove") else [word]
    return names[:at] + new + names[at + (not name.startswith("insert")) :]


def _label(name: str, names: list[str], word: str | None, answer: str) -> str | dict[str, Any]:
    if name == "shuffle" or name.endswith("random"):
        return {"input": names, **({"word": word} if word else {}), "example": answer}
    return answer


def _render(names: Sequence[str]) -> str:
    return "[" + ", ".join(f'"{name}"' for name in names) + "]"


# --- Puzzles


@functools.cache
def latin_squares(size: int = 4) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """All Latin squares of 0 … size − 1, row by row; 576 of size 4 (the official generator draws from 144 of them)."""
    rows = list(itertools.permutations(range(size)))

    def extend(square: tuple[tuple[int, ...], ...]) -> Iterator[tuple[tuple[int, ...], ...]]:
        if len(square) == size:
            yield square
            return
        for row in rows:
            if all(a != b for above in square for a, b in zip(above, row, strict=True)):
                yield from extend((*square, row))

    return tuple(extend(()))


@functools.cache
def sudoku_grids() -> tuple[tuple[tuple[int, ...], ...], ...]:
    """All 288 solved 4×4 grids, of digits 0 … 3: the Latin squares whose quarters hold each digit once."""
    corners = list(itertools.product((0, 2), repeat=2))
    return tuple(
        grid
        for grid in latin_squares()
        if all(len({*grid[r][c : c + 2], *grid[r + 1][c : c + 2]}) == 4 for r, c in corners)
    )


def _draw_latin_square(task: str, name: str, size: int, rng: random.Random) -> Row:
    if size != 4:
        raise ValueError(f"`n` must be 4 for {task}, got {size}.")
    symbols = rng.sample(_SYMBOLS, size)
    square = rng.choice(latin_squares())
    example = "\n".join(",".join(symbols[cell] for cell in line) for line in square)
    inputs = {"size": size, "symbols": "[" + ", ".join(symbols) + "]"}
    return Row(task, _LATIN_SQUARE, inputs, {"symbols": symbols, "example": example}, None, {"length": size})


def _draw_sudoku(task: str, name: str, size: int, rng: random.Random) -> Row:
    """A grid with `size` empty cells and one solution."""
    if not 1 <= size <= 12:
        raise ValueError(
            f"`n` must be from 1 to 12 empty cells (with fewer than 4 digits no grid is unique), got {size}."
        )
    cells = [(r, c) for r in range(4) for c in range(4)]
    solution, empty = None, set()
    while solution is None:
        grid, empty = rng.choice(sudoku_grids()), set(rng.sample(cells, size))
        given = [cell for cell in cells if cell not in empty]
        if sum(all(other[r][c] == grid[r][c] for r, c in given) for other in sudoku_grids()) == 1:
            solution = grid

    def render(hidden: set[tuple[int, int]]) -> str:
        return "\n".join(
            "".join("0" if (r, c) in hidden else str(solution[r][c] + 1) for c in range(4)) for r in range(4)
        )

    return Row(task, _SUDOKU, {"size": 4, "sudoku": render(empty)}, render(set()), None, {"length": 16 - size})


# --- Words


def _draw_words(task: str, name: str, size: int, rng: random.Random) -> Row:
    """Easy: words of one theme; medium: everyday words, each of another theme; hard: abstract ones among them."""
    if name == "easy":
        words = _sample(THEMES[rng.choice(sorted(set(THEMES) - {"ideas"}))], size, rng)
    else:
        themes = _sample(sorted(set(THEMES) - {"ideas"}), size, rng)
        ideas = set(themes[::2]) if name == "hard" else set()
        used: list[str] = []
        for theme in themes:
            pool = [word for word in THEMES["ideas" if theme in ideas else theme] if word not in used]
            used.append(rng.choice(pool))
        words = used
    listed = words[0] if size == 1 else ", ".join(words[:-1]) + f"{',' * (size > 2)} and {words[-1]}"
    example = "We spoke about " + (f"the {words[0]}" if size == 1 else _enumerate(words)) + " for an hour."
    label = {"words": words, "example": example}
    return Row(task, _SENTENCE, {"words": listed}, label, None, {"length": size})


def _enumerate(words: Sequence[str]) -> str:
    return ", ".join(f"the {word}" for word in words[:-1]) + f" and the {words[-1]}"


def _sample(pool: Sequence[str], size: int, rng: random.Random) -> list[str]:
    if not 1 <= size <= len(pool):
        raise ValueError(f"`n` must be from 1 to {len(pool)} words, got {size}.")
    return rng.sample(pool, size)


_GENERATORS: dict[str, tuple[Callable[[str, str, int, random.Random], Row], tuple[int, ...]]] = {
    "waiting_line": (_draw_list, _PEOPLE),
    "words_to_sentence": (_draw_words, (4,)),
    "latin_square_n4": (_draw_latin_square, (4,)),
    "sudoku_n4_12": (_draw_sudoku, (4,)),
}
