"""Command line of the ParallelBench part; see the package."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.parallelbench import knobs, publish, run
from benchmarks.parallelbench.cases import check_cases
from benchmarks.parallelbench.table import FALSE_ALARM, render, table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallelbench", description=__doc__)
    commands = parser.add_subparsers(required=True)

    command = commands.add_parser("theory", help="closed forms beside what the strategies do on exact models")
    command.add_argument("--rows", type=int, default=1000, help="decodings per entry (default %(default)s)")
    command.add_argument("--lengths", type=int, nargs="+", default=[3, 4, 5, 6], metavar="n")
    command.set_defaults(run=_theory)

    command = commands.add_parser("cases", help="recorded outputs of the official scorers against ours")
    command.add_argument("file", type=Path, help="parallelbench_metric_cases.json")
    command.set_defaults(run=_cases)

    run.add_parser(commands)
    publish.add_parser(commands)
    knobs.add_parser(commands)

    options = parser.parse_args(arguments)
    return options.run(options)


def _theory(options: argparse.Namespace) -> int:
    started = time.perf_counter()
    cells = list(table(options.lengths, options.rows))
    for line in render(cells):
        print(line)
    wrong = sum(not cell.agrees for cell in cells)
    print(
        f"\n{len(cells) - wrong} of {len(cells)} entries agree, {options.rows} decodings each. Chance of a false alarm: "
        f"at most {FALSE_ALARM:g} per comparison."
    )
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"entries": len(cells), "disagree": wrong, "rows": options.rows, "seconds": seconds}))
    return 1 if wrong else 0


def _cases(options: argparse.Namespace) -> int:
    report = check_cases(options.file)
    for line in report.lines():
        print(line)
    return 1 if report.wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
