"""A block-causal drafter beside the full one of the included pair, on the same tasks: what an exact cache gives.

    python -m benchmarks.block_pair --out block_pair.md

Why: a full drafter's keys depend on what comes later, so its cache (`kv_window`) changes answers. In a block-causal drafter
the keys of finished blocks are final. Both drafters are included (`python examples/train_pair.py --attention block` trains
the block-causal one). They have one shape, and the included verifier serves both.

The first tables have the accuracy and the tokens per drafter pass of every strategy, task by task. The last one compares
caches. `equal`: answers equal to those without a cache, same drafter and strategy. `columns`: columns that the drafter
computes per new token, and `tokens/s`, one thread: both one prompt at a time, `--alone` prompts; the median of
`--repetitions`, which take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from tqdm import tqdm

from apd.included import BLOCK_DRAFTER_DIR, DRAFTER_DIR, VERIFIER_DIR
from apd.included.tasks import TASKS, instances
from apd.models.drafter import MaskedDiffusionDrafter
from apd.sampler import APDSampler
from apd.strategies.registry import parse
from benchmarks.checked.__main__ import Tally, decode

SEQUENTIAL, NO_CACHE, EXACT = "left-to-right:1", "no cache", "exact cache"
#: Decide the first position of a block first: with shift 1, its logits are read where nothing of the block is seen.
SEEDED = ("seeded:8,aligned/confidence:1", "seeded:8,aligned/threshold:0.9")
#: Compared with every cache.
CACHED = (SEQUENTIAL, "threshold:0.9", *SEEDED, "apd:R=0.5", "checked:c=0.9")
#: Shown task by task, as in the README.
BY_TASK = (
    SEQUENTIAL,
    "confidence:1",
    "left-to-right:4",
    "confidence:4",
    "threshold:0.9",
    "apd:R=0",
    "apd:R=0.5",
    "apd:R=0.5,correction",
    *SEEDED,
)
KV_WINDOWS = (16, 4)
NEW_TOKENS, BATCH = 32, 16  # the pair was trained for 32

Name = tuple[str, str]  # drafter, cache


def samplers(drafter: str) -> dict[Name, APDSampler]:
    """All drafters and caches. The first of a drafter has no cache.

    Args:
        drafter: directory of the block-causal one.

    Raises:
        ValueError: it has other attention, or a vocabulary that is not the included one.
    """
    full = APDSampler.from_pretrained(str(DRAFTER_DIR), str(VERIFIER_DIR))
    block = APDSampler.from_pretrained(drafter, str(VERIFIER_DIR))
    model = block.drafter
    if not isinstance(model, MaskedDiffusionDrafter) or model.attention.kind != "block":
        raise ValueError(
            f"`--drafter` must be a block-causal drafter, got {drafter!r}. "
            "`python examples/train_pair.py --attention block` trains one, pair/block_drafter."
        )
    bare = MaskedDiffusionDrafter(
        model.model,
        mask_token_id=model.mask_token_id,
        logit_shift=model.logit_shift,
        attention="block",
        block_size=model.attention.block_size,
        cache=False,
    )
    kept = {
        ("full", f"kv_window={size}"): APDSampler(full.drafter, full.verifier, full.tokenizer, kv_window=size)
        for size in KV_WINDOWS
    }
    return {
        ("full", NO_CACHE): full,
        **kept,
        ("block", NO_CACHE): APDSampler(bare, block.verifier, block.tokenizer),
        ("block", EXACT): block,
    }


def supports(sampler: APDSampler, spec: str) -> bool:
    """Whether the sampler decodes so: frozen keys presume that tokens are committed from left to right."""
    strategy = parse(spec).strategy
    return sampler.config.kv_window is None or strategy is None or strategy.left_to_right


def tables(options: argparse.Namespace) -> Iterator[str]:
    """Both tables by task, then the one of the caches, in Markdown."""
    pairs = samplers(options.drafter)
    samples = [sample for task in TASKS for sample in instances(task, options.count, seed=1)]
    lengths = {"max_new_tokens": NEW_TOKENS, "seed": 0}

    def tallies(name: Name, specs: Iterable[str]) -> dict[str, Tally]:
        specs = [spec for spec in specs if supports(pairs[name], spec)]
        shown = tqdm(specs, desc=", ".join(name), disable=options.quiet)
        return {spec: decode(pairs[name], spec, samples, 0.0, batch_size=BATCH, **lengths) for spec in shown}

    found = {}
    for name in pairs:
        is_shown = name in (("full", NO_CACHE), ("block", EXACT))
        specs = dict.fromkeys((*options.by_task, *options.cached) if is_shown else options.cached)
        found[name] = tallies(name, specs)
        if is_shown:
            yield f"{', '.join(name)}: accuracy @ tokens per drafter pass\n\n{by_task(found[name], options)}"

    in_turn = zip(*(instances(task, options.alone, seed=1) for task in TASKS), strict=True)
    alone = list(chain.from_iterable(in_turn))[: options.alone]
    timed: dict[tuple[Name, str], list[Tally]] = {}
    for repetition in tqdm(range(options.repetitions + 1), desc="one by one", disable=options.quiet):
        for name, sampler in pairs.items():
            for spec in filter(partial(supports, sampler), options.cached):
                some = alone if repetition else alone[:1]  # a warm-up comes first
                tally = decode(sampler, spec, some, 0.0, batch_size=1, **lengths)
                if repetition:
                    timed.setdefault((name, spec), []).append(tally)

    head = ("drafter", "cache", "decoding", "equal", "right", "tokens per pass", "columns", "tokens/s")
    lines = []
    for spec in options.cached:
        for name, tallied in found.items():
            if spec not in tallied:
                lines.append((*name, f"`{spec}`", *["refused"] * 5))
                continue
            tally, ones = tallied[spec], timed[name, spec]
            pairs_of_answers = zip(tally.answers, found[name[0], NO_CACHE][spec].answers, strict=True)
            equal = sum(mine == exact for mine, exact in pairs_of_answers) / len(samples)
            seconds = statistics.median(one.seconds for one in ones)
            lines.append(
                (
                    *name,
                    f"`{spec}`",
                    f"{100 * equal:.1f} %",
                    f"{100 * tally.right / len(samples):.1f} %",
                    f"{tally.tokens / tally.passes:.2f}",
                    f"{ones[0].columns / ones[0].tokens:.1f}",
                    f"{ones[0].tokens / seconds:.0f}",
                )
            )
    yield markdown(head, lines)


def by_task(tallies: dict[str, Tally], options: argparse.Namespace) -> str:
    lines = []
    for task in TASKS:
        cells = []
        for spec in options.by_task:
            tokens, passes, _, right = tallies[spec].by_task[task]
            cells.append(f"{right / options.count:.2f} @ {tokens / passes:.1f}")
        lines.append((task, *cells))
    totals = (tallies[spec] for spec in options.by_task)
    share = 1 / (options.count * len(TASKS))
    lines.append(("**all**", *(f"{all.right * share:.2f} @ {all.tokens / all.passes:.1f}" for all in totals)))
    return markdown(("task", *(f"`{spec}`" for spec in options.by_task)), lines)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.block_pair", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--drafter",
        default=str(BLOCK_DRAFTER_DIR),
        help="directory of the block-causal drafter; the included one if left out",
    )
    parser.add_argument("--count", type=int, default=100, help="instances per task")
    parser.add_argument("--alone", type=int, default=55, help="prompts that are timed one at a time")
    parser.add_argument("--repetitions", type=int, default=3, help="of the timed prompts")
    parser.add_argument("--by-task", nargs="*", default=BY_TASK, help="strategies of the tables by task")
    parser.add_argument("--cached", nargs="+", default=CACHED, help="strategies of the table of caches")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    printed = []
    for table in tables(options):
        print(f"\n{table}", flush=True)
        printed.append(table)
    if options.out:
        options.out.write_text("\n\n".join(printed) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
