"""Reads prompts from a JSONL file and writes results to another one, with any number of processes, resumably.

During a run every process appends to its own part file beside the output; each answer is one write and is flushed to the
disk before the next. Parts are merged into the output at the end of a run, and at the beginning of a run after an
interrupted one. The output is replaced as a whole and sorted by index, so its bytes do not depend on interruptions. A
killed run can leave

- a torn last line in a part: it is ignored, and its prompt decoded again;
- the temporary file of a merge: the next merge overwrites it;
- an output that already holds what parts still hold: equal results count once.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

_START = b'{"index": '  # the beginning of every result, also of a torn one

Row = dict[str, Any]

#: Fields of results.
RESULT = frozenset(
    "index text answers parts holes given score new_tokens drafter_forwards verifier_forwards canvases tokens_per_forward "
    "finish run".split()
)


@dataclass(frozen=True)
class Prompt:
    """A prompt of the input.

    Attributes:
        index: counts lines from 0, bad ones included.
        asked: what is decoded: text, messages, or with holes the parts of a text.
        fields: what its result begins with: the fields of the input's line.
    """

    index: int
    asked: Any
    fields: Row = field(default_factory=dict)


class BadLine(ValueError):
    """A line that breaks the format; the message names file, line, rule and what was found."""


def read_prompts(
    lines: Iterable[bytes], name: str, read_line: Callable[[bytes], tuple[Any, Row]] | None = None
) -> Iterator[Prompt | BadLine]:
    """Parse every line of JSONL as a prompt or, if it breaks the format, as a `BadLine`; empty lines are skipped.

    Args:
        name: name of the file, for complaints.
        read_line: line → what it asks for and the fields of its result, or a ValueError; by default `prompt_of`.
    """
    read_line = read_line or prompt_of
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            yield Prompt(index, *read_line(line))
        except ValueError as error:
            yield BadLine(f"{name}, line {index + 1}: {error}")


def prompt_of(line: bytes) -> tuple[Any, Row]:
    """The prompt of a line, text or messages, and the fields of its result.

    Raises:
        ValueError: the line breaks the format.
    """
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):  # the last: very deep brackets
        row = json.loads(line.decode("utf-8-sig"))
        if ("prompt" in row) != ("messages" in row):
            asked: Any = row["prompt"] if "prompt" in row else _messages(row["messages"])
            if ("messages" in row) or (asked.strip() and asked.encode()):  # half a surrogate pair cannot be encoded
                return asked, kept(row, ("prompt", "messages"))
    raise ValueError(
        'expected {"prompt": "some text"} or {"messages": [{"role": "user", "content": "some text"}]}, got '
        f"{line[:60].decode(errors='replace').strip()!r}"
    )


def _messages(given: Any) -> list[Row]:
    """Messages, a role and a content each; what a template makes of them is its own affair.

    Raises:
        ValueError: they are none.
    """
    is_chat = isinstance(given, list) and all(
        isinstance(each, dict) and {"role", "content"} <= each.keys() for each in given
    )
    if not is_chat or not given:
        raise ValueError
    json.dumps(given, ensure_ascii=False).encode()
    return given


def kept(row: Row, first: Iterable[str], without: Iterable[str] = ()) -> Row:
    """The fields of an input's line as its result has them: `first` first. One that a result has, too, gets `input_` before it.

    Args:
        without: fields that are left out.
    """
    order = [*(name for name in first if name in row), *(name for name in row if name not in first)]
    return {f"input_{name}" if name in RESULT else name: row[name] for name in order if name not in without}


def read_results(path: Path) -> dict[int, Row]:
    """The results in a file by index; none if it does not exist. A torn last line is ignored.

    Raises:
        BadLine: another line is no result, or two lines have the same index.
    """
    rows: dict[int, Row] = {}
    if not path.exists():
        return rows
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and line.startswith(_START[: len(line)]):
                break  # torn by a kill
            try:
                row = json.loads(line)
                index = row["index"]
            except (ValueError, KeyError, TypeError, RecursionError):
                index = None
            if not isinstance(index, int) or not line.endswith(b"\n"):
                raise BadLine(f"{path}, line {number}: not a result of this command. Choose another output file.")
            if index in rows:
                raise BadLine(f"{path}, line {number}: index {index} is there twice. Choose another output file.")
            rows[index] = row
    return rows


def output_file(path: Path) -> Path:
    """Resolve a path to the regular file that it leads to, which need not exist; links on the way stay links.

    Raises:
        ValueError: it leads to a folder, a device, a pipe, or to itself.
        FileNotFoundError: the folder does not exist.
        PermissionError: the file may not be written.
    """
    real = Path(os.path.realpath(path))
    if path.is_dir():
        raise ValueError(f"The output must be a file, got the folder {path}. Name a file in it.")
    if path.exists() and not path.is_file():
        raise ValueError(
            f"The output must be a regular file, got {path}, a device, a pipe or a socket. Use - for standard output."
        )
    if real.is_symlink():
        raise ValueError(f"The output must be a file, got {path}, a link that leads to itself. Remove it.")
    if not real.parent.is_dir():
        raise FileNotFoundError(
            f"The output must be in a folder that exists, got {path}: there is no folder {real.parent}. Make it first."
        )
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"The output must be a file that may be written, got {path}, which is protected.")
    return real


def part_path(output: Path, process: int) -> Path:
    """The part file of a process, numbered from 0, which holds its results until they are merged."""
    return output.with_name(f"{output.name}.part-{process:05d}")


def part_paths(output: Path) -> list[Path]:
    """The parts beside an output, including those with only a lock file left."""
    is_part = re.compile(rf"({re.escape(output.name)}\.part-\d{{5,}})(\.lock)?").fullmatch
    found = [match[1] for path in output.parent.iterdir() if (match := is_part(path.name))]
    return [output.with_name(name) for name in sorted(set(found))]


def as_line(row: Row) -> bytes:
    """A result as its line in a file."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


