"""A report as Markdown tables, and updates the tables of a page."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.parallelbench.metrics import Cell
from benchmarks.parallelbench.report import MEAN, TARGETS, Equal, Report, cell_of

__all__ = ["described", "refresh", "tables"]


def tables(report: Report) -> dict[str, str]:
    """The tables by name: `run`, `main`, `families`, `oracle`, `equal`, `task-map`, `tasks`."""
    return {
        "run": described(report, _text),
        "main": _main(report),
        "families": _families(report),
        "oracle": _oracle(report),
        "equal": _equal(report),
        "task-map": _task_map(report),
        "tasks": _tasks(report),
    }


def refresh(page: Path, report: Report, run: str) -> None:
    """Replace the text between `<!-- table RUN/NAME -->` and `<!-- end -->`; tables of other runs stay.

    Args:
        run: name of the directory that the records are in.
    Raises:
        ValueError: the page names a table that does not exist.
    """
    found = tables(report)

    def renewed(match: re.Match[str]) -> str:
        if match[1] not in found:
            raise ValueError(f"{page} asks for the table {match[1]!r}. There are: {', '.join(found)}.")
        return f"<!-- table {run}/{match[1]} -->\n{found[match[1]]}\n<!-- end -->"

    text = page.read_text(encoding="utf-8")
    pattern = rf"<!-- table {re.escape(run)}/(\S+) -->\n.*?<!-- end -->"
    page.write_text(re.sub(pattern, renewed, text, flags=re.DOTALL), encoding="utf-8")


def described(report: Report, name: Callable[[Any], str] = str) -> str:
    """The run in one paragraph: settings, pair, date and versions.

    Args:
        name: formats a name in the records, such as a path.
    """
    made, settings = report.log.made_with, report.log.settings
    n = f"{report.count} samples per task" if report.count else "samples per task as in `results.csv`"
    length = f"at most {settings['max_new_tokens']} new tokens"
    if (hole := settings.get("holes")) is not None:
        length = f"a hole of a {name(hole)} of a right answer"
    how = "greedy" if not settings["temperature"] else f"temperature {settings['temperature']:g}"
    return (
        f"{len(report.points)} settings, {len(report.tasks)} tasks, {n}, {how}, seed {settings['seed']}, "
        f"{length}. Pair: {name(settings['pair'])} (drafter "
        f"{name(settings['drafter'])}, verifier {name(settings['verifier'])}). Made on {name(made['date'])} with Python "
        f"{name(made['python'])}, torch {name(made['torch'])}, transformers {name(made['transformers'])}. The official scorers and ours, which requires the exact form, differ on "
        f"{report.num_unlike} of {report.num_records} answers."
    )


def _main(report: Report) -> str:
    """One setting per family."""
    header = ["strategy", "accuracy [95 %]", "tokens / forward", "mean over tasks", "drafter / verifier passes"]
    rows = [
        [
            f"`{point.setting.spec}`",
            f"{point.mean.accuracy:.1f} [{point.mean.low:.1f}, {point.mean.high:.1f}]",
            _speed(point.mean),
            f"{point.mean.tpf_mean:.2f}",
            f"{point.mean.drafter_forwards:.2f} / {point.mean.verifier_forwards:.2f}",
            f"{point.mean.tps_mean_ratio:.2f} ({point.mean.tps_ratio_of_means:.2f})",
        ]
        for point in map(report.pick, report.families)
    ]
    return _table([*header, "max/NFE: mean of ratios (ratio of means)"], rows)


def _families(report: Report) -> str:
    rows = [
        [
            f"`{family.name}`",
            *(_number(family.pbx[x]) for x in TARGETS),
            f"{family.aup:.0f}",
            f"{family.best.mean.accuracy:.1f} @ {_speed(family.best.mean)}",
        ]
        for family in sorted(report.families, key=lambda family: -family.aup)
    ]
    return _table(["family", *(f"PB{x}" for x in TARGETS), "AUP", "most accurate setting"], rows)


def _oracle(report: Report) -> str:
    tasks = [*report.tasks, MEAN]
    rows = [[of, *(_short(cells[task]) for task in tasks)] for of, cells in report.oracles.items()]
    return "\n".join([_table(["oracle over", *map(_text, tasks)], rows), "", *_distances(report)])


def _distances(report: Report) -> list[str]:
    """Share of the oracles' tokens per forward that the fastest settings of sufficient mean accuracy reach."""
    mean = report.equal[-1]
    lines = []
    for side in (mean.apd, mean.checked, mean.rival):
        if side is not None:
            shares = [
                f"{100 * side[1].tpf / cells[MEAN].tpf:.0f} % of the oracle over {of}"
                for of, cells in report.oracles.items()
            ]
            lines.append(f"- `{side[0]}` ({_short(side[1])}): {', '.join(shares)}.")
    return lines


def _equal(report: Report) -> str:
    columns: dict[str, Callable[[Equal], str]] = {
        "task": lambda equal: _text(equal.task),
        "one at a time": lambda equal: f"{equal.reference:.1f}",
        "fastest APD": lambda equal: _side(equal, equal.apd),
        "fastest checked": lambda equal: _side(equal, equal.checked),
        "fastest any-order rival": lambda equal: _side(equal, equal.rival),
        "ratio": lambda equal: _ratio(equal, equal.ratio, equal.apd),
        "ratio of checked": lambda equal: _ratio(equal, equal.checked_ratio, equal.checked),
    }
    if not any(equal.checked for equal in report.equal):
        columns = {name: column for name, column in columns.items() if "checked" not in name}
    return _table([*columns], [[column(equal) for column in columns.values()] for equal in report.equal])


def _side(equal: Equal, side: tuple[str, Cell] | None) -> str:
    if side is None:
        return "none"
    spec, cell = side
    text = f"`{spec}` {_short(cell)}, {cell.verifier_forwards:.1f} verifier".removesuffix(", 0.0 verifier")
    if (beside := equal.beside.get(spec)) is None:
        return text
    low, high = beside.interval
    return f"{text}; −{beside.lost} +{beside.gained} of {beside.n}, {low:+.1f} to {high:+.1f}".replace(" -", " −")


def _ratio(equal: Equal, ratio: float | None, side: tuple[str, Cell] | None) -> str:
    """In brackets where the samples are too few to tell that both sides are within a point of the reference."""
    if ratio is None or (equal.is_told(side) and equal.is_told(equal.rival)):
        return _number(ratio)
    return f"({_number(ratio)})"


def _task_map(report: Report) -> str:
    rows = [[_text(task), f"{x:.2f}", "–" if y is None else f"{y:+.1f}"] for task, (x, y) in report.task_map.items()]
    return _table(["task", "parallelisability", "points per doubling of the block"], rows)


def _tasks(report: Report) -> str:
    rows = [
        [f"`{point.setting.spec}`", *(_short(cell_of(point, task)) for task in report.tasks)]
        for point in map(report.pick, report.families)
    ]
    return _table(["accuracy @ tokens per forward", *map(_text, report.tasks)], rows)


def _short(cell: Cell) -> str:
    return f"{cell.accuracy:.0f} @ {_speed(cell)}"


def _speed(cell: Cell) -> str:
    """Tokens per forward, and the canvases per pass where they are more than one."""
    several = cell.canvases_per_pass != 1
    return f"{cell.tpf:.2f}{f' ({cell.canvases_per_pass:.1f} canvases)' if several else ''}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _text(name: Any) -> str:
    """Escape a name from the records for one cell of a Markdown table: no line breaks, column bars or markup."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(str(name).split()))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
