"""Measurements as a table and as one JSON line."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.floor import Rates
from benchmarks.speed.measure import Result, spread
from benchmarks.speed.pairs import Pair
from benchmarks.speed.schedule import Schedule

__all__ = ["LEGEND", "body", "command", "entries", "lines", "machine", "rate_entries", "rate_lines", "rounded"]

LEGEND = """\
tok/s: new tokens to the first stop token, per second, without instruments. ×one: tok/s over those of one token per
step, median over the repetitions. tok/f: tokens per drafter forward of a row. ms/step: whole call / steps, median of
the repetitions ± distance of the quartiles. drafter, verif., mixing, other: ms of a step, with instruments; other
includes a call's setup; column setup has it alone, ms per call. ovh: 1 − forwards / total; ovh*: ovh of the steps
that are followed by another one, without a call's setup and output.
floor: least ms of a step's forwards on this device; ×floor: ms/step over it. GB: highest memory, weights included.
acc: right answers. M, W all: every mask that is left, no KV window."""

_COLUMNS = (
    ("", 21),
    ("tok/s", 7),
    ("×one", 6),
    ("tok/f", 6),
    ("ms/step", 8),
    ("±", 4),
    ("drafter", 8),
    ("verif.", 7),
    ("mixing", 7),
    ("other", 6),
    ("setup", 6),
    ("ovh", 5),
    ("ovh*", 5),
    ("floor", 7),
    ("×floor", 7),
    ("GB", 5),
    ("acc", 5),
)


def entries(
    pair: Pair, results: Sequence[Result], *, batch: int, schedule: Schedule, baseline: Result | None
) -> list[dict[str, Any]]:
    """The JSON objects of a pair's settings.

    `*_ms` are milliseconds per step, `setup_ms` per call; shares and spreads are fractions; `None` is "not measured".
    """
    return [_entry(pair, result, batch, schedule, baseline) for result in results]


def _entry(pair: Pair, result: Result, batch: int, schedule: Schedule, baseline: Result | None) -> dict[str, Any]:
    setting, samples, steps = result.setting, result.samples, result.steps
    forwards = result.median(lambda sample: sample.drafter + sample.verifier)
    seen = result.missed == 0

    def per_step(seconds: float | None) -> float | None:
        return None if seconds is None or not seen else rounded(1000 * seconds / steps)

    def known(value: float | None) -> float | None:
        return None if value is None or not seen else rounded(value)

    setup = result.median(lambda sample: sample.setup)
    return {
        "pair": pair.name,
        "strategy": setting.strategy,
        "label": setting.label,
        "batch": batch,
        "mixture_weight": setting.mixture_weight,
        "window_size": setting.window_size,
        "kv_window": setting.kv_window,
        "accepted": _accepted(pair, result, schedule),
        "tokens_per_second": rounded(result.tokens_per_second),
        "tokens_per_forward": rounded(result.tokens / result.row_forwards),
        "ms_per_step": rounded(1000 * result.seconds_per_step),
        "spread": rounded(spread([sample.plain for sample in samples])),
        "later_ms_per_step": _later(result),
        "cpu_ms_per_step": rounded(1000 * statistics.median(sample.cpu for sample in samples) / steps),
        "speedup": None if baseline is None else rounded(_speedup(result, baseline)),
        "drafter_ms": per_step(result.median(lambda sample: sample.drafter)),
        "verifier_ms": per_step(result.median(lambda sample: sample.verifier)),
        "mixing_ms": per_step(result.median(_mixing)),
        "other_ms": per_step(result.median(_other)),
        "setup_ms": None if setup is None else rounded(1000 * setup / result.calls),
        "metered_ms_per_step": per_step(result.median(lambda sample: sample.metered)),
        "overhead_share": known(result.median(lambda sample: 1 - _forwards(sample) / sample.metered)),
        "step_overhead_share": known(result.median(_of_steps)),
        "floor_ms": known(1000 * result.floor / steps),
        "floor_ratio": known(result.seconds_per_step * steps / result.floor) if seen and forwards else None,
        "instrument_cost": rounded(_instrument_cost(result)),
        "peak_memory_mb": rounded(result.peak_memory / 2**20),
        "accuracy": None if result.accuracy is None else rounded(result.accuracy),
        "accuracy_instances": result.judged,
        "new_tokens": result.tokens,
        "drafter_forwards": result.row_forwards,
        "steps": steps,
        "calls": result.calls,
        "repetitions": len(samples),
    }


def _accepted(pair: Pair, result: Result, schedule: Schedule) -> str:
    if not pair.trained and result.setting.strategy in ("apd", "threshold"):
        return f"schedule: geometric, mean {schedule.mean:g} tokens, cut at the window"
    if not pair.trained and result.setting.strategy == "reference":
        return "one per step, by a threshold of 1"
    return "by the models"


def _later(result: Result) -> float | None:
    seconds, steps = result.median(lambda sample: sample.later), result.steps - result.calls
    return None if seconds is None or not steps else rounded(1000 * seconds / steps)


def _forwards(sample: Any) -> float:
    return sample.drafter + sample.verifier


def _of_steps(sample: Any) -> float | None:
    return 1 - sample.followed_forwards / sample.followed if sample.followed else None


def _mixing(sample: Any) -> float | None:
    return None if sample.propose is None else sample.propose - _forwards(sample)


def _other(sample: Any) -> float:
    return sample.metered - (_forwards(sample) if sample.propose is None else sample.propose)


def _instrument_cost(result: Result) -> float:
    return statistics.median(sample.metered / sample.plain for sample in result.samples) - 1


def _speedup(result: Result, baseline: Result) -> float:
    """The median of ratios per repetition, so that a slow phase of the run affects both sides."""
    per_second = zip(result.samples, baseline.samples, strict=True)
    return statistics.median(
        (result.tokens / ours.plain) / (baseline.tokens / theirs.plain) for ours, theirs in per_second
    )


def rounded(value: float) -> float:
    """Round to five digits."""
    return float(f"{value:.5g}")


def lines(pair: Pair, found: Sequence[dict[str, Any]]) -> list[str]:
    """A pair's table, at most 120 characters wide."""
    head = f"{pair.name}, batch {found[0]['batch']}" + (f" ({pair.note})" if pair.note else "")
    return [head, *body(pair, found)]


