r"""Holes in the answers of the included pair's tasks: what decoding gives with both sides in sight.

    python -m benchmarks.holes
    python -m benchmarks.holes --count 10 --strategies left-to-right:1 "apd:R=0.9"

Each held-out instance is its prompt and its answer with a hole at a random place, a third of the answer's tokens; the rest of
the answer and the end token are given. Everything is greedy and follows from `--seed`.

`right`: answers that the task counts as right. `equal`: holes filled as by the first strategy. `pass`: new tokens per drafter
pass, pooled. `canvases`: canvases of a row per pass. `columns`: columns that the drafter computed per new token. `verifier`:
verifier passes per new token. The second table is the heuristic for holes of unknown length: every length from 2 below the true
one to 2 above (`--range`) is decoded. `by score`: the length with the best mean log-probability per token is taken. `by the
verifier`: the one whose whole text, with what is given on the right, is the likeliest to the causal model, as `infill` does.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from apd.included.tasks import TASKS, Instance, instances, is_right
from apd.sampler import APDSampler
from apd.strategies.registry import parse
from benchmarks.checked.__main__ import Columns, Tally

STRATEGIES = (
    "left-to-right:1",
    "threshold:0.9",
    "apd:R=0.5",
    "apd:R=0.8",
    "apd:R=1",
    "checked",
    "checked:c=0.9",
    "checked:proposer=drafter",
)
TEXTS_TOGETHER = 8


@dataclass(frozen=True)
class Holed:
    """A prompt and its answer with a hole in it.

    Attributes:
        prompt: its ids.
        answer: ids of the answer, the end token included.
        start, size: first token of the hole, counted from the answer's first, and its length.
    """

    prompt: list[int]
    answer: list[int]
    start: int
    size: int

    def row(self, mask: int) -> list[int]:
        """The row before decoding."""
        return [*self.prompt, *self.filled([mask] * self.size)]

    def filled(self, tokens: Sequence[int]) -> list[int]:
        """The answer with these tokens in its hole."""
        return [*self.answer[: self.start], *tokens, *self.answer[self.start + self.size :]]


@dataclass(frozen=True)
class HeldOut(Holed):
    """An instance of a task of the included pair, with a hole in its answer."""

    instance: Instance


def place(num_tokens: int, key: str) -> tuple[int, int]:
    """First token and length of a hole of a third of the answer's tokens, at a random place that follows from `key`."""
    size = max(1, num_tokens // 3)
    return random.Random(key).randint(0, num_tokens - size), size


def holed(sampler: APDSampler, count: int, seed: int) -> list[HeldOut]:
    """`count` instances of each task."""
    encode, found = sampler.tokenizer, []
    for task in TASKS:
        for instance in instances(task, count, seed):
            prompt, answer = (encode(text)["input_ids"] for text in (instance.prompt, instance.answer))
            start, size = place(len(answer), f"{seed} {instance.prompt}")
            found.append(HeldOut(prompt, [*answer, encode.eos_token_id], start, size, instance))
    return found


def decode(sampler: APDSampler, spec: str, samples: Sequence[HeldOut], batch_size: int) -> Tally:
    """All samples with one strategy, greedily."""
    tally, columns = Tally(), Columns(sampler)
    rows = [sample.row(sampler.drafter.mask_token_id) for sample in samples]
    generated = sampler.generate_many(rows, batch_size=batch_size, strategy=spec, seed=0, max_new_tokens=0)
    for sample, answer in zip(samples, generated, strict=True):
        text = sampler.tokenizer.decode(sample.filled(answer.tokens), skip_special_tokens=True)
        tally.tokens += len(answer.tokens)
        tally.passes += answer.drafter_forwards
        tally.canvases += answer.canvases
        tally.verified += answer.verifier_forwards
        tally.right += is_right(sample.instance, text)
        tally.answers.append(tuple(answer.tokens))
    tally.columns = columns.close()
    return tally


def known_length(
    sampler: APDSampler, samples: Sequence[HeldOut], strategies: Sequence[str], batch_size: int
) -> Iterator[str]:
    """The lines of the first table."""
    yield from _head("decoding", "right", "equal", "pass", "canvases", "columns", "verifier")
    sought = None
    for spec in strategies:
        tally = decode(sampler, spec, samples, batch_size)
        sought = tally.answers if sought is None else sought
        equal = sum(mine == its for mine, its in zip(tally.answers, sought, strict=True))
        yield _line(
            f"`{spec}`",
            f"{100 * tally.right / len(samples):.1f}",
            f"{100 * equal / len(samples):.1f}",
            f"{tally.tokens / tally.passes:.2f}",
            f"{tally.canvases / tally.passes:.2f}",
            f"{tally.columns / tally.tokens:.1f}",
            f"{tally.verified / tally.tokens:.2f}",
        )


def unknown_length(sampler: APDSampler, samples: Sequence[HeldOut], spread: int) -> Iterator[str]:
    """The lines of the second table: by the true length, and over all."""
    yield from _head(
        *(
            "true length",
            "holes",
            "found by score",
            "right",
            "found by the verifier",
            "right",
            "right at the true length",
        ),
    )
    lines: dict[int, list[list[bool]]] = {}
    spell, end = sampler.tokenizer.decode, sampler.tokenizer.eos_token
    for at in range(0, len(samples), TEXTS_TOGETHER):
        together = samples[at : at + TEXTS_TOGETHER]
        texts = [
            [
                spell([*sample.prompt, *sample.answer[: sample.start]]),
                range(max(1, sample.size - spread), sample.size + spread + 1),
                spell(sample.answer[sample.start + sample.size :]),
            ]
            for sample in together
        ]
        for sample, best in zip(together, sampler.infill(texts), strict=True):
            by_length = {len(each.holes[0].ids): each for each in (best, *best.others)}
            true = by_length[sample.size]
            scored = max((by_length[length] for length in sorted(by_length)), key=lambda each: each.score)
            good = [
                is_right(sample.instance, each.text.removeprefix(sample.instance.prompt).removesuffix(end))
                for each in (scored, best, true)
            ]
            lines.setdefault(sample.size, []).append([scored is true, good[0], best is true, good[1], good[2]])
    for name, found in [
        *((str(size), lines[size]) for size in sorted(lines)),
        ("all", [each for size in lines.values() for each in size]),
    ]:
        yield _line(
            name, str(len(found)), *(f"{100 * sum(each) / len(found):.1f}" for each in zip(*found, strict=True))
        )


def _head(*cells: str) -> Iterator[str]:
    yield _line(*cells)
    yield _line(*["---"] * len(cells))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.holes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=50, help="instances per task (default 50)")
    parser.add_argument("--strategies", nargs="+", default=STRATEGIES, help="a reference and what is compared with it")
    parser.add_argument(
        "--range", type=int, default=2, help="lengths around the true one (default 2); 0: no second table"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args(arguments)
    for spec in options.strategies:
        parse(spec)
    torch.set_num_threads(1)
    sampler = APDSampler.from_included()
    samples = holed(sampler, options.count, options.seed)
    print(f"{len(samples)} holes of {sum(sample.size for sample in samples) / len(samples):.1f} tokens on average\n")
    for line in known_length(sampler, samples, options.strategies, options.batch):
        print(line, flush=True)
    if options.range:
        print(flush=True)
        for line in unknown_length(sampler, samples, options.range):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
