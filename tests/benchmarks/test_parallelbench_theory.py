"""Closed forms against enumeration of all answers and all draws, and against the numbers of PARALLELBENCH §1."""

import functools
import itertools
import math
from collections import Counter

import pytest
from thinned import thinned

pytest.importorskip("benchmarks.parallelbench", reason="benchmarks are imported from the repository root")

from benchmarks.parallelbench import table
from benchmarks.parallelbench.__main__ import main
from benchmarks.parallelbench.table import FALSE_ALARM, METHODS, TASKS, cell, interval
from benchmarks.parallelbench.theory import (
    OPEN_TASKS,
    STRATEGIES,
    SURE_TASKS,
    accuracy,
    accuracy_floor,
    bound,
    even_schedule,
    forwards,
    ideal_forwards,
    length,
    replace_accuracy,
    shuffle_accuracy,
    total_correlation,
)


def answers(task: str, n: int) -> list[tuple[int, ...]]:
    names = tuple(range(n))
    if task == "shuffle":
        return list(itertools.permutations(names))
    if task == "replace_random":
        return [(*names[:i], n, *names[i + 1 :]) for i in range(n)]
    if task == "insert_random":
        return [(*names[:i], n, *names[i:]) for i in range(n + 1)]
    if task == "remove_random":
        return [(*names[:i], *names[i + 1 :]) for i in range(n)]
    return [names]


def entropy(counts: Counter) -> float:
    return -sum(c / counts.total() * math.log2(c / counts.total()) for c in counts.values())


def correlation(rows: list[tuple[int, ...]], positions: range) -> float:
    """C of some positions, the rows being equally likely."""
    parts = sum(entropy(Counter(row[i] for row in rows)) for i in positions)
    return parts - entropy(Counter(tuple(row[i] for i in positions) for row in rows))


# --- Information


@pytest.mark.parametrize("task", [*OPEN_TASKS, "copy"])
@pytest.mark.parametrize("n", [2, 3, 4, 6])
def test_total_correlation_is_the_enumerated_one(task, n):
    rows = answers(task, n)
    assert total_correlation(task, n) == pytest.approx(correlation(rows, range(len(rows[0]))), abs=1e-9)
    assert bound(task, n, [length(task, n)]) == pytest.approx(total_correlation(task, n), abs=1e-9)


@pytest.mark.parametrize("task", [*OPEN_TASKS, "sort"])
def test_the_bound_of_several_steps_is_the_enumerated_one(task):
    n = 5
    rows, total = answers(task, n), length(task, n)
    for steps in range(1, total + 1):
        for cuts in itertools.combinations(range(1, total), steps - 1):
            edges = [0, *cuts, total]
            expected = 0.0
            for start, end in itertools.pairwise(edges):
                prefixes = Counter(row[:start] for row in rows)
                for prefix, count in prefixes.items():
                    fitting = [row for row in rows if row[:start] == prefix]
                    expected += count / len(rows) * correlation(fitting, range(start, end))
            schedule = [b - a for a, b in itertools.pairwise(edges)]
            assert bound(task, n, schedule) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("task", OPEN_TASKS)
def test_splitting_a_step_never_raises_the_bound_and_one_at_a_time_loses_nothing(task):
    total = length(task, 6)
    assert bound(task, 6, [1] * total) == pytest.approx(0, abs=1e-9)
    for first in range(1, total):
        for second in range(1, total - first):
            split = bound(task, 6, [first, second, total - first - second])
            assert split <= bound(task, 6, [first, total - first]) + 1e-9
            assert split <= bound(task, 6, [first + second, total - first - second]) + 1e-9


@pytest.mark.parametrize("task", OPEN_TASKS)
@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_accuracy_is_never_below_the_floor_of_the_bound(task, k):
    floor = accuracy_floor(task, 6, even_schedule(length(task, 6), k))
    reached = accuracy(task, 6, "left_to_right", k)
    assert reached > floor - 1e-9
    if task == "shuffle":
        assert reached == pytest.approx(floor)


