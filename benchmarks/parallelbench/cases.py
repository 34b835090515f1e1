"""Compares our scores with recorded outputs of the official scorers."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.parallelbench.score import score

__all__ = ["Report", "check_cases"]

_CLOSE = 1e-12


@dataclass
class Report:
    """The result of the comparison.

    Attributes:
        equal: per task, the number of cases that agree in every recorded value.
        wrong: (case, our scores) of the cases that do not.
        missing: number of cases that could not be scored, by reason.
    """

    equal: Counter[str] = field(default_factory=Counter)
    wrong: list[tuple[dict[str, Any], dict[str, float]]] = field(default_factory=list)
    missing: Counter[str] = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        for task, count in self.equal.items():
            yield f"{task:42}{count:4} equal"
        for case, ours in self.wrong:
            yield f"{case['task']}: {case['kind']}: recorded {case['official_per_sample']}, ours {ours}"
        for reason, count in self.missing.items():
            yield f"{count} not scored: {reason}"
        total = self.equal.total()
        yield f"{total} of {total + len(self.wrong)} recorded cases equal"


def check_cases(file: Path) -> Report:
    """Score every case of a file in the form of `parallelbench_metric_cases.json`.

    Where the grammar checker was replaced by a constant for the recording, the same constant is used here.
    """
    report = Report()
    for case in json.loads(file.read_text(encoding="utf-8"))["cases"]:
        stub = case.get("grammar_stub")
        grammar = None if stub is None else _constant(stub)
        try:
            ours = score(case["task"], case["response"], case["label"], grammar=grammar)
        except ImportError as error:
            report.missing[str(error)] += 1
            continue
        recorded = case["official_per_sample"]
        if all(abs(ours[name] - value) <= _CLOSE for name, value in recorded.items()):
            report.equal[case["task"]] += 1
        else:
            report.wrong.append((case, ours))
    return report


def _constant(verdict: bool) -> Any:
    return lambda text: verdict
