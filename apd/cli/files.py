"""`apd generate --input … --output …`, and `apd infill` likewise: decodes a file with any number of processes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from apd.cli.answers import decode, load, readable
from apd.cli.progress import progress
from apd.cli.report import say
from apd.cli.results import (
    BadLine,
    Part,
    Prompt,
    Row,
    as_line,
    merge,
    part_path,
    prompt_of,
    read_prompts,
    read_results,
    take_over,
)
from apd.cli.usage import STANDARD, fingerprint
from apd.config import APDConfig
from apd.generation.many import Generated
from apd.generation.processes import meet
from apd.sampler import APDSampler
from apd.show.rows import number

if TYPE_CHECKING:
    from accelerate import PartialState  # type: ignore[import-untyped]


@dataclass(frozen=True)
class Task:
    """What a command does with the lines of a file.

    Attributes:
        read_line: line → what it asks for and the fields of its result, or a ValueError.
        decode: (sampler, prompts, arguments, on_error) → pairs of index and fields of a result, see `answers.decode`.
        check: (what is asked, tokenizer) → a ValueError if it cannot be read, before weights are.
    """

    read_line: Callable[[bytes], tuple[Any, Row]]
    decode: Callable[..., Iterator[tuple[int, Row]]]
    check: Callable[[Any, Any], object] = lambda asked, tokenizer: None


def answer_file(task: Task, arguments: argparse.Namespace, config: APDConfig, processes: PartialState) -> None:
    """Decode this process's share of the remaining prompts, then let the first process merge all shares.

    1. The first process takes over the parts of an interrupted run, while the others wait.
    2. Every process computes the remaining prompts; the i-th of n takes every n-th of them, from the i-th on.
    3. It decodes them into its own part file.
    4. When all are done, the first process merges the parts into the output.
    """
    output, fingerprint_of_run = arguments.output, fingerprint(arguments, config)
    paths = [part_path(output, process) for process in range(processes.num_processes)]
    start = time.monotonic()
    with ExitStack() as stack:
        # 1. Take over the parts of an interrupted run.
        if processes.is_main_process:
            part = stack.enter_context(Part(paths[0]))
            prompts, num_bad = _read_prompts(task, arguments, report=True)
            fields = {prompt.index: prompt.fields for prompt in prompts}
            take_over(part, output, partial(_check_result, fields=fields, run=fingerprint_of_run))
        meet()
        if not processes.is_main_process:
            if not paths[0].exists():
                raise FileNotFoundError(f"{paths[0]} is not there: all processes must see the same files.")
            part = stack.enter_context(Part(paths[processes.process_index]))
            prompts, num_bad = _read_prompts(task, arguments, report=False)

        # 2. The share of this process.
        done = read_results(output)
        todo = [prompt for prompt in prompts if prompt.index not in done]
        if processes.is_main_process and prompts:
            _announce(len(prompts), len(prompts) - len(todo), len(done), arguments, processes)
        share = todo[processes.process_index :: processes.num_processes]

        # 3. Decode it.
        try:
            if share:
                _answer_share(task, share, part.write, arguments, config, processes, fingerprint_of_run)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(_left(len(prompts), done, output, paths)) from None

        # 4. Merge.
        meet()
        if processes.is_main_process:
            num_results = merge(output, paths)
            for path in paths[1:]:
                path.unlink()
            part.close(delete=True)
            if not num_results:
                _check_nothing(arguments, len(todo) + num_bad)
                output.touch()
            elif todo:
                skipped = len(prompts) + num_bad - num_results
                seconds = time.monotonic() - start
                _summarise(read_results(output).values(), len(done), skipped, seconds, _near(output))


def _left(total: int, done: Collection[int], output: Path, paths: Sequence[Path]) -> str:
    """How many prompts an interrupted run leaves answered, and in which files."""
    counts = {path: len(read_results(path)) for path in paths}
    files = [*([output] if done else []), *(path for path, count in counts.items() if count)]
    where = f" in {', '.join(_near(path) for path in files)}" if files else ""
    return f"{len(done) + sum(counts.values())} of {total} answered{where}"


def _announce(
    total: int, num_done: int, num_results: int, arguments: argparse.Namespace, processes: PartialState
) -> None:
    """Say what a run will do."""
    if num_done == total:
        say(f"nothing left to do: {_near(arguments.output)} holds {num_results} results")
        return
    over = f", {num_done} answered before and taken over, {total - num_done} to do" if num_done else ""
    among = f" by {processes.num_processes} processes" if processes.num_processes > 1 else ""
    say(f"{_name(arguments.input)}: {number(total, 'prompt')}{over}{among}")


def _near(path: Path) -> str:
    """A path as it is seen from the working folder, if it lies in it."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _summarise(rows: Collection[Row], num_before: int, num_skipped: int, seconds: float, where: str) -> None:
    """Say what a run has done; tokens per forward are those of all answers, pooled."""
    tokens = sum(row["new_tokens"] for row in rows)
    forwards = sum(row["drafter_forwards"] or row["verifier_forwards"] for row in rows)
    new = f", {len(rows) - num_before} of them new" if num_before else ""
    new += f", {num_skipped} skipped" if num_skipped else ""
    say(f"{number(len(rows), 'answer')}{new}, {tokens / forwards:.1f} tokens per forward, {seconds:.0f} s → {where}")


