"""What a run decodes with and what it is asked: a pair of models, samples, and how an answer is judged.

The embedded pair answers the tasks it was trained for (`apd.embedded.tasks`, held-out instances), any other pair of an
instruction-tuned drafter and a verifier our own tasks in the official schema (`tasks.py`). Causal LMs alone and endpoints
would join here: whatever gives `Sample`s and has `generate_many` can be run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apd.embedded import DRAFTER_DIR, VERIFIER_DIR
from apd.embedded import tasks as embedded
from apd.many import Prompt
from apd.sampler import APDSampler
from benchmarks.parallelbench.score import TEXT_KINDS, kind_of, score
from benchmarks.parallelbench.tasks import GENERATED_TASKS, Row, embedded_rows, generate

__all__ = ["Judge", "Pair", "Sample", "embedded_pair", "pair_of"]

#: From an answer to the scores of a record.
Judge = Callable[[str], dict[str, float]]

# Numbers of samples, from which their seeds come, leave this much room per task.
_PER_TASK = 1_000_000


@dataclass(frozen=True)
class Sample:
    """One question.

    Attributes:
        task: its name.
        index: its place among those of the task, from 0.
        number: its place among all, which gives its seed.
        prompt: what the model is given.
        judge: from an answer to the scores of a record.
    """

    task: str
    index: int
    number: int
    prompt: Prompt
    judge: Judge


@dataclass(frozen=True)
class Pair:
    """Models and what they are asked.

    Attributes:
        settings: what tells this pair from every other; part of a run's settings.
        tasks: their names.
        by_default: those of them that run when none is named.
        max_new_tokens: length of the answer field.
        open: loads the models.
        samples: the first `count` samples of a task, the same for the same seed.
    """

    settings: dict[str, Any]
    tasks: tuple[str, ...]
    by_default: tuple[str, ...]
    max_new_tokens: int
    open: Callable[[], APDSampler]
    samples: Callable[[str, int, int], list[Sample]]


def _embedded_samples(task: str, count: int, seed: int) -> list[Sample]:
    first = embedded.TASKS.index(task) * _PER_TASK
    asked = embedded.instances(task, count, seed)
    if task == embedded.ARITHMETIC:
        judges = [_exactly(instance) for instance in asked]
    else:
        rows = embedded_rows(task, count, seed)
        judges = [_officially(row, instance) for row, instance in zip(rows, asked, strict=True)]
    return [
        Sample(task, i, first + i, instance.prompt, judge)
        for i, (instance, judge) in enumerate(zip(asked, judges, strict=True))
    ]


def _officially(row: Row, instance: embedded.Instance) -> Judge:
    """The official scores, and ours, which wants the exact form."""
    return lambda text: score(row.task, text, row.answer) | {"exact": float(embedded.is_right(instance, text))}


def _exactly(instance: embedded.Instance) -> Judge:
    """Ours alone: arithmetic is no official task."""
    return lambda text: dict.fromkeys(("score", "score_strict", "exact"), float(embedded.is_right(instance, text)))


def embedded_pair() -> Pair:
    """The pair that ships with the package."""
    return Pair(
        settings={"pair": "embedded", "drafter": _digest(DRAFTER_DIR), "verifier": _digest(VERIFIER_DIR)},
        tasks=embedded.TASKS,
        by_default=embedded.TASKS,
        max_new_tokens=32,
        open=APDSampler.from_embedded,
        samples=_embedded_samples,
    )


def pair_of(drafter: str, verifier: str | None, **loading: Any) -> Pair:
    """Any drafter with a chat template, and its verifier, by directory or hub id; their weights are not compared.

    Args:
        loading: for `APDSampler.from_pretrained`, such as `device_map`.
    """
    return Pair(
        settings={"pair": "own", "drafter": drafter, "verifier": verifier},
        tasks=GENERATED_TASKS,
        # Sentences need a grammar checker, which is an extra.
        by_default=tuple(task for task in GENERATED_TASKS if kind_of(task) not in TEXT_KINDS),
        max_new_tokens=64,
        open=lambda: APDSampler.from_pretrained(drafter, verifier, **loading),
        samples=_chat_samples,
    )


def _chat_samples(task: str, count: int, seed: int) -> list[Sample]:
    first = GENERATED_TASKS.index(task) * _PER_TASK
    return [
        Sample(task, i, first + i, row.messages, lambda text, row=row: score(row.task, text, row.answer))
        for i, row in enumerate(generate(task, count, seed))
    ]


def _digest(directory: Path) -> str:
    """Of the weights: the first 16 hex digits of their SHA-256."""
    return hashlib.sha256((Path(directory) / "model.safetensors").read_bytes()).hexdigest()[:16]
