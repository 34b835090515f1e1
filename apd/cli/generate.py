"""`apd generate`: answers one prompt, a file of prompts, or standard input."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from apd.cli.answers import decode, load
from apd.cli.checkpoints import check_places, settle_new_tokens
from apd.cli.files import GENERATE, Task, answer_file, answer_to_stdout
from apd.cli.report import say
from apd.cli.results import Prompt
from apd.cli.settings import set_up
from apd.cli.usage import STANDARD, UsageError, check_files, check_usage, config_of
from apd.generation.many import Generated
from apd.generation.processes import join
from apd.sampler import APDSampler
from apd.show.rows import number
from apd.show.terminal import console
from apd.show.text import bar_for, legend, mark, pieces
from apd.text import decoder

if TYPE_CHECKING:
    from accelerate import PartialState  # type: ignore[import-untyped]


def run(arguments: argparse.Namespace) -> None:
    """Run the command with parsed arguments.

    Raises:
        UsageError: the options cannot be used together, or one is out of range.
    """
    answer(arguments, GENERATE, _answer_prompt, "--prompt")


def answer(
    arguments: argparse.Namespace, task: Task, answer_one: Callable[[APDSampler, argparse.Namespace], None], one: str
) -> None:
    """Answer a file with `task`, or what the option `one` gives with `answer_one`.

    Raises:
        UsageError: the options cannot be used together, or one is out of range.
    """
    config = config_of(arguments)
    if arguments.input is None and vars(arguments)[one.lstrip("-")] is None:
        raise UsageError(
            f"{one} TEXT, or --input FILE with --output FILE, must be given. See `apd --help` for examples."
        )
    check_usage(arguments)
    with processes_of(arguments) as processes:
        if arguments.input is None and processes.num_processes > 1:
            raise UsageError(f"{one} takes one process, got {processes.num_processes}. Use --input and --output.")
        check_places(arguments)
        set_up(included=arguments.drafter is None)
        settle_new_tokens(arguments, is_told=processes.is_main_process)
        if arguments.input is not None:
            check_files(arguments, processes.num_processes)
            write = answer_to_stdout if arguments.output == STANDARD else answer_file
            write(task, arguments, config, processes)
        else:
            answer_one(load(arguments, config, chats=arguments.chat), arguments)


@contextmanager
def processes_of(arguments: argparse.Namespace) -> Iterator[PartialState]:
    """The launched processes, one without a launcher. Sets `device_map` to this process's device if it is open."""
    state = join(on_cpu=arguments.drafter is None or arguments.device_map == "cpu")
    if arguments.drafter is not None and arguments.device_map in (None, state.device.type):
        arguments.device_map = str(state.device)
    try:
        yield state
    finally:
        state.destroy_process_group()


def _answer_prompt(sampler: APDSampler, arguments: argparse.Namespace) -> None:
    def refuse(index: int, error: Exception) -> None:
        raise error

    prompt = arguments.prompt
    if prompt == STANDARD:
        prompt = sys.stdin.read().removesuffix("\n")  # of `echo`, and of an editor
        if not prompt:
            raise ValueError("--prompt - reads the prompt from standard input, which is empty. Pipe a text into it.")
    answers = list(decode(sampler, [Prompt(0, prompt)], arguments, refuse))
    for answer in sorted(answers, key=lambda answer: answer.sequence):
        if len(answers) > 1:
            print(f"[{answer.sequence + 1}]")
        _show(answer, sampler, arguments)


def _show(answer: Generated, sampler: APDSampler, arguments: argparse.Namespace) -> None:
    if arguments.show_steps:
        out = console(sys.stdout, arguments.color)
        colour = out.color_system is not None
        parts = pieces(answer.tokens, answer.trace.steps, decoder(sampler.tokenizer, skip_special_tokens=True))
        bar = bar_for(text for _, text in parts)
        console(sys.stderr, "always" if colour else "never").print(legend(colour=colour, bar=bar))
        out.print(mark(parts, colour=colour, bar=bar))
    else:
        print(str(answer.text).strip(), flush=True)
    several = answer.canvases > answer.drafter_forwards
    canvases = f", {answer.canvases} canvases" if several else ""
    say(
        f"{number(len(answer.tokens), 'token')}, {number(answer.drafter_forwards, 'drafter forward')} "
        f"({answer.tokens_per_forward:.1f} tokens each), {number(answer.verifier_forwards, 'verifier forward')}{canvases}"
    )
