"""The tasks of the included pair: ten list operations and short arithmetic stories, with their scorer.

The list operations are ParallelBench's waiting line (arXiv:2510.04767), with new wordings and names. They are the
smallest tasks in which parallel decoding can fail: copying six names in one step is safe; shuffling them is not, since
the names must differ from each other. Places count from 1; alphabetical order is Python's `sorted`.

Prompts and answers have a closed vocabulary, so a word-level tokenizer reproduces them exactly.

    >>> instance = instances("reverse", 1, seed=0)[0]
    >>> is_right(instance, instance.answer)
    True
"""

import random
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

NAMES: tuple[str, ...] = tuple(
    """Ada Amir Bea Ben Carl Cleo Dan Dora Emil Eva Fay Finn Gil Gus Hana Hugo Ines Ivo Joan Jude Kira Kurt
    Leo Lina Max Mia Nils Nora Olga Otto Paul Pia Quin Rita Rosa Sam Sven Tara Uma Vera Wim Xena Yuri Zoe""".split()
)

# Wordings per task: `{list}` is the list, `{new}` the new name, `{place}` a place counted from 1. An inserted name has
# this place in the answer.
WORDINGS: dict[str, tuple[str, ...]] = {
    "copy": (
        "Copy this list: {list}.",
        "Repeat the names as they stand: {list}.",
        "Write the same list again: {list}.",
    ),
    "reverse": ("Reverse this list: {list}.", "Write the names from last to first: {list}."),
    "sort": ("Sort the names from A to Z: {list}.", "Put this list in alphabetical order: {list}."),
    "shuffle": ("Shuffle this list: {list}.", "Put the names in a new random order: {list}."),
    "replace_index": ("Replace name {place} with {new}: {list}.", "Swap out number {place} for {new}: {list}."),
    "replace_random": ("Replace any one name with {new}: {list}.", "Swap out a random name for {new}: {list}."),
    "insert_index": ("Insert {new} as name {place}: {list}.", "Add {new} to become number {place}: {list}."),
    "insert_random": ("Insert {new} anywhere: {list}.", "Add {new} at a random place: {list}."),
    "remove_index": ("Remove name {place}: {list}.", "Leave out number {place} of this list: {list}."),
    "remove_random": ("Remove any one name: {list}.", "Leave out a random name of this list: {list}."),
}

LIST_TASKS: tuple[str, ...] = tuple(WORDINGS)
ARITHMETIC = "arithmetic"
TASKS: tuple[str, ...] = (*LIST_TASKS, ARITHMETIC)
PEOPLE = (3, 4, 5, 6)

# Stories: opening, sentences that add, sentences that subtract, question.
THINGS = ("coins", "apples", "books", "cards")
STORIES: tuple[tuple[str, tuple[str, ...], tuple[str, ...], str], ...] = (
    (
        "{who} has {start} {things}.",
        (" {who} finds {n}.", " {who} buys {n}.", " {who} gets {n} more."),
        (" {who} loses {n}.", " {who} sells {n}.", " {who} gives away {n}."),
        " How many {things} has {who} now?",
    ),
    (
        "A box holds {start} {things}.",
        (" {who} adds {n}.", " {who} puts in {n} more."),
        (" {who} takes {n}.", " {who} takes out {n}."),
        " How many {things} are in the box?",
    ),
    (
        "In a bus sit {start} people.",
        (" Then {n} get on.", " Then {n} more come."),
        (" Then {n} get off.", " Then {n} leave."),
        " How many people are in the bus?",
    ),
)
MAX_START, MAX_OPERAND, EVENTS = 20, 12, (1, 2, 3)

SPECIAL_TOKENS: tuple[str, ...] = ("<pad>", "<eos>", "<mask>", "<unk>")
# Words and numbers include the space before them, as in GPT-2's tokens; names inside a list have none.
TOKEN_PATTERN = r""" ?\["|", "|"\]| ?[A-Za-z]+| ?[0-9]+| [-+=]|[.:?]"""


def _vocabulary() -> tuple[str, ...]:
    wordings = [wording for wordings in WORDINGS.values() for wording in wordings]
    stories = [part for opening, more, less, end in STORIES for part in (opening, *more, *less, end)]
    words = {piece for text in wordings + stories for piece in re.findall(TOKEN_PATTERN, re.sub(r" ?{\w+}", "", text))}
    words |= {f" {thing}" for thing in THINGS} | {' ["', '["', '", "', '"]', " +", " -", " =", " Answer"}
    names = [form for name in NAMES for form in (name, f" {name}")]
    numbers = [f" {n}" for n in range(MAX_START + max(EVENTS) * MAX_OPERAND + 1)]
    return (*SPECIAL_TOKENS, *names, *numbers, *sorted(words))


VOCABULARY: tuple[str, ...] = _vocabulary()


@dataclass(frozen=True)
class Instance:
    """A prompt, one right answer, and the facts that the scorer needs.

    Args:
        task: one of `TASKS`.
        prompt: ends with "." or "?"; the answer follows directly.
        answer: one right answer with its leading space, drawn uniformly if there are several.
        names: the list in the prompt; empty for arithmetic.
        newcomer: the new name to insert; `None` if the task has none.
        place: the place, counted from 1; `None` if the task has none.
        numbers: for arithmetic, the start and the signed changes; else empty.
    """

    task: str
    prompt: str
    answer: str
    names: tuple[str, ...] = ()
    newcomer: str | None = None
    place: int | None = None
    numbers: tuple[int, ...] = ()


