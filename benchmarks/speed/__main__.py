"""Command line of the speed benchmark; see the package."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.speed import batch, launch, length, sampling, targets, versus, window
from benchmarks.speed.floor import measure_rates
from benchmarks.speed.measure import Plan, measure, sizes_of
from benchmarks.speed.options import add_loading, add_machine, loading_of, pair_of, prepared
from benchmarks.speed.pairs import PAIRS
from benchmarks.speed.schedule import PAPER_MEAN, Schedule
from benchmarks.speed.settings import ONE_PER_STEP, compared, supports
from benchmarks.speed.table import LEGEND, command, entries, lines, machine, rate_entries, rate_lines

COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "length": length.main,
    "batch": batch.main,
    "window": window.main,
    "sampling": sampling.main,
    "targets": targets.main,
    "launch": launch.main,
    "versus": versus.main,
}


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if arguments and arguments[0] in COMMANDS:
            return COMMANDS[arguments[0]](arguments[1:])
        return _compare(arguments)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _compare(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    prepared(options)
    schedule, loading = Schedule(options.mean), loading_of(options)
    found: list[dict[str, Any]] = []
    rates_of: dict[str, Any] = {}
    for name in options.pair:
        pair = pair_of(name, loading)
        print(f"measuring {name} …", file=sys.stderr)
        rates = measure_rates(sizes_of(pair.models), options.device, loading.weights)
        rates_of[name] = rate_entries(rates)
        settings = []
        for setting in compared():
            if (reason := supports(setting, pair, options.device)) is None:
                settings.append(setting)
            else:
                print(f"{name}: {setting.label} left out: {reason}")
        for rows in options.batch:
            count = options.count or max(rows, (11 if options.quick else 44) if pair.trained else 4)
            plan = Plan(
                count=count,
                batch=rows,
                repetitions=options.repetitions or (3 if options.quick or not pair.trained else 5),
                quality_count=55 if options.quick else 220,
            )
            results = measure(
                pair, settings, plan, rates, schedule=schedule, device=options.device, progress=_progress(options)
            )
            baseline = next(result for result in results if result.setting == ONE_PER_STEP)
            of_pair = entries(pair, results, batch=rows, schedule=schedule, baseline=baseline)
            found += of_pair
            print("\n".join(lines(pair, of_pair)), end="\n\n", flush=True)
        print("\n".join(rate_lines(rates)), end="\n\n")
    print(LEGEND)
    report = {
        **machine(options.device),
        "dtype": str(loading.weights).removeprefix("torch."),
        "rates": rates_of,
        **next(iter(rates_of.values())),
        "command": command("python -m benchmarks.speed", arguments),
        "settings": found,
    }
    keep(report, options.out)
    return 0


def keep(report: dict[str, Any], folder: Path | None) -> None:
    """Write the report as JSON to a folder, and as the last line into a pipe or a file; a terminal is told of it."""
    line = json.dumps(report)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "speed.json").write_text(line + "\n")
    print("All numbers as JSON: --out DIR, or the last line in a pipe." if sys.stdout.isatty() else line)


def _progress(options: argparse.Namespace) -> Callable[[str], None]:
    if not options.verbose:
        return lambda _: None
    return lambda text: print(text, file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed",
        description=__doc__,
        epilog="other commands, with --help of their own: " + ", ".join(COMMANDS),
    )
    parser.add_argument(
        "--pair",
        nargs="+",
        default=["included"],
        metavar="PAIR",
        help=f"{', '.join(PAIRS)} or DRAFTER_DIR:VERIFIER_DIR",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few prompts; within a minute on one core (included pair)"
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1], metavar="ROWS", help="rows of a call")
    parser.add_argument("--count", type=int, metavar="N", help="prompts")
    parser.add_argument("--repetitions", type=int, metavar="N", help="of every setting")
    parser.add_argument(
        "--mean", type=float, default=PAPER_MEAN, help="accepted tokens of the schedule (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write speed.json there")
    parser.add_argument("--verbose", action="store_true", help="report progress on standard error")
    add_loading(parser)
    add_machine(parser)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
