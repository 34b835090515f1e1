"""Effect of R, τ and M on exact Shuffle, where p_D and p_AR are known exactly, so every error is due to the mixture."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from apd import APDSampler, IdealListModel
from benchmarks.parallelbench.pictures import blank

__all__ = ["Point", "add_parser", "draw", "points", "write"]

ITEMS = 6
WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0)
THRESHOLDS = (0.0, 0.2, 0.4, 0.6, 0.9)
WINDOWS = (1, 2, 3, 6)


@dataclass(frozen=True)
class Point:
    """One setting: share of valid answers, and tokens per drafter forward over all of them."""

    mixture_weight: float
    acceptance_threshold: float
    window_size: int
    correction: bool
    accuracy: float
    tokens_per_forward: float


def points(rows: int) -> Iterator[Point]:
    """Every window at τ = 0, and every threshold at the full window; both with and without the correction token.

    All R < 1 give equal results: each model is uniform over its support, so their product is uniform over the
    intersection for any weight. At R = 1 the zeros of the verifier have no effect.
    """
    settings = [(0.0, window) for window in WINDOWS] + [(threshold, ITEMS) for threshold in THRESHOLDS[1:]]
    model = IdealListModel.shuffle(ITEMS)
    sampler = APDSampler(model.drafter, model.verifier)
    for correction in (False, True):
        for threshold, window in settings:
            for weight in WEIGHTS:
                knobs = {"mixture_weight": weight, "acceptance_threshold": threshold, "window_size": window}
                output = sampler.generate(
                    torch.zeros(rows, 1, dtype=torch.int64),
                    max_new_tokens=ITEMS,
                    do_sample=True,
                    top_k=0,
                    seed=0,
                    correction=correction,
                    return_dict_in_generate=True,
                    **knobs,
                )
                accuracy = float(model.is_valid(output.sequences[:, 1:]).double().mean())
                speed = float(output.new_tokens.sum() / output.drafter_forwards.sum())
                yield Point(weight, threshold, window, correction, accuracy, speed)


def write(found: list[Point], directory: Path) -> None:
    """`shuffle-knobs.csv`."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "shuffle-knobs.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(asdict(found[0])), lineterminator="\n")
        table.writeheader()
        table.writerows({**asdict(point), "tokens_per_forward": f"{point.tokens_per_forward:.4f}"} for point in found)


def draw(found: list[Point], directory: Path) -> None:
    """`shuffle-knobs.png`.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = blank(11, 4.2)
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axis, title, name, fixed in (
        (axes[0], "threshold τ, whole window", "acceptance_threshold", lambda point: point.window_size == ITEMS),
        (axes[1], "window M, τ = 0", "window_size", lambda point: point.acceptance_threshold == 0),
    ):
        for i, value in enumerate(sorted({getattr(point, name) for point in found})):
            for correction, marker in ((False, "o"), (True, "s")):
                line = [
                    point
                    for point in found
                    if fixed(point) and getattr(point, name) == value and point.correction == correction
                ]
                below = [point for point in line if point.mixture_weight < 1]
                alone = [point for point in line if point.mixture_weight == 1]
                # Below R = 1 the settings coincide (see `points`), so two series suffice; R = 1 has hollow marks.
                label = f"{title.split()[1].rstrip(',')} = {value}" if not correction else None
                for some, face in ((below, f"C{i}"), (alone, "none")):
                    axis.plot(
                        [point.tokens_per_forward for point in some],
                        [point.accuracy for point in some],
                        marker,
                        color=f"C{i}",
                        markerfacecolor=face,
                        label=label if some is below else None,
                    )
        axis.set(title=title, xlabel="tokens per forward")
        axis.legend(fontsize=8, title="full: every R < 1, hollow: R = 1\nsquare: with correction", title_fontsize=8)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("valid answers")
    figure.suptitle(f"Exact Shuffle, {ITEMS} items, temperature 1")
    figure.savefig(directory / "shuffle-knobs.png", dpi=110)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser("knobs", help="what R, tau and M do on exact Shuffle, as CSV and plot")
    command.add_argument("out", type=Path, metavar="DIR")
    command.add_argument("--rows", type=int, default=4000, help="decodings per setting (default %(default)s)")
    command.set_defaults(run=_main)


def _main(options: argparse.Namespace) -> int:
    found = list(points(options.rows))
    write(found, options.out)
    try:
        draw(found, options.out)
    except ImportError as error:
        print(f"no picture: {error}", file=sys.stderr)
    for point in found:
        if point.mixture_weight == 0:
            print(
                f"R 0, tau {point.acceptance_threshold}, M {point.window_size}, correction {point.correction}: "
                f"{point.accuracy:.2%} valid @ {point.tokens_per_forward:.2f} tokens per forward"
            )
    return 0
