"""`apd check`: checks a checkpoint and prints the report."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import torch

from apd.cli.checkpoints import check_places
from apd.cli.settings import set_up
from apd.cli.usage import LOADING, UsageError, check_loading
from apd.inspection import Report, check
from apd.inspection.declarations import differing_ids
from apd.models.pairs import load_pair
from apd.sampler import APDSampler


def run(arguments: argparse.Namespace) -> int:
    """Run the command with parsed arguments; returns the exit code, 1 if there is a problem.

    Raises:
        UsageError: options that cannot be used together, or a text that cannot be read.
        ValueError, OSError: the models cannot be loaded.
    """
    check_loading(arguments, ("verifier", *LOADING))
    text = None if arguments.text is None else _read(arguments.text)
    check_places(arguments)
    set_up(included=arguments.drafter is None)
    report = _report(arguments, text)
    print(report)
    return 1 if report.problems else 0


def _read(path: Path) -> str | list[tuple[str, str]]:
    """The text of a file, or the prompts and answers of its lines if its name ends in .jsonl."""
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text must be a file of text in UTF-8, got {path}: {error}.") from None
    return _pairs(text, path) if path.suffix == ".jsonl" else text


def _pairs(text: str, path: Path) -> list[tuple[str, str]]:
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            pair = record["prompt"], record["answer"]
        except (ValueError, KeyError, TypeError, RecursionError):
            pair = None
        if pair is None or not all(isinstance(part, str) and part for part in pair):
            raise UsageError(
                f'--text FILE.jsonl must have a {{"prompt": "...", "answer": "..."}} in each line, texts that are not empty, got '
                f"line {number} of {path}: {line[:60]!r}."
            )
        found.append(pair)
    if not found:
        raise UsageError(f"--text FILE.jsonl must have at least one line, got none in {path}.")
    return found


def _report(arguments: argparse.Namespace, text: str | list[tuple[str, str]] | None) -> Report:
    if arguments.drafter is None:
        return check(APDSampler.from_included(), text=text)
    loading = {name: getattr(arguments, name) for name in LOADING}
    if loading["device_map"] is None and torch.cuda.is_available():
        loading["device_map"] = "cuda"
    pair = load_pair(arguments.drafter, arguments.verifier, vocabularies_may_differ=True, **loading)
    tokenizers = {"tokenizer": pair.tokenizer, "verifier_tokenizer": pair.verifier_tokenizer}
    try:
        sampler, differ = APDSampler(pair.drafter, pair.verifier, **tokenizers), ""
    except ValueError as error:  # the vocabularies differ: the drafter can be checked nevertheless
        sampler, differ = APDSampler(pair.drafter, **tokenizers), str(error)
    report = check(sampler, text=text, revision=arguments.revision, verifier_revision=arguments.verifier_revision)
    if differ:
        report = dataclasses.replace(report, parts={**report.parts, "Verifier": [differing_ids(differ)]})
    return report