class Part:
    """The part file of one process, locked until it is closed or the process ends.

    The lock, a file beside the part, refuses a second run with the same output, also while processes of a killed launcher
    still run.

    Args:
        path: see `part_path`; created if it does not exist, else continued.
    Raises:
        RuntimeError: a running process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(f"{path}.lock", timeout=0)
        try:
            self._lock.acquire()
        except Timeout:
            raise RuntimeError(
                f"{path} is being written by a process of another run. Wait until it has ended, or end it: an output "
                "takes one run at a time."
            ) from None
        try:
            self._file = path.open("ab")
        except OSError:
            self._unlock()
            raise

    def write(self, row: Row) -> None:
        """Append a result as a whole line and flush it to the disk."""
        self._file.write(as_line(row))
        self._file.flush()
        os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Drop the results, which have been merged."""
        self._file.truncate(0)

    def close(self, *, delete: bool = False) -> None:
        """Release the lock; `delete` removes the part first."""
        self._file.close()
        if delete:
            self.path.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        # Removed while it is held: a process that waits for it sees that its file is gone. Windows removes it itself.
        with suppress(PermissionError):
            Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def __enter__(self) -> "Part":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._file.closed:  # a run that is refused leaves nothing behind
            self.close(delete=error is not None and not os.fstat(self._file.fileno()).st_size)


def take_over(own: Part, output: Path, check: Callable[[Path, Row], None]) -> None:
    """Merge the parts of an interrupted run of any number of processes; the first process calls it.

    Args:
        own: the first process's part, empty afterwards; the other parts are removed.
        check: (file, result) → raises if the result does not belong to this run; nothing is changed then.
    Raises:
        RuntimeError: a process of another run still holds a part.
        BadLine: see `merge`.
    """
    with ExitStack() as stack:
        others = [stack.enter_context(Part(path)) for path in part_paths(output) if path != own.path]
        merge(output, [own.path, *(other.path for other in others)], check)
        for other in others:
            other.close(delete=True)
        own.clear()


def merge(output: Path, parts: Iterable[Path], check: Callable[[Path, Row], None] = lambda path, row: None) -> int:
    """Bring the results in `parts` into `output`, sorted by index, in one replacement; the parts stay.

    An output that exists keeps its mode, and its owner and group as far as the system allows.

    Args:
        check: called with every file and result before anything is written.
    Returns:
        The number of results in the output. Without new results, the output is not touched or created.
    Raises:
        BadLine: a line is no result, or one index has two different results.
    """
    rows: dict[int, Row] = {}
    source: dict[int, Path] = {}
    for path in (output, *parts):
        for index, row in read_results(path).items():
            check(path, row)
            if rows.setdefault(index, row) != row:
                raise BadLine(f"{path}: index {index} has another result than in {source[index]}. Remove one of them.")
            source.setdefault(index, path)
    if all(path == output for path in source.values()):
        return len(rows)
    merging = output.with_name(f"{output.name}.merging")
    merging.unlink(missing_ok=True)
    with merging.open("wb") as file:
        if output.exists():
            _keep_owner_and_mode(merging, output.stat())
        file.writelines(as_line(rows[index]) for index in sorted(rows))
        file.flush()
        os.fsync(file.fileno())
    os.replace(merging, output)
    return len(rows)


def _keep_owner_and_mode(path: Path, of: os.stat_result) -> None:
    if hasattr(os, "chown"):  # not on Windows
        with suppress(PermissionError):  # only the superuser may give a file away
            os.chown(path, of.st_uid, of.st_gid)
    path.chmod(stat.S_IMODE(of.st_mode))
