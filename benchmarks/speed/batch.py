"""Tokens per second against batch size, compared with the gain of the bare forwards at the same shapes.

    python -m benchmarks.speed batch --out DIR [--pair included 100m] [--batch 1 2 4 8 16]

Every batch size decodes the same prompts, hence the same tokens. The bare forwards are the two models called directly, with a
mask and without a cache, at the shapes (rows, tokens, projected tokens) recorded in a run, one after another.
Their gain is what batching gives these models on this machine; the ratio is the share that the library keeps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.speed.files import Csv, picture
from benchmarks.speed.instruments import Clock, Forward, Meter
from benchmarks.speed.options import add_loading, add_machine, loading_of, pair_of, prepared
from benchmarks.speed.pairs import Pair
from benchmarks.speed.schedule import Schedule
from benchmarks.speed.settings import Decoder, Setting, decoder
from benchmarks.speed.table import machine

__all__ = ["Point", "Sample", "main", "samples", "summary"]


@dataclass(frozen=True)
class Sample:
    """One repetition of one batch size.

    Attributes:
        pair: its name.
        batch: rows of a call.
        repetition: from 0.
        tokens: new tokens of all prompts.
        forwards: of both models.
        seconds: all calls, without instruments.
        bare_seconds: the bare forwards.
        cpu_seconds, bare_cpu_seconds: processor time of both, which other load on the machine affects less.
    """

    pair: str
    batch: int
    repetition: int
    tokens: int
    forwards: int
    seconds: float
    bare_seconds: float
    cpu_seconds: float
    bare_cpu_seconds: float


@dataclass(frozen=True)
class Point:
    """A batch size, medians over the repetitions.

    Attributes:
        pair: its name.
        batch: rows of a call.
        tokens_per_second: of all rows.
        gain: over the smallest batch size.
        bare_gain: gain of the bare forwards.
        ratio: gain / bare gain, repetition by repetition.
        cpu_ratio: this ratio in processor time.
    """

    pair: str
    batch: int
    tokens_per_second: float
    gain: float
    bare_gain: float
    ratio: float
    cpu_ratio: float


def samples(
    pair: Pair,
    setting: Setting,
    sizes: Sequence[int],
    *,
    count: int,
    repetitions: int,
    device: str = "cpu",
    on_sample: Callable[[Sample], None] = lambda _: None,
) -> list[Sample]:
    """Run all batch sizes in turn, `repetitions` times, after one call of each that counts tokens and shapes.

    Args:
        on_sample: called with each sample as soon as it is measured.
    """
    clock, prepared_runs = Clock(device), []
    for size in sizes:
        rows = pair.rows(count, size)
        each = decoder(setting, pair, Schedule(), lambda inputs: 0)
        tokens = sum(len(row) for inputs in rows.calls for row in each.answers(inputs).tokens)
        meter = Meter(pair.models, clock, pair.compiled)
        with meter.attached():
            for inputs in rows.calls:
                each.decode(inputs)
        prepared_runs.append((size, each, rows.calls, tokens, bare(pair.models, meter.forwards)))
    found = []
    for repetition in range(repetitions):
        for size, each, calls, tokens, forwards in prepared_runs:
            wall, cpu = _timed(clock, lambda each=each, calls=calls: _decode_all(each, calls))
            bare_wall, bare_cpu = _timed(clock, lambda forwards=forwards: [forward() for forward in forwards])
            found.append(Sample(pair.name, size, repetition, tokens, len(forwards), wall, bare_wall, cpu, bare_cpu))
            on_sample(found[-1])
    return found


def summary(found: Sequence[Sample]) -> list[Point]:
    """One point per batch size."""
    sizes = sorted({sample.batch for sample in found})
    first = {sample.repetition: sample for sample in found if sample.batch == sizes[0]}
    points = []
    for size in sizes:
        line = [(sample, first[sample.repetition]) for sample in found if sample.batch == size]
        # All batch sizes decode the same prompts to the same tokens, so a gain is a ratio of times.
        points.append(
            Point(
                pair=found[0].pair,
                batch=size,
                tokens_per_second=statistics.median(sample.tokens / sample.seconds for sample, _ in line),
                gain=statistics.median(alone.seconds / sample.seconds for sample, alone in line),
                bare_gain=statistics.median(alone.bare_seconds / sample.bare_seconds for sample, alone in line),
                ratio=statistics.median(
                    alone.seconds / sample.seconds * sample.bare_seconds / alone.bare_seconds for sample, alone in line
                ),
                cpu_ratio=statistics.median(
                    alone.cpu_seconds / sample.cpu_seconds * sample.bare_cpu_seconds / alone.bare_cpu_seconds
                    for sample, alone in line
                ),
            )
        )
    return points


def bare(models: Mapping[str, PreTrainedModel], forwards: Sequence[Forward]) -> list[Callable[[], Any]]:
    """The bare forwards as callables: arbitrary ids in, logits out, one set of inputs per shape."""
    made: dict[tuple[Any, ...], Callable[[], Any]] = {}
    for forward in forwards:
        key = (forward.role, forward.rows, forward.tokens, forward.projected)
        if key not in made:
            made[key] = _pass(models[forward.role], forward)
    return [made[forward.role, forward.rows, forward.tokens, forward.projected] for forward in forwards]


def _pass(model: PreTrainedModel, forward: Forward) -> Callable[[], Any]:
    device, rows, tokens = model.device, forward.rows, forward.tokens
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device=device)
    if getattr(model.config, "is_causal", True):
        mask = mask.tril()
    given = {
        "input_ids": torch.zeros(rows, tokens, dtype=torch.int64, device=device),
        "attention_mask": mask,
        "position_ids": torch.arange(tokens, device=device).expand(rows, -1),
        "use_cache": False,
    }

    @torch.no_grad()
    def run() -> Any:
        hidden = model.base_model(**given).last_hidden_state
        # More positions may be projected than exist: columns behind a row's end are filled up.
        index = torch.arange(forward.projected, device=device).clamp(max=tokens - 1)
        return model.get_output_embeddings()(hidden[:, index])

    return run


def _timed(clock: Clock, action: Callable[[], object]) -> tuple[float, float]:
    """Wall-clock seconds and processor seconds."""
    start, cpu = clock.wall(), time.process_time()
    action()
    return clock.wall() - start, time.process_time() - cpu


def _decode_all(each: Decoder, calls: Sequence[Any]) -> None:
    for inputs in calls:
        each.decode(inputs)


def draw(points: Sequence[Point], path: Path) -> None:
    """Gain against batch size, full for the library and dashed for the bare forwards."""
    figure = picture(6.5, 4)
    axes = figure.subplots()
    for name, colour in zip(
        dict.fromkeys(point.pair for point in points), ("#c2410c", "#1d4ed8", "#0f766e"), strict=False
    ):
        line = [point for point in points if point.pair == name]
        sizes = [point.batch for point in line]
        axes.plot(sizes, [point.gain for point in line], "o-", color=colour, label=f"{name}: tokens per second")
        axes.plot(sizes, [point.bare_gain for point in line], "s--", color=colour, label=f"{name}: bare forwards")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({point.batch for point in points}), sorted({point.batch for point in points}))
    axes.set(xlabel="batch size", ylabel="gain over the smallest batch")
    axes.grid(alpha=0.3)
    for label in axes.legend(frameon=False).get_texts():
        label.set_parse_math(False)  # a pair may be a path
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed batch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--pair", nargs="+", default=["included", "100m"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="ROWS")
    parser.add_argument("--count", type=int, metavar="N", help="prompts (default: the largest batch)")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N")
    parser.add_argument("--mixture-weight", type=float, default=0.5, metavar="R")
    parser.add_argument("--window-size", type=int, metavar="M")
    parser.add_argument("--kv-window", type=int, metavar="W")
    add_loading(parser)
    add_machine(parser)
    options = parser.parse_args(arguments)
    prepared(options)
    count = options.count or max(options.batch)
    if count < max(options.batch):
        raise ValueError(f"`--count` must be at least the largest batch, {max(options.batch)}, got {count}.")
    setting = Setting("apd", options.mixture_weight, options.window_size, options.kv_window)
    table = Csv(options.out / "batch.csv", tuple(field.name for field in fields(Sample)))
    points: list[Point] = []
    for name in options.pair:
        pair = pair_of(name, loading_of(options))
        found = samples(
            pair,
            setting,
            options.batch,
            count=count,
            repetitions=options.repetitions,
            device=options.device,
            on_sample=lambda sample: table.add(asdict(sample)),
        )
        points += (of_pair := summary(found))
        counts = "" if pair.trained else "; accepted counts by the schedule, not by the models"
        print(f"{name}{f' ({pair.note})' if pair.note else ''}, {setting.label}, {count} prompts{counts}")
        for point in of_pair:
            print(
                f"  batch {point.batch:3d}: {point.tokens_per_second:9.1f} tok/s, gain {point.gain:5.2f}, bare forwards "
                f"{point.bare_gain:5.2f}, ratio {point.ratio:.0%} ({point.cpu_ratio:.0%} in processor time)",
                flush=True,
            )
    draw(points, options.out / "batch.png")
    print(json.dumps({**machine(options.device), "setting": setting.label, "points": [asdict(p) for p in points]}))
    return 0
