"""Rows of a user's checkout of the official benchmark, read in place: it has no licence, so nothing of it is here.

First generation (October 2025): `…/data/output/test/<group>/<name>.jsonl`, with the prompts in `task_config.yaml`
beside them. Second generation (2026): the repository no longer holds its data, but the runs that it holds,
`results/…/samples_parallelbench_<group>_<name>.jsonl`, repeat every question; so do files of `{"messages", "label"}` lines
saved from its data set as `<group>/<name>.jsonl`.

In the first generation index tasks count from 0, and the answers of `sort` go by the whole name although the prompt says
last name. Rows are ordered by length, so a sub-sample should be stratified.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.parallelbench.score import TASKS, kind_of
from benchmarks.parallelbench.tasks import Row

__all__ = ["available", "load"]

# Names of the second generation for the tasks that it renamed.
_RENAMED = {
    "words_to_sentence/easy": "text_writing/words_to_sentence_easy",
    "words_to_sentence/medium": "text_writing/words_to_sentence_medium",
    "words_to_sentence/hard": "text_writing/words_to_sentence_hard",
    "paraphrase_summarize/samsum": "text_writing/summarization",
    "paraphrase_summarize/chatgpt-paraphrases": "text_writing/paraphrasing",
    "puzzle/latin_square_n4": "puzzles/latin_square_n4",
    "puzzle/sudoku_n4_12": "puzzles/sudoku_n4",
}


def available(directory: str | Path) -> list[str]:
    """Official names of the tasks in a checkout, at most seventeen."""
    return [task for task in TASKS if _find(Path(directory), task)]


def load(directory: str | Path, task: str) -> list[Row]:
    """All rows of one task, in their order.

    Args:
        directory: the checkout, or any folder within it that holds the data.
        task: the official name, in either generation's spelling.
    Raises:
        FileNotFoundError: the folder does not have the task.
        ValueError: unknown task, or lines that are in neither form.
    """
    kind_of(task)
    file = _find(Path(directory), task)
    if file is None:
        raise FileNotFoundError(
            f"{directory} has no rows of {task}: neither {task}.jsonl beside a task_config.yaml, nor a run's "
            f"{_samples_stem(task)}.jsonl. Give the folder of a checkout of furiosa-ai/ParallelBench."
        )
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if all("answer" in line for line in lines):
        prompt = _prompt(file, task)
        return [_first_generation(task, prompt, line) for line in lines]
    documents = [line.get("doc", line) for line in lines]
    if not all("messages" in document and "label" in document for document in documents):
        raise ValueError(f"{file} has lines with neither an answer nor messages and a label. Is it the official file?")
    if all("index" in document for document in documents):  # a run on several devices interleaves its rows
        documents = list({document["index"]: document for document in documents}.values())
        documents.sort(key=lambda document: document["index"])
    return [_second_generation(task, document) for document in documents]


def _find(directory: Path, task: str) -> Path | None:
    for name in (task, _RENAMED.get(task, task)):
        for found in sorted(directory.rglob(f"{name}.jsonl")):
            return found
    stem = _samples_stem(task)
    runs = [file for file in directory.rglob(f"{stem}*.jsonl") if re.fullmatch(rf"{stem}(_[\dT.:-]+)?", file.stem)]
    return max(runs, key=lambda file: (file.parent.name, file.name), default=None)  # folders are named by date


def _samples_stem(task: str) -> str:
    return "samples_parallelbench_" + _RENAMED.get(task, task).replace("/", "_")


def _prompt(file: Path, task: str) -> str:
    import yaml  # type: ignore[import-untyped]  # comes with transformers

    config = file.with_name("task_config.yaml")
    if not config.exists():
        raise FileNotFoundError(f"{file} has no task_config.yaml beside it, which holds the prompt.")
    tasks = yaml.safe_load(config.read_text(encoding="utf-8"))
    for key in (task, f"{file.parent.name}/{file.stem}", file.stem):
        if key in tasks:
            return tasks[key]["prompt"].replace("\\n", "\n")  # some templates spell the line break out
    raise ValueError(f"{config} says nothing about {task}; it has {', '.join(tasks)}.")


def _first_generation(task: str, prompt: str, line: dict[str, Any]) -> Row:
    inputs = dict(line["input"])
    examples = tuple(_first_generation(task, prompt, example) for example in inputs.pop("icl_examples", None) or ())
    return Row(task, prompt, inputs, line["answer"], line.get("output_format"), line.get("metadata") or {}, examples)


def _second_generation(task: str, document: dict[str, Any]) -> Row:
    *before, last = [message["content"] for message in document["messages"] if message["role"] != "system"]
    examples = tuple(
        Row(task, "{text}", {"text": question}, answer)
        for question, answer in zip(before[::2], before[1::2], strict=True)
    )
    metadata = document.get("metadata") or {}
    return Row(task, "{text}", {"text": last}, document["label"], document.get("output_prefix"), metadata, examples)
