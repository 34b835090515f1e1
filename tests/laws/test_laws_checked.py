"""Law 11: checked decoding is its reference, token for token, for every proposer, temperature, batch and window.

Without a cache, and with certainty 1. Models are exact, or random networks in float64, where a tie within rounding has a
probability below 1e-9 per drawn token.
"""

import itertools
import random
from typing import Any

import pytest
import torch
from pairs import left_padded
from torch import Tensor
from toy import tiny_pair, toy
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from apd import APDSampler
from apd.models.ideal import IdealListModel
from apd.strategies import (
    Blocks,
    Checked,
    Confidence,
    Entropy,
    EntropyBound,
    Factor,
    LeftToRight,
    Margin,
    Mixture,
    OneStep,
    PromptLookup,
    RandomOrder,
    Threshold,
    Unmasking,
)
from apd.strategies.proposers import NO_GUESS, Stateless

REFERENCES: list[Unmasking] = [
    LeftToRight(1),
    LeftToRight(2),
    LeftToRight([1, 3]),
    Confidence(1),
    Blocks(Confidence(1), 3),
    Threshold(0.3),
    Blocks(Threshold(0.3), 4),
    Margin(2),
    Entropy([1, 2]),
    EntropyBound(0.5),
    Factor(1.5),
    RandomOrder(1),
    OneStep(),
]


class Whatever(Stateless):
    """Proposes any ids that exist, and none at some columns."""

    def __init__(self, seed: int) -> None:
        self.drawn = torch.Generator().manual_seed(seed)

    def propose(self, state: Any, window: Any, marginals: Any, pair: Any, sampling: Any) -> Tensor:
        size = window.columns.shape
        tokens = torch.randint(pair.support.vocab_size, size, generator=self.drawn)
        return tokens.masked_fill(torch.rand(size, generator=self.drawn) < 0.1, NO_GUESS)


def neural(seed: int) -> APDSampler:
    drafter, verifier = tiny_pair(seed, vocab=12, num_layers=1)
    drafter.model.double(), verifier.model.double()
    return APDSampler(drafter, verifier)


def listed() -> APDSampler:
    """Every sequence of 2 tokens and length 7, with random weights."""
    answers = torch.tensor(list(itertools.product(range(2), repeat=7)))
    weights = torch.randn(len(answers), generator=torch.Generator().manual_seed(0), dtype=torch.float64).mul(2).exp()
    model = IdealListModel(answers, weights)
    return APDSampler(model.drafter, model.verifier)


SAMPLERS = [neural(0), neural(1), listed(), APDSampler(toy().drafter, toy().verifier)]
LENGTHS, STOPS = (9, 9, 7, 4), ([10], [10], None, None)


def case(seed: int) -> tuple[APDSampler, dict[str, Any], Unmasking, Checked]:
    """A random call, the reference, and its checked form."""
    rng = random.Random(seed)
    which = rng.choice((0, 0, 1, 1, 2, 3))
    sampler, words = SAMPLERS[which], 10 if which < 2 else 2
    reference = rng.choice(REFERENCES)
    prompts = [[rng.randrange(words) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 4))]
    call: dict[str, Any] = {
        **left_padded(prompts),
        "max_new_tokens": LENGTHS[which],
        "eos_token_id": STOPS[which],
        "window_size": rng.choice((None, None, 3, 5)),
        "noise": rng.choice(("keyed", "keyed", "step")),
        "seed": [rng.randrange(1 << 30) for _ in prompts],
    }
    if rng.random() < 0.6:
        call |= {"do_sample": True, "temperature": rng.choice((0.7, 1.0, 1.5)), "top_k": rng.choice((0, 0, 3))}
        call["top_p"] = rng.choice((1.0, 1.0, 0.8))
    if which < 2 and rng.random() < 0.4:
        call["min_new_tokens"] = rng.randint(1, 5)
    if which < 2 and reference.left_to_right and rng.random() < 0.4:
        call["logits_processor"] = [
            rng.choice((NoRepeatNGramLogitsProcessor(2), RepetitionPenaltyLogitsProcessor(1.7)))
        ]
    proposer = rng.choice(("drafter", "verifier", "mixture", "lookup", Mixture(0.8), PromptLookup(2), Whatever(seed)))
    depth = rng.choice((1, 2, 4, 8, "auto"))
    return sampler, call, reference, Checked(reference, proposer, depth, breadth=rng.randint(1, 3))


def differing(seeds: range) -> list[int]:
    """The cases in which a row's tokens differ."""
    wrong = []
    for seed in seeds:
        sampler, call, reference, checked = case(seed)
        sought = sampler.generate(**call, strategy=reference)
        if not torch.equal(sought, sampler.generate(**call, strategy=checked)):
            wrong.append(seed)
    return wrong


def test_checked_decoding_is_its_reference() -> None:
    assert differing(range(50)) == []


@pytest.mark.slow
def test_checked_decoding_is_its_reference_in_a_thousand_cases() -> None:
    assert differing(range(50, 1050)) == []