def test_published_numbers():
    """Total correlation in bits and accuracy of one step: Replace, Shuffle, Insert, Remove. PARALLELBENCH §1.4."""
    order = ("replace_random", "shuffle", "insert_random", "remove_random")
    published = {
        3: ((1.170, 2.170, 2.623, 0.252), (0.444, 0.222, 0.188, 0.889)),
        4: ((1.245, 3.415, 3.386, 0.623), (0.422, 0.0938, 0.123, 0.750)),
        5: ((1.288, 4.703, 4.137, 1.064), (0.410, 0.0384, 0.0823, 0.614)),
        6: ((1.315, 6.018, 4.880, 1.552), (0.402, 0.0154, 0.0560, 0.494)),
        10: ((1.368, 11.43, 7.817, 3.764), (0.387, 3.6e-4, 0.0130, 0.186)),
        15: ((1.394, 18.35, 11.46, 6.822), (0.381, 3.0e-6, 0.0023, 0.0489)),
    }
    for n, (bits, shares) in published.items():
        for task, lost, right in zip(order, bits, shares, strict=True):
            assert total_correlation(task, n) == pytest.approx(lost, rel=3e-3)
            assert accuracy(task, n, "left_to_right", length(task, n)) == pytest.approx(right, rel=0.02)
    for (n, k), right in {(6, 2): 0.7335, (6, 3): 0.604, (10, 2): 0.812, (10, 5): 0.570}.items():
        assert replace_accuracy(even_schedule(n, k)) == pytest.approx(right, abs=6e-4)
    assert total_correlation("latin_square", 4) == pytest.approx(22.83, abs=5e-3)
    assert shuffle_accuracy([2, 2, 2]) == pytest.approx(5 * 3 / (6 * 4 * 2))
    assert bound("shuffle", 6, [2, 2, 2]) == pytest.approx(math.log2(48 / 15))


def test_greedy_and_thresholds_of_the_paper():
    for n, k, right in ((6, 1, 1), (6, 2, 0.5), (6, 3, 0), (6, 6, 0), (5, 2, 1)):
        assert accuracy("replace_random", n, "confidence", k, greedy=True) == right
    # No single threshold fits: Shuffle wants more than ½, Replace Random more than 1 − 1/n.
    assert accuracy("shuffle", 10, "threshold", 0.51) == 1
    assert accuracy("shuffle", 6, "threshold", 0.5) == 0.5 and forwards("shuffle", 6, "threshold", 0.5) == 5
    assert accuracy("replace_random", 6, "threshold", 0.8, greedy=True) == 0
    assert accuracy("replace_random", 6, "threshold", 0.84, greedy=True) == 1
    assert accuracy("insert_random", 6, "threshold", 0.6, greedy=True) == 1
    assert forwards("insert_random", 6, "threshold", 0.6, greedy=True) == 3


