"""The closed forms of `theory.py` beside measurements of the strategies of `apd` on `apd.models.ideal.IdealListModel`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from apd import APDSampler
from apd.models.ideal import IdealListModel
from apd.strategies import (
    Autoregressive,
    Blocks,
    Confidence,
    Entropy,
    EntropyBound,
    Factor,
    LeftToRight,
    Margin,
    OneStep,
    RandomOrder,
    Threshold,
)
from benchmarks.parallelbench.theory import OPEN_TASKS, accuracy, forwards, length

__all__ = ["FALSE_ALARM", "METHODS", "TASKS", "Cell", "Method", "cell", "interval", "render", "table"]

FALSE_ALARM = 1e-6  # of one comparison, for a seed taken at random
TASKS = ("copy", *OPEN_TASKS)
_ROUNDING = 1e-9
_NEARLY_GREEDY = 0.01  # as greedy decoding, but breaks exact ties at random, as noisy logits would


@dataclass(frozen=True)
class Method:
    """A strategy of `apd` and its name in `theory.py`.

    Args:
        strategy, knob: as `theory.accuracy` takes them; a knob of None is the length of the answer.
        greedy: decode greedily.
        alias: another strategy of `apd` that is the same here.
    """

    strategy: str
    knob: float | None
    greedy: bool = False
    alias: str | None = None

    def __str__(self) -> str:
        if self.alias:
            return self.alias
        return f"{self.strategy}({'n' if self.knob is None else self.knob}){' greedy' * self.greedy}"

    def arguments(self, total: int) -> dict[str, Any]:
        """The arguments of `APDSampler.generate`."""
        # Closed forms that depend on drafts assume noise that is redrawn; APD's laws assume keyed noise.
        if self.strategy == "apd":
            return {"mixture_weight": self.knob}
        if self.alias:
            return {"strategy": _ALIASES[self.alias]}
        return {"strategy": _STRATEGIES[self.strategy](total if self.knob is None else self.knob), "noise": "step"}


_STRATEGIES: dict[str, Callable[[Any], Any]] = {
    "left_to_right": LeftToRight,
    "random": RandomOrder,
    "confidence": Confidence,
    "margin": Margin,
    "entropy": Entropy,
    "threshold": Threshold,
    "factor": Factor,
    "entropy_bound": EntropyBound,
}

_ALIASES = {
    "autoregressive": Autoregressive(),
    "one_step": OneStep(),
    "blocks(one_step, 2)": Blocks(OneStep(), 2),
}

METHODS: tuple[Method, ...] = (
    Method("left_to_right", 1),
    Method("left_to_right", 2),
    Method("left_to_right", None),
    Method("left_to_right", 1, alias="autoregressive"),
    Method("left_to_right", None, alias="one_step"),
    Method("left_to_right", 2, alias="blocks(one_step, 2)"),
    Method("random", 2),
    Method("confidence", 2),
    Method("margin", 2),
    Method("entropy", 2),
    Method("threshold", 0.55),
    Method("threshold", 0.95),
    Method("factor", 1.3),
    Method("entropy_bound", 0.5),
    Method("apd", 0.0),
    Method("apd", 0.5),
    Method("apd", 1.0),
    Method("left_to_right", 2, greedy=True),
    Method("confidence", 2, greedy=True),
    Method("threshold", 0.55, greedy=True),
)


@dataclass(frozen=True)
class Cell:
    """One closed form and its measurement.

    Attributes:
        accuracy, forwards: of the theory; the forwards are NaN where there is no closed form.
        measured_accuracy, measured_forwards: means over the rows.
        low, high: confidence interval of the accuracy, see `interval`.
        agrees: whether both hold: exactly where the theory says 0, 1 or a fixed number of forwards, else within what
            `FALSE_ALARM` allows.
    """

    task: str
    n: int
    method: Method
    accuracy: float
    measured_accuracy: float
    low: float
    high: float
    forwards: float
    measured_forwards: float
    agrees: bool


def table(
    lengths: Sequence[int] = (3, 4, 5, 6),
    rows: int = 1000,
    tasks: Sequence[str] = TASKS,
    methods: Sequence[Method] = METHODS,
) -> Iterator[Cell]:
    """Every task by every method by every length; the seeds are 0 … rows − 1."""
    for task in tasks:
        for method in methods:
            for n in lengths:
                yield cell(task, n, method, rows)


def cell(task: str, n: int, method: Method, rows: int = 1000) -> Cell:
    model, total = _ideal(task, n), length(task, n)
    knob = total if method.knob is None else method.knob
    sampler = APDSampler(model.drafter, model.verifier)
    output = sampler.generate(
        torch.zeros(rows, 1, dtype=torch.int64),
        max_new_tokens=total,
        do_sample=True,
        temperature=_NEARLY_GREEDY if method.greedy else 1.0,
        top_k=0,
        top_p=1.0,
        seed=list(range(rows)),
        return_dict_in_generate=True,
        **method.arguments(total),
    )
    hits = int(model.is_valid(output.sequences[:, 1:]).sum())
    # The autoregressive strategy runs the verifier alone.
    steps = torch.maximum(output.drafter_forwards, output.verifier_forwards).double()
    expected = accuracy(task, n, method.strategy, knob, greedy=method.greedy)
    expected_steps = forwards(task, n, method.strategy, knob, greedy=method.greedy)
    low, high = interval(hits, rows)
    right = hits == round(expected * rows) if _is_whole(expected) else low <= expected <= high
    # Hoeffding: steps lie between 1 and the length.
    slack = (total - 1) * math.sqrt(math.log(2 / FALSE_ALARM) / (2 * rows))
    off = abs(float(steps.mean()) - expected_steps)
    close = math.isnan(expected_steps) or off <= (_ROUNDING if _is_whole(expected_steps) else slack)
    return Cell(
        task, n, method, expected, hits / rows, low, high, expected_steps, float(steps.mean()), right and close
    )


def _is_whole(value: float) -> bool:
    """Whether the value is deterministic, up to rounding of sums of many probabilities."""
    return abs(value - round(value)) < _ROUNDING if math.isfinite(value) else False


def interval(hits: int, rows: int) -> tuple[float, float]:
    """The probabilities that `FALSE_ALARM` does not rule out, by Chernoff's bound 2·exp(−rows·KL(share‖p))."""
    share, most = hits / rows, math.log(2 / FALSE_ALARM) / rows

    def ruled_out(p: float) -> bool:
        terms = ((share, p), (1 - share, 1 - p))
        return any(a > 0 and b <= 0 for a, b in terms) or sum(a * math.log(a / b) for a, b in terms if a > 0) > most

    def edge(outside: float) -> float:
        inside = share
        for _ in range(50):
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if ruled_out(middle) else (middle, outside)
        return inside

    return edge(0.0), edge(1.0)


