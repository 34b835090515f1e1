"""The models of a run, its samples, and how an answer is scored.

The included pair answers the tasks it was trained for (`apd.included.tasks`, held-out instances), any other pair of an
instruction-tuned drafter and a verifier, any causal LM and any endpoint our own tasks in the official schema (`tasks.py`)
or those of a checkout of the official benchmark (`official.py`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from apd.extras import install
from apd.generation.many import Prompt
from apd.included import DRAFTER_DIR, VERIFIER_DIR
from apd.included import tasks as included
from apd.sampler import APDSampler
from benchmarks.parallelbench import official
from benchmarks.parallelbench.alone import Alone, CausalLM, Endpoint, check_url
from benchmarks.parallelbench.score import TASKS, TEXT_KINDS, kind_of, score
from benchmarks.parallelbench.tasks import GENERATED_TASKS, Row, generate, included_rows

__all__ = [
    "Judge",
    "Pair",
    "Questions",
    "Sample",
    "causal_lm",
    "endpoint",
    "included_pair",
    "our_questions",
    "pair_of",
    "questions_of_checkout",
]

#: From an answer to the scores of a record.
Judge = Callable[[str], dict[str, float]]

# Sample numbers, which determine the seeds, are spaced by this much per task.
_PER_TASK = 1_000_000


@dataclass(frozen=True)
class Sample:
    """One prompt of a task.

    Attributes:
        task: its name.
        index: its number within the task, from 0.
        number: its number among all samples, which determines its seed.
        prompt: input of the model.
        judge: from an answer to the scores of a record.
        reference: a right answer.
    """

    task: str
    index: int
    number: int
    prompt: Prompt
    judge: Judge
    reference: str


@dataclass(frozen=True)
class Questions:
    """The tasks of a run.

    Attributes:
        tasks: their names.
        by_default: the tasks that run if none is named.
        max_new_tokens: length of the answer field, the largest where tasks differ.
        samples: the first `count` samples of a task, a function of the seed.
        lengths: of the answer field, by task, where they differ.
        settings: identifies these questions; part of a run's settings.
    """

    tasks: tuple[str, ...]
    by_default: tuple[str, ...]
    max_new_tokens: int
    samples: Callable[[str, int, int], list[Sample]]
    lengths: dict[str, int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """A drafter with its verifier, or a model alone, and the tasks.

    Attributes:
        settings: identifies this pair; part of a run's settings.
        open: loads the models.
        questions: the tasks.
        strategies: the only possible ones if the model decodes alone; `None`: any.
    """

    settings: dict[str, Any]
    open: Callable[[], APDSampler | Alone]
    questions: Questions
    strategies: tuple[str, ...] | None = None


def _included_samples(task: str, count: int, seed: int) -> list[Sample]:
    first = included.TASKS.index(task) * _PER_TASK
    drawn = included.instances(task, count, seed)
    if task == included.ARITHMETIC:
        judges = [_exactly(instance) for instance in drawn]
    else:
        rows = included_rows(task, count, seed)
        judges = [_officially(row, instance) for row, instance in zip(rows, drawn, strict=True)]
    return [
        Sample(task, i, first + i, instance.prompt, judge, instance.answer)
        for i, (instance, judge) in enumerate(zip(drawn, judges, strict=True))
    ]


def _officially(row: Row, instance: included.Instance) -> Judge:
    """The official scores, and ours, which requires the exact form."""
    return lambda text: score(row.task, text, row.answer) | {"exact": float(included.is_right(instance, text))}


def _exactly(instance: included.Instance) -> Judge:
    """Our score alone, because arithmetic is not an official task."""
    return lambda text: dict.fromkeys(("score", "score_strict", "exact"), float(included.is_right(instance, text)))


def included_pair() -> Pair:
    """The included pair."""
    return Pair(
        settings={"pair": "included", "drafter": _digest(DRAFTER_DIR), "verifier": _digest(VERIFIER_DIR)},
        open=APDSampler.from_included,
        questions=Questions(included.TASKS, included.TASKS, max_new_tokens=32, samples=_included_samples),
    )


def pair_of(drafter: str, verifier: str | None, questions: Questions | None = None, **loading: Any) -> Pair:
    """Any drafter with a chat template, and its verifier, by directory or hub id or "self"; their weights are not compared.

    Args:
        questions: ours when not given.
        loading: for `APDSampler.from_pretrained`, such as `device_map`.
    """
    return Pair(
        settings={"pair": "own", "drafter": drafter, "verifier": verifier},
        open=lambda: APDSampler.from_pretrained(drafter, verifier, **loading),
        questions=questions or our_questions(),
    )


def causal_lm(name: str, questions: Questions | None = None, **loading: Any) -> Pair:
    """A causal LM alone, by directory or hub id, one token per forward.

    Args:
        questions: ours when not given.
        loading: for `CausalLM.from_pretrained`.
    """
    return Pair(
        settings={"pair": "causal-lm", "drafter": None, "verifier": name},
        open=lambda: CausalLM.from_pretrained(name, **loading),
        questions=questions or our_questions(),
        strategies=("autoregressive",),
    )


def endpoint(url: str, model: str, api_key_env: str | None = None, questions: Questions | None = None) -> Pair:
    """A model behind an OpenAI-compatible endpoint, see `Endpoint`; its forwards are unknown.

    Raises:
        ValueError: the URL, which is stored, holds a password or a query.
    """
    check_url(url)
    return Pair(
        settings={"pair": f"{model} at {url}", "drafter": None, "verifier": None},
        open=lambda: Endpoint(url, model, api_key_env),
        questions=questions or our_questions(),
        strategies=("endpoint",),
    )


def our_questions() -> Questions:
    """Our own tasks in the official schema."""
    return Questions(
        tasks=GENERATED_TASKS,
        by_default=_without_text(GENERATED_TASKS),
        max_new_tokens=64,
        samples=lambda task, count, seed: _chat_samples(GENERATED_TASKS, task, generate(task, count, seed)),
    )


def questions_of_checkout(directory: Path) -> Questions:
    """All tasks in a checkout of the official benchmark, unchanged.

    A task has as many samples as the checkout has rows, at most; fewer of them are drawn evenly from all lengths.

    Raises:
        ValueError: it has none.
    """
    tasks = tuple(official.available(directory))
    if not tasks:
        raise ValueError(
            f"`data` must be a checkout of furiosa-ai/ParallelBench, got {directory}, which has none of the tasks."
        )
    rows = {task: official.load(directory, task) for task in tasks}
    lengths = {task: 32 if task.startswith("waiting_line/") else 64 for task in tasks}  # the paper's, of diffusion LMs
    return Questions(
        tasks=tasks,
        by_default=_without_text(tasks),
        max_new_tokens=max(lengths.values()),
        samples=lambda task, count, seed: _chat_samples(TASKS, task, _mixed(rows[task], seed)[:count]),
        lengths=lengths,
        settings={"data": _fingerprint(rows)},
    )


def _chat_samples(tasks: Sequence[str], task: str, rows: Sequence[Row]) -> list[Sample]:
    _check_extra(task)
    first = tasks.index(task) * _PER_TASK
    return [
        Sample(task, i, first + i, row.messages, partial(_judged, row), row.reference) for i, row in enumerate(rows)
    ]


def _judged(row: Row, text: str) -> dict[str, float]:
    return score(row.task, text, row.answer)


def _without_text(tasks: Sequence[str]) -> tuple[str, ...]:
    """Sentences need a grammar checker, which is an extra."""
    return tuple(task for task in tasks if kind_of(task) not in TEXT_KINDS)


def _check_extra(task: str) -> None:
    """Fail before decoding if packages of the extra, which text tasks need, are missing."""
    needed = ["language_tool_python"] if kind_of(task) in TEXT_KINDS else []
    needed += {"summary": ["rouge_score"], "paraphrase": ["sacrebleu"]}.get(kind_of(task), [])
    if missing := [name.replace("_", "-") for name in needed if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"The task {task} is scored with {', '.join(missing)}. Install it with: "
            f"{install('bench-text')}, or name other `tasks`."
        )


def _mixed(rows: Sequence[Row], seed: int) -> list[Row]:
    """Reorder so that every prefix has all lengths evenly; the official rows are sorted by length."""
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.metadata.get("length")].append(row)
    rng = random.Random(seed)
    for group in groups.values():
        rng.shuffle(group)
    return [row for turn in zip_longest(*groups.values()) for row in turn if row is not None]


def _fingerprint(rows: dict[str, list[Row]]) -> str:
    """Fingerprint of all questions and labels: the first 16 hex digits of their SHA-256."""
    content = {task: [[row.messages, row.answer] for row in found] for task, found in rows.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _digest(directory: Path) -> str:
    """Fingerprint of the weights: the first 16 hex digits of their SHA-256."""
    return hashlib.sha256((Path(directory) / "model.safetensors").read_bytes()).hexdigest()[:16]
