"""`Processing`: applies the caller's logits processors to the logits of drafter and verifier.

Processors act on each model's raw logits, before log_softmax and mixing, so a token that they remove is removed from
draft and target. Processors that read earlier tokens are applied position by position: tokens are committed from left to
right, so each position is processed with exactly the tokens before it, drafted ones included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from einops import rearrange
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitNormalization,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from apd.decoding.returned import processed
from apd.decoding.state import DecodeState, to_device
from apd.decoding.window import Window

#: Warpers set temperature and truncation. They also act on the mixture, so they are kept apart from other processors.
WARPERS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
)
_HISTORY_FREE = (SuppressTokensLogitsProcessor, LogitNormalization)

#: Processors that keep a state between calls or expect additional rows. They cannot process a position twice.
STATEFUL = (
    "AlternatingCodebooksLogitsProcessor",
    "BarkEosPrioritizerLogitsProcessor",
    "ClassifierFreeGuidanceLogitsProcessor",
    "DiaClassifierFreeGuidanceLogitsProcessor",
    "DiaEOSChannelFilterLogitsProcessor",
    "DiaEOSDelayPatternLogitsProcessor",
    "SynthIDTextWatermarkLogitsProcessor",
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",
    "WhisperNoSpeechDetection",
    "WhisperTimeStampLogitsProcessor",
)

AllowedTokens = Callable[[int, Tensor], list[int]]


@dataclass(frozen=True)
class Processing:
    """The logits processors of one call, all pure functions of (ids, scores).

    Attributes:
        stop_token_ids: `s` int64; positions behind a drafted stop token are not processed.
        processors: transformers' logits processors without warpers.
        allowed_tokens: transformers' `prefix_allowed_tokens_fn`: (row, ids `n` int64) → ids that may come next.
        min_new_tokens: number of new tokens before which no stop token is allowed.
        suppressed_first: ids that may not be the first new token.
        stops_in_holes: stop tokens may be drawn in holes, where they end nothing.
        has_holes: True if a prompt may have holes.
    """

    stop_token_ids: Tensor
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    allowed_tokens: AllowedTokens | None = None
    min_new_tokens: int = 0
    suppressed_first: tuple[int, ...] = ()
    stops_in_holes: bool = False
    has_holes: bool = False

    @property
    def needs_history(self) -> bool:
        """True if a processor reads the tokens before a position."""
        return self.allowed_tokens is not None or not all(map(_is_history_free, self.processors))

    def apply_vectorised(self, logits: Tensor, state: DecodeState, window: Window) -> Tensor:
        """Apply the processors that do not depend on other tokens, at all positions at once.

        Args:
            logits: `b m v` float32.
            state: the rows.
            window: the columns of the logits.
        Returns:
            `b m v` float32.
        """
        if self.has_holes and not self.stops_in_holes and len(self.stop_token_ids):
            logits = _remove(logits, self.stop_token_ids, window.columns < state.given_end[:, None])
        if not (self.min_new_tokens or self.suppressed_first or len(self.processors)):
            return logits
        if self.min_new_tokens or self.suppressed_first:
            place = window.gather(state.places) if self.has_holes else window.columns - state.prompt_end[:, None]
            if self.min_new_tokens and len(self.stop_token_ids):
                logits = _remove(logits, self.stop_token_ids, place < self.min_new_tokens)
            if self.suppressed_first:
                suppressed = to_device(list(self.suppressed_first), logits.device)
                logits = _remove(logits, suppressed, place == 0)
        if self.processors and not self.needs_history:
            flat = processed(self.processors, None, rearrange(logits, "b m v -> (b m) v"))
            logits = rearrange(flat, "(b m) v -> b m v", m=window.columns.shape[1])
        return logits

    def apply_per_position(
        self, logits: Tensor, state: DecodeState, window: Window, sample: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        """Apply the processors that read earlier tokens, position by position, each with exactly the tokens before it.

        Args:
            logits: `b m v` float32, processed by `apply_vectorised`.
            state: the rows.
            window: the columns of the logits.
            sample: (logits of one position `b v`, index of the position) → tokens `b` int64, which the processors read
                at later positions.
        Returns:
            `b m v` float32, unchanged behind a drafted stop token.
        Raises:
            ValueError: `allowed_tokens` allows no token.
        """
        logits = logits.clone()
        known, is_known = window.gather(state.tokens), window.within(window.gather(state.given))
        frontier = window.columns[:, 0]
        rows = [ids[a:t] for ids, a, t in zip(state.tokens, state.padding, frontier, strict=True)]
        active = torch.ones_like(state.done)
        for j in range(logits.shape[1]):
            active = active & window.inside[:, j]
            for i in (active & ~is_known[:, j]).nonzero().flatten().tolist():
                logits[i, j] = self._processed(logits[i, j], rows[i], int(state.rows[i]))
            tokens = torch.where(is_known[:, j], known[:, j], sample(logits[:, j], j))
            rows = [torch.cat([ids, token[None]]) for ids, token in zip(rows, tokens, strict=True)]
            active = active & (is_known[:, j] | ~torch.isin(tokens, self.stop_token_ids))
        return logits

    def _processed(self, scores: Tensor, ids: Tensor, row: int) -> Tensor:
        if self.processors:
            scores = processed(self.processors, ids[None], scores[None])[0]
        if self.allowed_tokens is None:
            return scores
        allowed = torch.as_tensor(self.allowed_tokens(row, ids), dtype=torch.int64, device=scores.device)
        if not len(allowed):
            raise ValueError(
                f"`prefix_allowed_tokens_fn` must allow at least one token, got none for row {row} behind its "
                f"{len(ids)} tokens. Allow a stop token where the text may end."
            )
        removed = torch.full_like(scores, -torch.inf).index_fill(0, allowed, 0.0)
        return scores + removed


def split_processors(
    given: Iterable[LogitsProcessor],
) -> tuple[LogitsProcessorList, LogitsProcessorList, AllowedTokens | None]:
    """Split the caller's processors into warpers, other processors, both in their order, and `prefix_allowed_tokens_fn`.

    The function is taken out of its processor because processors are called with one row at a time, and that processor
    would pass row 0 to the function each time.

    Raises:
        ValueError: a processor keeps a state between calls.
    """
    warpers, processors = LogitsProcessorList(), LogitsProcessorList()
    constraint: AllowedTokens | None = None
    for processor in given:
        if isinstance(processor, PrefixConstrainedLogitsProcessor):
            constraint = processor._prefix_allowed_tokens_fn
            continue
        if type(processor).__name__ in STATEFUL:
            raise ValueError(
                f"`logits_processor` must be pure functions of (ids, scores), got {type(processor).__name__}, which "
                "keeps a state or expects additional rows. Leave it out: drafted positions are processed more than once."
            )
        (warpers if isinstance(processor, WARPERS) else processors).append(processor)
    return warpers, processors, constraint


def _is_history_free(processor: LogitsProcessor) -> bool:
    """True for known processors of transformers, and for others with a true attribute `history_free`."""
    return isinstance(processor, _HISTORY_FREE) or getattr(processor, "history_free", False)


def _remove(logits: Tensor, ids: Tensor, where: Tensor) -> Tensor:
    """Set these ids (`s` int64) to −∞ at these positions (`b m` bool): `b m v` → `b m v`."""
    removed = torch.isin(torch.arange(logits.shape[-1], device=logits.device), ids)
    return logits.masked_fill(where[..., None] & removed, -torch.inf)
