"""Whether the targets for a GPU are met, in one run.

    python -m benchmarks.speed targets --out DIR       random weights in the shape of Dream-7B + Qwen2.5-0.5B, on a GPU
    python -m benchmarks.speed targets --pair tiny --device cpu --no-compile --quick

All at R = 0.5, M = 100, W = 16, on the compiled path unless `--no-compile` is given:

(a) A step in batch 1 takes at most 1.5 × the time that reading the weights of both models once takes.
(b) It takes at most 1.15 × a step that commits one token, with the same M and W.
(c) Batch 8 makes at least 5 × the tokens per second of batch 1, with the same prompts. The device's own
    limit is printed beside it, and both again for M = "auto", with which a step computes fewer columns.
(d) The compiled path gives the tokens of the eager one: all of them in float32; otherwise their share is printed.

On the compiled path M = 16 is measured too, without a target.

The time of a step is a whole call over its steps, setup and prefill included; the time of the steps behind the first is
printed beside it. With random weights (a), (b) and (c) commit by a schedule, (d) by the models. (a), (b) and (c)
are judged on a GPU only.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from apd.decoding.acceptance import Coupling
from apd.decoding.step import APD
from benchmarks.speed.floor import Rates, measure_rates, parts, weights_seconds
from benchmarks.speed.measure import Plan, Result, measure, sizes_of
from benchmarks.speed.options import add_loading, add_machine, loading_of, pair_of, prepared
from benchmarks.speed.pairs import PAIRS, Pair, compiled
from benchmarks.speed.schedule import Schedule
from benchmarks.speed.settings import KV_WINDOW, Library, Setting
from benchmarks.speed.table import LEGEND, body, command, entries, machine, rate_entries, rate_lines, rounded

__all__ = ["Agreement", "Target", "agreement", "main", "verdicts"]

WINDOW_SIZE, BATCH = 100, 8
OURS = Setting("apd", 0.5, WINDOW_SIZE, KV_WINDOW)
AUTO = replace(OURS, window_size="auto")
NARROW = replace(OURS, window_size=16)
SEQUENTIAL = Setting("left-to-right", None, WINDOW_SIZE, KV_WINDOW)

#: Bounds: most × the floor, most × a step of one token, least gain of the batch.
MOST_FLOORS, MOST_STEPS, LEAST_GAIN = 1.5, 1.15, 5.0

QUICK_TOKENS = 16

Case = tuple[str, Setting, int]  # path, setting, rows of a call


@dataclass(frozen=True)
class Agreement:
    """Agreement of the answers of two paths.

    Attributes:
        label: name of the setting.
        batch: rows of a call.
        prompts: number of prompts.
        tokens: summed lengths of the longer answer to each prompt.
        equal: tokens that both answers have at the same position.
        same: prompts with equal answers.
    """

    label: str
    batch: int
    prompts: int
    tokens: int
    equal: int
    same: int


@dataclass(frozen=True)
class Target:
    """A target and its measurement.

    Attributes:
        name: its letter.
        value: the measured ratio; `None` if not measured.
        limit: the bound on `value`.
        met: whether the bound holds; `None` if not judged.
        summary: value and limit in words.
    """

    name: str
    value: float | None
    limit: float
    met: bool | None
    summary: str

    def __str__(self) -> str:
        verdict = {True: "MET", False: "MISSED", None: "not judged"}[self.met]
        return f"({self.name}) {verdict}: {self.summary}"


def agreement(pair: Pair, other: Pair, setting: Setting, count: int, batch: int) -> Agreement:
    """The agreement of answers to `count` prompts without a schedule and without recording."""
    strategy = APD(setting.mixture_weight or 0.0, Coupling())
    found = []
    for inputs in pair.rows(count, batch).calls:
        width = inputs["input_ids"].shape[1]
        answers = (Library(setting, each, strategy).decode(inputs)[:, width:].tolist() for each in (pair, other))
        found += [tuple(map(pair.to_stop, rows)) for rows in zip(*answers, strict=True)]
    return Agreement(
        label=_NAMES[setting],
        batch=batch,
        prompts=len(found),
        tokens=sum(max(map(len, rows)) for rows in found),
        equal=sum(a == b for rows in found for a, b in zip(*rows, strict=False)),
        same=sum(a == b for a, b in found),
    )


def verdicts(
    found: Mapping[Case, Mapping[str, Any]],
    *,
    path: str,
    floor_ms: float,
    bound_ms: tuple[float, float],
    agreements: Sequence[Agreement],
    exact: bool,
    judged: bool,
) -> list[Target]:
    """Compare the measurements with the targets.

    Args:
        found: entries of the table by case.
        path: the path that (a), (b) and (c) measure.
        floor_ms: least time of reading all weights once.
        bound_ms: for a step of (a), the least time of reading, and the least time of arithmetic.
        agreements: compiled against eager path; empty without compilation.
        exact: whether all tokens must agree.
        judged: whether (a), (b) and (c) are judged.
    """
    ours, sequential = found[path, OURS, 1], found[path, SEQUENTIAL, 1]

    def later(least: float | None) -> str:
        own = ours["later_ms_per_step"]
        return "" if own is None or least is None else f"; behind the first step {own / least:.2f} ×"

    floors, steps = ours["ms_per_step"] / floor_ms, ours["ms_per_step"] / sequential["ms_per_step"]
    gain, gained, allowed = _batching(found[path, OURS, 1], found[path, OURS, BATCH])
    _, gained_auto, allowed_auto = _batching(found[path, AUTO, 1], found[path, AUTO, BATCH])
    reading, arithmetic = bound_ms
    targets = [
        Target(
            "a",
            floors,
            MOST_FLOORS,
            floors <= MOST_FLOORS if judged else None,
            f"a step of {ours['ms_per_step']:.2f} ms (± {ours['spread']:.0%}) is {floors:.2f} × the {floor_ms:.3g} ms of "
            f"reading both models' weights, wanted ≤ {MOST_FLOORS}{later(floor_ms)}. "
            f"{'Bytes' if reading >= arithmetic else 'Operations'} bind its forwards: reading {reading:.3g} ms, "
            f"arithmetic {arithmetic:.3g} ms.",
        ),
        Target(
            "b",
            steps,
            MOST_STEPS,
            steps <= MOST_STEPS if judged else None,
            f"it is {steps:.2f} × the {sequential['ms_per_step']:.2f} ms (± {sequential['spread']:.0%}) of one token per "
            f"step, wanted ≤ {MOST_STEPS}{later(sequential['later_ms_per_step'])}.",
        ),
        Target(
            "c",
            gain,
            LEAST_GAIN,
            gain >= LEAST_GAIN if judged else None,
            f"{gained}, wanted ≥ {LEAST_GAIN:g}{allowed}. With M auto: {gained_auto}{allowed_auto}.",
        ),
    ]
    if not agreements:
        return [*targets, Target("d", None, 1.0, None, "nothing was compiled.")]
    share = sum(each.equal for each in agreements) / sum(each.tokens for each in agreements)
    gains = ", ".join(
        f"{found['plain', OURS, rows]['ms_per_step'] / found['compiled', OURS, rows]['ms_per_step']:.2f} × (batch {rows})"
        for rows in (1, BATCH)
    )
    summary = "; ".join(
        f"{each.label} ×{each.batch}: {each.equal} of {each.tokens}, {each.same} of {each.prompts} answers the same"
        for each in agreements
    )
    wanted = "all wanted" if exact else "all wanted in float32 only"
    text = f"{share:.2%} of the tokens are those of the plain path, {wanted} ({summary}). A plain step takes {gains} as long."
    return [*targets, Target("d", share, 1.0, share == 1 if exact else None, text)]


def _batching(alone: Mapping[str, Any], together: Mapping[str, Any]) -> tuple[float, str, str]:
    """The gain of a batch in tokens per second, this gain in words, and the gain that the device allows in words.

    The latter is the gain of steps at their floor, if every row commits as much per step as alone. A larger gain is
    possible only if a step of batch 1 is further from its floor. It is left out for forwards that bypass the hooks.
    """
    gain = together["tokens_per_second"] / alone["tokens_per_second"]
    gained = (
        f"batch {BATCH} makes {together['tokens_per_second']:.0f} tokens/s (± {together['spread']:.0%}), "
        f"{gain:.2f} × the {alone['tokens_per_second']:.0f} of batch 1"
    )
    if alone["floor_ms"] is None or together["floor_ms"] is None:
        return gain, gained, ""
    most = BATCH * alone["floor_ms"] / together["floor_ms"]
    return gain, gained, f"; steps of their forwards' least times would gain at most {most:.2f} ×"


def _cases(paths: Sequence[str]) -> Iterator[Case]:
    first, *others = paths
    yield first, SEQUENTIAL, 1
    for path, setting in [(first, OURS), (first, AUTO), *((path, OURS) for path in others)]:
        yield path, setting, 1
        yield path, setting, BATCH


def _label(case: Case) -> str:
    path, setting, rows = case
    return f"{_NAMES[setting]} {path} ×{rows}"


_NAMES = {SEQUENTIAL: "1/step", OURS: "APD", AUTO: "APD auto", NARROW: "APD M 16"}


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    prepared(options)
    if options.count < BATCH:
        raise ValueError(f"`--count` must be at least {BATCH}, a batch, got {options.count}.")
    if options.quick and options.new_tokens is None:
        options.new_tokens = QUICK_TOKENS
    began, loading, schedule = time.perf_counter(), replace(loading_of(options), is_compiled=False), Schedule()

    def progress(text: str) -> None:
        print(f"{time.perf_counter() - began:4.0f} s: {text}", file=sys.stderr, flush=True)

    progress(f"loading {options.pair}")
    plain = pair_of(options.pair, loading)
    # The most important and most fragile case runs first.
    paths = ({"compiled": compiled(plain)} if options.compile else {}) | {"plain": plain}
    path = next(iter(paths))
    sizes = sizes_of(plain.models)
    rates = measure_rates(sizes, options.device, loading.weights)

    results: dict[Case, Result] = {}
    for case in _cases(list(paths)):
        name, setting, rows = case
        progress(f"measuring {_label(case)}")
        # One token per step makes as many steps as tokens, all alike; the answers of trained weights differ in length.
        count = 1 if setting == SEQUENTIAL and not plain.trained else options.count
        plan = Plan(count, rows, options.repetitions, quality_count=options.count)
        [results[case]] = measure(paths[name], [setting], plan, rates, schedule=schedule, device=options.device)
        progress(
            f"{_label(case)}: {1000 * results[case].seconds_per_step:.2f} ms per step, "
            f"{results[case].tokens_per_second:.1f} tokens/s"
        )
    agreements = []
    for name, setting in (("compiled", OURS), ("compiled", NARROW)) if options.compile else ():
        for rows in (1, BATCH):
            progress(f"comparing tokens, {_label((name, setting, rows))}")
            agreements.append(agreement(plain, paths[name], setting, max(rows, 2), rows))

    found, baseline = {}, results[path, SEQUENTIAL, 1]
    for case, result in results.items():
        name, _, rows = case
        [entry] = entries(paths[name], [result], batch=rows, schedule=schedule, baseline=baseline)
        found[case] = entry | {"label": _label(case), "path": name}
    floor_ms = 1000 * weights_seconds(sizes, rates)
    targets = verdicts(
        found,
        path=path,
        floor_ms=floor_ms,
        bound_ms=_bound(results[path, OURS, 1], plain, rates),
        agreements=agreements,
        exact=loading.weights == torch.float32,
        judged=options.device != "cpu",
    )

    report = {
        **machine(options.device),
        "dtype": str(loading.weights).removeprefix("torch."),
        **rate_entries(rates),
        "weights_ms": rounded(floor_ms),
        "command": command("python -m benchmarks.speed targets", arguments),
        "seconds": round(time.perf_counter() - began, 1),
        "settings": list(found.values()),
        "agreements": [asdict(each) for each in agreements],
        "targets": [asdict(target) | {"value": target.value and rounded(target.value)} for target in targets],
    }
    text = "\n".join(
        [
            f"{plain.name}{f' ({plain.note})' if plain.note else ''}, {report['dtype']}, R {OURS.mixture_weight:g}, "
            f"M {WINDOW_SIZE}, W {KV_WINDOW}, {options.count} prompts, {plain.new_tokens} new tokens",
            *([f"M is cut to the {plain.new_tokens} masks of an answer."] if plain.new_tokens < WINDOW_SIZE else []),
            *body(plain, list(found.values())),
            f"×{BATCH}: rows of a call. 1/step: one token per step, which ×one refers to everywhere. auto: M follows the counts.",
            "",
            *rate_lines(rates),
            LEGEND,
            "",
            *(textwrap.fill(str(target), 120, subsequent_indent=" " * 4) for target in targets),
        ]
    )
    line = json.dumps(report)
    print(text, line, sep="\n\n")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "targets.txt").write_text(f"{text}\n\n{line}\n")
        (options.out / "targets.json").write_text(line + "\n")
    return 0


def _bound(result: Result, pair: Pair, rates: Rates) -> tuple[float, float]:
    """Least milliseconds of reading and of arithmetic in a step's forwards."""
    reading, arithmetic = (
        1000 * sum(seconds) / result.steps
        for seconds in zip(*parts(sizes_of(pair.models), result.forwards, rates), strict=True)
    )
    return reading, arithmetic


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed targets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pair",
        default="dream-7b",
        metavar="PAIR",
        help=f"{', '.join(PAIRS)} or DRAFTER_DIR:VERIFIER_DIR (default %(default)s)",
    )
    parser.add_argument("--count", type=int, default=BATCH, metavar="N", help="prompts (default %(default)s)")
    parser.add_argument(
        "--repetitions", type=int, default=3, metavar="N", help="of every setting (default %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help=f"answers of at most {QUICK_TOKENS} tokens")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write targets.txt and targets.json there")
    add_loading(parser)
    add_machine(parser)
    parser.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu", compile=True, prompt_length=128)
    return parser
