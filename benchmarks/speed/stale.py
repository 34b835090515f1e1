"""Frozen keys and short windows: the columns that they save, and the accuracy that they cost the included pair.

    python -m benchmarks.speed.stale --out results     # five minutes on a shared core; --quick: seconds
    python -m benchmarks.speed.stale --help

The drafter attends both ways, so frozen keys were computed for an earlier canvas. Every setting of `kv_window` (W) and
`kv_refresh` (N) decodes the same held-out instances, greedily. An uncached session computes each step of the cached one
too; KL(exact p_D ‖ cached p_D) measures the distortion along the cached decode. `columns`: columns that the drafter
computes per row and step, the first step and its prompt included; `context`: those of them that are not masks.

Values of `window_size` (M) are compared without a cache.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from apd import APDSampler, LeftToRight, MaskedDiffusionDrafter
from apd.config import WindowSize
from apd.decoding.state import DecodeState
from apd.decoding.strategy import Strategy
from apd.decoding.window import Window
from apd.extras import install
from apd.included import tasks
from apd.models.drafter import NeuralDrafterSession
from apd.models.span import Span

__all__ = ["Point", "main", "measure"]

KV_WINDOWS = (1, 2, 4, 8, 16, 32)
REFRESHES = (None, 4, 8, 16, 32)
WINDOW_SIZES = (4, 8, 16, 32, "auto")
POSITIONS = 4  # compared positions of a window: those that a step is likely to commit
NEW_TOKENS = 32


@dataclass(frozen=True)
class Point:
    """One setting on one task.

    Attributes:
        window_size: M.
        kv_window: W.
        kv_refresh: N.
        task: one of `tasks.TASKS`, or "all".
        kl: KL(exact p_D ‖ cached p_D) in nats, mean over the first positions of the window and all steps.
        accuracy: share of right answers.
        tokens_per_forward: new tokens per drafter forward.
        columns: computed by the drafter per row and step.
        context: columns left of the frontier among them.
    """

    window_size: WindowSize
    kv_window: int | None
    kv_refresh: int | None
    task: str
    kl: float
    accuracy: float
    tokens_per_forward: float
    columns: float
    context: float


class Watched(MaskedDiffusionDrafter):
    """A drafter whose sessions are compared with exact ones, step by step.

    Attributes:
        distances: per step, `b p` float32: the divergence at the window's first positions, in nats; NaN outside.
        widths: per step, the columns computed for each row.
        masks: per step, the masks among them over all rows.
    """

    def __init__(self, drafter: MaskedDiffusionDrafter) -> None:
        super().__init__(drafter.model, mask_token_id=drafter.mask_token_id, logit_shift=drafter.logit_shift)
        self.distances: list[Tensor] = []
        self.widths: list[list[int]] = []
        self.masks: list[int] = []

    def open(self, state: DecodeState) -> _WatchedSession:
        return _WatchedSession(self, state, None, None)

    def open_cached(self, state: DecodeState, kv_window: int, kv_refresh: int | None) -> _WatchedSession:
        return _WatchedSession(self, state, kv_window, kv_refresh)


class _WatchedSession(NeuralDrafterSession):
    def __init__(self, drafter: Watched, state: DecodeState, kv_window: int | None, kv_refresh: int | None) -> None:
        super().__init__(drafter, state, kv_window, kv_refresh)
        self.watched = drafter
        self.exact = NeuralDrafterSession(drafter, state, None, None)

    def next_span(self, state: DecodeState, window: Window) -> Span:
        span = super().next_span(state, window)
        self.watched.widths.append([end - start for start, end in zip(span.starts, span.ends, strict=True)])
        self.watched.masks.append(int(window.inside.sum()))
        return span

    def logits(self, state: DecodeState, window: Window) -> Tensor:
        logits = super().logits(state, window)
        exact, cached = (
            some[:, :POSITIONS].index_fill(-1, torch.tensor([self.drafter.mask_token_id]), -1e4).log_softmax(-1)
            for some in (self.exact.logits(state, window), logits)
        )
        distance = (exact.exp() * (exact - cached)).sum(-1)
        self.watched.distances.append(distance.masked_fill(~window.inside[:, :POSITIONS], torch.nan))
        return logits

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.exact.select(rows)


@dataclass(frozen=True)
class Setting:
    """The knobs that are compared; see `APDConfig`."""

    window_size: WindowSize = None
    kv_window: int | None = None
    kv_refresh: int | None = None


EXACT = Setting()


def settings() -> list[Setting]:
    """All caches, then no cache; then all windows without a cache."""
    caches = [Setting(kv_window=w, kv_refresh=n) for w in KV_WINDOWS for n in REFRESHES]
    return [*caches, EXACT, *(Setting(window_size=m) for m in WINDOW_SIZES)]


def measure(sampler: APDSampler, task: str, count: int, strategy: Strategy | None, setting: Setting) -> Point:
    """Greedy answers to `count` held-out instances of a task, at the sampler's other knobs."""
    instances = tasks.instances(task, count, seed=1)
    inputs = sampler.tokenizer([instance.prompt for instance in instances], return_tensors="pt", padding=True)
    drafter = Watched(sampler.drafter)
    output = APDSampler(drafter, sampler.verifier, tokenizer=sampler.tokenizer, config=sampler.config).generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        strategy=strategy,
        return_dict_in_generate=True,
        **asdict(setting),
    )
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]
    texts = sampler.tokenizer.batch_decode(answers, skip_special_tokens=True)
    right = sum(tasks.is_right(instance, text) for instance, text in zip(instances, texts, strict=True))
    forwards = int(output.drafter_forwards.sum())
    columns = sum(map(sum, drafter.widths))
    return Point(
        **asdict(setting),
        task=task,
        kl=float(torch.cat([distance.flatten() for distance in drafter.distances]).nanmean()),
        accuracy=right / count,
        tokens_per_forward=int(output.new_tokens.sum()) / forwards,
        columns=columns / forwards,
        context=(columns - sum(drafter.masks)) / forwards,
    )


