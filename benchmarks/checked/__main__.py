r"""Checked decoding beside its references and APD, on the included pair's held-out tasks.

    python -m benchmarks.checked --count 100 --temperature 0 1 --out runs/checked
    python -m benchmarks.checked --strategies left-to-right:1 "checked:R=0.7,c=0.9" --count 24

`equal`: answers equal to the reference's, in percent; for APD and the like, to sequential decoding's. `right`: answers
that the task counts as right. `pass`: new tokens per drafter pass, pooled over all tasks. `rows`: canvases of a row per
pass. `columns`: columns that the drafter computed per new token. `verifier`: verifier passes per new token. `tokens/s` is
measured on one prompt at a time (`--alone`), with one torch thread, and depends on the machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from apd.included import DRAFTER_DIR, VERIFIER_DIR
from apd.included.tasks import TASKS, Instance, instances, is_right
from apd.sampler import APDSampler
from apd.strategies.registry import parse

DEPENDENT = ("shuffle", "replace_random", "insert_random")
#: Sections of the table: a title, the reference's name, and the strategies beside it.
SECTIONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "left to right": (
        "left-to-right:1",
        (
            "checked",
            "checked:proposer=verifier",
            "checked:proposer=drafter",
            "checked:proposer=lookup",
            "checked:R=0.7",
            "checked:K=8",
            "checked:K=24",
            "checked:K=auto",
            "checked:c=0.9",
            "checked:c=0.9,R=0.7",
            "checked:c=0.95,K=auto",
            "apd:R=0.5",
            "apd:R=0.5,correction",
            "threshold:0.9",
        ),
    ),
    "most confident first": (
        "confidence:1",
        (
            "checked:proposer=drafter/confidence:1",
            "checked:proposer=drafter,breadth=2/confidence:1",
            "checked:breadth=2/confidence:1",
        ),
    ),
    "most confident first, blocks of 8": (
        "blocks:8/confidence:1",
        (
            "checked:proposer=drafter/blocks:8/confidence:1",
            "checked:proposer=drafter,breadth=2/blocks:8/confidence:1",
            "checked:breadth=2/blocks:8/confidence:1",
        ),
    ),
    "threshold 0.9": (
        "threshold:0.9",
        (
            "checked:proposer=drafter/threshold:0.9",
            "checked:proposer=drafter,breadth=2/threshold:0.9",
            "checked:breadth=2/threshold:0.9",
        ),
    ),
}


@dataclass
class Tally:
    """Sums over the answers of one strategy."""

    tokens: int = 0
    passes: int = 0
    canvases: int = 0
    columns: int = 0
    verified: int = 0
    right: int = 0
    answers: list[tuple[int, ...]] = field(default_factory=list)
    by_task: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0, 0, 0]))
    seconds: float = 0.0


def decode(
    sampler: APDSampler,
    spec: str,
    samples: Sequence[Instance],
    temperature: float,
    *,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> Tally:
    """All samples with one strategy. Every row has a seed of its own, so no answer depends on its batch."""
    tally = Tally()
    columns = Columns(sampler)
    drawing: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    start = time.process_time()
    generated = sampler.generate_many(
        [sample.prompt for sample in samples],
        batch_size=batch_size,
        strategy=spec,
        seed=seed,
        max_new_tokens=max_new_tokens,
        **drawing,
    )
    for sample, answer in zip(samples, generated, strict=True):
        tally.tokens += len(answer.tokens)
        tally.passes += answer.drafter_forwards
        tally.canvases += answer.canvases
        tally.verified += answer.verifier_forwards
        good = is_right(sample, answer.text)
        tally.right += good
        tally.answers.append(tuple(answer.tokens))
        of_task = tally.by_task[sample.task]
        for i, value in enumerate((len(answer.tokens), answer.drafter_forwards, answer.canvases, int(good))):
            of_task[i] += value
    tally.seconds = time.process_time() - start
    tally.columns = columns.close()
    return tally


class Columns:
    """Counts the columns that the drafter's base model computes."""

    def __init__(self, sampler: APDSampler) -> None:
        self.computed = 0
        model: Any = sampler.drafter.model  # type: ignore[attr-defined]
        self.hook = model.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.computed += kwargs["input_ids"].numel()

    def close(self) -> int:
        self.hook.remove()
        return self.computed


