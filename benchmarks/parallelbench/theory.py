"""The cost of parallel decoding on tasks whose right answers can be enumerated: information, accuracy, forwards.

All functions assume the ideal model: it gives the exact marginals p(token | known tokens), all right answers
being equally likely, one token per item. Sources are sections of "ParallelBench" (arXiv 2510.04767); "own" marks what is
derived here. Every function is tested against enumeration, and `python -m benchmarks.parallelbench theory` prints it
beside measurements of the strategies of `apd`.

A task is named by the last part of its official name, n is the length of the list in the prompt. Of the list tasks,
those in `SURE_TASKS` have one right answer: parallel decoding loses nothing on them.

    >>> round(total_correlation("shuffle", 3), 3), round(total_correlation("replace_random", 3), 3)
    (2.17, 1.17)
    >>> accuracy("shuffle", 6, "left_to_right", 2)
    0.3125
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.parallelbench import chains
from benchmarks.parallelbench.chains import CHAINS, Rule

__all__ = [
    "OPEN_TASKS",
    "STRATEGIES",
    "SURE_TASKS",
    "accuracy",
    "accuracy_floor",
    "bound",
    "even_schedule",
    "forwards",
    "ideal_forwards",
    "length",
    "replace_accuracy",
    "shuffle_accuracy",
    "total_correlation",
]

SURE_TASKS = ("copy", "reverse", "sort", "replace_index", "insert_index", "remove_index")
OPEN_TASKS = ("shuffle", *CHAINS)
_LATIN_SQUARES = 576  # of size 4; the official generator draws from 144 of them


def length(task: str, n: int) -> int:
    """Number of items of an answer: n, one more for Insert, one less for Remove."""
    _check(task, n)
    return n + task.startswith("insert") - task.startswith("remove")


# --- Information


def total_correlation(task: str, n: int) -> float:
    """C(Y|X) = Σᵢ H(yᵢ|X) − H(Y|X) in bits: the least KL divergence of decoding in one step.

    Zero for one right answer. Replace Random: (n−1)(log₂ n − log₂(n−1)); Shuffle: n log₂ n − log₂ n! (the paper's §4.1;
    PARALLELBENCH §1.2). Insert Random, N = n+1: Σᵢ H(1/N, (N−i)/N, (i−1)/N) − log₂ N; Remove Random: Σᵢ h(i/n) − log₂ n
    (own, §1.4). Latin square: 4² cells of 2 bits less log₂ 576.
    """
    if task == "latin_square" and n == 4:
        return n * n * math.log2(n) - math.log2(_LATIN_SQUARES)
    _check(task, n)
    if task in SURE_TASKS or n == 1:
        return 0.0
    if task == "shuffle":
        return n * math.log2(n) - math.log2(math.factorial(n))
    if task == "replace_random":
        return (n - 1) * (math.log2(n) - math.log2(n - 1))
    if task == "insert_random":
        return sum(_entropy(1, n + 1 - i, i - 1) for i in range(1, n + 2)) - math.log2(n + 1)
    return sum(_entropy(i, n - i) for i in range(1, n)) - math.log2(n)


def bound(task: str, n: int, schedule: Sequence[int]) -> float:
    """L_T = Σₜ E[C(Sₜ | X, S₍<ₜ₎)] in bits: the least KL divergence of decoding from the left in these steps.

    The bound is Theorem 1 of the paper (PARALLELBENCH §1.1). Shuffle, k_t items being left before step t:
    Σₜ |Sₜ| log₂ k_t − log₂ n! (§1.2). The other three are right with probability (places left)/(places) when step t begins
    with the place still open, and then lose Σ H(yᵢ) − H(Sₜ), where each of the k masks ends the search with one chance in
    m: H(Sₜ) = (k/m) log₂ m − ((m−k)/m) log₂((m−k)/m) (own, §1.4).

    Args:
        schedule: how many tokens each step commits; they add up to the answer's `length`.
    """
    total = length(task, n)
    if sum(schedule) != total or min(schedule) < 1:
        raise ValueError(f"`schedule` must be positive and add up to {total}, got {list(schedule)}.")
    if task in SURE_TASKS:
        return 0.0
    lost, left = 0.0, total
    for k in schedule:
        if task == "shuffle":
            lost += k * math.log2(left) - math.log2(math.perm(left, k))
        else:
            chain = CHAINS[task]
            places = chain.places(left)
            marginals = sum(_entropy(*chain.weights(left, mask)) for mask in range(1, k + 1))
            lost += places / chain.places(total) * (marginals - _entropy(*[1] * k, places - k))
        left -= k
    return lost


def accuracy_floor(task: str, n: int, schedule: Sequence[int]) -> float:
    """2^(−L_T): the least probability of a right answer when sampling from the left in these steps (own, PARALLELBENCH §1.1).

    Data processing on the event that Y is valid gives −log₂ Q(valid) ≤ KL = L_T. Equal for Shuffle.
    """
    return 2 ** -bound(task, n, schedule)


def ideal_forwards(task: str, n: int) -> float:
    """Number of forwards of an ideal adaptive decode that loses nothing (own, PARALLELBENCH §1.4).

    One right answer: 1. Shuffle: n. Replace Random, one mask at a time until the new item shows, then the rest:
    (n+3)/2 − 1/n on average. Insert Random, bisecting: ⌈log₂(n+2)⌉ at most (one more than §1.4 says where n+1 is a power
    of 2: its last two places still need a look). Remove Random: 1, the argmax of all marginals being a right answer.
    """
    _check(task, n)
    if task == "shuffle":
        return n
    if task == "replace_random":
        return (n + 3) / 2 - 1 / n
    if task == "insert_random":
        return math.ceil(math.log2(n + 2))
    return 1


# --- Accuracy and forwards of strategies

# The meaning of a strategy's parameter: k tokens per step, γ, f, or nats.
_RULES: dict[str, Callable[[Any], Rule]] = {
    "left_to_right": lambda k: Rule(chains.top(k)),
    "random": lambda k: Rule(chains.top(k), at_random=True),
    "confidence": lambda k: Rule(chains.top(k), chains.confidence),
    "margin": lambda k: Rule(chains.top(k), chains.margin),
    "entropy": lambda k: Rule(chains.top(k), chains.negative_entropy),
    "threshold": lambda threshold: Rule(chains.at_least(threshold), chains.confidence),
    "factor": lambda factor: Rule(chains.within_factor(factor), chains.confidence),
    "entropy_bound": lambda nats: Rule(chains.within_entropy(nats), chains.negative_entropy),
}
STRATEGIES = (*_RULES, "apd")
_FIXED_STEPS = ("left_to_right", "random", "confidence", "margin", "entropy")
_BLIND = ("left_to_right", "random", "margin", "entropy")  # on Replace Random these cannot tell the masks apart


def even_schedule(total: int, tokens_per_step: int) -> list[int]:
    """k tokens per step, the rest last. (LLaDA's scheduler puts the rest into the first steps.)"""
    return [min(tokens_per_step, left) for left in range(total, 0, -tokens_per_step)]


def shuffle_accuracy(schedule: Sequence[int]) -> float:
    """Π P(m_i, k_i) / m_i^k_i: each step must draw different items of the m_i left (paper §4.2; PARALLELBENCH §1.3).

    Holds for any order of the masks; sampled, or greedy with ties broken at random, as noisy logits would.
    """
    left, right = sum(schedule), 1.0
    for k in schedule:
        right *= math.perm(left, k) / left**k
        left -= k
    return right


def replace_accuracy(schedule: Sequence[int], greedy: bool = False) -> float:
    """Replace Random where the order does not depend on the drafts: left to right, random, margin, entropy.

    Sampled: Σᵢ [Π_{j<i} (1−1/m_j)^k] · k (1/m_i) (1−1/m_i)^(k−1), exactly one step bringing the new item (own, §1.4).
    Greedy: "keep" wins until two masks are left, so the size of the last step decides: 1, ½ or 0 for 1, 2 or more
    (paper §4.2; PARALLELBENCH §1.3).
    """
    if greedy:
        return {1: 1.0, 2: 0.5}.get(schedule[-1], 0.0)
    left, right, nothing_yet = sum(schedule), 0.0, 1.0
    for k in schedule:
        right += nothing_yet * k / left * (1 - 1 / left) ** (k - 1)
        nothing_yet *= (1 - 1 / left) ** k
        left -= k
    return right


def accuracy(task: str, n: int, strategy: str, knob: float, *, greedy: bool = False) -> float:
    """The probability that the ideal model is right.

    Args:
        strategy: one of `STRATEGIES`.
        knob: its parameter. k for "left_to_right", "random", "confidence", "margin" and "entropy", the rest going last;
            γ for "threshold": all drafts with p ≥ γ, at least the surest; f for "factor": the largest k with
            (k+1)(1−p₍k₎) < f; nats for "entropy_bound"; R for "apd". Of equal masks the leftmost goes first.
        greedy: the likeliest token, ties broken at random as noisy logits would; else sampled at temperature 1, with
            noise that is redrawn in each step.
    Source: the closed forms above where they hold; for the last m* = ⌊1/γ⌋ items of Shuffle m*!/m*^m* (PARALLELBENCH
        §1.4); elsewhere the recursion of `chains.py`. "apd" below R = 1 accepts nothing wrong, since the verifier gives
        probability 0 to tokens that no answer continues; at R = 1 it accepts all masks at once (own; the laws of DESIGN §3).
    """
    steps = _fixed_steps(task, n, strategy, knob)
    if task in SURE_TASKS or (strategy == "apd" and knob < 1):
        return 1.0
    if task == "shuffle":
        return shuffle_accuracy(steps)
    if task == "replace_random" and strategy in (*_BLIND, "apd"):
        return replace_accuracy(steps, greedy)
    return chains.walk(CHAINS[task], n, _rule(task, n, strategy, knob), greedy)[0]


def forwards(task: str, n: int, strategy: str, knob: float, *, greedy: bool = False) -> float:
    """The mean number of forwards; arguments as in `accuracy`.

    NaN where no closed form is known: "apd" below R = 1, and thresholds so low that a list goes wrong before its end.
    Threshold on Shuffle: n − m* + 1 with m* = min(n, ⌊1/γ⌋) (own, PARALLELBENCH §1.4).
    """
    steps = _fixed_steps(task, n, strategy, knob)
    if strategy == "apd" and knob < 1:
        return math.nan
    if steps:
        return len(steps)
    return chains.walk(CHAINS[task], n, _rule(task, n, strategy, knob), greedy)[1]


def _fixed_steps(task: str, n: int, strategy: str, knob: float) -> list[int]:
    """Tokens per step if they are independent of the draws, else an empty result."""
    total, rule = length(task, n), _rule(task, n, strategy, knob)
    steps: list[int] = []
    if task != "shuffle" and task not in SURE_TASKS and strategy not in (*_FIXED_STEPS, "apd"):
        return steps
    while left := total - sum(steps):
        items = left if task == "shuffle" else 1
        score = rule.score([1 / items] * items, 0) if rule.score else 0.0
        steps.append(rule.take([score] * left))
    return steps


def _rule(task: str, n: int, strategy: str, knob: float) -> Rule:
    if strategy == "apd":
        return _RULES["left_to_right"](length(task, n))
    if strategy not in _RULES:
        raise ValueError(f"`strategy` must be one of {', '.join(STRATEGIES)}, got {strategy!r}.")
    return _RULES[strategy](knob)


def _entropy(*weights: int) -> float:
    """H of a distribution in bits, given by counts."""
    total = sum(weights)
    return -sum(w / total * math.log2(w / total) for w in weights if w)


def _check(task: str, n: int) -> None:
    if task not in SURE_TASKS + OPEN_TASKS:
        raise ValueError(f"`task` must be one of {', '.join(SURE_TASKS + OPEN_TASKS)}, got {task!r}.")
    least = 2 if task.startswith("remove") else 1
    if n < least:
        raise ValueError(f"`n` must be at least {least}, got {n}.")
