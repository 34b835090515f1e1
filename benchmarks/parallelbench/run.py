r"""Decode the samples of the tasks with every named strategy, one record each; an interrupted run is continued.

    python -m benchmarks.parallelbench run --pair included --strategies few --count 12 --out runs/few
    python -m benchmarks.parallelbench run --drafter Dream-org/Dream-v0-Instruct-7B --verifier Qwen/Qwen2.5-0.5B \
        --dtype bfloat16 --device-map cuda --strategies few --count 12 --out runs/dream
    python -m benchmarks.parallelbench run --causal-lm Qwen/Qwen2.5-0.5B-Instruct --data ParallelBench --out runs/qwen
    python -m benchmarks.parallelbench run --endpoint https://host/v1 --model NAME --api-key-env KEY --out runs/name
    python -m benchmarks.parallelbench run --pair included --strategies few --holes third --count 12 --out runs/holes

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

from apd.sampler import APDSampler
from benchmarks.parallelbench import holes
from benchmarks.parallelbench.alone import Alone, Answer
from benchmarks.parallelbench.models import (
    Pair,
    Questions,
    Sample,
    causal_lm,
    endpoint,
    included_pair,
    pair_of,
    questions_of_checkout,
)
from benchmarks.parallelbench.records import NAME, Record, accuracies, appending, key, read
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
        max_new_tokens: `None`: the length that each task defines.
        holes: `"third"`: a right answer is given but for a third of its tokens, see `holes.py`; `None`: nothing of it is.
    """

    tasks: Sequence[str]
    settings: Sequence[Setting]
    count: int
    seed: int = 0
    temperature: float = 0.0
    batch_size: int = 48
    max_new_tokens: int | None = None
    holes: str | None = None

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"`count` must be at least 1, got {self.count}.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` must be at least 0, got {self.temperature}. Use 0 for greedy decoding.")
        if self.holes is None:
            return
        if self.max_new_tokens is not None:
            raise ValueError(
                f"`max_new_tokens` must be left out with `holes`, got {self.max_new_tokens}: nothing is appended."
            )
        if wrong := [setting.spec for setting in self.settings if not holes.fills(setting)]:
            raise ValueError(
                f"`strategies` must run the drafter and take nothing back with `holes`, got {', '.join(wrong)}. Leave them out."
            )


def run(pair: Pair, plan: Plan, out: Path, *, progress: bool = True) -> int:
    """Write the records that `out` lacks, and return their number.

    Raises:
        ValueError: an unknown task, a strategy that the model cannot run, or `out` holds records that are packed or made
            with other settings.
    """
    questions = pair.questions
    if unknown := [task for task in plan.tasks if task not in questions.tasks]:
        raise ValueError(f"`tasks` must be among {', '.join(questions.tasks)}, got {', '.join(unknown)}.")
    _check_strategies(pair, plan)
    if (packed := out / f"{NAME}.xz").exists():
        raise ValueError(f"{packed} is packed. Unpack it with `xz -d` to go on, or choose another directory.")
    lengths = {
        task: plan.max_new_tokens or questions.lengths.get(task, questions.max_new_tokens) for task in questions.tasks
    }
    length = max(lengths.values())
    shared = questions.settings | {"seed": plan.seed, "temperature": plan.temperature, "max_new_tokens": length}
    if min(lengths.values()) < length:
        shared["lengths"] = "by task"
    if plan.holes is not None:
        shared["holes"] = plan.holes
    samples = [sample for task in plan.tasks for sample in questions.samples(task, plan.count, plan.seed)]
    out.mkdir(parents=True, exist_ok=True)
    with appending(out / NAME, pair.settings | shared, _made_with()) as (part, log):
        done = {key(record) for record in log.records}
        missing = [
            (setting, [sample for sample in samples if (setting.spec, sample.task, sample.index) not in done])
            for setting in plan.settings
        ]
        total = sum(len(todo) for _, todo in missing)
        if total:
            model = pair.open()
            with tqdm(total=total, unit="sample", disable=not progress, smoothing=0.05) as bar:
                for setting, todo in missing:
                    bar.set_description(setting.spec)
                    for record in _records(model, setting, todo, plan, lengths):
                        part.write(record)
                        bar.update()
    return total


