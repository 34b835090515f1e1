"""Prompts from a JSONL file, results to another one that a later run can continue."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["BadLine", "Prompt", "append", "finished", "read_prompts"]

_START = b'{"index": '  # every result begins so: a file of another kind is never cut


@dataclass(frozen=True)
class Prompt:
    """A prompt and its place: `index` counts the input's lines from 0, bad ones included, so it never shifts."""

    index: int
    text: str


class BadLine(ValueError):
    """A line that is not what it should be; the message names file, line, rule and what was found."""


def read_prompts(path: Path) -> Iterator[Prompt | BadLine]:
    """Every line of a JSONL file as a prompt, or as the complaint about it; empty lines are passed over."""
    with path.open("rb") as file:
        for index, line in enumerate(file):
            if not line.strip():
                continue
            try:
                yield Prompt(index, _prompt_of(line))
            except ValueError as error:
                yield BadLine(f"{path}, line {index + 1}: {error}")


def _prompt_of(line: bytes) -> str:
    try:
        prompt: str = json.loads(line.decode("utf-8-sig"))["prompt"]
        if prompt.strip() and prompt.encode():  # half a surrogate pair cannot be encoded
            return prompt
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f'expected {{"prompt": "some text"}}, got {line[:60].decode(errors="replace").strip()!r}')


def finished(path: Path) -> dict[int, dict[str, Any]]:
    """The results that an output file holds, by index. A last line that a kill tore off is removed from the file.

    Raises:
        BadLine: another line is no result, or two lines have the same index.
    """
    if not path.exists():
        return {}
    *lines, torn = path.read_bytes().split(b"\n")
    rows: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            index = row["index"]
        except (ValueError, KeyError, TypeError):
            raise _no_result(path, number) from None
        if index in rows:
            raise BadLine(f"{path}, line {number}: index {index} stands there twice. Choose another output file.")
        rows[index] = row
    if torn:
        if not torn.startswith(_START[: len(torn)]):
            raise _no_result(path, len(lines) + 1)
        os.truncate(path, path.stat().st_size - len(torn))
    return rows


def _no_result(path: Path, number: int) -> BadLine:
    return BadLine(f"{path}, line {number}: not a result of this command. Choose another output file.")


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write results as whole lines and hand them to the disk."""
    with path.open("ab") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
        file.flush()
        os.fsync(file.fileno())
