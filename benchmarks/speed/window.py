"""Quality and speed by window M.

python -m benchmarks.speed window --out DIR [--pair included] [--mixture-weight 0.5]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apd import APDConfig
from benchmarks.speed.files import Csv, picture
from benchmarks.speed.floor import measure_rates
from benchmarks.speed.measure import Plan, measure, sizes_of
from benchmarks.speed.options import add_loading, add_machine, loading_of, pair_of, prepared
from benchmarks.speed.schedule import Schedule
from benchmarks.speed.settings import Setting
from benchmarks.speed.table import entries, machine

__all__ = ["WINDOWS", "main", "understood"]

WINDOWS: tuple[int | str | None, ...] = (4, 8, 16, 32, None, "auto")
_COLUMNS = ("window_size", "accuracy", "tokens_per_forward", "tokens_per_second", "ms_per_step", "spread")


def understood(window_size: Any) -> bool:
    """True if the library accepts this window size."""
    try:
        APDConfig(window_size=window_size)
    except (TypeError, ValueError):
        return False
    return True


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Tokens per second by window, and accuracy above it if it is known."""
    figure = picture(6.5, 4)
    axes = figure.subplots()
    names = ["all" if entry["window_size"] is None else str(entry["window_size"]) for entry in found]
    bars = axes.bar(names, [entry["tokens_per_second"] for entry in found], color="#c2410c", alpha=0.8)
    labels = ["" if entry["accuracy"] is None else f"{entry['accuracy']:.0%} right" for entry in found]
    axes.bar_label(bars, labels, fontsize=8)
    axes.set(xlabel="window M", ylabel="tokens per second")
    axes.set_title(f"{found[0]['pair']}, R = {found[0]['mixture_weight']:g}, batch 1", loc="left", parse_math=False)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed window", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--pair", default="included")
    parser.add_argument("--mixture-weight", type=float, default=0.5, metavar="R")
    parser.add_argument("--count", type=int, default=44, metavar="N", help="prompts that are timed")
    parser.add_argument("--repetitions", type=int, default=5, metavar="N")
    add_loading(parser)
    add_machine(parser)
    options = parser.parse_args(arguments)
    prepared(options)
    pair = pair_of(options.pair, loading_of(options))
    windows = [window for window in WINDOWS if understood(window)]
    for window in WINDOWS:
        if window not in windows:
            print(f"M {window} left out: this version of the library does not know it")
    rates = measure_rates(sizes_of(pair.models), options.device, loading_of(options).weights)
    results = measure(
        pair,
        [Setting("apd", options.mixture_weight, window) for window in windows],
        Plan(options.count, repetitions=options.repetitions),
        rates,
        device=options.device,
    )
    found = entries(pair, results, batch=1, schedule=Schedule(), baseline=None)
    table = Csv(options.out / "window.csv", _COLUMNS)
    if not pair.trained:
        print("ACCEPTED COUNTS ARE NOT THE MODELS': " + found[0]["accepted"])
    for entry in found:
        table.add(entry | {"window_size": "all" if entry["window_size"] is None else entry["window_size"]})
        accuracy = "" if entry["accuracy"] is None else f", {entry['accuracy']:.1%} right"
        print(
            f"  {entry['label']:24} {entry['tokens_per_second']:8.1f} tok/s ± {entry['spread']:.0%}, "
            f"{entry['tokens_per_forward']:.2f} tokens per forward, {entry['ms_per_step']:.2f} ms per step{accuracy}"
        )
    draw(found, options.out / "window.png")
    print(json.dumps({**machine(options.device), "settings": found}))
    return 0