def _check_strategies(pair: Pair, plan: Plan) -> None:
    specs = [setting.spec for setting in plan.settings]
    if plan.holes is not None and pair.strategies is not None:
        raise ValueError(f"`holes` must be left out for {_name(pair)}: it sees nothing of what is behind a hole.")
    if pair.strategies is None:
        if "endpoint" in specs:
            raise ValueError("`strategies` must not have endpoint here: it is the strategy of a run with `endpoint`.")
        return
    if wrong := [spec for spec in specs if spec not in pair.strategies]:
        raise ValueError(
            f"`strategies` must be {', '.join(pair.strategies)} for {_name(pair)}, which decodes alone, got "
            f"{', '.join(wrong)}. Leave it out."
        )
    if plan.temperature > 0:
        raise ValueError(f"`temperature` must be 0 for {_name(pair)}, got {plan.temperature}.")


def _name(pair: Pair) -> str:
    return pair.settings["verifier"] or pair.settings["pair"]


def _records(
    model: APDSampler | Alone, setting: Setting, todo: Sequence[Sample], plan: Plan, lengths: dict[str, int]
) -> Iterator[Record]:
    """Yield a record per sample as it is done; tasks with answers of equal length are decoded together."""
    for length in sorted({lengths[sample.task] for sample in todo}):
        by_number = {sample.number: sample for sample in todo if lengths[sample.task] == length}
        before = time.perf_counter()
        for answer in _answers(model, setting, list(by_number.values()), plan, length):
            now = time.perf_counter()
            most = length if plan.holes is None else answer.new_tokens or 0
            yield _record(setting, by_number[answer.index], answer, most, now - before)
            before = now


def _answers(
    model: APDSampler | Alone, setting: Setting, todo: Sequence[Sample], plan: Plan, length: int
) -> Iterator[Answer]:
    if not isinstance(model, APDSampler):
        yield from model.answers(
            [(sample.number, sample.prompt) for sample in todo], batch_size=plan.batch_size, max_new_tokens=length
        )
        return
    sampling: dict[str, Any] = {"do_sample": False}
    if plan.temperature > 0:
        sampling = {"do_sample": True, "temperature": plan.temperature, "top_k": 0, "top_p": 1.0}
    if plan.holes is not None:
        yield from holes.answers(model, todo, plan.seed, strategy=setting.spec, batch_size=plan.batch_size, **sampling)
        return
    for answer in model.generate_many(
        [sample.prompt for sample in todo],
        indices=[sample.number for sample in todo],
        batch_size=plan.batch_size,
        ordered=False,
        seed=plan.seed,
        strategy=setting.spec,
        max_new_tokens=length,
        **sampling,
    ):
        yield Answer(
            index=answer.index,
            text=answer.text or "",
            new_tokens=len(answer.tokens),
            drafter_forwards=answer.drafter_forwards,
            verifier_forwards=answer.verifier_forwards,
            canvases=answer.canvases,
            finish=answer.finish,
        )


def _record(setting: Setting, sample: Sample, answer: Answer, length: int, seconds: float) -> Record:
    """The record of an answer. Rows share a batch, so `seconds` counts from the previous answer."""
    return {
        "strategy": setting.spec,
        "task": sample.task,
        "index": sample.index,
        "prompt": sample.prompt,
        "text": answer.text,
        **sample.judge(answer.text),
        "drafter_forwards": answer.drafter_forwards,
        "verifier_forwards": answer.verifier_forwards,
        "canvases": answer.canvases,
        "new_tokens": answer.new_tokens,
        "max_new_tokens": length,
        "finish": answer.finish,
        "seconds": round(seconds, 4),
    }


def _made_with() -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version(), **packages}


