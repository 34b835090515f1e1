"""Computes the figures of a run from its records: curves, PBx, oracles, AUP, speed at equal accuracy, the task map."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from apd.strategies import Checked
from benchmarks.parallelbench.metrics import (
    Cell,
    Paired,
    Point,
    aup,
    average,
    oracle,
    paired,
    parallelisability,
    pbx,
    slope,
    summarise,
)
from benchmarks.parallelbench.records import NAME, Log, Record, read
from benchmarks.parallelbench.specs import Setting, parse

__all__ = ["MEAN", "TARGETS", "Equal", "Family", "Report", "build", "cell_of", "load"]

TARGETS = (90, 80, 70, 60)
MEAN = "average"
_MARGIN = 1.0  # percentage points below one token per step that still count as equal


@dataclass(frozen=True)
class Family:
    """Settings that differ in one parameter.

    Attributes:
        name: such as "threshold" or "apd:correction".
        points: in the order of the parameter.
        pbx: by target, in our tokens per forward, the mean over tasks.
        pbx_published: the same in the mean of max_tokens / forwards.
        aup: accuracy under parallelism of the means over tasks.
    """

    name: str
    points: list[Point]
    pbx: dict[int, float | None]
    pbx_published: dict[int, float | None]
    aup: float

    @property
    def best(self) -> Point:
        """The most accurate setting, the faster of two."""
        return max(self.points, key=lambda point: (point.mean.accuracy, point.mean.tpf))


@dataclass(frozen=True)
class Equal:
    """The fastest APD, checked and any-order strategies that are as accurate as one token per step.

    Attributes:
        task: or the mean over tasks.
        reference: accuracy of the best strategy that decodes one token per step.
        apd, checked, rival: setting and its cell, the fastest within a point of the reference, of equally fast ones that
            with the fewest canvases; `None` if there is none.
            A checked strategy is none of the rivals, whatever it checks: it computes several canvases per pass.
        beside: each of these settings beside the most accurate one-token strategy on the same samples.
    """

    task: str
    reference: float
    apd: tuple[str, Cell] | None
    checked: tuple[str, Cell] | None
    rival: tuple[str, Cell] | None
    beside: dict[str, Paired] = field(default_factory=dict)

    def is_told(self, side: tuple[str, Cell] | None) -> bool:
        """Whether the samples are enough to tell that a side is within a point of the reference: 95 % interval of the change."""
        found = self.beside.get(side[0]) if side else None
        return found is not None and found.interval[0] >= -_MARGIN

    @property
    def ratio(self) -> float | None:
        """Tokens per forward of APD over those of the rival."""
        return _over(self.apd, self.rival)

    @property
    def checked_ratio(self) -> float | None:
        """Tokens per forward of checked over those of the rival."""
        return _over(self.checked, self.rival)


def _over(one: tuple[str, Cell] | None, other: tuple[str, Cell] | None) -> float | None:
    return one[1].tpf / other[1].tpf if one and other else None


@dataclass(frozen=True)
class Report:
    """All data of the files.

    Attributes:
        log: the records.
        count: samples per task, the same everywhere; `None` if they differ.
        tasks: in the order of the records.
        points: settings that have every task.
        left_out: settings that lack a task.
        families: in the order of the records.
        oracles: of a family of settings, per task and on average.
        equal: for every task and on average.
        task_map: parallelisability and block slope per task, if the run has the settings for them.
        num_records: number of records.
        num_unlike: records whose official score differs from ours, which requires the exact form.
    """

    log: Log
    count: int | None
    tasks: list[str]
    points: list[Point]
    left_out: list[str]
    families: list[Family]
    oracles: dict[str, dict[str, Cell]]
    equal: list[Equal]
    task_map: dict[str, tuple[float, float | None]]
    num_records: int
    num_unlike: int

    def pick(self, family: Family) -> Point:
        """The fastest setting within a point of one token per step, on average; else the most accurate one."""
        enough = [point for point in family.points if point.mean.accuracy >= self.equal[-1].reference - _MARGIN]
        return max(enough, key=lambda point: point.mean.tpf, default=family.best)


def load(directory: Path) -> Log:
    """The records of a directory, packed or not.

    Raises:
        ValueError: there are none.
    """
    for name in (NAME, f"{NAME}.xz"):
        if (log := read(directory / name)) is not None and log.records:
            if any(record["drafter_forwards"] is None for record in log.records):
                raise ValueError(
                    f"{directory} holds answers of an endpoint, whose forwards are unknown, so there is no curve."
                )
            return log
    raise ValueError(f"{directory} holds no records. Make some with `python -m benchmarks.parallelbench run`.")


def build(log: Log, count: int | None = None) -> Report:
    """The report on these records, or on the first `count` samples of each task.

    Raises:
        ValueError: `count` is less than 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"`count` must be at least 1, got {count}. Leave it out for all samples.")
    records = [record for record in log.records if count is None or record["index"] < count]
    by_setting: dict[str, dict[str, list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        by_setting[record["strategy"]][record["task"]].append(record)
    tasks = list(dict.fromkeys(record["task"] for record in records))
    complete = {spec: found for spec, found in by_setting.items() if len(found) == len(tasks)}
    points = [_point(spec, found, tasks) for spec, found in complete.items()]
    sizes = {cell.n for point in points for cell in point.cells.values()}
    return Report(
        log=log,
        count=sizes.pop() if len(sizes) == 1 else None,
        tasks=tasks,
        points=points,
        left_out=[spec for spec in by_setting if spec not in complete],
        families=_families(points),
        oracles=_oracles(complete, points, tasks),
        equal=[_equal(task, points, complete) for task in (*tasks, MEAN)],
        task_map=_task_map(points, tasks),
        num_records=len(records),
        num_unlike=sum(record["score"] != record["exact"] for record in records if "exact" in record),
    )


def _point(spec: str, found: dict[str, list[Record]], tasks: Sequence[str]) -> Point:
    cells = {task: summarise(found[task]) for task in tasks}
    return Point(parse(spec), cells, average(cells.values()))


def _families(points: Sequence[Point]) -> list[Family]:
    members: dict[str, list[Point]] = defaultdict(list)
    for point in points:
        members[point.setting.family].append(point)
    best = max(point.mean.accuracy for point in points)
    families = []
    for name, family in members.items():
        ordered = sorted(family, key=lambda point: point.setting.value)
        families.append(
            Family(
                name=name,
                points=ordered,
                pbx={x: pbx(ordered, x) for x in TARGETS},
                pbx_published={x: pbx(ordered, x, lambda cell: cell.tps_mean_ratio) for x in TARGETS},
                aup=aup([(point.mean.tpf_mean, point.mean.accuracy) for point in ordered], best) if best else 0.0,
            )
        )
    return families


def _oracles(
    complete: dict[str, dict[str, list[Record]]], points: Sequence[Point], tasks: Sequence[str]
) -> dict[str, dict[str, Cell]]:
    """Oracles over the thresholds, as published, over all settings of APD, and over all any-order settings."""
    groups: dict[str, Callable[[Point], bool]] = {
        "threshold": lambda point: point.setting.family == "threshold",
        "any order": lambda point: _is_rival(point.setting),
        "apd": lambda point: point.setting.is_apd,
    }
    oracles = {}
    for name, belongs in groups.items():
        specs = [point.setting.spec for point in points if belongs(point)]
        if specs:
            cells = {task: oracle(record for spec in specs for record in complete[spec][task]) for task in tasks}
            oracles[name] = {**cells, MEAN: average(cells.values())}
    return oracles


def cell_of(point: Point, task: str) -> Cell:
    """The cell of a setting on a task, or of the mean."""
    return point.mean if task == MEAN else point.cells[task]


def _equal(task: str, points: Sequence[Point], complete: dict[str, dict[str, list[Record]]]) -> Equal:
    cells = [(point.setting, cell_of(point, task)) for point in points]
    sequential = [(cell.accuracy, setting.spec) for setting, cell in cells if _is_sequential(setting)]
    reference, name = max(sequential, key=lambda pair: pair[0], default=(100.0, None))
    enough = [(setting, cell) for setting, cell in cells if cell.accuracy >= reference - _MARGIN]

    def fastest(belongs: Callable[[Setting], bool]) -> tuple[str, Cell] | None:
        found = [(setting.spec, cell) for setting, cell in enough if belongs(setting)]
        return max(found, key=lambda pair: (pair[1].tpf, -pair[1].canvases_per_pass), default=None)

    def records(spec: str) -> list[Record]:
        of_task = complete[spec]
        return [record for found in of_task.values() for record in found] if task == MEAN else of_task[task]

    sides = {
        "apd": fastest(lambda setting: setting.is_apd),
        "checked": fastest(_is_checked),
        "rival": fastest(_is_rival),
    }
    beside = {side[0]: paired(records(side[0]), records(name)) for side in sides.values() if side and name}
    return Equal(task, reference, **sides, beside=beside)


def _is_checked(setting: Setting) -> bool:
    return isinstance(setting.strategy, Checked)


def _is_rival(setting: Setting) -> bool:
    return setting.is_any_order and not _is_checked(setting)


def _is_sequential(setting: Setting) -> bool:
    return setting.parameter == "K" and setting.value == 1 and "/" not in setting.spec


def _task_map(points: Sequence[Point], tasks: Sequence[str]) -> dict[str, tuple[float, float | None]]:
    """Per task: how much parallelism it tolerates, and how much accuracy a doubling of the block costs."""
    by_spec = {point.setting.spec: point for point in points}
    top_k = [point for point in points if point.setting.family == "confidence"]
    lengths = {
        int(spec.removeprefix("blocks:").partition("/")[0]): point
        for spec, point in by_spec.items()
        if spec.startswith("blocks:") and spec.endswith("/confidence:2")
    }
    if "confidence:2" in by_spec:
        lengths |= {32: by_spec["confidence:2"]}
    if not top_k:
        return {}
    return {
        task: (
            parallelisability((point.setting.value, point.cells[task].accuracy) for point in top_k),
            slope((n, point.cells[task].accuracy) for n, point in lengths.items()) if len(lengths) > 1 else None,
        )
        for task in tasks
    }