def render(cells: Sequence[Cell]) -> Iterator[str]:
    """Lines of text: per length the closed form, the measurement and its interval; then forwards."""
    lengths = sorted({cell.n for cell in cells})
    groups: dict[tuple[str, str], list[Cell]] = {}
    for entry in cells:
        groups.setdefault((entry.task, str(entry.method)), []).append(entry)
    yield "accuracy: closed form, measured [interval]".ljust(46) + "forwards: closed form, measured"
    previous = ""
    for (task, method), group in groups.items():
        if task != previous:
            yield f"\n{task:25}" + "".join(f"n = {n}".ljust(27) for n in lengths) + "forwards"
            previous = task
        accuracies = "".join(
            f"{c.accuracy:.4f} {c.measured_accuracy:.3f} [{c.low:.3f} {c.high:.3f}]".ljust(27) for c in group
        )
        steps = "  ".join(
            f"{'?' if math.isnan(c.forwards) else f'{c.forwards:.2f}'} {c.measured_forwards:.2f}" for c in group
        )
        yield f"{method:25}{accuracies}{steps}" + ("" if all(c.agrees for c in group) else "   DISAGREES")


def _ideal(task: str, n: int) -> IdealListModel:
    if task == "copy":  # and every other task with one right answer: the model is the same
        return IdealListModel(torch.arange(n)[None])
    return {
        "shuffle": IdealListModel.shuffle,
        "replace_random": IdealListModel.replace_random,
        "insert_random": IdealListModel.insert_random,
        "remove_random": IdealListModel.remove_random,
    }[task](n)
