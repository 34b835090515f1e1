"""Time of a step outside the models by way of sampling and size of the vocabulary.

    python -m benchmarks.speed sampling [--vocab 2048 131072] [--batch 1] [--out DIR]

Narrow models with random weights, whose marginals are almost flat: every token may win a draw and a nucleus holds nearly
all of them, as at masks far from the frontier. M = 16, W = 16, accepted counts by the schedule. A step lasts until the
next begins; "outside" is its time without the decoders and their output layers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.speed.files import Csv
from benchmarks.speed.instruments import Clock, Meter
from benchmarks.speed.options import add_loading, add_machine, loading_of, prepared
from benchmarks.speed.pairs import SHAPES, Loading, Pair, Shape, random_pair
from benchmarks.speed.schedule import Schedule
from benchmarks.speed.settings import KV_WINDOW, Library, Setting, decoder
from benchmarks.speed.table import machine

__all__ = ["WAYS", "Point", "main", "points"]

WINDOW_SIZE = 16
#: Arguments of `generate`. The first is what ratios refer to.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "top-k 50": {"do_sample": True, "top_k": 50},
    "temperature 1": {"do_sample": True, "top_k": 0},
    "top-p 0.95": {"do_sample": True, "top_k": 0, "top_p": 0.95},
}


@dataclass(frozen=True)
class Point:
    """One way of sampling from one vocabulary.

    Attributes:
        vocab_size: ids.
        way: a key of `WAYS`.
        rows: of the call.
        ms_outside: milliseconds outside the models of a step with a successor: mean over a call, median over the
            calls.
        ratio: `ms_outside` over that of greedy decoding in the same repetition, median.
        ms_per_step: milliseconds of these steps, models included.
    """

    vocab_size: int
    way: str
    rows: int
    ms_outside: float
    ratio: float
    ms_per_step: float


def pair_of(vocab_size: int, loading: Loading) -> Pair:
    """The narrow pair with a vocabulary of this size."""
    tiny = SHAPES["tiny"]
    sizes = ({**of_model, "vocab_size": vocab_size} for of_model in (tiny.drafter, tiny.verifier))
    return random_pair(f"narrow, {vocab_size} ids", Shape(*sizes, prompt_length=32, new_tokens=96), loading)


def points(
    pair: Pair,
    ways: Mapping[str, Mapping[str, Any]] = WAYS,
    *,
    rows: int = 1,
    repetitions: int = 3,
    device: str = "cpu",
) -> Iterator[Point]:
    """Run all ways of sampling in turn, `repetitions` times, after a warm-up call of each."""
    library = decoder(Setting("apd", 0.5, WINDOW_SIZE, KV_WINDOW), pair, Schedule(), lambda _: 0)
    assert isinstance(library, Library)
    knobs, [inputs] = library.knobs, pair.rows(rows, rows).calls
    clock = Clock(device)
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for call, (repetition, way) in enumerate(itertools.product(range(repetitions + 1), ways)):
        inputs |= {"seed": list(range(call * rows, (call + 1) * rows))}  # seeds that no earlier call used
        meter = Meter(pair.models, clock, pair.compiled)
        library.knobs = knobs | ways[way]
        with meter.attached(), meter.call():
            library.decode(inputs, meter)
        if repetition:
            steps, whole = meter.count("followed"), meter.seconds("followed")
            found[way].append((whole / steps, (whole - meter.seconds("followed forwards")) / steps))
    greedy = [outside for _, outside in found[next(iter(ways))]]
    for way, samples in found.items():
        outside = [outside for _, outside in samples]
        yield Point(
            vocab_size=pair.sampler.vocab_size,
            way=way,
            rows=rows,
            ms_outside=1000 * statistics.median(outside),
            ratio=statistics.median(ours / theirs for ours, theirs in zip(outside, greedy, strict=True)),
            ms_per_step=1000 * statistics.median(whole for whole, _ in samples),
        )


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed sampling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--vocab", type=int, nargs="+", default=[2048, 131_072], metavar="IDS")
    parser.add_argument("--batch", type=int, default=1, metavar="ROWS", help="rows of a call (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=3, metavar="N", help="of every way (default %(default)s)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write sampling.csv there")
    add_loading(parser)
    add_machine(parser)
    options = parser.parse_args(arguments)
    prepared(options)
    if min(options.vocab) < 64:
        raise ValueError(f"`--vocab` must be at least 64 ids, more than top-k 50 leaves, got {min(options.vocab)}.")
    table = options.out and Csv(options.out / "sampling.csv", tuple(field.name for field in fields(Point)))
    found = []
    for vocab_size in options.vocab:
        pair = pair_of(vocab_size, loading_of(options))
        print(f"{pair.name} ({pair.note}), {options.batch} rows, M = {WINDOW_SIZE}, W = {KV_WINDOW}")
        for point in points(pair, rows=options.batch, repetitions=options.repetitions, device=options.device):
            found.append(point)
            if table:
                table.add(asdict(point))
            print(
                f"  {point.way:14} {point.ms_outside:8.2f} ms outside the models, {point.ratio:6.2f} × greedy, of "
                f"{point.ms_per_step:8.2f} ms per step",
                flush=True,
            )
    print(json.dumps({**machine(options.device), "points": [asdict(point) for point in found]}))
    return 0
