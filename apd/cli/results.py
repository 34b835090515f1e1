"""Prompts from a JSONL file, results to another one that any number of processes write and a later run continues.

While a run is under way, each process, a lone one too, appends to its own part file beside the output, every answer in
one write and on the disk before the next. Parts are merged into the output when a run ends, and when one begins that
finds parts of an interrupted one. So the output is only ever replaced as a whole, sorted by index and the same bytes
whatever happened before, and there is one mechanism for one process and for many. A kill can leave

- a torn last line in a part: it is passed over, and its prompt decoded again;
- the temporary file of a merge: the next merge writes it anew;
- an output that already has what parts still have: equal lines count once.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows: no locks, see `Part`
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "BadLine",
    "Part",
    "Prompt",
    "as_line",
    "indices",
    "merge",
    "output_file",
    "part_path",
    "read_prompts",
    "read_results",
    "take_over",
]

_START = b'{"index": '  # every result begins so: a file of another kind is never cut


@dataclass(frozen=True)
class Prompt:
    """A prompt and its place: `index` counts the input's lines from 0, bad ones included, so it never shifts."""

    index: int
    text: str


class BadLine(ValueError):
    """A line that is not what it should be; the message names file, line, rule and what was found."""


def read_prompts(lines: Iterable[bytes], name: str) -> Iterator[Prompt | BadLine]:
    """Every line of JSONL as a prompt, or as the complaint about it; empty lines are passed over.

    Args:
        name: of the file, for complaints.
    """
    for index, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            yield Prompt(index, _prompt_of(line))
        except ValueError as error:
            yield BadLine(f"{name}, line {index + 1}: {error}")


def _prompt_of(line: bytes) -> str:
    try:
        prompt: str = json.loads(line.decode("utf-8-sig"))["prompt"]
        if prompt.strip() and prompt.encode():  # half a surrogate pair cannot be encoded
            return prompt
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # the last where brackets are very deep
        pass
    raise ValueError(f'expected {{"prompt": "some text"}}, got {line[:60].decode(errors="replace").strip()!r}')


def read_results(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The results that a file holds, each with the byte at which it begins. A torn last line is passed over.

    Raises:
        BadLine: another line is no result, or two lines have the same index.
    """
    seen: set[int] = set()
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n") and line.startswith(_START[: len(line)]):
                return  # torn by a kill
            try:
                row = json.loads(line)
                index = row["index"]
            except (ValueError, KeyError, TypeError, RecursionError):
                index = None
            if not isinstance(index, int) or not line.endswith(b"\n"):
                raise BadLine(f"{path}, line {number}: not a result of this command. Choose another output file.")
            if index in seen:
                raise BadLine(f"{path}, line {number}: index {index} stands there twice. Choose another output file.")
            seen.add(index)
            yield start, row
            start += len(line)


def indices(path: Path) -> set[int]:
    """Of the results that a file holds; none if it does not exist."""
    return {row["index"] for _, row in read_results(path)} if path.exists() else set()


def output_file(path: Path) -> Path:
    """The regular file, there or not, to which a path leads; links on the way stay links.

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
    """Where a process, counted from 0, keeps its results until they are merged."""
    return output.with_name(f"{output.name}.part-{process:05d}")


def part_paths(output: Path) -> list[Path]:
    """The parts that lie beside an output."""
    is_part = re.compile(re.escape(output.name) + r"\.part-\d{5,}").fullmatch
    return sorted(path for path in output.parent.iterdir() if is_part(path.name))


def as_line(row: dict[str, Any]) -> bytes:
    """A result as its line in a file."""
    return (json.dumps(row, ensure_ascii=False) + "\n").encode()


class Part:
    """The part file of one process, which holds a lock on it until it is closed or killed.

    A second run of the same output finds the lock and is refused, also when a launcher was killed and left its
    processes behind. Windows and file systems without locks have no such guard.

    Args:
        path: see `part_path`; made if it does not exist, else continued.
    Raises:
        RuntimeError: a running process holds it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = _open_locked(path)

    def write(self, row: dict[str, Any]) -> None:
        """Append a result as a whole line and hand it to the disk."""
        self._file.write(as_line(row))
        self._file.flush()
        os.fsync(self._file.fileno())

    def clear(self) -> None:
        """Drop what it holds, which has been merged."""
        self._file.truncate(0)

    def delete(self) -> None:
        """Remove the file; the lock goes last, where there are locks."""
        if fcntl is None:  # an open file cannot be removed on Windows
            self._file.close()
        self.path.unlink()
        self._file.close()

    def __enter__(self) -> "Part":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file.closed:
            return
        if error is not None and not os.fstat(self._file.fileno()).st_size:
            self.path.unlink(missing_ok=True)  # a run that is refused leaves nothing behind
        self._file.close()


def _open_locked(path: Path) -> BinaryIO:
    while True:
        file = path.open("ab")
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise RuntimeError(
                f"{path} is being written by a process of another run. Wait until it has ended, or end it: an output "
                "takes one run at a time."
            ) from None
        except OSError:
            pass  # a file system without locks
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()  # the run that held it has removed it meanwhile


def take_over(own: Part, output: Path, check: Callable[[Path, dict[str, Any]], None]) -> None:
    """Merge what an interrupted run, of any number of processes, has left beside the output. For the first process.

    Args:
        own: its part, empty afterwards; the other parts are removed.
        check: raises for a file and a result in it that does not belong to this run; nothing is touched then.
    Raises:
        RuntimeError: a process of another run is still at work.
        BadLine: see `merge`.
    """
    with ExitStack() as stack:
        others = [stack.enter_context(Part(path)) for path in part_paths(output) if path != own.path]
        parts = [own.path, *(other.path for other in others)]
        for path in [output, *parts] if output.exists() else parts:
            for _, row in read_results(path):
                check(path, row)
        merge(output, parts)
        for other in others:
            other.delete()
        own.clear()


def merge(output: Path, parts: Iterable[Path]) -> int:
    """Bring the results in `parts` into `output`, sorted by index, at one stroke; the parts stay.

    An output that exists keeps its mode, and its owner and group as far as the system allows.

    Returns:
        How many results the output holds. With none, it is left as it is, there or not.
    Raises:
        BadLine: a line is no result, or one index has two different results.
    """
    with ExitStack() as stack:
        places: dict[int, tuple[BinaryIO, int]] = {}

        def line_at(place: tuple[BinaryIO, int]) -> bytes:
            place[0].seek(place[1])
            return place[0].readline()

        def take(path: Path) -> None:
            file = stack.enter_context(path.open("rb"))
            for start, row in read_results(path):
                place = places.setdefault(row["index"], (file, start))
                if place[0] is not file and line_at(place) != line_at((file, start)):
                    raise BadLine(
                        f"{path}: index {row['index']} has another result than in {place[0].name}. Remove one of them."
                    )

        if output.exists():
            take(output)
        before = len(places)
        for part in parts:
            take(part)
        if len(places) == before:
            return before
        merging = output.with_name(f"{output.name}.merging")
        merging.unlink(missing_ok=True)
        with merging.open("wb") as file:
            if output.exists():
                _keep_owner_and_mode(merging, output.stat())
            for index in sorted(places):
                file.write(line_at(places[index]))
            file.flush()
            os.fsync(file.fileno())
    os.replace(merging, output)
    return len(places)


def _keep_owner_and_mode(path: Path, of: os.stat_result) -> None:
    if hasattr(os, "chown"):  # not on Windows
        with suppress(PermissionError):  # a file is given away by the superuser alone
            os.chown(path, of.st_uid, of.st_gid)
    path.chmod(stat.S_IMODE(of.st_mode))
