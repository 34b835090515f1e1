"""The curves of a report as PNG: the mean over tasks, every task, and the task map."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.parallelbench.report import MEAN, Family, Report, cell_of

__all__ = ["GROUPS", "TICKS", "Group", "Spot", "blank", "group_of", "spots", "write_pictures"]


@dataclass(frozen=True)
class Group:
    """Families that share a colour.

    Attributes:
        name: for the legend.
        light, dark: the colour on a light and on a dark page.
        kinds: prefixes of their names.
    """

    name: str
    light: str
    dark: str
    kinds: tuple[str, ...]


# Later groups are drawn on top.
GROUPS = (
    Group("any order, K per step", "#0f766e", "#2dd4bf", ("random", "confidence", "margin", "entropy")),
    Group("blocks", "#7c3aed", "#a78bfa", ("blocks",)),
    Group("left to right", "#57534e", "#a8a29e", ("left-to-right", "autoregressive")),
    Group(
        "any order, adaptive",
        "#1d4ed8",
        "#60a5fa",
        ("threshold", "factor", "entropy-bound", "klass", "wino", "one-step"),
    ),
    Group("checked", "#be185d", "#f472b6", ("checked",)),
    Group("APD", "#c2410c", "#fb923c", ("apd",)),
)
TICKS = (0.25, 0.5, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 32)
_MARKERS = "osD^vPXph<>"


def group_of(family: Family) -> Group:
    """The group of a family."""
    kind = re.split("[:/]", family.name)[0]
    return next(group for group in GROUPS if kind in group.kinds)


def blank(width: float, height: float) -> Any:
    """An empty figure that needs no display; sizes in inches.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"{error}. Pictures need matplotlib: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def write_pictures(report: Report, directory: Path) -> None:
    """`average.png`, `tasks.png` and, where there is one, `task_map.png`.

    Raises:
        ImportError: matplotlib is missing.
    """
    figure = blank(14, 5.6)
    whole, best = figure.subplots(1, 2)
    for axes in (whole, best):
        _curves(axes, report, MEAN, size=6)
    lowest = min(point.mean.accuracy for point in report.points)
    fastest = max((point.mean.tpf for point in report.points if point.mean.accuracy >= 80), default=1.0)
    whole.set_ylim(lowest - 4, 102)
    best.set_xlim(fastest / 2.2, fastest * 1.08)
    best.set_ylim(78, 101)
    best.set_xticks([tick for tick in TICKS if fastest / 2.2 <= tick <= fastest * 1.08])
    best.set_xticklabels([f"{tick:g}" for tick in best.get_xticks()])
    whole.set_title("Mean over tasks", loc="left")
    best.set_title("its best part", loc="left")
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", fontsize=8, frameon=False)
    figure.savefig(directory / "average.png", dpi=110)

    columns = 4
    rows = -(-(len(report.tasks) + 1) // columns)
    figure = blank(3.6 * columns, 2.7 * rows)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, task in zip(panels, report.tasks, strict=False):
        _curves(axes, report, task, size=3.5)
        axes.set_title(task.replace("_", " "), loc="left", fontsize=10, parse_math=False)
        axes.label_outer()
    for axes in panels[len(report.tasks) :]:
        axes.axis("off")
    handles, labels = panels[0].get_legend_handles_labels()
    panels[-1].legend(handles, labels, loc="center", fontsize=6.5, frameon=False, ncol=2)
    figure.savefig(directory / "tasks.png", dpi=120)

    if spots(report.task_map):
        figure = blank(7.5, 5)
        _map(figure.subplots(), report)
        figure.savefig(directory / "task_map.png", dpi=120)


def _curves(axes: Any, report: Report, task: str, size: float) -> None:
    seen: dict[str, int] = {}
    for group in GROUPS:
        for family in report.families:
            if group_of(family) is not group:
                continue
            cells = [cell_of(point, task) for point in family.points]
            marker = _MARKERS[seen.get(group.name, 0) % len(_MARKERS)]
            seen[group.name] = seen.get(group.name, 0) + 1
            axes.plot(
                [cell.tpf for cell in cells],
                [cell.accuracy for cell in cells],
                color=group.light,
                marker=marker,
                markersize=size,
                linewidth=1.1,
                alpha=0.85 if group.name == "APD" else 0.6,
                label=family.name,
            )
    for name, cells_of in report.oracles.items():
        cell = cells_of[task]
        color = "#c2410c" if name == "apd" else "#1d4ed8"
        axes.plot(
            [cell.tpf],
            [cell.accuracy],
            marker="*" if name != "any order" else "P",
            markersize=size * 2,
            color=color,
            markeredgecolor="white",
            markeredgewidth=0.5,
            linestyle="none",
            label=f"oracle over {name}",
            zorder=5,
        )
    axes.set_xscale("log", base=2)
    powers = [tick for tick in TICKS if math.log2(tick).is_integer()]
    axes.set_xticks(powers, [f"{tick:g}" for tick in powers])
    axes.minorticks_off()
    axes.set_xlim(0.3, 18)
    axes.set_ylim(-3, 103)
    axes.set_xlabel("tokens per forward")
    axes.set_ylabel("accuracy, %")
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


@dataclass(frozen=True)
class Spot:
    """Tasks so close on the task map that they share a label, with the coordinates of each."""

    tasks: list[tuple[str, float, float]]

    @property
    def x(self) -> float:
        return self.tasks[0][1]

    @property
    def y(self) -> float:
        return self.tasks[0][2]


def spots(task_map: dict[str, tuple[float, float | None]], width: float = 1.0, height: float = 2.0) -> list[Spot]:
    """Group the tasks of a map: a group lies within `width` and `height` of its first task. A task without a slope has no place."""
    found: list[Spot] = []
    for task, (x, y) in task_map.items():
        if y is None:
            continue
        near = next((spot for spot in found if abs(spot.x - x) < width and abs(spot.y - y) < height), None)
        if near is None:
            found.append(Spot([(task, x, y)]))
        else:
            near.tasks.append((task, x, y))
    return found


def _map(axes: Any, report: Report) -> None:
    for spot in spots(report.task_map):
        axes.plot([x for _, x, _ in spot.tasks], [y for _, _, y in spot.tasks], "o", color="#c2410c", markersize=7)
        right = spot.x < 6
        axes.annotate(
            "\n".join(task.replace("_", " ") for task, _, _ in spot.tasks),
            (spot.x, spot.y),
            xytext=(10, 0) if right else (-4, -9),
            textcoords="offset points",
            ha="left" if right else "right",
            va="center" if right else "top",
            fontsize=9,
            parse_math=False,
        )
    axes.set_xlabel("tokens per step the task puts up with: Σ k·accuracy / Σ accuracy, confidence top-k")
    axes.set_ylabel("points per doubling of the block, at k = 2")
    axes.margins(0.12, 0.2)
    axes.grid(color="#e5e7eb", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