def add_parser(commands: Any) -> None:
    """Add the subcommand `run`."""
    parser = commands.add_parser(
        "run",
        help="decode tasks with many strategies",
        description=__doc__,
        epilog=f"strategies:\n{GRAMMAR}\n  or a preset: {', '.join(PRESETS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pair", choices=["included"], default="included", help="the included pair, unless a drafter is named"
    )
    parser.add_argument("--drafter", metavar="MODEL", help="directory or hub id, instruction-tuned")
    parser.add_argument(
        "--verifier", metavar="MODEL", help="directory or hub id, with the drafter's tokenizer; or self"
    )
    parser.add_argument("--causal-lm", metavar="MODEL", help="directory or hub id, decoded alone and greedily")
    parser.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible, such as https://host/v1")
    parser.add_argument("--model", metavar="NAME", help="that the endpoint knows")
    parser.add_argument("--api-key-env", metavar="VARIABLE", help="environment variable with the endpoint's key")
    parser.add_argument("--dtype", help="of the models, such as bfloat16")
    parser.add_argument("--device-map", help="for the models, such as cuda")
    parser.add_argument("--data", type=Path, metavar="DIR", help="tasks of a checkout of the official benchmark")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="default: all that need no extra package")
    parser.add_argument(
        "--strategies", nargs="+", metavar="SPEC", help="see below; a causal LM and an endpoint have one of their own"
    )
    parser.add_argument("--count", type=int, default=24, metavar="N", help="samples per task (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--batch-size", type=int, default=48, metavar="ROWS")
    parser.add_argument(
        "--holes", choices=holes.HOLES, help="give a right answer on both sides of a hole of a third of its tokens"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="TOKENS", help="default: as the tasks define")
    parser.set_defaults(run=_main)


# Options that need one of several others.
_NEEDS = {
    "verifier": ("drafter",),
    "dtype": ("drafter", "causal_lm"),
    "device_map": ("drafter", "causal_lm"),
    "model": ("endpoint",),
    "api_key_env": ("endpoint",),
    "data": ("drafter", "causal_lm", "endpoint"),
}


def _pair(options: argparse.Namespace) -> Pair:
    given = [name for name in ("drafter", "causal_lm", "endpoint") if getattr(options, name) is not None]
    if len(given) > 1:
        raise ValueError(f"`{given[0]}` and `{given[1]}` must not both be given: one run has one model or pair.")
    for name, needed in _NEEDS.items():
        if getattr(options, name) is not None and not set(given) & set(needed):
            wanted = " or ".join(f"`{other}`" for other in needed)
            has = f"`{given[0]}`" if given else "the included pair"
            raise ValueError(f"`{name}` is for {wanted}; {has} takes none.")
    questions: Questions | None = None if options.data is None else questions_of_checkout(options.data)
    loading = {"dtype": options.dtype, "device_map": options.device_map}
    if options.drafter is not None:
        return pair_of(options.drafter, options.verifier, questions, **loading)
    if options.causal_lm is not None:
        return causal_lm(options.causal_lm, questions, **loading)
    if options.endpoint is not None:
        if options.model is None:
            raise ValueError("`endpoint` needs a `model`: the name that the endpoint knows it by.")
        return endpoint(options.endpoint, options.model, options.api_key_env, questions)
    return included_pair()


def _main(options: argparse.Namespace) -> int:
    try:
        pair = _pair(options)
        strategies = options.strategies or pair.strategies
        if strategies is None:
            raise ValueError("`strategies` must be given, such as `few`; see `run --help`.")
        settings = expand(strategies)
        if options.holes is not None and set(strategies) & PRESETS.keys():
            named = {setting.spec for setting in expand(set(strategies) - PRESETS.keys())}
            unable = [s.spec for s in settings if s.spec not in named and not holes.fills(s)]
            settings = [s for s in settings if s.spec not in unable]
            if unable:
                print(f"left out, since they fill no holes: {', '.join(unable)}", file=sys.stderr)
        plan = Plan(
            tasks=options.tasks or pair.questions.by_default,
            settings=settings,
            count=options.count,
            seed=options.seed,
            temperature=options.temperature,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            holes=options.holes,
        )
        written = run(pair, plan, options.out)
    except (ValueError, RuntimeError, ImportError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{written} records written to {options.out / NAME}")
    if pair.strategies is not None and (log := read(options.out / NAME)) is not None:
        for line in accuracies(log):
            print(line)
    return 0
