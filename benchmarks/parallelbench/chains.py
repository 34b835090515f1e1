"""Exact accuracy and forwards of parallel decoding on tasks with one hidden variable, a position (own).

Replace Random, Insert Random and Remove Random have one hidden variable: the position j. A decoding that is still right is
described by how many masks depend on j, m of them, and how many are already settled by what was committed; so the
sums over all drafts and all orders are a recursion over (m, settled) rather than over answers.

What is drawn at a mask is one of up to three outcomes: as in the list (`OLD`), the new item (`NEW`), or as in the list
but moved by one (`MOVED`).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = [
    "CHAINS",
    "Chain",
    "Rule",
    "at_least",
    "confidence",
    "margin",
    "negative_entropy",
    "top",
    "walk",
    "within_entropy",
    "within_factor",
]

OLD, NEW, MOVED = range(3)
_DIGITS = 12  # scores are rounded to these, so that equal ones tie


@dataclass(frozen=True)
class Chain:
    """One of the three tasks.

    Args:
        outputs: n → length of the answer, which is also how many masks depend on j at first.
        places: m → how many values j can still have.
        weights: (m, mask 1 … m) → how many of them say OLD, NEW, MOVED there.
        after: (m, outcome by mask) → masks that depend on j once these are known, or None if no j fits.
    """

    outputs: Callable[[int], int]
    places: Callable[[int], int]
    weights: Callable[[int, int], tuple[int, int, int]]
    after: Callable[[int, Mapping[int, int]], int | None]


def _after_replace(m: int, known: Mapping[int, int]) -> int | None:
    num_new = list(known.values()).count(NEW)
    left = m - len(known)
    if num_new:
        return 0 if num_new == 1 else None
    return _unless_settled(left) if left else None


def _after_insert(m: int, known: Mapping[int, int]) -> int | None:
    low, high = _bounds(m, known)
    new = [mask for mask, outcome in known.items() if outcome == NEW]
    if new:
        return 0 if len(new) == 1 and low < new[0] < high else None
    return _unless_settled(high - low - 1) if high - low > 1 else None


def _after_remove(m: int, known: Mapping[int, int]) -> int | None:
    low, high = _bounds(m, known)
    return high - low - 1 if low < high else None


def _bounds(m: int, known: Mapping[int, int]) -> tuple[int, int]:
    """The last mask known to be OLD and the first known to be MOVED."""
    low = max((mask for mask, outcome in known.items() if outcome == OLD), default=0)
    return low, min((mask for mask, outcome in known.items() if outcome == MOVED), default=m + 1)


def _unless_settled(m: int) -> int:
    return 0 if m == 1 else m  # with a single mask left for the new item, nothing is open


CHAINS: dict[str, Chain] = {
    "replace_random": Chain(
        outputs=lambda n: n,
        places=lambda m: m,
        weights=lambda m, mask: (m - 1, 1, 0),
        after=_after_replace,
    ),
    "insert_random": Chain(
        outputs=lambda n: n + 1,
        places=lambda m: m,
        weights=lambda m, mask: (m - mask, 1, mask - 1),
        after=_after_insert,
    ),
    "remove_random": Chain(
        outputs=lambda n: n - 1,
        places=lambda m: m + 1,
        weights=lambda m, mask: (m + 1 - mask, 0, mask),
        after=_after_remove,
    ),
}


# --- Which masks a step commits

Take = Callable[[Sequence[float]], int]
Score = Callable[[Sequence[float], int], float]


@dataclass(frozen=True)
class Rule:
    """A strategy: rank the masks, commit the best.

    Args:
        take: scores of all masks, best first → how many of them to commit, at least one.
        score: (probabilities of a mask, which of them was drafted) → higher is better, ties from the left; a settled
            mask has the probabilities (1,). None: the order is independent of the drafts.
        at_random: without a score, a random order instead of left to right.
    """

    take: Take
    score: Score | None = None
    at_random: bool = False


def top(k: int) -> Take:
    return lambda scores: min(k, len(scores))


def at_least(threshold: float) -> Take:
    return lambda scores: max(1, sum(score >= threshold for score in scores))


def within_factor(factor: float) -> Take:
    """The largest k with (k+1)(1 − c_k) < f."""
    return lambda scores: max([1, *(k for k, c in enumerate(scores, 1) if (k + 1) * (1 - c) < factor)])


def within_entropy(bound: float) -> Take:
    """The largest k whose first k − 1 entropies add up to γ nats at most; scores are negative entropies."""
    return lambda scores: sum(-math.fsum(scores[:k]) <= bound for k in range(len(scores)))


def confidence(probs: Sequence[float], drafted: int) -> float:
    return probs[drafted]


def margin(probs: Sequence[float], drafted: int) -> float:
    first, *others = sorted(probs, reverse=True)
    return first - max(others, default=0.0)


def negative_entropy(probs: Sequence[float], drafted: int) -> float:
    return math.fsum(p * math.log(p) for p in probs if p)


# (probability, outcome of each chosen mask that depends on j, how many settled ones are chosen)
Choice = tuple[float, dict[int, int], int]


def choices(rule: Rule, chain: Chain, m: int, settled: int, greedy: bool) -> Iterator[Choice]:
    """All possible commits of one step; for rules without a score, only the correct ones."""
    if rule.score is not None:
        yield from _best(rule, rule.score, chain, m, settled, greedy)
        return
    size = rule.take([0.0] * (m + settled))
    if not rule.at_random:  # from the left, all masks depend on j or none does
        first = range(1, min(size, m) + 1)
        for prob, drafts in _right_drafts(chain, m, first, greedy):
            yield prob, drafts, size - len(first)
        return
    for count in range(max(0, size - settled), min(m, size) + 1):
        share = math.comb(settled, size - count) / math.comb(m + settled, size)
        for masks in itertools.combinations(range(1, m + 1), count):
            for prob, drafts in _right_drafts(chain, m, masks, greedy):
                yield share * prob, drafts, size - count


def _best(rule: Rule, score: Score, chain: Chain, m: int, settled: int, greedy: bool) -> Iterator[Choice]:
    sure = [score((1.0,), 0)] * settled  # never ranked below others
    scores = {}
    for mask in range(1, m + 1):
        probs = [weight / chain.places(m) for weight in chain.weights(m, mask)]
        for outcome in (OLD, NEW, MOVED):
            scores[mask, outcome] = round(score(probs, outcome), _DIGITS)
    for prob, drafts in _drafts(chain, m, range(1, m + 1), greedy):
        ranked = sorted(drafts, key=lambda mask: -scores[mask, drafts[mask]])
        size = rule.take([*sure, *(scores[mask, drafts[mask]] for mask in ranked)])
        chosen = ranked[: max(0, size - settled)]
        yield prob, {mask: drafts[mask] for mask in chosen}, min(size, settled)


def _drafts(chain: Chain, m: int, masks: Sequence[int], greedy: bool) -> Iterator[tuple[float, dict[int, int]]]:
    """Independent draws at these masks, with their probabilities; if greedy, draws among the likeliest outcomes."""
    options = [_outcomes(chain, m, mask, greedy) for mask in masks]
    for draws in itertools.product(*options):
        yield math.prod(p for p, _ in draws), {mask: drawn[1] for mask, drawn in zip(masks, draws, strict=True)}


def _right_drafts(chain: Chain, m: int, masks: Sequence[int], greedy: bool) -> Iterator[tuple[float, dict[int, int]]]:
    """The draws of `_drafts` that are consistent with some j: few for any m."""
    found: list[tuple[float, dict[int, int]]] = [(1.0, {})]
    for mask in masks:
        longer = (
            (prob * p, known | {mask: outcome})
            for prob, known in found
            for p, outcome in _outcomes(chain, m, mask, greedy)
        )
        found = [(prob, known) for prob, known in longer if chain.after(m, known) is not None]
    yield from found


def _outcomes(chain: Chain, m: int, mask: int, greedy: bool) -> list[tuple[float, int]]:
    weights: Sequence[int] = chain.weights(m, mask)
    if greedy:
        weights = [weight == max(weights) for weight in weights]
    return [(weight / sum(weights), outcome) for outcome, weight in enumerate(weights) if weight]


# --- From the first step to the last


def walk(chain: Chain, n: int, rule: Rule, greedy: bool = False) -> tuple[float, float]:
    """Accuracy and expected number of forwards.

    Forwards are defined for rules with a score only. They are NaN if a decode can be wrong before its last step,
    because the ideal model is undefined on a prefix that no answer has.
    """

    @functools.cache
    def value(m: int, settled: int) -> tuple[float, float]:
        if m + settled == 0:
            return 1.0, 0.0
        accuracy, forwards = 0.0, 1.0
        for prob, known, num_settled in choices(rule, chain, m, settled, greedy):
            left = m + settled - len(known) - num_settled
            then = chain.after(m, known) if m else 0
            if then is not None:
                right, more = value(then, left - then)
                accuracy += prob * right
                forwards += prob * more
            elif left:
                forwards = math.nan
        return accuracy, forwards

    m = chain.outputs(n)
    m, settled = (m, 0) if chain.places(m) > 1 else (0, m)
    return value(m, settled)
