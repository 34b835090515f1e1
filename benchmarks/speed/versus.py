"""Two checkouts against each other: processor time of calls and their steps, and of `apd --help`.

    python -m benchmarks.speed versus --base DIR [--pair included 100m] [--rounds 9]

Each checkout runs in a process of its own, with its own `apd` and `benchmarks.speed`; they take turns, a round of one
setting after another. Processor time with one thread does not count the time that other programs take from a shared core.
Ratios are this checkout over the base in the same round: their median, least and largest. Both must give the same tokens.
"Outside the models" is what is left of a step that another one follows without decoders and output layers.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["WAYS", "main"]

_APD = ("apd", 0.5, 16, 16)  # R, M, W
#: Arguments of `Setting` and of `generate`. The seeds of a round are its own, so that no noise has been drawn before.
WAYS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "APD M all W all": (_APD[:2], {}),
    "APD M 16 W 16": (_APD, {}),
    "APD M 16 W 16, temperature 1": (_APD, {"do_sample": True, "top_k": 0}),
    "APD M 16 W 16, top-p 0.95": (_APD, {"do_sample": True, "top_k": 0, "top_p": 0.95}),
    "one token per step": (("left-to-right",), {}),
    "threshold 0.9": (("threshold",), {}),
}
#: What is measured.
COLUMNS = {"call": "a call, per step", "outside": "a step outside the models", "setup": "setup of a call"}


class Checkout:
    """A checkout and the process that decodes with it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory.resolve()
        self.environment = os.environ | {
            "PYTHONPATH": str(self.directory),
            "PYTHONSAFEPATH": "1",  # not this file's directory
            "OMP_NUM_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def decode(self, pair: str, way: str, rows: int, turn: int) -> dict[str, float]:
        """One round of a setting, see `decode`."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps([pair, way, rows, turn]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise OSError(f"the process that decodes with {self.directory} has ended, see its error above")
        return json.loads(answer)

    def help_ms(self) -> float:
        """Processor time of `apd --help`."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "apd", "--help"]
        subprocess.run(command, cwd=self.directory, env=self.environment, stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def decode(clock: Any, pair: Any, way: str, rows: int, turn: int) -> dict[str, float]:
    """One round in a checkout's own process: milliseconds, see `COLUMNS`, and a checksum of the tokens."""
    from benchmarks.speed.instruments import Meter
    from benchmarks.speed.schedule import Schedule
    from benchmarks.speed.settings import Setting, decoder

    setting, knobs = WAYS[way]
    library: Any = decoder(Setting(*setting), pair, Schedule(), lambda _: 0)
    library.knobs |= knobs
    meter, count, checksum = Meter(pair.models, clock), 8 if pair.trained else rows, 0
    with meter.attached():
        for call, inputs in enumerate(pair.rows(count, rows, seed=turn).calls):
            first = (1000 * turn + call) * rows
            with meter.call():
                tokens = library.decode(inputs | {"seed": list(range(first, first + rows))}, meter)
            checksum = hash((checksum, *tokens.flatten().tolist()))
    seconds = {
        "call": meter.seconds("call") / meter.count("propose"),
        "outside": meter.seconds("followed") - meter.seconds("followed forwards"),
        "setup": meter.seconds("setup") / meter.count("call"),
    }
    seconds["outside"] /= max(meter.count("followed"), 1)
    return {name: 1000 * value for name, value in seconds.items()} | {"tokens": checksum}


def serve() -> None:
    """Decode what is asked for on standard input."""
    import torch

    from benchmarks.speed.instruments import Clock
    from benchmarks.speed.pairs import Loading, load

    torch.set_num_threads(1)
    clock, pair_of = Clock("cpu"), functools.cache(lambda name: load(name, Loading()))
    clock.mark = time.process_time
    for request in sys.stdin:
        name, *rest = json.loads(request)
        print(json.dumps(decode(clock, pair_of(name), *rest)), flush=True)


def told(pairs: Sequence[tuple[float, float]]) -> str:
    """`base → this, median of the ratios (least – largest)`."""
    before, after = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratios = [ours / base for base, ours in pairs]
    return f"{before:.2f} → {after:.2f}, {statistics.median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed versus",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="the other checkout")
    parser.add_argument("--pair", nargs="+", default=["included"], metavar="PAIR")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="ROWS", help="rows of a call")
    parser.add_argument(
        "--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY", help="; ".join(WAYS)
    )
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="of every setting (default %(default)s)")
    options = parser.parse_args(arguments)
    base, ours = Checkout(options.base), Checkout(Path(__file__).parents[2])
    print("| ms of processor time |", " | ".join(COLUMNS.values()), "|")
    print("|---|" + "---|" * len(COLUMNS))
    for pair, rows, way in ((p, b, w) for p in options.pair for b in options.batch for w in options.ways):
        rounds = []
        for turn in range(options.rounds + 1):
            order = (base, ours) if turn % 2 else (ours, base)
            found = {each: each.decode(pair, way, rows, turn) for each in order}
            rounds.append((found[base], found[ours]))
        if any(before["tokens"] != after["tokens"] for before, after in rounds):
            way += ", OTHER TOKENS"
        cells = [told([(before[name], after[name]) for before, after in rounds[1:]]) for name in COLUMNS]  # 0 warms up
        print(f"| {pair}, batch {rows}, {way} |", " | ".join(cells), "|", flush=True)
    taken = [(base.help_ms(), ours.help_ms()) for _ in range(options.rounds + 1)]
    print("| `apd --help` |", told(taken[1:]), "| | |")
    for each in (base, ours):
        each.process.communicate()  # closes its input, which ends it
    return 0


if __name__ == "__main__":
    serve()
