"""`Request`: the checked arguments of one call, as plain data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from apd.decoding.commit import Stopping
from apd.decoding.processing import WARPERS, Processing
from apd.decoding.sampling import Sampling
from apd.decoding.strategy import Strategy
from apd.decoding.window import WindowPolicy


@dataclass(frozen=True)
class Request:
    """The checked arguments of one call. It has one row per prompt and returned sequence, on the drafter's device.

    Attributes:
        prompt: `b l` int64, padded on the left.
        padding: `b` int64, columns of left padding.
        max_new_tokens: number of masks behind each prompt.
        seeds: `b` int64, the row seeds.
        pad_token_id: the id that is written behind a stop token.
        stopping: stop tokens and stopping criteria.
        processing: the logits processors.
        sampling: temperature, truncation and noise of the draws.
        strategy: selects the tokens that a step commits.
        policy: determines the window of a step.
        kv_window: W, see `APDConfig`.
        kv_refresh: N, see `APDConfig`.
        record_scores: record the scores that decided each position, v floats per token.
        record_logits: record the logits of each position, before temperature and truncation, v floats per token.
        is_recorded: return an `APDOutput` with the trace instead of ids only.
    """

    prompt: Tensor
    padding: Tensor
    max_new_tokens: int
    seeds: Tensor
    pad_token_id: int
    stopping: Stopping
    processing: Processing
    sampling: Sampling
    strategy: Strategy
    policy: WindowPolicy
    kv_window: int | None = None
    kv_refresh: int | None = None
    record_scores: bool = False
    record_logits: bool = False
    is_recorded: bool = False

    @property
    def is_uncommon(self) -> bool:
        """True if a step calls Python functions that the caller may have written, or prompts have holes: not compiled."""
        own_warpers = [warper for warper in self.sampling.warpers if type(warper) not in WARPERS]
        processing = self.processing
        calls = own_warpers or self.stopping.criteria or processing.processors or processing.allowed_tokens
        return bool(calls or processing.has_holes)
