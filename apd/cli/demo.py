"""`apd demo`: the embedded pair, adaptive parallel decoding beside one token per step, to watch and to count."""

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from apd import APDSampler, LeftToRight
from apd.embedded.tasks import EXAMPLES, Instance, is_right
from apd.show.terminal import align, legend, mark, pieces

__all__ = ["Comparison", "Run", "compare", "play", "table"]

MAX_NEW_TOKENS = 32
FRAME_SECONDS = 0.05


@dataclass(frozen=True)
class Run:
    """One prompt, decoded once.

    Args:
        text: the answer.
        frames: after each step, what was committed so far as `(step, piece)`, and the rejected rest of the draft.
        tokens: new tokens, the stop token included.
        drafter_forwards: passes of the drafter, one per step.
        verifier_forwards: passes of the verifier.
        seconds: wall-clock.
        right: what the task's scorer says.
    """

    text: str
    frames: list[tuple[list[tuple[int, str]], str]]
    tokens: int
    drafter_forwards: int
    verifier_forwards: int
    seconds: float
    right: bool


@dataclass(frozen=True)
class Comparison:
    """One prompt, decoded one token per step and with adaptive parallel decoding."""

    instance: Instance
    single: Run
    apd: Run


def compare(sampler: APDSampler, instances: Sequence[Instance] = EXAMPLES) -> Iterator[Comparison]:
    """Decode each prompt both ways, one at a time; a warm-up, whose time counts nowhere, comes first."""
    _run(sampler, instances[0], one_token_per_step=False)
    for instance in instances:
        single = _run(sampler, instance, one_token_per_step=True)
        yield Comparison(instance, single, _run(sampler, instance, one_token_per_step=False))


def _run(sampler: APDSampler, instance: Instance, *, one_token_per_step: bool) -> Run:
    tokenizer: Any = sampler.tokenizer
    inputs = tokenizer([instance.prompt], return_tensors="pt")
    start = time.perf_counter()
    output: Any = sampler.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        strategy=LeftToRight(1) if one_token_per_step else None,
        return_dict_in_generate=True,
    )
    seconds = time.perf_counter() - start
    trace = output.trace[0]

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    frames = []
    for step in range(len(trace.starts)):
        committed = sum(s <= step for s in trace.steps)
        tokens = trace.tokens[:committed]
        rejected = trace.drafts[step][committed - trace.starts[step] :]
        rest = decode([*tokens, *rejected])[len(decode(tokens)) :]
        frames.append((pieces(tokens, trace.steps[:committed], decode), rest))
    text = decode(trace.tokens)
    return Run(
        text=text,
        frames=frames,
        tokens=int(output.new_tokens[0]),
        drafter_forwards=int(output.drafter_forwards[0]),
        verifier_forwards=int(output.verifier_forwards[0]),
        seconds=seconds,
        right=is_right(instance, text),
    )


def play(comparison: Comparison, out: TextIO, *, colour: bool, animate: bool) -> None:
    """Write one comparison: the prompt, then both answers with their steps marked.

    With `animate`, which needs a terminal with colours, both grow forward by forward, the rejected rest of each draft
    dimmed behind them.
    """
    runs = {"one per step": comparison.single, "apd": comparison.apd}
    out.write(f"\n{comparison.instance.task}: {comparison.instance.prompt}\n")
    room = shutil.get_terminal_size().columns - len(_counted("", 0)) - 1
    if animate and max(len(run.text) for run in runs.values()) <= room:  # a wrapped line could not be drawn over
        for shown in range(1, max(len(run.frames) for run in runs.values())):
            for name, run in runs.items():
                parts, rejected = run.frames[min(shown, len(run.frames)) - 1]
                rejected = rejected[: room - sum(len(text) for _, text in parts)]
                text = mark(parts, colour=colour, rejected=rejected)
                out.write(f"\x1b[2K{_counted(name, min(shown, len(run.frames)))}{text}\n")
            out.write("\x1b[2A")
            out.flush()
            time.sleep(FRAME_SECONDS)
        out.write("\x1b[J")
    for name, run in runs.items():
        verdict = "right" if run.right else "wrong"
        out.write(f"{_counted(name, len(run.frames))}{mark(run.frames[-1][0], colour=colour)}  ({verdict})\n")
    out.flush()


def _counted(name: str, forwards: int) -> str:
    unit = "forward" if forwards == 1 else "forwards"
    return f"  {name:<12} {forwards:>3} {unit:<8}  "


def table(comparisons: Sequence[Comparison]) -> str:
    """All prompts and their totals, then what was saved and at what price."""
    header = [
        ["", "", "forwards,", "forwards,", "tokens per", "verifier", "right,", "right,"],
        ["task", "tokens", "one per step", "apd", "forward", "forwards", "one per step", "apd"],
    ]
    rows = [
        _row(c.instance.task, c.apd.tokens, c.single.drafter_forwards, c.apd.drafter_forwards, c.apd.verifier_forwards)
        + ["yes" if run.right else "no" for run in (c.single, c.apd)]
        for c in comparisons
    ]
    tokens = sum(c.apd.tokens for c in comparisons)
    single = sum(c.single.drafter_forwards for c in comparisons)
    parallel = sum(c.apd.drafter_forwards for c in comparisons)
    right = [sum(c.single.right for c in comparisons), sum(c.apd.right for c in comparisons)]
    verified = sum(c.apd.verifier_forwards for c in comparisons)
    total = _row("all", tokens, single, parallel, verified) + [f"{n} of {len(comparisons)}" for n in right]
    seconds = [sum(c.single.seconds for c in comparisons), sum(c.apd.seconds for c in comparisons)]
    return "\n".join(
        [
            align([*header, *rows, total], header=2),
            "",
            f"Adaptive parallel decoding: {tokens / parallel:.1f} tokens per drafter forward; {single - parallel} of "
            f"{single} drafter forwards saved; {right[1]} of {len(comparisons)} right, one token per step {right[0]}.",
            f"Seconds: {seconds[0]:.2f} with one token per step, {seconds[1]:.2f} with apd.",
        ]
    )


def _row(task: str, tokens: int, single: int, parallel: int, verified: int) -> list[str]:
    return [task, str(tokens), str(single), str(parallel), f"{tokens / parallel:.1f}", str(verified)]


def run(sampler: APDSampler, out: TextIO, *, colour: bool, animate: bool) -> list[Comparison]:
    """The whole demo, written to `out`; returns what was measured."""
    knobs = ", ".join(f"{name} {str(value).lower()}" for name, value in asdict(sampler.config).items())
    out.write(
        f"Adaptive parallel decoding with the embedded pair, {len(EXAMPLES)} prompts, greedy.\nKnobs: {knobs}.\n"
    )
    out.write(legend(colour=colour) + "\n")
    comparisons = []
    for comparison in compare(sampler):
        play(comparison, out, colour=colour, animate=animate)
        comparisons.append(comparison)
    out.write(f"\n{table(comparisons)}\n")
    return comparisons