def points(sampler: APDSampler, count: int, strategy: Strategy | None) -> Iterator[list[Point]]:
    """All settings on all tasks, each followed by the mean over the tasks."""
    for setting in settings():
        found = [measure(sampler, task, count, strategy, setting) for task in tasks.TASKS]
        yield [*found, mean(found)]


def mean(found: Sequence[Point]) -> Point:
    """The unweighted mean over tasks."""
    values = {
        name: sum(getattr(point, name) for point in found) / len(found)
        for name in ("kl", "accuracy", "tokens_per_forward", "columns", "context")
    }
    return dataclasses.replace(found[0], task="all", **values)


def table(found: Sequence[Point]) -> str:
    """The settings over all tasks, and the accuracy on the two tasks that lose most."""
    accuracy = {(_setting(point), point.task): point.accuracy for point in found}
    lowest = {task: min(point.accuracy for point in found if point.task == task) for task in tasks.TASKS}
    worst = sorted(tasks.TASKS, key=lambda task: lowest[task] - accuracy[EXACT, task])[:2]
    head = ["M", "W", "N", "KL, nats", "accuracy", *worst, "tokens per forward", "columns", "context"]
    lines = [head, ["---"] * len(head)]
    for point in found:
        if point.task == "all":
            setting = _setting(point)
            knobs = ["none" if value is None else str(value) for value in asdict(setting).values()]
            tail = [f"{accuracy[setting, task]:.2f}" for task in worst]
            cost = [f"{point.tokens_per_forward:.2f}", f"{point.columns:.1f}", f"{point.context:.1f}"]
            lines.append([*knobs, f"{point.kl:.4f}", f"{point.accuracy:.3f}", *tail, *cost])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _setting(point: Point) -> Setting:
    return Setting(point.window_size, point.kv_window, point.kv_refresh)


def write(found: Sequence[Point], directory: Path) -> None:
    """`stale.csv` and `stale.png`.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}. The plots are an extra: {install('bench')}.") from error

    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "stale.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, list(asdict(found[0])), lineterminator="\n")
        rows.writeheader()
        rows.writerows(
            {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in asdict(point).items()}
            for point in found
        )
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    totals = [point for point in found if point.task == "all"]
    (exact,) = (point for point in totals if _setting(point) == EXACT)
    for axis, name, label in zip(
        figure.subplots(1, 3),
        ("kl", "accuracy", "tokens_per_forward"),
        ("KL(exact ‖ cached), nats", "accuracy, all tasks", "tokens per forward"),
        strict=True,
    ):
        for refresh in REFRESHES:
            line = [point for point in totals if point.kv_refresh == refresh and point.kv_window]
            shown = "never" if refresh is None else f"every {refresh} tokens"
            axis.plot([p.context for p in line], [getattr(p, name) for p in line], "o-", label=shown)
        axis.plot(exact.context, getattr(exact, name), "k*", markersize=12, label="no cache")
        axis.set(xlabel="context columns recomputed per step", ylabel=label)
        axis.grid(alpha=0.3)
    figure.axes[1].legend(title="whole row recomputed", fontsize=8)
    figure.suptitle("Frozen keys on the included pair; along a line W = 1, 2, 4, 8, 16, 32 from left to right")
    figure.savefig(directory / "stale.png", dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.stale", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for stale.csv and stale.png")
    parser.add_argument("--count", type=int, default=64, help="held-out instances per task")
    parser.add_argument("--quick", action="store_true", help="four instances per task")
    parser.add_argument("--tokens-per-step", type=int, metavar="K", help="K tokens per step from the left, not APD")
    parser.add_argument("--mixture-weight", "-R", type=float, default=0.5)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(int(os.environ.get("APD_NUM_THREADS", "1")))
    sampler = APDSampler.from_included(mixture_weight=arguments.mixture_weight)
    strategy = None if arguments.tokens_per_step is None else LeftToRight(arguments.tokens_per_step)
    count = 4 if arguments.quick else arguments.count
    found = [
        point
        for some in tqdm(points(sampler, count, strategy), total=len(settings()), unit="setting")
        for point in some
    ]
    write(found, arguments.out)
    print(table(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
