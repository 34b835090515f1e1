"""Numbers from records: tokens per forward, PBx, the oracle, accuracy under parallelism, the task map.

A forward is a drafter pass of a row that is not done; of plain autoregressive decoding, which has no drafter, a verifier
pass. A row is done when every position up to its first stop token is decided. Three ways of counting tokens:

- `tpf`, ours: Σ new tokens / Σ forwards, tokens up to and including the stop token. The main figure. Over tasks it is
  pooled: both sums run over the samples of all tasks. `tpf_mean` is the mean over tasks of their `tpf`, in which a task of one pass
  counts as much as a task of twenty.
- `tps_mean_ratio`: mean over samples of max_tokens / forwards, as published for most methods.
- `tps_ratio_of_means`: max_tokens / mean forwards, as published for APD; never larger.

The published ones credit the padding behind the stop token. Published samplers also go on until the whole answer field
is decided, ours stop at the stop token, for every strategy alike: their passes are more than ours, never fewer.
A pass counts as one however many canvases of the row the drafter computes in it: one, except with `checked`. So the
canvases per pass stand beside every speed.
Accuracy is in percent everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from benchmarks.parallelbench.records import Record
from benchmarks.parallelbench.specs import Setting

__all__ = [
    "Cell",
    "Paired",
    "Point",
    "aup",
    "average",
    "canvases",
    "forwards",
    "oracle",
    "paired",
    "parallelisability",
    "pbx",
    "slope",
    "summarise",
    "wilson",
]

_Z = 1.959964  # 95 %


@dataclass(frozen=True)
class Cell:
    """One strategy on one task, or the unweighted mean over tasks.

    Attributes:
        n: samples.
        accuracy: in percent, with its 95 % Wilson interval `low` to `high` (of the mean over tasks: of the pooled samples).
        strict: accuracy by the strict scorer.
        tpf, tpf_mean, tps_mean_ratio, tps_ratio_of_means: see the module.
        drafter_forwards, verifier_forwards, new_tokens, seconds: per sample.
        canvases_per_pass: Σ canvases / Σ drafter passes; 1 where the verifier decodes alone.
    """

    n: int
    accuracy: float
    low: float
    high: float
    strict: float
    tpf: float
    tpf_mean: float
    tps_mean_ratio: float
    tps_ratio_of_means: float
    drafter_forwards: float
    verifier_forwards: float
    canvases_per_pass: float
    new_tokens: float
    seconds: float


@dataclass(frozen=True)
class Paired:
    """Two strategies on the same samples.

    Attributes:
        lost, gained: samples on which the first one scores lower, and higher, than the second.
        n: samples that both have.
    """

    lost: int
    gained: int
    n: int

    @property
    def change(self) -> float:
        """Accuracy of the first one less that of the second, in points, if a score is 0 or 1."""
        return 100 * (self.gained - self.lost) / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the change, in points.

        Source: Agresti and Min 2005, Wald's interval of a paired difference, with 1/2 added to each of the four cells. Of
        equal scores it is ±1 point with 194 samples.
        """
        lost, gained, n = self.lost + 0.5, self.gained + 0.5, self.n + 2
        half = _Z * math.sqrt(lost + gained - (gained - lost) ** 2 / n) / n
        return 100 * ((gained - lost) / n - half), 100 * ((gained - lost) / n + half)


@dataclass(frozen=True)
class Point:
    """A setting on every task."""

    setting: Setting
    cells: dict[str, Cell]
    mean: Cell


def forwards(record: Record) -> int:
    """Drafter passes; verifier passes where the verifier decoded alone."""
    return record["drafter_forwards"] or record["verifier_forwards"]