def answer_to_stdout(task: Task, arguments: argparse.Namespace, config: APDConfig, processes: PartialState) -> None:
    """Decode all prompts and write each answer once all before it are written."""
    start = time.monotonic()
    prompts, num_bad = _read_prompts(task, arguments, report=True)
    written: list[Row] = []

    def write(row: Row) -> None:
        written.append({name: row[name] for name in ("new_tokens", "drafter_forwards", "verifier_forwards")})
        sys.stdout.buffer.write(as_line(row))
        sys.stdout.flush()

    if prompts:
        _announce(len(prompts), 0, 0, arguments, processes)
        _answer_share(task, prompts, write, arguments, config, processes, fingerprint(arguments, config))
    if written:
        skipped = len(prompts) + num_bad - len(written)
        _summarise(written, 0, skipped, time.monotonic() - start, "standard output")
    else:
        _check_nothing(arguments, len(prompts) + num_bad)


def _check_nothing(arguments: argparse.Namespace, num_skipped: int) -> None:
    """Report a run without results: an error unless the input has no prompts."""
    if num_skipped:
        raise ValueError(
            f"every prompt was skipped, all {num_skipped} of {_name(arguments.input)}: nothing is written"
        )
    say(f"{_name(arguments.input)} holds no prompts: the output is empty")


def _read_prompts(task: Task, arguments: argparse.Namespace, *, report: bool) -> tuple[list[Prompt], int]:
    """The prompts of the input, and the number of its bad lines."""
    prompts, num_bad = [], 0
    is_standard = arguments.input == STANDARD
    with nullcontext(sys.stdin.buffer) if is_standard else arguments.input.open("rb") as file:
        for item in read_prompts(file, _name(arguments.input), task.read_line):
            if not isinstance(item, BadLine):
                prompts.append(item)
                continue
            if arguments.on_error == "stop":
                raise item
            num_bad += 1
            if report:
                _report_skipped(item)
    return prompts, num_bad


def _name(source: Path | str) -> str:
    return "standard input" if source == STANDARD else str(source)


def _check_result(path: Path, row: Row, *, fields: dict[int, Row], run: str) -> None:
    index = row["index"]
    asked = fields.get(index, {})
    if row.get("run") != run or any(row.get(name) != value for name, value in asked.items()):
        raise ValueError(
            f"{path} holds results of another run: line {index + 1} of the input was decoded with another prompt, other fields or "
            "other settings. Choose another --output, or repeat the settings."
        )


def _answer_share(
    task: Task,
    share: Sequence[Prompt],
    write: Callable[[Row], None],
    arguments: argparse.Namespace,
    config: APDConfig,
    processes: PartialState,
    run: str,
) -> None:
    """Decode prompts and write the results. Only the first process shows a bar, which counts its own share."""

    def refused(index: int, error: Exception) -> None:
        complaint = f"{_name(arguments.input)}, line {index + 1}: {error}"
        if arguments.on_error == "stop":
            raise ValueError(complaint) from error
        _report_skipped(complaint)
        bar.update()

    def check(tokenizer: Any) -> None:
        for prompt in share if arguments.on_error == "stop" else ():
            try:
                task.check(prompt.asked, tokenizer)
            except ValueError as error:
                refused(prompt.index, error)

    sampler = load(arguments, config, chats=arguments.chat, check=check)
    fields = {prompt.index: prompt.fields for prompt in share}
    of_many = f"process 1 of {processes.num_processes}" if processes.num_processes > 1 else None
    is_hidden = not processes.is_main_process or (arguments.output == STANDARD and sys.stdout.isatty())
    with progress(len(share), of_many, is_hidden=is_hidden) as bar:
        try:
            for index, found in task.decode(sampler, share, arguments, refused):
                write({"index": index, **fields[index], **found, "run": run})
                bar.update()
        except FloatingPointError as error:
            copies = arguments.num_return_sequences
            line = "i + 1" if copies == 1 else f"i // {copies} + 1"
            raise FloatingPointError(f"{_name(arguments.input)}: {error} Row i is line {line}.") from error


def _report_skipped(complaint: object) -> None:
    tqdm.write(f"apd: skipped: {complaint}", file=sys.stderr)


def _generated(
    sampler: APDSampler,
    prompts: Sequence[Prompt],
    arguments: argparse.Namespace,
    on_error: Callable[[int, Exception], None],
) -> Iterator[tuple[int, Row]]:
    copies = arguments.num_return_sequences
    waiting: dict[int, list[Generated]] = {}
    for answer in decode(sampler, prompts, arguments, on_error):
        of_prompt = waiting.setdefault(answer.index, [])
        of_prompt.append(answer)
        if len(of_prompt) == copies:
            del waiting[answer.index]
            yield answer.index, _result(answer) if copies == 1 else _results(of_prompt)


def _results(answers: list[Generated]) -> Row:
    """The fields of a result with several answers: the answers, and their counts in sum."""
    listed = [_result(answer) for answer in sorted(answers, key=lambda answer: answer.sequence)]
    names = ("new_tokens", "drafter_forwards", "verifier_forwards", "canvases")
    total = {name: sum(each[name] for each in listed) for name in names}
    forwards = total["drafter_forwards"] or total["verifier_forwards"]
    return {"answers": listed, **total, "tokens_per_forward": round(total["new_tokens"] / forwards, 3)}


def _result(answer: Generated) -> Row:
    return {
        "text": answer.text,
        "new_tokens": len(answer.tokens),
        "drafter_forwards": answer.drafter_forwards,
        "verifier_forwards": answer.verifier_forwards,
        "canvases": answer.canvases,
        "tokens_per_forward": round(answer.tokens_per_forward, 3),
        "finish": answer.finish,
    }


#: `apd generate`.
GENERATE = Task(prompt_of, _generated, readable)
