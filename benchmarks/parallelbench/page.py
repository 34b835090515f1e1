"""A report as one self-contained HTML page: an interactive curve, and the tables behind it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from benchmarks.parallelbench.metrics import Cell
from benchmarks.parallelbench.pictures import GROUPS, TICKS, group_of, spots
from benchmarks.parallelbench.report import MEAN, TARGETS, Report, cell_of
from benchmarks.parallelbench.summary import described

__all__ = ["write_page"]

_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
_HOW = (
    "A forward is one drafter pass of a row that is not done; a row is done when every position up to its first stop "
    "token is decided, for every strategy alike. Plain autoregressive decoding has no drafter, so its verifier passes "
    "count. Over several tasks tokens and forwards are summed over all samples: pooled. A forward of checked decoding computes several canvases of the row; it counts as one, and the canvases per "
    "pass stand beside it. Milliseconds are wall-clock per sample on a shared CPU core, in batches: an order of magnitude, "
    "no more."
)


def write_page(report: Report, directory: Path) -> None:
    """Write `index.html`."""
    # "</script" would end the element that holds the data, and "<!--<script" would hide its end.
    data = json.dumps(_data(report), separators=(",", ":")).replace("<", "\\u003c")
    page = _TEMPLATES.get_template("page.html").render(data=Markup(data))
    (directory / "index.html").write_text(page, encoding="utf-8")


def _data(report: Report) -> dict[str, Any]:
    tasks = [*report.tasks, MEAN]
    speeds = [cell_of(point, task).tpf for point in report.points for task in tasks]
    families = [
        {
            "name": family.name,
            "group": group_of(family).name,
            "pbx": [family.pbx[x] for x in TARGETS],
            "aup": family.aup,
            "best": family.best.setting.spec,
            "best_cell": _cell(family.best.mean),
            "pick": report.pick(family).setting.spec,
            "points": [
                {"spec": point.setting.spec, "cells": {task: _cell(cell_of(point, task)) for task in tasks}}
                for point in family.points
            ],
        }
        for family in report.families
    ]
    equal = [
        {
            "task": equal.task,
            "reference": equal.reference,
            **{side: _side(getattr(equal, side)) for side in ("apd", "checked", "rival")},
            "ratio": equal.ratio,
            "checked_ratio": equal.checked_ratio,
        }
        for equal in report.equal
    ]
    oracles = [
        {
            "of": of,
            "group": "APD" if of == "apd" else "any order, adaptive",
            "cells": {task: _cell(cell) for task, cell in cells.items()},
        }
        for of, cells in report.oracles.items()
    ]
    return {
        "mean": MEAN,
        "run": described(report) + _coarse(report),
        "how": _HOW,
        "facts": _facts(report),
        "tasks": report.tasks,
        "targets": TARGETS,
        "ticks": TICKS,
        "range": [min(speeds) * 0.9, max(speeds) * 1.12],
        "groups": [{"name": group.name, "light": group.light, "dark": group.dark} for group in GROUPS],
        "families": families,
        "oracles": oracles,
        "equal": equal,
        "map": [
            {"x": spot.x, "y": spot.y, "tasks": [{"task": task, "x": x, "y": y} for task, x, y in spot.tasks]}
            for spot in spots(report.task_map)
        ],
    }


def _coarse(report: Report) -> str:
    """A sentence about a run of few samples, whose answers weigh more than the point that settings are compared to."""
    if report.count is None or report.count >= 25:
        return ""
    return (
        f" One answer is {100 / report.count:.1f} points of a task: what is within one point here may be so by chance."
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    """The key figures at the top of the page."""
    mean = report.equal[-1]
    facts = []
    if mean.apd is None:
        facts.append(("none", "of the APD settings is as accurate as one token per step"))
    else:
        spec, cell = mean.apd
        facts.append(
            (f"{cell.tpf:.2f}", f"tokens per forward, pooled: APD as accurate as one token per step ({spec})")
        )
    if mean.checked is not None:
        spec, cell = mean.checked
        facts.append(
            (
                f"{cell.tpf:.2f}",
                f"checked decoding as accurate ({spec}), {cell.canvases_per_pass:.1f} canvases per pass",
            )
        )
    if mean.rival is not None:
        spec, cell = mean.rival
        facts.append((f"{cell.tpf:.2f}", f"the fastest any-order rival as accurate ({spec})"))
    ratios = [(equal.ratio, equal.task) for equal in report.equal[:-1] if equal.ratio is not None]
    if ratios:
        ratio, task = max(ratios)
        facts.append((f"{ratio:.2f} ×", f"where APD gains most at equal accuracy: {task.replace('_', ' ')}"))
        ratio, task = min(ratios)
        facts.append((f"{ratio:.2f} ×", f"where it gains least: {task.replace('_', ' ')}"))
    if without := [equal.task.replace("_", " ") for equal in report.equal[:-1] if equal.apd is None]:
        facts.append(
            (str(len(without)), f"of {len(report.tasks)} tasks have no APD setting as accurate: {', '.join(without)}")
        )
    return facts


def _side(side: tuple[str, Cell] | None) -> dict[str, Any] | None:
    return None if side is None else {"spec": side[0], **_cell(side[1])}


def _cell(cell: Cell) -> dict[str, float]:
    return {name: round(value, 4) for name, value in asdict(cell).items()}