def body(pair: Pair, found: Sequence[dict[str, Any]]) -> list[str]:
    """A pair's table without its heading, for any batch sizes."""
    text = []
    if not pair.trained:
        scheduled = next((e["accepted"] for e in found if e["accepted"].startswith("schedule")), None)
        text.append(
            f"ACCEPTED COUNTS ARE NOT THE MODELS': {scheduled}." if scheduled else "All counts are the models' own."
        )
    text.append(_row(*(title for title, _ in _COLUMNS)))
    for entry in found:
        text.append(
            _row(
                entry["label"],
                _number(entry["tokens_per_second"], 1),
                _number(entry["speedup"], 2),
                _number(entry["tokens_per_forward"], 2),
                _number(entry["ms_per_step"], 2),
                _percent(entry["spread"]),
                _number(entry["drafter_ms"], 2),
                _number(entry["verifier_ms"], 2),
                _number(entry["mixing_ms"], 2),
                _number(entry["other_ms"], 2),
                _number(entry["setup_ms"], 2),
                _percent(entry["overhead_share"]),
                _percent(entry["step_overhead_share"]),
                _number(entry["floor_ms"], 2),
                _number(entry["floor_ratio"], 1),
                _number(entry["peak_memory_mb"] / 1024, 1),
                _percent(entry["accuracy"]),
            )
        )
    costs = [entry["instrument_cost"] for entry in found]
    text.append(
        f"Instruments cost {statistics.median(costs):+.1%}, median over the settings; at most {max(costs):+.1%}."
    )
    share = statistics.median(entry["cpu_ms_per_step"] / entry["ms_per_step"] for entry in found)
    if share < 0.9:
        text.append(
            f"This process had a core {share:.0%} of the time: compare settings; times and ×floor are stretched."
        )
    if unseen := [entry["label"] for entry in found if entry["drafter_ms"] is None]:
        text.append(f"forwards that bypass the hooks, parts unknown: {', '.join(unseen)}")
    return text


def _row(*cells: str) -> str:
    name, *numbers = (
        cell.ljust(width) if not i else cell.rjust(width)
        for i, (cell, (_, width)) in enumerate(zip(cells, _COLUMNS, strict=True))
    )
    return (name + "".join(numbers)).rstrip()


def _number(value: float | None, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits if value < 1000 else 0}f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"


def machine(device: str) -> dict[str, Any]:
    """The machine and the versions of a measurement."""
    return {
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def command(program: str, arguments: Sequence[str]) -> str:
    """The command as typed, without `--out`, which does not affect the measurement."""
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--out")
    return " ".join([program, *options.parse_known_args(arguments)[1]])


def rate_entries(rates: Rates) -> dict[str, Any]:
    """The rates in GB/s and Gflop/s."""
    return {
        "bandwidth_gb_s": rounded(rates.bandwidth / 1e9),
        "bandwidth_in_cache_gb_s": {role: rounded(rate / 1e9) for role, rate in rates.resident.items()},
        "matmul_gflop_s": rounded(rates.matmul / 1e9),
    }


def rate_lines(rates: Rates) -> list[str]:
    """The device's rates in words."""
    resident = "".join(f"; {role}, which fits the cache: {rate / 1e9:.0f}" for role, rate in rates.resident.items())
    return [
        f"Floor: a copy moves {rates.bandwidth / 1e9:.0f} GB/s{resident}.",
        f"A large product makes {rates.matmul / 1e9:.0f} Gflop/s; small ones never do.",
    ]


def _cpu_model() -> str:
    try:
        found = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return found[0].partition(":")[2].strip()
    except (OSError, IndexError):
        return platform.processor() or "unknown"
