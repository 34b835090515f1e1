"""Strategies that decode block by block, each around another one that decides within a block."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from apd.config import check_count
from apd.decoding.commit import Proposal
from apd.decoding.pair import Draft, ModelPair
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState
from apd.decoding.window import Window
from apd.kinds import WHOLE
from apd.strategies.base import Unmasking, next_token_proposal


@dataclass(frozen=True)
class _Around(Unmasking):
    """A strategy around another one.

    Attributes:
        strategy: selects within a block; any `Unmasking` strategy without memory.
        length: block length in tokens, at least 1.
        aligned: blocks count from the row's first real token, prompt included, as those of block-causal drafters do; otherwise
            from the end of the prompt.
    """

    strategy: Unmasking
    length: int = 32
    aligned: bool = False

    def __post_init__(self) -> None:
        if WHOLE.fits(self.strategy) and isinstance(self.length, Unmasking):
            name = type(self).__name__
            raise TypeError(
                f"`strategy` must come first and `length` behind it, got {self.strategy} first. Write {name}({self.length!r}, "
                f"{self.strategy}); only the short name has the length first."
            )
        if not isinstance(self.strategy, Unmasking):
            raise TypeError(
                f"`strategy` must pick within a block by the state alone, got {self.strategy!r}. Use Confidence, "
                "Threshold or the like."
            )
        check_count("length", self.length, "Use 1 for sequential decoding")

    @property
    def is_random(self) -> bool:  # type: ignore[override]
        return self.strategy.is_random

    @property
    def counts_steps(self) -> bool:  # type: ignore[override]
        return self.strategy.counts_steps

    def measure(self, draft: Draft, window: Window) -> Tensor:
        return self.strategy.measure(draft, window)

    def offset(self, columns: Tensor, state: DecodeState) -> Tensor:
        """Columns counted from where the row's first block starts: `b m` int64."""
        return columns - (state.padding if self.aligned else state.prompt_end)[:, None]

    def within(self, candidate: Tensor, state: DecodeState, window: Window) -> Tensor:
        """The candidates of the first block that has any: `b m` bool."""
        block = self.offset(window.columns, state) // self.length
        return candidate & (block == block[:, :1])  # the window's first column is the frontier


@dataclass(frozen=True)
class Blocks(_Around):
    """Semi-autoregressive decoding: applies another strategy block by block, from left to right.

    Candidates are the masks of the first block that has any. The drafter still reads the whole canvas.

    Args:
        strategy: selects within a block; any `Unmasking` strategy without memory.
        length: block length in tokens, at least 1.
        aligned: blocks count from the row's first real token, prompt included, as those of block-causal drafters do; otherwise
            from the end of the prompt.

    Raises:
        TypeError: `strategy` is not an `Unmasking`.
        TypeError, ValueError: `length` is outside its range.

    Source: arXiv:2502.09992 (LLaDA), semi-autoregressive remasking.
    """

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        return self.strategy.chosen(measure, self.within(candidate, state, window), state, window, sampling)


@dataclass(frozen=True)
class Seeded(_Around):
    """Semi-autoregressive decoding that decides the first token of each block alone, in a step of its own.

    By the drafter, it is the token that the last row of the finished block predicts, if the logits are shifted (Fast-dLLM
    v2). By the verifier, it is the next token of a causal model; with `verifier="self"`, of the drafter's own weights
    (Nemotron). A step then runs the verifier if any row is at the first token of a block, and the drafter if any is not: in a
    ragged batch a row also pays for passes of the other model. Traces have the probabilities of the target only.

    Args:
        strategy, length, aligned: as in `Blocks`.
        by: which model decides the first token.

    Raises:
        TypeError: `strategy` is not an `Unmasking`.
        TypeError, ValueError: `length` or `by` is outside its range.

    Source: decoding of Fast-dLLM v2, arXiv:2509.26328, and of Nemotron-Labs-Diffusion, arXiv:2607.05722.
    """

    by: Literal["drafter", "verifier"] = "drafter"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("drafter", "verifier"):
            raise ValueError(f"`by` must be 'drafter' or 'verifier', got {self.by!r}.")

    @property
    def needs_verifier(self) -> bool:  # type: ignore[override]
        return self.by == "verifier"

    def is_first(self, state: DecodeState, window: Window) -> Tensor:
        """True for rows whose frontier is the first column of a block: `b 1` bool."""
        return self.offset(window.columns[:, :1], state) % self.length == 0

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        first = torch.arange(candidate.shape[1], device=candidate.device) == 0
        others = self.strategy.chosen(measure, self.within(candidate, state, window), state, window, sampling)
        return torch.where(self.is_first(state, window), candidate & first, others)

    def propose(self, state: DecodeState, window: Window, pair: ModelPair, sampling: Sampling) -> Proposal:
        if self.by == "drafter":
            return super().propose(state, window, pair, sampling)
        layout = state.layout
        origins = layout.padding if self.aligned else layout.prompt_end
        seeds = [(t - origin) % self.length == 0 for t, origin in zip(layout.frontier, origins, strict=True)]
        seeded = _of_target(next_token_proposal(state, window, pair, sampling)) if any(seeds) else None
        if all(seeds) and seeded is not None:
            return seeded
        drafted = _of_target(super().propose(state, window, pair, sampling))
        return drafted if seeded is None else _either(self.is_first(state, window), seeded, drafted)


def _of_target(proposal: Proposal) -> Proposal:
    """The proposal with the probabilities of the target alone: rows of one step are decided by different models."""
    probs = None if proposal.probs is None else proposal.probs[..., :1]
    return dataclasses.replace(proposal, models=("target",), probs=probs)


def _either(where: Tensor, one: Proposal, other: Proposal) -> Proposal:
    """The rows of `one` where `where` (`b 1` bool) is True, and of `other` elsewhere."""

    def rows(name: str) -> Tensor | None:
        a, b = getattr(one, name), getattr(other, name)
        if a is None or b is None:
            return None
        if a.shape[1] < b.shape[1]:
            a = pad(a, (0, b.shape[1] - a.shape[1]))
        return torch.where(where.view(-1, *[1] * (a.dim() - 1)), a, b)

    fields: dict[str, Any] = {name: rows(name) for name in _TENSORS}
    return dataclasses.replace(other, **fields)


_TENSORS = ("tokens", "chosen", "decisive", "fault", "draft", "probs", "logits", "scores")
