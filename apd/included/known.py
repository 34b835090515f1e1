"""What the included pair knows, and why it does not know a prompt."""

from __future__ import annotations

import difflib
import re
from functools import cache
from typing import Any

from apd.included.tasks import (
    EVENTS,
    LIST_TASKS,
    MAX_OPERAND,
    MAX_START,
    NAMES,
    PEOPLE,
    STORIES,
    THINGS,
    WORDINGS,
)

__all__ = ["ABOUT", "unknown_words", "why_unknown"]

ABOUT = (
    f"The included pair knows {len(LIST_TASKS)} list tasks in fixed wordings, over {min(PEOPLE)} to {max(PEOPLE)} of "
    f"{len(NAMES)} first names, and sums of small numbers told as stories, all shown by `apd.EXAMPLE_PROMPTS`; to "
    "anything else its answer is noise."
)
UNKNOWN = "<unk>"  # what the tokenizer writes for a word that it does not know


def why_unknown(prompt: str) -> str | None:
    """Why the included pair was not trained on a prompt, as a clause such as "its list has 2 names"; else `None`.

    Args:
        prompt: a task, perhaps with the beginning of its answer behind it; `<unk>` stands for an unknown word.
    """
    spaced = re.sub(
        rf"(?<=\w){UNKNOWN}", f" {UNKNOWN}", prompt
    )  # a word has its space in it, which is unknown with it
    for pattern in _lists():
        if match := pattern.match(spaced):
            return _about_list(match) or _about_rest(spaced[match.end() :], r' \["')
    for story, events in _stories():
        if match := story.match(prompt):
            return _about_story(match, events) or _about_rest(prompt[match.end() :], r" \d")
    if UNKNOWN in prompt:
        before = prompt[: prompt.index(UNKNOWN)][-30:]
        place = f"the first behind {before!r}" if before else "its first is one"
        return f"it has words that the tokenizer does not know, {place}; the models cannot read them"
    nearest = difflib.get_close_matches(prompt, _shown(), n=1, cutoff=0.7)
    return f"it is worded otherwise than they are{f', such as {nearest[0]}' if nearest else ''}"


def unknown_words(text: str, tokenizer: Any) -> list[str]:
    """The words of a text that become the tokenizer's unknown token, each once; none where the tokenizer cannot tell."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown in (None, tokenizer.eos_token_id, tokenizer.pad_token_id) or not getattr(tokenizer, "is_fast", False):
        return []
    encoded = tokenizer(text, return_offsets_mapping=True)
    pairs = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    words = [text[start:end].strip() for token, (start, end) in pairs if token == unknown]
    return list(dict.fromkeys(filter(None, words)))


def _about_list(match: re.Match[str]) -> str | None:
    names, facts = match["list"].split('", "'), match.groupdict()
    if not min(PEOPLE) <= len(names) <= max(PEOPLE):
        return f"its list has {len(names)} name{'s' * (len(names) > 1)}, not {min(PEOPLE)} to {max(PEOPLE)}"
    new = facts.get("new")
    called = {f"name {i} of its list": name for i, name in enumerate(names, 1)} | (
        {"its new name": new} if new else {}
    )
    # Of a word that the tokenizer does not know, only the place is left.
    strangers = [place if UNKNOWN in name else name for place, name in called.items() if name not in NAMES]
    if strangers:
        return f"{', '.join(strangers)} {'is' if len(strangers) == 1 else 'are'} none of {', '.join(NAMES)}"
    twice = next((name for name in names if names.count(name) > 1 or name == new), None)
    if twice:
        return f"it has the name {twice} twice"
    last = len(names) + match.re.pattern.startswith(("Insert", "Add"))
    if facts.get("place") and not 1 <= int(facts["place"]) <= last:
        return f"its list has no place {facts['place']}"
    return None


def _about_story(match: re.Match[str], events: re.Pattern[str]) -> str | None:
    value, found = int(match["start"]), list(events.finditer(match["events"]))
    if not min(EVENTS) <= len(found) <= max(EVENTS):
        return f"its story has {len(found)} events, not {min(EVENTS)} to {max(EVENTS)}"
    numbers = [int(event[str(event.lastgroup)]) for event in found]
    if not 1 <= value <= MAX_START or not all(1 <= n <= MAX_OPERAND for n in numbers):
        return f"its story must start at 1 to {MAX_START} and go on by 1 to {MAX_OPERAND}"
    for event, n in zip(found, numbers, strict=True):
        value += n if str(event.lastgroup).startswith("more") else -n
        if value < 0:
            return "its story goes below zero"
    if len(set(re.findall("|".join(NAMES), match[0]))) > 1 or len(set(re.findall("|".join(THINGS), match[0]))) > 1:
        return "its story is about several people or things"
    return None


def _about_rest(rest: str, answer: str) -> str | None:
    return None if not rest or re.match(answer, rest) else "it goes on behind the task"


@cache
def _lists() -> list[re.Pattern[str]]:
    parts = {
        "list": r'\["(?P<list>[^"]*(?:", "[^"]*)*)"\]',
        "new": r"(?P<new>[A-Z]\w+|<unk>)",
        "place": r"(?P<place>\d+)",
    }
    return [re.compile(_filled(wording, parts)) for wordings in WORDINGS.values() for wording in wordings]


@cache
def _stories() -> list[tuple[re.Pattern[str], re.Pattern[str]]]:
    """For each kind of story a pattern of all of it, and one of an event."""
    who, things = "|".join(NAMES), "|".join(THINGS)
    parts = {"who": rf"(?:{who})", "things": rf"(?:{things})", "start": r"(?P<start>\d+)", "n": r"\d+"}
    found = []
    for opening, more, less, question in STORIES:
        anything = "|".join(_filled(event, parts) for event in (*more, *less))
        story = f"{_filled(opening, parts)}(?P<events>(?:{anything})*){_filled(question, parts)}"
        events = [
            _filled(event, {**parts, "n": rf"(?P<{kind}{i}>\d+)"})
            for kind, texts in {"more": more, "less": less}.items()
            for i, event in enumerate(texts)
        ]
        found.append((re.compile(story), re.compile("|".join(events))))
    return found


def _filled(wording: str, parts: dict[str, str]) -> str:
    """A wording as a regular expression, its fields replaced by `parts`."""
    pieces = re.split(r"\{(\w+)\}", wording)
    return "".join(parts[piece] if i % 2 else re.escape(piece) for i, piece in enumerate(pieces))


def _shown() -> list[str]:
    example = {"list": '["Ada", "Ben", "Carl"]', "new": "Mia", "place": 2}
    return [wording.format(**example) for wordings in WORDINGS.values() for wording in wordings]
