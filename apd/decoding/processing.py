"""Logits processors: what the caller wants of every distribution, for draft and target alike.

Processors act on each model's raw logits, before log_softmax and mixing, so that a token they remove is removed from
both. Those that look at the tokens before a position go through the window position by position: since tokens are
committed from left to right, each position is processed with exactly the tokens that precede it, drafted ones included.
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

#: Warpers say how a token is drawn; they act on the mixture too, and are therefore kept apart from processors.
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

#: Processors that remember what they saw, or expect rows that are not there. They cannot be asked again about a position.
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
    """The processors of one call. All of them are pure functions of (ids, scores).

    Attributes:
        stop_token_ids: `s` int64; behind a drafted one nothing is processed.
        processors: transformers' processors, warpers left out.
        allowed_tokens: transformers' `prefix_allowed_tokens_fn`: from (row, ids `n`) the ids that may come next.
        min_new_tokens: no stop token before so many new tokens.
        suppressed_first: ids that may not be the first new token.
    """

    stop_token_ids: Tensor
    processors: LogitsProcessorList = field(default_factory=LogitsProcessorList)
    allowed_tokens: AllowedTokens | None = None
    min_new_tokens: int = 0
    suppressed_first: tuple[int, ...] = ()

    @property
    def needs_history(self) -> bool:
        """Whether some processor looks at the tokens before a position."""
        return self.allowed_tokens is not None or not all(map(_is_history_free, self.processors))

    def apply_vectorised(self, logits: Tensor, state: DecodeState, window: Window) -> Tensor:
        """Everything that does not depend on other tokens, at all positions at once: `b m v` → `b m v`."""
        if not (self.min_new_tokens or self.suppressed_first or len(self.processors)):
            return logits
        position = window.columns - state.prompt_end[:, None]
        if self.min_new_tokens and len(self.stop_token_ids):
            logits = _remove(logits, self.stop_token_ids, position < self.min_new_tokens)
        if self.suppressed_first:
            suppressed = to_device(list(self.suppressed_first), logits.device)
            logits = _remove(logits, suppressed, position == 0)
        if self.processors and not self.needs_history:
            flat = processed(self.processors, None, rearrange(logits, "b m v -> (b m) v"))
            logits = rearrange(flat, "(b m) v -> b m v", m=window.columns.shape[1])
        return logits

    def apply_per_position(
        self, logits: Tensor, state: DecodeState, window: Window, sample: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        """Everything else, position by position, each with exactly the tokens that precede it.

        Args:
            logits: `b m v`, processed by `apply_vectorised`.
            sample: from the logits of one position, `b v`, and its number: the token there, `b`, which the following
                positions see.
        Returns:
            `b m v`; behind a drafted stop token nothing is processed.
        """
        logits = logits.clone()
        frontier = window.columns[:, 0]
        rows = [ids[a:t] for ids, a, t in zip(state.tokens, state.padding, frontier, strict=True)]
        going_on = torch.ones_like(state.done)
        for j in range(logits.shape[1]):
            going_on = going_on & window.inside[:, j]
            for i in going_on.nonzero().flatten().tolist():
                logits[i, j] = self._processed(logits[i, j], rows[i], int(state.rows[i]))
            tokens = sample(logits[:, j], j)
            rows = [torch.cat([ids, token[None]]) for ids, token in zip(rows, tokens, strict=True)]
            going_on = going_on & ~torch.isin(tokens, self.stop_token_ids)
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
    """The caller's warpers, the caller's other processors, each in their order, and a grammar if there is one.

    A grammar is taken out of its processor, which would take every row for the first: it is called with one at a time.

    Raises:
        ValueError: a processor keeps a state of its own.
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
                "keeps a state or expects rows of its own; drafted positions are asked about more than once."
            )
        (warpers if isinstance(processor, WARPERS) else processors).append(processor)
    return warpers, processors, constraint


def _is_history_free(processor: LogitsProcessor) -> bool:
    """Transformers' own, or a caller's that says so by a true attribute `history_free`."""
    return isinstance(processor, _HISTORY_FREE) or getattr(processor, "history_free", False)


def _remove(logits: Tensor, ids: Tensor, where: Tensor) -> Tensor:
    """−∞ for these ids (`s`) at these positions (`b m` bool)."""
    removed = torch.isin(torch.arange(logits.shape[-1], device=logits.device), ids)
    return logits.masked_fill(where[..., None] & removed, -torch.inf)
