"""Time of a step by committed length: constant with a KV window, growing without one.

    python -m benchmarks.speed length --out DIR [--layers N] [--lengths 128 1024 4096]

Random weights, one row, M = 16 masks, accepted counts by the schedule. The first step reads the prompt and is
listed alone. The table marks a drafter cut by `--layers`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from torch import Tensor
from transformers import StoppingCriteriaList

from benchmarks.speed.files import Csv, picture
from benchmarks.speed.instruments import Clock, Meter
from benchmarks.speed.measure import spread
from benchmarks.speed.options import add_loading, add_machine, loading_of, pair_of, prepared
from benchmarks.speed.pairs import Pair
from benchmarks.speed.schedule import Schedule
from benchmarks.speed.settings import KV_WINDOW, Library, Setting, decoder
from benchmarks.speed.table import machine

__all__ = ["Point", "main", "points"]

WINDOW_SIZE = 16


@dataclass(frozen=True)
class Point:
    """One prompt length under one KV window.

    Attributes:
        pair: its name.
        layers: of the drafter.
        kv_window: W; `None` recomputes everything.
        prompt_length: tokens.
        first_ms: the step that reads the prompt, milliseconds.
        ms_per_step: median of the steps behind it.
        spread: distance of their quartiles, as a share of the median.
        steps: how many these are.
        tokens: most tokens that one of them recomputed in the drafter.
    """

    pair: str
    layers: int
    kv_window: int | None
    prompt_length: int
    first_ms: float
    ms_per_step: float
    spread: float
    steps: int
    tokens: int


def points(
    pair: Pair, lengths: Sequence[int], kv_windows: Sequence[int | None], *, steps: int, device: str = "cpu"
) -> Iterator[Point]:
    """Measure `steps` steps of every length and KV window; the first one is measured apart."""
    clock = Clock(device)
    for prompt_length in lengths:
        for kv_window in kv_windows:
            # Longer than the steps can fill, so that no window is cut at the row's end.
            row = replace(pair, prompt_length=prompt_length, new_tokens=(steps + 2) * WINDOW_SIZE)
            setting = Setting("apd", 0.5, WINDOW_SIZE, kv_window)
            each = decoder(setting, row, Schedule(), lambda inputs: 0)
            assert isinstance(each, Library)
            [inputs] = row.rows(1, 1).calls
            warm, meter = (Meter(pair.models, clock, pair.compiled) for _ in range(2))
            each.decode(inputs, warm, stopping_criteria=_after(1, warm))
            with meter.attached():
                each.decode(inputs, meter, stopping_criteria=_after(steps + 2, meter))
            # A step lasts until the next begins; the last has no next and is left out.
            starts = meter.starts("propose")
            first, *later = [after - before for before, after in itertools.pairwise(starts)]
            drafted = [forward.tokens for forward in meter.forwards if forward.role == "drafter"]
            yield Point(
                pair=pair.name,
                layers=pair.models["drafter"].config.num_hidden_layers,
                kv_window=kv_window,
                prompt_length=prompt_length,
                first_ms=1000 * first,
                ms_per_step=1000 * statistics.median(later),
                spread=spread(later),
                steps=len(later),
                tokens=max(drafted[1:-1], default=0),
            )


def _after(steps: int, meter: Meter) -> StoppingCriteriaList:
    """Ends a row at its first token of the given step."""

    def reached(ids: Tensor, scores: object, **_: object) -> bool:
        return meter.count("propose") >= steps

    return StoppingCriteriaList([reached])


def draw(found: Sequence[Point], path: Path) -> None:
    """Milliseconds per step against prompt length, a line per KV window."""
    figure = picture(6.5, 4)
    axes = figure.subplots()
    for kv_window, colour in zip(
        dict.fromkeys(point.kv_window for point in found), ("#c2410c", "#1d4ed8"), strict=False
    ):
        line = [point for point in found if point.kv_window == kv_window]
        name = "no KV window: all recomputed" if kv_window is None else f"KV window W = {kv_window}"
        axes.plot([p.prompt_length for p in line], [p.ms_per_step for p in line], "o-", color=colour, label=name)
    axes.set(xlabel="committed tokens", ylabel="ms per step, behind the first", xscale="log", yscale="log")
    lengths = sorted({point.prompt_length for point in found})
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.minorticks_off()
    axes.set_title(f"{found[0].pair}, {found[0].layers} layers, M = {WINDOW_SIZE}", loc="left", parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed length", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--pair", default="100m", help="with random weights (default %(default)s)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024, 4096], metavar="TOKENS")
    parser.add_argument("--steps", type=int, default=4, help="behind the first (default %(default)s)")
    add_loading(parser)
    add_machine(parser)
    options = parser.parse_args(arguments)
    prepared(options)
    if min(*options.lengths, options.steps) < 1:
        raise ValueError(f"`--lengths` and `--steps` must be at least 1, got {options.lengths} and {options.steps}.")
    pair = pair_of(options.pair, loading_of(options))
    if pair.trained:
        raise ValueError(f"`--pair` must have random weights here, any prompt being as good, got {options.pair!r}.")
    table = Csv(options.out / "length.csv", tuple(field.name for field in fields(Point)))
    found = []
    print(
        f"{pair.name} ({pair.note}), one row, M = {WINDOW_SIZE}; accepted counts by the schedule, mean {Schedule().mean:g}"
    )
    for point in points(pair, options.lengths, (KV_WINDOW, None), steps=options.steps, device=options.device):
        found.append(point)
        table.add(asdict(point))
        print(
            f"  {point.prompt_length:6d} tokens, W {point.kv_window or 'all'!s:>3}: {point.ms_per_step:9.1f} ms per step "
            f"± {point.spread:.0%}, first {point.first_ms:9.1f} ms, {point.tokens} tokens recomputed",
            flush=True,
        )
    draw(found, options.out / "length.png")
    print(json.dumps({**machine(options.device), "points": [asdict(point) for point in found]}))
    return 0
