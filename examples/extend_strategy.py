"""Strategies of your own. Runs in seconds: python examples/extend_strategy.py

A strategy says which drafted tokens a step commits. Where the drafter decides
alone, subclass `Unmasking` and write `choose`, a pure function of rows. Where
a step takes several forwards, write `propose`: `pair` counts each.
"""

import argparse
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from apd import EXAMPLE_PROMPTS, APDSampler, Proposal, Threshold, Unmasking
from apd.decoding.pair import ModelPair
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState
from apd.decoding.window import Window


@dataclass(frozen=True)
class SurePrefix(Unmasking):
    """Commit from the left as long as the product of the confidences is at least γ; always the first mask."""

    least: float = 0.9
    left_to_right = True

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        return (measure.cumprod(1) >= self.least) | (candidate.cumsum(1) == 1)


@dataclass(frozen=True)
class TwoRounds(Threshold):
    """Two rounds of `Threshold` in one step: the second draft is given what the first one chose."""

    def propose(self, state: DecodeState, window: Window, pair: ModelPair, sampling: Sampling) -> Proposal:
        first = super().propose(state, window, pair, sampling)
        tokens = window.write(first.tokens, first.chosen, state.tokens)
        decided = window.write(torch.ones_like(first.chosen), first.chosen, state.decided)
        second = super().propose(state.with_decided(tokens, decided), window, pair, sampling)

        def of_round(name: str) -> Tensor | None:
            a, b = getattr(first, name), getattr(second, name)  # `b m`, or `b m n` where they are recorded
            return None if a is None else torch.where(first.chosen if a.dim() == 2 else first.chosen[..., None], a, b)

        merged = {name: of_round(name) for name in ("tokens", "fault", "probs", "logits", "scores")}
        return dataclasses.replace(first, chosen=first.chosen | second.chosen, **merged)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sampler = APDSampler.from_included()
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS, return_tensors="pt", padding=True)
    for strategy in (SurePrefix(), Threshold(0.9), TwoRounds(0.9)):
        output = sampler.generate(**inputs, max_new_tokens=32, strategy=strategy, return_dict_in_generate=True)
        steps, forwards = sum(map(len, output.committed_per_step)), int(output.drafter_forwards.sum())
        print(f"{strategy}: {int(output.new_tokens.sum())} tokens in {steps} steps and {forwards} drafter forwards")


if __name__ == "__main__":
    main()
