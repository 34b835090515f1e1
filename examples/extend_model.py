"""Models of your own. Runs in seconds: python examples/extend_model.py

A model answers one question: the logits `b m v` of a window. These are exact
models of a Markov chain; one with a cache returns a session from `open`.
"""

import argparse

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from apd import APDSampler
from apd.decoding.state import DecodeState
from apd.decoding.window import Window

STATES = ("sun", "rain", "snow")
CHAIN = torch.tensor([[0.8, 0.15, 0.05], [0.4, 0.4, 0.2], [0.1, 0.4, 0.5]], dtype=torch.float64)  # p(next | this)
MASK = len(STATES)


class Memoryless:
    vocab_size, max_length, device = MASK + 1, None, torch.device("cpu")

    def open(self, state: DecodeState) -> "Memoryless":
        return self

    def select(self, rows: Tensor) -> None: ...
    def join(self, state: DecodeState) -> None: ...


class ChainVerifier(Memoryless):
    def logits(self, state: DecodeState, window: Window, draft: Tensor) -> Tensor:
        before = window.fill(draft, state.tokens).gather(1, (window.columns - 1).clamp(min=0))
        return pad(CHAIN, (0, 1, 0, 1)).log()[before]  # −∞ for the mask token


class ChainDrafter(Memoryless):
    mask_token_id = MASK

    def logits(self, state: DecodeState, window: Window) -> Tensor:
        is_token = one_hot(state.tokens, MASK + 1)[..., :MASK].double()
        forward = torch.where((state.tokens == MASK)[..., None], 1.0, is_token)  # b l v, 1 for each possible token
        backward, known = torch.ones_like(forward), forward.clone()
        for column in range(1, state.width):
            forward[:, column] *= forward[:, column - 1] @ CHAIN
        for column in reversed(range(state.width - 1)):
            backward[:, column] = (backward[:, column + 1] * known[:, column + 1]) @ CHAIN.T
        return pad((forward * backward).gather(1, window.columns[..., None].expand(-1, -1, MASK)), (0, 1)).log()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sampler = APDSampler(ChainDrafter(), ChainVerifier(), mixture_weight=0.0)
    call = {"max_new_tokens": 8, "do_sample": True, "top_k": 0, "seed": 0, "return_dict_in_generate": True}
    output = sampler.generate(torch.zeros(2000, 1).long(), **call)
    print(f"{float(output.tokens_per_forward.mean()):.1f} tokens per drafter forward")
    for this, name in enumerate(STATES):
        counts = output.sequences[:, 1:][output.sequences[:, :-1] == this].bincount(minlength=MASK).double()
        print(f"after {name}: {(counts / counts.sum()).round(decimals=2).tolist()}, exact {CHAIN[this].tolist()}")


if __name__ == "__main__":
    main()