def rows(
    sampler: APDSampler, options: argparse.Namespace, samples: Sequence[Instance], temperature: float
) -> Iterator[list[str]]:
    """The table's rows, header and section titles included."""
    yield [
        "decoding",
        "equal",
        "right",
        "pass",
        "rows",
        "columns",
        "verifier",
        *(["tokens/s"] if options.alone else []),
        *DEPENDENT,
    ]
    alone = [sample for i, sample in enumerate(samples) if i % max(1, len(samples) // max(1, options.alone)) == 0]
    for title, (reference, others) in sections(options.strategies).items():
        yield [title]
        sought = None
        for spec in tqdm((reference, *others), desc=f"T {temperature:g} {title}", disable=options.quiet):
            lengths = {"max_new_tokens": options.max_new_tokens, "seed": options.seed}
            tally = decode(sampler, spec, samples, temperature, batch_size=options.batch, **lengths)
            one_by_one = decode(sampler, spec, alone, temperature, batch_size=1, **lengths) if options.alone else None
            sought = tally.answers if sought is None else sought
            equal = sum(mine == its for mine, its in zip(tally.answers, sought, strict=True)) / len(sought)
            yield [
                spec,
                f"{100 * equal:.2f}",
                f"{100 * tally.right / len(samples):.1f}",
                f"{tally.tokens / tally.passes:.2f}",
                f"{tally.canvases / tally.passes:.2f}",
                f"{tally.columns / tally.tokens:.1f}",
                f"{tally.verified / tally.tokens:.2f}",
                *([f"{one_by_one.tokens / one_by_one.seconds:.0f}"] if one_by_one else []),
                *(_of_task(tally, task, len(samples) // len(TASKS)) for task in DEPENDENT),
            ]


def _of_task(tally: Tally, task: str, count: int) -> str:
    tokens, passes, canvases, right = tally.by_task[task]
    return f"{100 * right / count:.0f} % {tokens / passes:.2f} @ {canvases / passes:.1f}"


def sections(strategies: Sequence[str] | None) -> dict[str, tuple[str, tuple[str, ...]]]:
    """The sections of the table; strategies that are named make one, the first of them the reference."""
    if not strategies:
        return SECTIONS
    for spec in strategies:
        parse(spec)
    return {"": (strategies[0], tuple(strategies[1:]))}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.checked", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, help="instances per task")
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument(
        "--strategies", nargs="+", help="a reference and what is compared with it; default: all sections"
    )
    parser.add_argument("--alone", type=int, default=0, help="prompts that are timed one at a time; 0: none")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="the pair was trained for 32")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="also write the tables there, as tab-separated files")
    parser.add_argument(
        "--dtype", default="float32", help="of both models; with bfloat16 more scores tie within rounding"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sampler = APDSampler.from_pretrained(str(DRAFTER_DIR), str(VERIFIER_DIR), dtype=options.dtype)
    samples = [sample for task in TASKS for sample in instances(task, options.count, options.seed)]
    for temperature in options.temperature:
        print(
            f"\nT {temperature:g}, {options.count} instances of each of {len(TASKS)} tasks, at most {options.max_new_tokens} new "
            f"tokens, {options.dtype}",
            flush=True,
        )
        lines = []
        for cells in rows(sampler, options, samples, temperature):
            lines.append("\t".join(cells))
            widths = (58, 8, 6, 6, 6, 8, 9, *([9] if options.alone else []), *[18] * len(DEPENDENT))
            print("".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=False)), flush=True)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / f"checked-T{temperature:g}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
