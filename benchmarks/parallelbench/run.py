r"""Decode the samples of the tasks with every strategy asked for, one record each; an interrupted run goes on.

    python -m benchmarks.parallelbench run --pair embedded --strategies few --count 12 --out runs/few
    python -m benchmarks.parallelbench run --drafter Dream-org/Dream-v0-Instruct-7B --verifier Qwen/Qwen2.5-0.5B \
        --dtype bfloat16 --device-map cuda --strategies few --count 12 --out runs/dream

A later run with the same settings adds strategies, tasks or samples to the same directory.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tqdm import tqdm

from apd.many import Generated
from apd.sampler import APDSampler
from benchmarks.parallelbench.models import Pair, Sample, embedded_pair, pair_of
from benchmarks.parallelbench.records import NAME, Record, appending, key
from benchmarks.parallelbench.specs import GRAMMAR, PRESETS, Setting, expand

__all__ = ["Plan", "add_parser", "run"]


@dataclass(frozen=True)
class Plan:
    """What a run decodes.

    Args:
        tasks: their names.
        settings: the strategies.
        count: samples per task.
        seed: of the samples, and of the noise where the temperature is above 0.
        temperature: 0 is greedy.
        batch_size: rows decoded together; no answer depends on it.
        max_new_tokens: `None`: what the tasks ask for.
    """

    tasks: Sequence[str]
    settings: Sequence[Setting]
    count: int
    seed: int = 0
    temperature: float = 0.0
    batch_size: int = 48
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"`count` must be at least 1, got {self.count}.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` must be at least 0, got {self.temperature}. Use 0 for greedy decoding.")


def run(pair: Pair, plan: Plan, out: Path, *, progress: bool = True) -> int:
    """Write the records that `out` does not hold yet, and say how many there were.

    Raises:
        ValueError: an unknown task, or `out` holds records that are packed or made with other settings.
    """
    if unknown := [task for task in plan.tasks if task not in pair.tasks]:
        raise ValueError(f"`tasks` must be among {', '.join(pair.tasks)}, got {', '.join(unknown)}.")
    if (packed := out / f"{NAME}.xz").exists():
        raise ValueError(f"{packed} is packed. Unpack it with `xz -d` to go on, or choose another directory.")
    length = plan.max_new_tokens or pair.max_new_tokens
    shared = {"seed": plan.seed, "temperature": plan.temperature, "max_new_tokens": length}
    samples = [sample for task in plan.tasks for sample in pair.samples(task, plan.count, plan.seed)]
    out.mkdir(parents=True, exist_ok=True)
    with appending(out / NAME, pair.settings | shared, _made_with()) as (part, log):
        done = {key(record) for record in log.records}
        missing = [
            (setting, [sample for sample in samples if (setting.spec, sample.task, sample.index) not in done])
            for setting in plan.settings
        ]
        total = sum(len(todo) for _, todo in missing)
        if total:
            sampler = pair.open()
            with tqdm(total=total, unit="sample", disable=not progress, smoothing=0.05) as bar:
                for setting, todo in missing:
                    bar.set_description(setting.spec)
                    for record in _records(sampler, setting, todo, plan, length):
                        part.write(record)
                        bar.update()
    return total


def _records(
    sampler: APDSampler, setting: Setting, todo: Sequence[Sample], plan: Plan, length: int
) -> Iterator[Record]:
    """One per sample, in the order in which they are done."""
    by_number = {sample.number: sample for sample in todo}
    sampling: dict[str, Any] = {"do_sample": False}
    if plan.temperature > 0:
        sampling = {"do_sample": True, "temperature": plan.temperature, "top_k": 0, "top_p": 1.0}
    answers = sampler.generate_many(
        [sample.prompt for sample in todo],
        indices=list(by_number),
        batch_size=plan.batch_size,
        ordered=False,
        seed=plan.seed,
        strategy=setting.strategy,
        max_new_tokens=length,
        **setting.knobs,
        **sampling,
    )
    before = time.perf_counter()
    for answer in answers:
        now = time.perf_counter()
        yield _record(setting, by_number[answer.index], answer, length, now - before)
        before = now


def _record(setting: Setting, sample: Sample, answer: Generated, length: int, seconds: float) -> Record:
    """`seconds`: since the answer before, so that their sum is what the strategy took; rows share a batch."""
    return {
        "strategy": setting.spec,
        "task": sample.task,
        "index": sample.index,
        "prompt": sample.prompt,
        "text": answer.text,
        **sample.judge(answer.text or ""),
        "drafter_forwards": answer.drafter_forwards,
        "verifier_forwards": answer.verifier_forwards,
        "new_tokens": len(answer.tokens),
        "max_new_tokens": length,
        "finish": answer.finish,
        "seconds": round(seconds, 4),
    }


def _made_with() -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), **packages}


def add_parser(commands: Any) -> None:
    """The subcommand `run`."""
    parser = commands.add_parser(
        "run",
        help="decode tasks with many strategies",
        description=__doc__,
        epilog=f"strategies:\n{GRAMMAR}\n  or a preset: {', '.join(PRESETS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--pair", choices=["embedded"], default="embedded", help="unless a drafter is named")
    parser.add_argument("--drafter", metavar="MODEL", help="directory or hub id, instruction-tuned")
    parser.add_argument("--verifier", metavar="MODEL", help="directory or hub id, with the drafter's tokenizer")
    parser.add_argument("--dtype", help="of both, such as bfloat16")
    parser.add_argument("--device-map", help="for both, such as cuda")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all that need no extra package")
    parser.add_argument("--strategies", nargs="+", required=True, metavar="SPEC", help="see below")
    parser.add_argument("--count", type=int, default=24, metavar="N", help="samples per task (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--batch-size", type=int, default=48, metavar="ROWS")
    parser.add_argument("--max-new-tokens", type=int, metavar="TOKENS", help="default: what the tasks ask for")
    parser.set_defaults(run=_main)


def _pair(options: argparse.Namespace) -> Pair:
    if options.drafter is not None:
        return pair_of(options.drafter, options.verifier, dtype=options.dtype, device_map=options.device_map)
    for name in ("verifier", "dtype", "device_map"):
        if getattr(options, name) is not None:
            raise ValueError(f"`{name}` needs a `drafter`; the embedded pair has its own.")
    return embedded_pair()


def _main(options: argparse.Namespace) -> int:
    try:
        pair = _pair(options)
        plan = Plan(
            tasks=options.tasks or pair.by_default,
            settings=expand(options.strategies),
            count=options.count,
            seed=options.seed,
            temperature=options.temperature,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
        )
        written = run(pair, plan, options.out)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{written} records written to {options.out / NAME}")
    return 0