def canvases(record: Record) -> int:
    """Canvases of the row that the drafter computed; one per pass in records that do not tell."""
    return record.get("canvases", record["drafter_forwards"])


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson score interval of a share, in percent."""
    p, spread = successes / n, _Z * _Z / n
    centre, half = p + spread / 2, math.sqrt(spread * p * (1 - p) + spread * spread / 4)
    return 100 * max(centre - half, 0.0) / (1 + spread), 100 * min((centre + half) / (1 + spread), 1.0)


def paired(records: Iterable[Record], others: Iterable[Record]) -> Paired:
    """The records of one strategy beside those of another, sample by sample."""
    scores = {(record["task"], record["index"]): record["score"] for record in others}
    changes = [
        record["score"] - scores[sample]
        for record in records
        if (sample := (record["task"], record["index"])) in scores
    ]
    return Paired(sum(change < 0 for change in changes), sum(change > 0 for change in changes), len(changes))


def summarise(records: Sequence[Record]) -> Cell:
    """Summary of the records of one strategy and one task."""
    n = len(records)

    def mean(value: Callable[[Record], float]) -> float:
        return sum(map(value, records)) / n

    low, high = wilson(sum(record["score"] for record in records), n)
    passes = mean(forwards)
    tokens = mean(lambda record: record["new_tokens"])
    drafted = mean(lambda record: record["drafter_forwards"])
    return Cell(
        n=n,
        accuracy=100 * mean(lambda record: record["score"]),
        low=low,
        high=high,
        strict=100 * mean(lambda record: record["score_strict"]),
        tpf=tokens / passes,
        tpf_mean=tokens / passes,
        tps_mean_ratio=mean(lambda record: record["max_new_tokens"] / forwards(record)),
        tps_ratio_of_means=mean(lambda record: record["max_new_tokens"]) / passes,
        drafter_forwards=drafted,
        verifier_forwards=mean(lambda record: record["verifier_forwards"]),
        canvases_per_pass=mean(canvases) / drafted if drafted else 1.0,
        new_tokens=tokens,
        seconds=mean(lambda record: record["seconds"]),
    )


def average(cells: Iterable[Cell]) -> Cell:
    """Unweighted over tasks, but for `tpf`, which is pooled; `n` is the number of all samples."""
    cells = list(cells)
    names = [name for name in Cell.__dataclass_fields__ if name not in ("n", "low", "high", "tpf")]
    means = {name: sum(getattr(cell, name) for cell in cells) / len(cells) for name in names}
    n = sum(cell.n for cell in cells)
    low, high = wilson(means["accuracy"] / 100 * n, n)
    tokens = sum(cell.n * cell.new_tokens for cell in cells)
    passes = sum(cell.n * (cell.drafter_forwards or cell.verifier_forwards) for cell in cells)
    return Cell(n=n, low=low, high=high, tpf=tokens / passes, **means)


def pbx(
    points: Sequence[Point], target: float, measure: Callable[[Cell], float] = lambda cell: cell.tpf_mean
) -> float | None:
    """PBx: the most tokens per forward at which the mean accuracy over tasks is at least x percent; `None` if it never is.

    Between neighbouring parameters of a threshold-like family, the accuracy is interpolated linearly in the tokens.

    Args:
        points: one family, in the order of its parameter.
        target: x, in percent.
        measure: which tokens per forward; by default the mean over tasks, as published, of our count.

    Source: ParallelBench, arXiv:2510.04767, and its released code (2026).
    """
    found = [measure(point.mean) for point in points if point.mean.accuracy >= target]
    for one, other in pairwise(points):
        above, below = sorted((one, other), key=lambda point: point.mean.accuracy, reverse=True)
        if one.setting.interpolates and above.mean.accuracy >= target > below.mean.accuracy:
            share = (above.mean.accuracy - target) / (above.mean.accuracy - below.mean.accuracy)
            found.append(measure(above.mean) + share * (measure(below.mean) - measure(above.mean)))
    return max(found, default=None)


def aup(curve: Iterable[tuple[float, float]], best: float, alpha: float = 3.0, floor: float = 5.0) -> float:
    """Accuracy under parallelism: the area under accuracy over tokens per forward, low accuracy weighted less.

    With ρ_1 < ρ_2 < … the tokens per forward and y_i the accuracies, in percent, of the settings with y_i ≥ y_1 − floor:
    ρ_1·y_1 + Σ_i (ρ_i − ρ_(i−1))·(y_i·W(y_i) + y_(i−1)·W(y_(i−1))) / 2, where W(y) = min(exp(−α·(1 − y/best)), 1).

    Args:
        curve: (ρ, y) of one family, in any order.
        best: the highest accuracy of all methods compared.
        alpha: α.
        floor: in points.

    Source: d3LLM, arXiv:2601.07568, and its released code.
    """
    ordered = sorted(curve)
    kept = [(rho, y) for rho, y in ordered if y >= ordered[0][1] - floor]

    def weighted(y: float) -> float:
        return y * min(math.exp(-alpha * (1 - y / best)), 1.0)

    (rho, y), area = kept[0], kept[0][0] * kept[0][1]
    for next_rho, next_y in kept[1:]:
        area += (next_rho - rho) * (weighted(y) + weighted(next_y)) / 2
        rho, y = next_rho, next_y
    return area


def oracle(records: Iterable[Record]) -> Cell:
    """The best result of a family if the setting were chosen per sample.

    Per sample, the fewest forwards among the settings that reach that sample's best score.

    Args:
        records: of one task, all settings of a family.

    Source: ParallelBench, arXiv:2510.04767, appendix G.2, with the confidence threshold.
    """
    chosen: dict[int, Record] = {}
    for record in records:
        held = chosen.get(record["index"])
        if held is None or (record["score"], -forwards(record)) > (held["score"], -forwards(held)):
            chosen[record["index"]] = record
    return summarise(list(chosen.values()))


def parallelisability(curve: Iterable[tuple[float, float]]) -> float:
    """Σ k·score_k / Σ score_k over top-k decoding: how many tokens per step a task tolerates; 0 if no answer is right."""
    curve = list(curve)
    total = sum(score for _, score in curve)
    return sum(k * score for k, score in curve) / total if total else 0.0


def slope(curve: Iterable[tuple[float, float]]) -> float:
    """Least-squares slope of the score over log2 of the block length: points per doubling, at two tokens per step."""
    xs, ys = zip(*((math.log2(length), score) for length, score in curve), strict=True)
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x_mean) ** 2 for x in xs)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / spread
