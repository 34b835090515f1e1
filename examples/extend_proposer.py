"""A proposer of your own.
Runs on the included pair in seconds: python examples/extend_proposer.py

A proposer guesses the tokens that `Checked` lets the drafter check. A wrong
guess costs time, never a token, so it may be anything: a template, a cache of
answers, another model. This one looks up how earlier answers went on.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor

from apd import EXAMPLE_PROMPTS, APDSampler, Checked
from apd.decoding.pair import ModelPair
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState
from apd.decoding.window import Window
from apd.strategies.proposers import NO_GUESS, Marginals, Stateless


@dataclass(frozen=True)
class EarlierAnswers(Stateless):
    """Guesses what followed the row's last `length` tokens in earlier answers, lists of ids."""

    answers: tuple[tuple[int, ...], ...]
    length: int = 2

    def propose(
        self, state: DecodeState, window: Window, marginals: Marginals | None, pair: ModelPair, sampling: Sampling
    ) -> Tensor:
        width = window.columns.shape[1]
        guesses = torch.full((len(state.rows), width), NO_GUESS)
        for row, t in enumerate(window.starts):
            found = self.continuation(tuple(state.tokens[row, t - self.length : t].tolist()))[:width]
            guesses[row, : len(found)] = torch.tensor(found)
        return guesses.to(state.tokens.device)  # b k, `NO_GUESS` where there is none

    def continuation(self, end: tuple[int, ...]) -> tuple[int, ...]:
        for answer in self.answers:
            for i in range(len(answer) - len(end)):
                if answer[i : i + len(end)] == end:
                    return answer[i + len(end) :]
        return ()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sampler = APDSampler.from_included()
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS, return_tensors="pt", padding=True)
    call = {**inputs, "max_new_tokens": 32, "return_dict_in_generate": True}
    alone = sampler.generate(**call, strategy="left-to-right:1")
    earlier = EarlierAnswers(tuple(tuple(row.tokens) for row in alone.trace))
    again = sampler.generate(**call, strategy=Checked(proposer=earlier))
    print(f"the same tokens: {torch.equal(alone.sequences, again.sequences)}")
    for name, output in (("alone", alone), ("checked", again)):
        passes, canvases = int(output.drafter_forwards.sum()), int(output.canvases.sum())
        print(f"{name}: {int(output.new_tokens.sum())} tokens, {passes} drafter passes, {canvases} canvases")


if __name__ == "__main__":
    main()
