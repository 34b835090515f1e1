"""`run --holes third`: the answers are given but for a hole of a third of their tokens, which the drafter fills."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from apd.generation.many import encode
from apd.sampler import APDSampler
from benchmarks.holes import Holed, place
from benchmarks.parallelbench.alone import Answer
from benchmarks.parallelbench.models import Sample
from benchmarks.parallelbench.specs import Setting

__all__ = ["HOLES", "answers", "fills"]

#: How much of an answer is left open.
HOLES = ("third",)


def fills(setting: Setting) -> bool:
    """True if the setting can fill a hole: it runs the drafter and takes nothing back."""
    strategy = setting.strategy  # None is APD
    return strategy is None or (strategy.needs_drafter and not getattr(strategy, "reads_decided", False))


def answers(model: APDSampler, todo: Sequence[Sample], seed: int, **settings: Any) -> Iterator[Answer]:
    """The answers with their holes filled, in any order. Tokens and passes are those of the holes.

    Args:
        seed: of the places of the holes, and of the noise.
        **settings: of `APDSampler.generate_many`.
    """
    holed = {sample.number: _holed(model, sample, seed) for sample in todo}
    mask = model.drafter.mask_token_id
    for found in model.generate_many(
        [row.row(mask) for row in holed.values()],
        indices=list(holed),
        ordered=False,
        seed=seed,
        max_new_tokens=0,
        **settings,
    ):
        ids = holed[found.index].filled(found.tokens)
        yield Answer(
            index=found.index,
            text=model.tokenizer.decode(ids, skip_special_tokens=True),
            new_tokens=len(found.tokens),
            drafter_forwards=found.drafter_forwards,
            verifier_forwards=found.verifier_forwards,
            canvases=found.canvases,
            finish=found.finish,
        )


def _holed(model: APDSampler, sample: Sample, seed: int) -> Holed:
    answer = model.tokenizer(sample.reference, add_special_tokens=False)["input_ids"]
    start, size = place(len(answer), f"{seed} {sample.task} {sample.index}")
    end = [] if model.tokenizer.eos_token_id is None else [model.tokenizer.eos_token_id]
    return Holed(encode(sample.prompt, model.tokenizer)[0].tolist(), [*answer, *end], start, size)
