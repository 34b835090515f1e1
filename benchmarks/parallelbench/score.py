"""Scorers of ParallelBench (arXiv 2510.04767): equal to the official ones on its recorded cases.

Twelve of the seventeen tasks need the standard library alone. Sentences, summaries and paraphrases are also judged by
a grammar checker and by overlap measures, see `text.py`.

Two conventions, which differ in the five text tasks only:

- "v1": the product of all measures (what the released code of October 2025 returned as `score`);
- "grammar_only": the grammar check (the paper's main figures, and the later code).

    >>> score("waiting_line/reverse", 'Here you are: ["Bo Ek", "Al Day"]', '["Bo Ek", "Al Day"]')
    {'score': 1.0, 'score_strict': 1.0}
    >>> score("waiting_line/reverse", "Bo Ek, Al Day", '["Bo Ek", "Al Day"]')
    {'score': 1.0, 'score_strict': 0.0}
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from benchmarks.parallelbench import text as measures

__all__ = ["CONVENTIONS", "LIST_TASKS", "TASKS", "TEXT_KINDS", "kind_of", "parse_list", "score"]

CONVENTIONS = ("v1", "grammar_only")

LIST_TASKS = (
    "copy",
    "sort",
    "reverse",
    "shuffle",
    "replace_index",
    "replace_random",
    "insert_index",
    "insert_random",
    "remove_index",
    "remove_random",
)
# The seventeen tasks of the benchmark by their official names.
TASKS = (
    *(f"waiting_line/{name}" for name in LIST_TASKS),
    "words_to_sentence/easy",
    "words_to_sentence/medium",
    "words_to_sentence/hard",
    "paraphrase_summarize/samsum",
    "paraphrase_summarize/chatgpt-paraphrases",
    "puzzle/latin_square_n4",
    "puzzle/sudoku_n4_12",
)
TEXT_KINDS = ("words_to_sentence", "summary", "paraphrase")

# The scorer of a task, by its name in either generation of the official repository.
_KINDS = (
    *((rf"waiting_line(_n\d+)?/{name}", name) for name in LIST_TASKS),
    (r"puzzles?/latin_square_n\d+", "latin_square"),
    (r"puzzles?/sudoku_n4(_\d+)?", "sudoku"),
    (r"words_to_sentence/(easy|medium|hard)(_n\d+)?", "words_to_sentence"),
    (r"text_writing/(words_to_sentence_)?(easy|medium|hard)(_n\d+)?", "words_to_sentence"),
    (r"(paraphrase_summarize|text_writing)/(samsum|summarization)", "summary"),
    (r"(paraphrase_summarize|text_writing)/(chatgpt[-_]paraphrases|paraphrasing)", "paraphrase"),
)


def score(
    task: str,
    text: str,
    label: str | dict[str, Any],
    *,
    convention: str = "v1",
    grammar: Callable[[str], bool] | None = None,
) -> dict[str, float]:
    """The quality of an answer, 0.0 to 1.0; the score of a set of answers is their mean.

    Args:
        task: the official name, such as "waiting_line/copy".
        text: output of the model, without the prompt.
        label: the official label: a string where one answer is right, else a dict of facts for the scorer.
        convention: "v1" or "grammar_only"; see the module.
        grammar: whether a text that is not blank has no mistakes; LanguageTool (en-US) when not given. Used by
            the text tasks only.
    Returns:
        "score", the benchmark's accuracy, and "score_strict", which requires the exact format; then the single measures
        of text tasks under their official names. Where the benchmark has no strict score, it is `score` again.
    Raises:
        ValueError: unknown task or convention.
        ImportError: a text task needs a package that is not installed.
    """
    if convention not in CONVENTIONS:
        raise ValueError(f"`convention` must be one of {', '.join(CONVENTIONS)}, got {convention!r}.")
    kind = kind_of(task)
    if kind in TEXT_KINDS:
        return _score_text(kind, text, label, convention, grammar)
    is_right = _SCORERS[kind]
    return {"score": float(is_right(text, label, False)), "score_strict": float(is_right(text, label, True))}


def kind_of(task: str) -> str:
    """The scorer of a task: a list operation, "latin_square", "sudoku" or one of `TEXT_KINDS`."""
    for pattern, kind in _KINDS:
        if re.fullmatch(pattern, task):
            return kind
    raise ValueError(f"`task` must be an official name such as {TASKS[0]!r}, got {task!r}. Known: {', '.join(TASKS)}.")


def parse_list(text: str, strict: bool = False) -> list[str] | None:
    """The items of the last list in `text`.

    Strict lists look like `["Al Day", "Bo Ek"]`; None if this one does not. Otherwise quotes, brackets and the space
    after a comma may be missing, so that text without any list is a list too.
    """
    _, bracket, rest = text.rpartition("[")
    inside, closing, _ = rest.partition("]")
    if strict:
        items = inside.split(", ")
        is_list = bracket and closing and all(re.fullmatch('"[^"]*"', item) for item in items)
        return [item[1:-1] for item in items] if is_list else None
    return [item for part in inside.split(",") if (item := part.strip('" '))]


def _is_listed(text: str, label: str, strict: bool) -> bool:
    return parse_list(text, strict) == parse_list(label)


def _is_shuffled(text: str, label: dict[str, Any], strict: bool) -> bool:
    answer, names = parse_list(text, strict), label["input"]
    return answer is not None and sorted(answer) == sorted(names) and answer != names


def _is_replaced(text: str, label: dict[str, Any], strict: bool) -> bool:
    answer, names, word = parse_list(text, strict), list(label["input"]), label["word"]
    if answer is None or word not in answer or len(answer) != len(names):
        return False
    names[answer.index(word)] = word
    return answer == names


def _is_inserted(text: str, label: dict[str, Any], strict: bool) -> bool:
    answer = parse_list(text, strict)
    if answer is None or label["word"] not in answer:
        return False
    answer.remove(label["word"])
    return answer == label["input"]


def _is_removed(text: str, label: dict[str, Any], strict: bool) -> bool:
    answer, names = parse_list(text, strict), label["input"]
    if answer is None or len(answer) != len(names) - 1:
        return False
    gone = set(names) - set(answer)
    return len(gone) == 1 and answer == [name for name in names if name not in gone]


def _is_latin_square(text: str, label: dict[str, Any], strict: bool) -> bool:
    """The rows are the first lines that hold each symbol once; other text is ignored, also by the strict score."""
    symbols = label["symbols"]
    lines = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    rows = [cells for cells in lines if set(cells) == set(symbols)][: len(symbols)]
    if len(rows) != len(symbols) or any(len(row) != len(symbols) for row in rows):
        return False
    return all(set(column) == set(symbols) for column in zip(*rows, strict=True))


def _is_sudoku(text: str, label: str, strict: bool) -> bool:
    """The lines with four digits are the grid; strict: only such lines and blank ones are allowed."""
    if strict:
        rows = [line for line in text.splitlines() if line.strip()]
        return rows == label.splitlines()
    lines = ["".join(re.findall(r"\d", line)) for line in text.splitlines()]
    return [digits for digits in lines if len(digits) == 4] == label.splitlines()


_SCORERS: dict[str, Callable[[str, Any, bool], bool]] = {
    **dict.fromkeys(LIST_TASKS, _is_listed),
    "shuffle": _is_shuffled,
    "replace_random": _is_replaced,
    "insert_random": _is_inserted,
    "remove_random": _is_removed,
    "latin_square": _is_latin_square,
    "sudoku": _is_sudoku,
}


def _score_text(
    kind: str, text: str, label: Any, convention: str, grammar: Callable[[str], bool] | None
) -> dict[str, float]:
    """The single measures, and their product or the grammar alone. A blank text scores 0 without a check."""
    blank = not text.strip()
    if kind == "words_to_sentence":
        parts = {"inclusion_score": float(all(word in text for word in label["words"]))}
        factors = list(parts)
    elif kind == "summary":
        parts = dict.fromkeys(measures.ROUGE_NAMES, 0.0) if blank else measures.rouge(text, label["summary"])
        factors = ["rougeL_score"]
    else:
        parts = {"inv_bleu_score": 0.0, "bertscore_score": 0.0}
        if not blank:
            parts["inv_bleu_score"] = 1 - measures.bleu(text, label["text"])
            parts["bertscore_score"] = measures.bertscore(text, label["text"])
        factors = list(parts)
    parts["grammar_score"] = 0.0 if blank else float((grammar or measures.is_grammatical)(text))
    total = parts["grammar_score"]
    if convention == "v1":
        for factor in factors:
            total *= parts[factor]
    return {"score": total, "score_strict": total, **parts}
