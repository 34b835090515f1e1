"""`ModelPair`: drafter and verifier of one call, restricted to the tokens that may be drawn. Counts their forwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from apd.decoding.noise import Noise
from apd.decoding.probability import gather_tokens, log_normalise, non_finite
from apd.decoding.processing import Processing
from apd.decoding.protocols import (
    CanvasSession,
    DrafterSession,
    LeaveOneOutSession,
    Logits,
    ScoringSession,
    VerifierSession,
)
from apd.decoding.returned import CheckedLogits, check_returned, name_of
from apd.decoding.sampling import Sampling, Scores
from apd.decoding.state import DecodeState
from apd.decoding.window import AllMasks, Window, WindowPolicy

T = TypeVar("T")

#: Entries of the largest tensor of a step, rows × positions × vocabulary: 512 MiB as float32. About eight live at once.
MAX_LOGIT_ENTRIES = 1 << 27


@dataclass(frozen=True)
class Support:
    """Which tokens may be drawn: those that both models have, without the mask token, as the processors leave them.

    Attributes:
        vocab_size: ids below it exist in both models.
        removed: ids that are never drawn, `n` int64.
        processing: the caller's logits processors, the same for both models.
    """

    vocab_size: int
    removed: Tensor
    processing: Processing

    def restrict(
        self, logits: Tensor, state: DecodeState, window: Window, sample: Callable[[Tensor, int], Tensor]
    ) -> Tensor:
        """Raw logits `b c v′` → log-probabilities up to a constant, `b c v` float32, −∞ for removed tokens.

        Args:
            sample: from the logits of one position, `b v`, and its number: the token there, `b`, which processors that
                look at earlier tokens see at the positions behind it.
        """
        logits = logits[..., : self.vocab_size].float()  # processors expect float32, as in transformers
        logits = self.processing.apply_vectorised(logits.index_fill_(-1, self.removed, -torch.inf), state, window)
        if self.processing.needs_history:
            logits = self.processing.apply_per_position(logits, state, window, sample)
        return logits


@dataclass(frozen=True)
class Draft:
    """One drawn token per mask of the window, or of a part of it.

    Attributes:
        tokens: `b c` int64.
        fault: `b c` bool, True where there is no valid distribution.
        logits: `b c v` float32, log p_D up to a constant, before temperature and truncation.
        scores: log p_D after temperature and truncation.
        noise: what was added to the scores before the argmax.
    """

    tokens: Tensor
    fault: Tensor
    logits: Tensor
    scores: Scores
    noise: Noise

    @cached_property
    def logprobs(self) -> Tensor:
        """log p_D, `b c v` float32; an argmax does not need it."""
        return log_normalise(self.logits)


def draw(logits: Tensor, state: DecodeState, window: Window, sampling: Sampling, support: Support) -> Draft:
    """x_i = argmax(warp(log p_D)_i + g_i) at every position: raw logits `b c v′` → `Draft`."""
    noise = sampling.noise(state, window)

    def sample(logits: Tensor, position: int) -> Tensor:
        return sampling.sample(sampling.warp(logits[:, None]), noise.at(position)).tokens[:, 0]

    logits = support.restrict(logits, state, window, sample)
    scores = sampling.warp(logits)
    tokens, best = sampling.sample(scores, noise)
    if support.processing.has_holes:  # a given token between two holes is its own draft
        tokens = torch.where(window.within(window.gather(state.given)), window.gather(state.tokens), tokens)
    return Draft(tokens, non_finite(best), logits, scores, noise)


@dataclass(frozen=True)
class Kernels:
    """The pure functions of a decode step, as they are or compiled: `draw`, `judge` (`step.py`) and `commit`."""

    draw: Callable[..., Draft]
    judge: Callable[..., Any]
    commit: Callable[..., Any]


class Drafts:
    """The draft of a window, in parts where its `b m v` tensors would be too large.

    Args:
        parts: consecutive slices of the window, all of it together.
        draw: the draft of one part. Of a single part it is computed once; of several whenever it is used.
    """

    def __init__(self, parts: list[slice], draw: Callable[[slice], Draft]) -> None:
        self.parts = parts
        only = draw(parts[0]) if len(parts) == 1 else None
        self.draw = draw if only is None else lambda _: only

    def __iter__(self) -> Iterator[tuple[slice, Draft]]:
        return ((part, self.draw(part)) for part in self.parts)

    @cached_property
    def tokens(self) -> Tensor:
        """The whole draft, `b m` int64."""
        return concatenate([draft.tokens for _, draft in self])

    def fold(self, function: Callable[[slice, Draft, T | None], T], is_last: Callable[[T], bool]) -> list[T]:
        """`function(part, draft, previous result)` of every part up to the first whose result `is_last`."""
        results: list[T] = []
        for part, draft in self:
            results.append(function(part, draft, results[-1] if results else None))
            if len(self.parts) > 1 and is_last(results[-1]):
                break
        return results


class ModelPair:
    """Drafter and verifier of one call. Every method that runs a model counts a forward where it happens.

    Args:
        drafter: its session; `None` if the strategy needs none.
        verifier: its session; `None` if the strategy needs none.
        support: the tokens that may be drawn.
        mask_token_id: what is in an undecided column.
        kernels: the pure functions of a step.
        policy: the masks that a step drafts; for strategies that make up canvases of their own.
        record_probs: proposals hold the probabilities of their tokens, `b m n`.
        record_scores: proposals hold what decided each position, `b m v`.

    Attributes:
        drafter_forwards, verifier_forwards: passes so far; every row of the state took part in each.
        extra_canvases: `b` int64, per row of the state the canvases beyond the first of each pass in this step; `None`: none.
    """

    def __init__(
        self,
        drafter: DrafterSession | None,
        verifier: VerifierSession | None,
        support: Support,
        *,
        mask_token_id: int,
        kernels: Kernels,
        policy: WindowPolicy | None = None,
        record_probs: bool = False,
        record_scores: bool = False,
    ) -> None:
        self.drafter, self.verifier, self.support = drafter, verifier, support
        self.mask_token_id, self.kernels = mask_token_id, kernels
        self.policy: WindowPolicy = AllMasks() if policy is None else policy
        self.record_probs, self.record_scores = record_probs, record_scores
        self.drafter_forwards = self.verifier_forwards = 0
        self.extra_canvases: Tensor | None = None

    def draft(self, state: DecodeState, window: Window, sampling: Sampling, width: int | None = None) -> Drafts:
        """x_i = argmax(warp(log p_D)_i + g_i) at every mask of the window, or at its first `width` positions."""
        drafter = self._running(self.drafter, "drafter")
        self.drafter_forwards += 1
        logits = self._checked(drafter, "logits", drafter.logits(state, window), window)
        return self._drafts(logits, state, window, sampling, width)

    def of_canvases(self, rows: Tensor) -> CanvasPair:
        """A pair that drafts several canvases of each row in one pass.

        Args:
            rows: `n` int64, ascending: the row of this pair's state that each canvas belongs to.
        """
        return CanvasPair(self, rows)

    def draft_leave_one_out(self, state: DecodeState, window: Window, sampling: Sampling) -> Drafts:
        """A draft of every column of the window from all other columns, as if it alone were masked."""
        if not isinstance(self.drafter, LeaveOneOutSession):
            raise TypeError(
                f"`drafter` must predict columns whose token is known, got {type(self.drafter).__name__} without "
                "`leave_one_out_logits`. Give its session that method, or use a strategy that revokes nothing."
            )
        self.drafter_forwards += 1
        logits = self.drafter.leave_one_out_logits(state, window)
        logits = self._checked(self.drafter, "leave_one_out_logits", logits, window)
        return self._drafts(logits, state, window, sampling)

    def draft_next_token(self, state: DecodeState, window: Window, sampling: Sampling) -> Drafts:
        """A draft from the verifier for the column at the frontier; `window` is one column wide."""
        return self._drafts(self.verify(state, window, torch.zeros_like(window.columns)), state, window, sampling)

    def verify(self, state: DecodeState, window: Window, draft: Tensor) -> Logits:
        """The verifier's raw logits at every position, given the drafted tokens before it: `b m v′`."""
        verifier = self._running(self.verifier, "verifier")
        self.verifier_forwards += 1
        return self._checked(verifier, "logits", verifier.logits(state, window, draft), window)

    def score(self, state: DecodeState, window: Window, draft: Tensor) -> Tensor:
        """log p_AR of every drafted token given the tokens before it, `b m` float32."""
        if isinstance(self.verifier, ScoringSession):
            self.verifier_forwards += 1
            scores = self.verifier.score(state, window, draft)
            check_returned(scores, name_of(self.verifier, "score"), tuple(draft.shape), torch.float32)
            return scores
        logits = self.verify(state, window, draft)
        scored = [
            gather_tokens(log_normalise(logits[:, part][..., : self.support.vocab_size]), draft[:, part])
            for part in self.parts(window)
        ]
        return concatenate(scored)

    def parts(self, window: Window) -> list[slice]:
        """The window in parts whose `b c v` tensors are small; whole where history or the caller needs it so."""
        rows, width = window.columns.shape
        if self.support.processing.needs_history or self.record_scores:
            return [slice(0, width)]
        size = max(1, MAX_LOGIT_ENTRIES // (rows * self.support.vocab_size))
        return [slice(start, min(start + size, width)) for start in range(0, width, size)]

    def select(self, rows: Tensor) -> None:
        for session in (self.drafter, self.verifier):
            if session is not None:
                session.select(rows)

    def join(self, state: DecodeState) -> None:
        for session in (self.drafter, self.verifier):
            if session is not None:
                session.join(state)

    @staticmethod
    def _running(session: Any, role: str) -> Any:
        if session is None:
            raise TypeError(
                f"A strategy that runs the {role} must have the attribute `needs_{role}` = True: without it the {role} is "
                "not opened."
            )
        return session

    def _checked(self, session: object, method: str, logits: Logits, window: Window) -> Logits:
        rows, width = window.columns.shape
        return CheckedLogits(logits, name_of(session, method), (rows, width), self.support.vocab_size)

    def _drafts(
        self, logits: Logits, state: DecodeState, window: Window, sampling: Sampling, width: int | None = None
    ) -> Drafts:
        def draw(part: slice) -> Draft:
            return self.kernels.draw(logits[:, part], state, window.part(part), sampling, self.support)

        whole = window.columns.shape[1]
        return Drafts(self.parts(window if width is None or width >= whole else window.part(slice(0, width))), draw)


class CanvasPair(ModelPair):
    """The drafter of a pair on several canvases of each row; it makes one pass.

    Args:
        pair: the pair of the rows; counts the forward.
        rows: `n` int64, the row of each canvas.

    Attributes:
        logits: raw logits of the pass at every position of every canvas' window, `n m v`; `None` before it.
    """

    def __init__(self, pair: ModelPair, rows: Tensor) -> None:
        super().__init__(
            None,
            None,
            pair.support,
            mask_token_id=pair.mask_token_id,
            kernels=pair.kernels,
            policy=pair.policy,
            record_probs=pair.record_probs,
            record_scores=pair.record_scores,
        )
        self.of_rows, self.rows = pair, rows
        self.logits: Logits | None = None

    def draft(self, state: DecodeState, window: Window, sampling: Sampling, width: int | None = None) -> Drafts:
        drafter = self._running(self.of_rows.drafter, "drafter")
        if not isinstance(drafter, CanvasSession):
            raise TypeError(
                f"`drafter` must compute several canvases of a row in one pass, got {type(drafter).__name__} without "
                "`canvas_logits`. Give its session that method: where it remembers nothing of a row, "
                "`return self.logits(state, window)`."
            )
        self.of_rows.drafter_forwards += 1
        self.of_rows.extra_canvases = torch.bincount(self.rows, minlength=int(self.rows[-1]) + 1) - 1
        logits = self._checked(drafter, "canvas_logits", drafter.canvas_logits(state, window, self.rows), window)
        self.logits = logits
        return self._drafts(logits, state, window, sampling, width)

    def draft_again(
        self, canvases: Tensor, positions: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Drafts:
        """Drafts of other columns from the logits of the pass.

        Args:
            canvases: `b` int64, the canvas of each row.
            positions: `b k` int64, positions in that canvas' window.
            state, window: the rows, and the columns at these positions.
        """
        assert self.logits is not None
        logits = self.logits[canvases[:, None], positions]
        return Drafts(
            self.parts(window),
            lambda part: self.kernels.draw(logits[:, part], state, window.part(part), sampling, self.support),
        )


def concatenate(parts: Sequence[Any], width: int = 0) -> Any:
    """The parts of a window as one: `b c …` tensors, or dataclasses of them, → `b m …`, at least `width` positions wide.

    Positions without a part are 0. A field that is `None` in the first part is `None`.
    """
    if isinstance(parts[0], Tensor):
        values = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
        missing = width - values.shape[1]
        return pad(values, (*[0, 0] * (values.dim() - 2), 0, missing)) if missing > 0 else values
    if parts[0] is None:
        return None
    names = [field.name for field in fields(parts[0])]
    if len(parts) == 1 and getattr(parts[0], names[0]).shape[1] >= width:
        return parts[0]
    return type(parts[0])(**{name: concatenate([getattr(part, name) for part in parts], width) for name in names})
