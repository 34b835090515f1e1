"""`apd demo`: adaptive parallel decoding with the included pair, side by side with one token per step."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from apd.cli.settings import set_up
from apd.config import APDConfig
from apd.decoding.strategy import Strategy
from apd.included.tasks import EXAMPLES, Instance, is_right
from apd.sampler import APDSampler
from apd.show.terminal import console
from apd.show.text import legend, mark, pieces
from apd.strategies import LeftToRight

MAX_NEW_TOKENS = 32
FRAME_SECONDS = 0.05
_HEADINGS = {
    "tokens": "tokens",
    "single": "forwards,\n1 per\nstep",
    "apd": "forwards,\napd",
    "rate": "tokens\nper\nforward",
    "verifier": "verifier\nforwards",
    "single right": "right,\n1 per\nstep",
    "apd right": "right,\napd",
}
#: Left out in a terminal of less than 80 columns.
_DISPENSABLE = ("tokens", "verifier")


@dataclass(frozen=True)
class Run:
    """One decode of one prompt.

    Args:
        text: the answer.
        frames: after each step, the tokens committed so far as `(step, piece)`, and the rejected rest of the draft.
        tokens: number of new tokens, the stop token included.
        drafter_forwards: passes of the drafter, one per step.
        verifier_forwards: passes of the verifier.
        seconds: wall-clock.
        right: whether the task's scorer accepts the answer.
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

    @property
    def num_frames(self) -> int:
        """Forwards until both are done."""
        return max(len(self.single.frames), len(self.apd.frames))


def run(config: APDConfig, *, colour: str, animate: bool) -> list[Comparison]:
    """Run the demo on standard output and return the measurements.

    Args:
        colour: `"auto"`, `"always"` or `"never"`.
        animate: show the answers grow; only in a terminal with colours.
    """
    set_up(included=True)
    sampler = APDSampler.from_included(**asdict(config))
    out = console(sys.stdout, colour)
    has_colours = out.color_system is not None
    knobs = ", ".join(f"{name} {str(value).lower()}" for name, value in asdict(config).items())
    out.print(f"Adaptive parallel decoding with the included pair, {len(EXAMPLES)} prompts, greedy.\nKnobs: {knobs}.")
    out.print(legend(colour=has_colours))
    comparisons = []
    for comparison in compare(sampler):
        play(comparison, out, animate=animate and has_colours and sys.stdout.isatty())
        comparisons.append(comparison)
    out.print()
    out.print(table(comparisons, out.width))
    out.print()
    out.print(summary(comparisons))
    return comparisons


def compare(sampler: APDSampler, instances: Sequence[Instance] = EXAMPLES) -> Iterator[Comparison]:
    """Decode each prompt both ways, one at a time, after an untimed warm-up."""
    _decode(sampler, instances[0])
    for instance in instances:
        yield Comparison(instance, _decode(sampler, instance, LeftToRight(1)), _decode(sampler, instance))


def _decode(sampler: APDSampler, instance: Instance, strategy: Strategy | None = None) -> Run:
    tokenizer: Any = sampler.tokenizer
    inputs = tokenizer([instance.prompt], return_tensors="pt")
    start = time.perf_counter()
    output = sampler.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, strategy=strategy, return_dict_in_generate=True)
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


def play(comparison: Comparison, out: Console, *, animate: bool) -> None:
    """Print one comparison: the prompt, then both answers with their steps marked.

    With `animate`, which needs a terminal with colours, both answers grow forward by forward, each followed by the
    rejected rest of its draft, dimmed.
    """
    colour = out.color_system is not None
    out.print(f"\n{comparison.instance.task}: {comparison.instance.prompt}")
    if animate:
        with Live(console=out, auto_refresh=False, transient=True) as live:
            for shown in range(1, comparison.num_frames):
                live.update(_answers(comparison, shown, colour=colour), refresh=True)
                time.sleep(FRAME_SECONDS)
    out.print(_answers(comparison, comparison.num_frames, colour=colour))


def _answers(comparison: Comparison, shown: int, *, colour: bool) -> Table:
    """Both answers after `shown` forwards; the finished ones with their verdicts."""
    grid = Table.grid(padding=(0, 2))
    for name, run in (("one per step", comparison.single), ("apd", comparison.apd)):
        count = min(shown, len(run.frames))
        parts, rejected = run.frames[count - 1]
        text = mark(parts, colour=colour, rejected=rejected)
        if shown >= comparison.num_frames:
            text.append("  (right)" if run.right else "  (wrong)")
        grid.add_row(f"  {name:<12}", f"{count:>2} {'forward' if count == 1 else 'forwards':<8}", text)
    return grid


def table(comparisons: Sequence[Comparison], width: int = 80) -> Table:
    """Counts of every prompt, then their totals; at most 80 columns wide, and with fewer counts where `width` is less."""
    padding = (0, int(width >= 80), 0, 0)
    found = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=padding, header_style="")
    shown = [name for name in _HEADINGS if width >= 80 or name not in _DISPENSABLE]
    found.add_column("task", vertical="bottom", no_wrap=True)
    for name in shown:
        found.add_column(_HEADINGS[name], justify="right", vertical="bottom")
    for comparison in comparisons:
        single, apd = ("yes" if run.right else "no" for run in (comparison.single, comparison.apd))
        cells = _counts([comparison]) | {"single right": single, "apd right": apd}
        found.add_row(comparison.instance.task, *(cells[name] for name in shown))
    single, apd = map(str, _total(comparisons, "right"))
    cells = _counts(comparisons) | {"single right": single, "apd right": apd}
    found.add_row("all", *(cells[name] for name in shown))
    return found


def _total(comparisons: Sequence[Comparison], of: str) -> tuple[Any, Any]:
    """Sums of a field of `Run`: with one token per step, and with adaptive parallel decoding."""
    return sum(getattr(c.single, of) for c in comparisons), sum(getattr(c.apd, of) for c in comparisons)


def _counts(comparisons: Sequence[Comparison]) -> dict[str, str]:
    (_, tokens), (single, parallel) = _total(comparisons, "tokens"), _total(comparisons, "drafter_forwards")
    verified = _total(comparisons, "verifier_forwards")[1]
    return {
        "tokens": str(tokens),
        "single": str(single),
        "apd": str(parallel),
        "rate": f"{tokens / parallel:.1f}",
        "verifier": str(verified),
    }


def summary(comparisons: Sequence[Comparison]) -> str:
    """Forwards saved, answers still right, and seconds, in words."""
    tokens, forwards, right, seconds = (
        _total(comparisons, of) for of in ("tokens", "drafter_forwards", "right", "seconds")
    )
    return (
        f"Adaptive parallel decoding: {tokens[1] / forwards[1]:.1f} tokens per drafter forward; "
        f"{forwards[0] - forwards[1]} of {forwards[0]} drafter forwards saved; {right[1]} of {len(comparisons)} right, "
        f"one token per step {right[0]}.\n"
        f"Seconds: {seconds[0]:.2f} with one token per step, {seconds[1]:.2f} with apd."
    )