def test_ideal_forwards():
    assert [ideal_forwards(task, 6) for task in SURE_TASKS] == [1] * len(SURE_TASKS)
    assert ideal_forwards("shuffle", 6) == 6
    assert ideal_forwards("replace_random", 6) == pytest.approx(4.33, abs=5e-3)
    assert ideal_forwards("insert_random", 6) == 3
    assert ideal_forwards("remove_random", 6) == 1
    assert accuracy("remove_random", 6, "left_to_right", 5, greedy=True) == 1


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8])
def test_ideal_forwards_are_what_one_unsettled_mask_at_a_time_takes(n):
    def revealing(m: int) -> int:
        """Most forwards of Insert Random with m masks in doubt: look at the middle one."""
        if m <= 1:
            return 1
        return 1 + max(1, revealing((m - 1) // 2), revealing(m // 2))

    assert ideal_forwards("insert_random", n) == revealing(n + 1)
    # The new item at i: i looks, and one more forward if masks are left; the last but one look settles the last.
    looks = [min(i + 1, n) for i in range(1, n + 1)]
    assert ideal_forwards("replace_random", n) == pytest.approx(sum(looks) / n)


# --- Strategies


def decode(task: str, n: int, strategy: str, knob: float, greedy: bool) -> tuple[float, float]:
    """Accuracy and forwards by enumerating every draw of every step; NaN forwards if masks are left when it is wrong."""
    rows = answers(task, n)
    total = len(rows[0])

    def marginals(known: tuple) -> list[dict[int, float]]:
        fitting = [row for row in rows if all(k in (None, token) for k, token in zip(known, row, strict=True))]
        columns = [Counter(column) for column in zip(*fitting, strict=True)]
        return [{token: c / column.total() for token, c in column.items()} for column in columns]

    def score(probs: dict[int, float], token: int) -> float:
        ranked = sorted([*probs.values(), 0.0], reverse=True)
        if strategy == "margin":
            return round(ranked[0] - ranked[1], 9)
        if strategy.startswith("entropy"):
            return round(sum(p * math.log(p) for p in ranked if p), 9)
        return round(probs[token], 9)

    def subsets(masks: list[int], scores: dict[int, float]) -> list[tuple[int, ...]]:
        """The sets of masks that a step may commit, equally likely."""
        best = sorted(masks, key=lambda i: (-scores[i], i))
        if strategy == "apd":
            return [tuple(masks)]
        if strategy == "left_to_right":
            return [tuple(masks[: int(knob)])]
        if strategy == "random":
            return list(itertools.combinations(masks, min(int(knob), len(masks))))
        if strategy == "threshold":
            return [tuple(i for i in best if i == best[0] or scores[i] >= knob)]
        if strategy == "factor":
            passing = [c for c in range(1, len(best) + 1) if (c + 1) * (1 - scores[best[c - 1]]) < knob]
            return [tuple(best[: max(passing, default=1)])]
        if strategy == "entropy_bound":
            return [tuple(i for c, i in enumerate(best) if -sum(scores[j] for j in best[:c]) <= knob)]
        return [tuple(best[: int(knob)])]

    @functools.cache
    def value(known: tuple) -> tuple[float, float]:
        masks = [i for i, token in enumerate(known) if token is None]
        if not masks:
            return 1.0, 0.0
        columns, options = marginals(known), []
        for i in masks:
            top = max(columns[i].values())
            probs = {t: p for t, p in columns[i].items() if not greedy or p > top - 1e-9}
            options.append([(p / sum(probs.values()), t) for t, p in probs.items()])
        right, more = 0.0, 1.0
        for draws in itertools.product(*options):
            prob, drafts = math.prod(p for p, _ in draws), dict(zip(masks, (t for _, t in draws), strict=True))
            ways = subsets(masks, {i: score(columns[i], drafts[i]) for i in masks})
            for way in ways:
                then = tuple(drafts[i] if i in way else token for i, token in enumerate(known))
                if any(all(k in (None, t) for k, t in zip(then, row, strict=True)) for row in rows):
                    further = value(then)
                    right += prob / len(ways) * further[0]
                    more += prob / len(ways) * further[1]
                elif None in then:
                    more = math.nan
        return right, more

    return value((None,) * total)


KNOBS = {
    "threshold": (0.3, 0.45, 0.55, 0.7, 0.95),
    "factor": (0.7, 1.1, 1.3, 1.9),
    "entropy_bound": (0.0, 0.4, 0.8, 3.0),
    "apd": (1.0,),
}


@pytest.mark.parametrize("greedy", thinned([False, True], 2))
@pytest.mark.parametrize("task", [*OPEN_TASKS, "reverse"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accuracy_and_forwards_are_the_enumerated_ones(strategy, task, greedy):
    for n in (2, 3, 4) if task in ("shuffle", "insert_random") else (2, 3, 4, 5):
        for knob in KNOBS.get(strategy, (1, 2, 3)):
            right, steps = decode(task, n, strategy, knob, greedy)
            assert accuracy(task, n, strategy, knob, greedy=greedy) == pytest.approx(right, abs=1e-9), (n, knob)
            claimed = forwards(task, n, strategy, knob, greedy=greedy)
            if not math.isnan(steps):
                assert claimed == pytest.approx(steps, abs=1e-9), (n, knob)


def test_apd_with_a_verifier_has_no_closed_form_of_its_forwards():
    assert accuracy("shuffle", 6, "apd", 0.99) == 1
    assert math.isnan(forwards("shuffle", 6, "apd", 0.5))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: accuracy("shuffel", 4, "random", 2), "shuffel"),
        (lambda: accuracy("shuffle", 4, "greedy", 2), "greedy"),
        (lambda: bound("shuffle", 4, [2, 1]), "schedule"),
        (lambda: total_correlation("remove_random", 1), "at least 2"),
    ],
)
def test_what_cannot_be_meant_is_named(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# --- What the strategies of `apd` do


CELLS = [(method, task, 3 + (i + j) % 2) for i, method in enumerate(METHODS) for j, task in enumerate(TASKS)]


@pytest.mark.parametrize(
    ("method", "task", "n"),  # lists of four by default: every method, every task
    [pytest.param(*each, marks=() if each[2] == 4 else pytest.mark.slow) for each in CELLS],
    ids=str,
)
def test_strategies_meet_their_closed_forms_on_the_exact_model(method, task, n):
    """Exactly where nothing is random, else at most `FALSE_ALARM` for each of the comparisons."""
    found = cell(task, n, method, rows=400)
    assert found.agrees, found


@pytest.mark.parametrize(
    ("name", "wrong"), [("accuracy", 0.55), ("accuracy", 1.0), ("forwards", 3), ("forwards", 2.5)]
)
def test_a_wrong_closed_form_is_noticed(monkeypatch, name, wrong):
    method = next(method for method in METHODS if str(method) == "confidence(2)")
    assert cell("shuffle", 4, method).agrees
    monkeypatch.setattr(table, name, lambda *args, **kwargs: wrong)
    assert not cell("shuffle", 4, method).agrees


def test_the_interval_is_where_chernoff_allows_it():
    low, high = interval(300, 1000)
    for p in (low, high):
        divergence = 0.3 * math.log(0.3 / p) + 0.7 * math.log(0.7 / (1 - p))
        assert 2 * math.exp(-1000 * divergence) == pytest.approx(FALSE_ALARM, rel=1e-3)
    assert interval(0, 1000)[0] == 0 and interval(1000, 1000)[1] == 1


def test_the_table_is_printed(capsys):
    assert main(["theory", "--rows", "50", "--lengths", "3"]) == 0
    printed = capsys.readouterr().out
    assert "100 of 100 entries agree" in printed and "shuffle" in printed
