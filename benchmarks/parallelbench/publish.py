"""The report on a run as CSV, PNG and one HTML page.

    python -m benchmarks.parallelbench report runs/few

Writes into the directory: `results.csv` (a row per strategy and task), `curves.csv` (official column names),
`families.csv`, `oracle.csv`, `equal.csv`, `task_map.csv`, `index.html` and, with matplotlib (extra `bench`), three PNG files.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.parallelbench.metrics import Cell, Point
from benchmarks.parallelbench.page import write_page
from benchmarks.parallelbench.pictures import write_pictures
from benchmarks.parallelbench.report import MEAN, TARGETS, Equal, Report, build, cell_of, load
from benchmarks.parallelbench.summary import refresh, tables

__all__ = ["add_parser", "write_csv"]


def write_csv(report: Report, directory: Path) -> None:
    """Write all tables as CSV files."""

    def write(name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        with (directory / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows([_plain(value) for value in row] for row in rows)

    names = list(Cell.__dataclass_fields__)
    cells = [(point.setting, task, cell_of(point, task)) for point in report.points for task in (*report.tasks, MEAN)]
    write(
        "results.csv",
        ["strategy", "family", "parameter", "value", "task", *names],
        ([s.spec, s.family, s.parameter, s.value, task, *asdict(cell).values()] for s, task, cell in cells),
    )
    write(
        "curves.csv",
        ["strategy", "task", "tps", "accuracy"],
        ([s.spec, task, c.tps_ratio_of_means if s.is_apd else c.tps_mean_ratio, c.accuracy] for s, task, c in cells),
    )
    targets = [f"pb{x}" for x in TARGETS]
    write(
        "families.csv",
        [
            "family",
            "settings",
            *targets,
            *(f"{name}_published" for name in targets),
            "aup",
            "best",
            "accuracy",
            "tpf",
            "canvases_per_pass",
        ],
        (
            [f.name, len(f.points), *f.pbx.values(), *f.pbx_published.values(), f.aup, *_named(f.best)]
            for f in report.families
        ),
    )
    write(
        "oracle.csv",
        ["of", "task", *names],
        ([of, task, *asdict(cell).values()] for of, found in report.oracles.items() for task, cell in found.items()),
    )
    columns = ("", "_accuracy", "_tpf", "_verifier", "_canvases", "_lost", "_gained", "_low", "_high")
    sides = [f"{side}{column}" for side in ("apd", "checked", "rival") for column in columns]
    write("equal.csv", ["task", "reference", *sides, "ratio", "checked_ratio"], map(_equal_row, report.equal))
    write(
        "task_map.csv",
        ["task", "parallelisability", "block_slope"],
        ([task, *place] for task, place in report.task_map.items()),
    )


def _named(point: Point) -> tuple[str, float, float, float]:
    return point.setting.spec, point.mean.accuracy, point.mean.tpf, point.mean.canvases_per_pass


def _equal_row(equal: Equal) -> list[Any]:
    row: list[Any] = [equal.task, equal.reference]
    for side in (equal.apd, equal.checked, equal.rival):
        if side is None:
            row += [""] * 9
        else:
            spec, cell = side
            row += [spec, cell.accuracy, cell.tpf, cell.verifier_forwards, cell.canvases_per_pass]
            beside = equal.beside.get(spec)
            row += [beside.lost, beside.gained, *beside.interval] if beside else [""] * 4
    return [*row, equal.ratio, equal.checked_ratio]


def _plain(value: Any) -> Any:
    if value is None:
        return ""
    return f"{value:.4f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def add_parser(commands: Any) -> None:
    """Add the subcommand `report`."""
    parser = commands.add_parser(
        "report",
        help="curves and summary numbers of a run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--count", type=int, metavar="N", help="the first N samples of each task only")
    parser.add_argument(
        "--docs", type=Path, nargs="+", default=[], metavar="PAGE", help="Markdown pages whose tables are updated"
    )
    parser.set_defaults(run=_main)


def _main(options: argparse.Namespace) -> int:
    try:
        report = build(load(options.directory), options.count)
        write_csv(report, options.directory)
        write_page(report, options.directory)
        for page in options.docs:
            refresh(page, report, options.directory.resolve().name)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        write_pictures(report, options.directory)
    except ImportError as error:
        print(f"no pictures: {error}", file=sys.stderr)
    print(tables(report)["main"])
    if report.left_out:
        print(f"Left out, since they lack tasks: {', '.join(report.left_out)}")
    print(f"Report: {options.directory / 'index.html'}")
    return 0
