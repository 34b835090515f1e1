"""The records of a run: one JSON object per line, one per strategy, task and sample, in a file that survives a killed run.

The first line holds the settings that every record of the file shares; a run with other settings is refused. A torn
last line is cut off, and its sample decoded again. Passes, canvases and tokens are null where they are unknown, as for an endpoint.
Records of the time before `checked` lack `canvases`: one per drafter pass.
"""

from __future__ import annotations

import json
import lzma
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apd.cli.results import Part

__all__ = ["NAME", "Log", "Record", "accuracies", "appending", "key", "read"]

NAME = "records.jsonl"

Record = dict[str, Any]


@dataclass(frozen=True)
class Log:
    """The content of a records file.

    Attributes:
        settings: shared by all records.
        made_with: versions and the like, of the run that began the file.
        records: in the order they were written.
        length: bytes of whole lines.
    """

    settings: dict[str, Any]
    made_with: dict[str, Any]
    records: list[Record]
    length: int


def key(record: Record) -> tuple[str, str, int]:
    """Strategy, task and index, which identify a record."""
    return record["strategy"], record["task"], record["index"]


def read(path: Path) -> Log | None:
    """The file, plain or packed (.xz); `None` if it does not exist or a kill left no whole first line.

    Raises:
        ValueError: it is no records file, or a record occurs twice.
    """
    if not path.exists():
        return None
    content = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:
        return None
    header, *lines = whole.splitlines()
    try:
        first = json.loads(header)
        settings, made_with = first["settings"], first["made_with"]
        records = [json.loads(line) for line in lines]
        keys = {key(record) for record in records}
        for strategy, task, _ in keys:
            (strategy + task).encode()  # names can be encoded: they hold no half of a surrogate pair
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} does not hold the records of a run. Choose another directory.") from None
    if len(keys) < len(records):
        raise ValueError(
            f"{path} holds {len(records) - len(keys)} records twice. Remove them, or use another directory."
        )
    return Log(settings, made_with, records, len(whole))


@contextmanager
def appending(path: Path, settings: dict[str, Any], made_with: dict[str, Any]) -> Iterator[tuple[Part, Log]]:
    """The file, locked and open for appending, and its present content.

    Raises:
        ValueError: it was made with other settings.
        RuntimeError: another run is writing it.
    """
    with Part(path) as part:
        log = read(path)
        if log is None:
            os.truncate(path, 0)
            part.write({"settings": settings, "made_with": made_with})
            log = Log(settings, made_with, [], 0)
        else:
            if log.settings != settings:
                raise ValueError(f"{path} was made with other settings: {_difference(log.settings, settings)}.")
            os.truncate(path, log.length)
        yield part, log


def accuracies(log: Log) -> list[str]:
    """The score of every strategy and task, one per line; the only result where passes are unknown."""
    scores: dict[tuple[str, str], list[float]] = {}
    for record in log.records:
        scores.setdefault((record["strategy"], record["task"]), []).append(record["score"])
    return [
        f"{strategy}  {task}  {100 * sum(found) / len(found):.1f} % of {len(found)}"
        for (strategy, task), found in scores.items()
    ]


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    names = [name for name in there | here if there.get(name) != here.get(name)]
    return ", ".join(f"{name} {there.get(name)!r} there and {here.get(name)!r} here" for name in names)