def instances(task: str, count: int, seed: int, split: str = "test") -> list[Instance]:
    """`count` instances of a task, a function of the arguments.

    List lengths, and the numbers of events of a story, alternate, so any sub-sample is balanced.

    Args:
        task: one of `TASKS`.
        count: number of instances.
        seed: any integer.
        split: "train" or "test". A hash of the task and its names, or of the story's numbers, assigns one instance in
            sixteen to "test".
    Raises:
        ValueError: unknown task or split.
    """
    source = stream(task, random.Random(f"{task} {seed} {split}"), split)
    return [next(source) for _ in range(count)]


def stream(task: str, rng: random.Random, split: str = "train") -> Iterator[Instance]:
    """Endless instances of one task; arguments and errors as in `instances`."""
    if task not in TASKS:
        raise ValueError(f"`task` must be one of {', '.join(TASKS)}, got {task!r}.")
    if split not in ("train", "test"):
        raise ValueError(f'`split` must be "train" or "test", got {split!r}.')
    turn = rng.randrange(12)  # 12: a multiple of the list lengths and of the numbers of events
    while True:
        draw = _draw_story(rng, turn) if task == ARITHMETIC else _draw_list(task, rng, turn)
        if _is_held_out(draw) == (split == "test"):
            yield draw
            turn += 1


def is_right(instance: Instance, text: str) -> bool:
    """True if `text` answers the prompt, in exactly the form `["Ann", "Bob"]` or `7 + 5 = 12. Answer 12`.

    White space around the answer is allowed; prose is not. A shuffle must differ from the list. A random replacement,
    insertion or removal may be at any place. A story needs the right result and true equations only.
    """
    if instance.task == ARITHMETIC:
        return _is_right_story(instance, text.strip())
    answer = _parse_list(text.strip())
    names = instance.names
    if answer is None:
        return False
    if instance.task == "shuffle":
        return sorted(answer) == sorted(names) and answer != names
    if instance.task.endswith("random"):
        places = range(len(names) + instance.task.startswith("insert"))
        return any(answer == _edited(instance.task, names, i, instance.newcomer) for i in places)
    return answer == _parse_list(instance.answer.strip())


def _draw_list(task: str, rng: random.Random, turn: int) -> Instance:
    *drawn, new = rng.sample(NAMES, PEOPLE[turn % len(PEOPLE)] + 1)
    names = tuple(drawn)
    place = rng.randint(1, len(names) + (task == "insert_index"))
    i = place - 1 if task.endswith("index") else rng.randrange(len(names) + (task == "insert_random"))
    if task == "reverse":
        answer = names[::-1]
    elif task == "sort":
        answer = tuple(sorted(names))
    elif task == "shuffle":
        answer = names
        while answer == names:
            answer = tuple(rng.sample(names, len(names)))
    elif task == "copy":
        answer = names
    else:
        answer = _edited(task, names, i, new)
    prompt = rng.choice(WORDINGS[task]).format(list=_render(names), new=new, place=place)
    return Instance(
        task=task,
        prompt=prompt,
        answer=" " + _render(answer),
        names=names,
        newcomer=new if task.startswith(("replace", "insert")) else None,
        place=place if task.endswith("index") else None,
    )


def _edited(task: str, names: tuple[str, ...], i: int, new: str | None) -> tuple[str, ...]:
    """The list with name i replaced or removed, or with the new name inserted before it."""
    rest = names[i:] if task.startswith("insert") else names[i + 1 :]
    return (*names[:i], *rest) if new is None or task.startswith("remove") else (*names[:i], new, *rest)


def _draw_story(rng: random.Random, turn: int) -> Instance:
    opening, more, less, question = rng.choice(STORIES)
    start = rng.randint(1, MAX_START)
    words = {"who": rng.choice(NAMES), "things": rng.choice(THINGS), "start": start}
    text, steps, numbers, value = opening, [], [start], start
    for _ in range(EVENTS[turn % len(EVENTS)]):
        n = rng.randint(1, MAX_OPERAND)
        change = -n if rng.random() < 0.5 and n <= value else n  # no story goes below zero
        text += rng.choice(more if change > 0 else less).replace("{n}", str(n))
        steps.append(f" {value} {'+' if change > 0 else '-'} {n} = {value + change}.")
        numbers.append(change)
        value += change
    prompt = (text + question).format(**words)
    return Instance(ARITHMETIC, prompt, "".join(steps) + f" Answer {value}", numbers=tuple(numbers))


def _is_held_out(instance: Instance) -> bool:
    key = f"{instance.task} {instance.names or instance.numbers}"
    return zlib.crc32(key.encode()) % 16 == 0


def _render(names: tuple[str, ...]) -> str:
    return '["' + '", "'.join(names) + '"]'


def _parse_list(text: str) -> tuple[str, ...] | None:
    if not re.fullmatch(r'\["[^"]*"(, "[^"]*")*\]', text):
        return None
    return tuple(text[2:-2].split('", "'))


def _is_right_story(instance: Instance, text: str) -> bool:
    if not re.fullmatch(r"(\d+ [-+] \d+ = \d+\. )+Answer \d+", text):
        return False
    *steps, answer = text.split(". ")
    for step in steps:
        a, sign, b, _, result = step.split()
        if int(result) != int(a) + (int(b) if sign == "+" else -int(b)):
            return False
    return int(answer.split()[1]) == sum(instance.numbers)


# One instance of each list task and two stories, all held out of training. The demo and the README show them.
EXAMPLES: list[Instance] = [
    *(instances(task, 4, seed=2)[i % 4] for i, task in enumerate(LIST_TASKS)),
    *instances(ARITHMETIC, 3, seed=2)[1:],
]
EXAMPLE_PROMPTS: list[str] = [example.prompt for example in EXAMPLES]
