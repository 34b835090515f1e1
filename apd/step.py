"""READ FIRST. One decode step: draft, verify, mix, accept, commit.

    1. Draft.   One drafter forward over the window's masks; one token for each, from its marginals.
    2. Verify.  One verifier forward over the draft scores each drafted token given those before it.
    3. Mix.     p_T ∝ p_D^R · p_AR^(1−R) at every position.
    4. Accept.  The longest prefix on which draft and mixture agree (`acceptance.py`).
    5. Commit.  Write it, cut at the first stop token, move the frontier (`state.commit`).

`APD.propose` and `APD.judge` hold 1 to 4 under these numbers; `decode_step` adds 5 and is the same for every strategy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from apd.acceptance import AcceptanceRule, Accepted, check_judgement
from apd.config import WindowSize, check_fraction
from apd.drafter import DrafterSession, LeaveOneOutSession
from apd.probability import log_normalise, mix
from apd.processing import Processing
from apd.returned import CheckedLogits, check_returned, name_of
from apd.sampling import Noise, Sampling, Scores
from apd.state import (
    DecodeState,
    FollowsRows,
    GoesAhead,
    Logits,
    Proposal,
    Reach,
    StepInfo,
    Stopping,
    Window,
    commit,
    next_pace,
)
from apd.verifier import VerifierSession

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Draft:
    """One token for every mask of the window, or of a part of it.

    Attributes:
        tokens: `b m` int64.
        best: `b m` float32, the score that each won with; see `Picked`.
        logits: `b m v` float32, log p_D up to a constant, before temperature and truncation.
        scores: the same after them.
        noise: what was added to the scores before the argmax.
    """

    tokens: Tensor
    best: Tensor
    logits: Tensor
    scores: Scores
    noise: Noise

    @cached_property
    def logprobs(self) -> Tensor:
        """log p_D, `b m v`; nothing that is decided by an argmax needs it."""
        return log_normalise(self.logits)


class Fused(Protocol):
    """Makes of a function one that does the same."""

    def __call__(self, function: Callable[P, T], /) -> Callable[P, T]: ...


def as_it_is(function: Callable[P, T]) -> Callable[P, T]:
    return function


@dataclass(frozen=True)
class Models:
    """The models of one call, open, restricted to the tokens they share and to what the caller allows.

    Attributes:
        drafter: its session.
        verifier: its session, or `None` when the strategy needs none.
        removed: ids that are never drafted, the mask token: `n` int64.
        mask_token_id: what stands where nothing is committed.
        vocab_size: ids below it exist in both models.
        processing: the caller's logits processors, the same for both models.
        keeps_probs: whether a proposal holds the probabilities of its tokens, `b m k`.
        keeps_scores: whether a proposal holds what decided each position, `b m v`.
        fused: the same function, its small operations compiled into few; see `APDSampler.compile`.
    """

    drafter: DrafterSession
    verifier: VerifierSession | None
    removed: Tensor
    mask_token_id: int
    vocab_size: int
    processing: Processing
    keeps_probs: bool = False
    keeps_scores: bool = False
    fused: Fused = as_it_is

    def draft(self, state: DecodeState, window: Window, sampling: Sampling) -> Drafts:
        """x_i = argmax(warp(log p_D)_i + g_i) at every mask of the window."""
        logits = self._checked(self.drafter, "logits", self.drafter.logits(state, window), window)
        return self._drafts(logits, state, window, sampling)

    def draft_again(self, state: DecodeState, window: Window, sampling: Sampling) -> Drafts:
        """The same at every column of the window, given all others: at a decided one as if it alone were a mask too."""
        if not isinstance(self.drafter, LeaveOneOutSession):
            raise TypeError(
                f"`drafter` must tell what it would say where it is shown a token, got {type(self.drafter).__name__} "
                "without `leave_one_out_logits`. Give its session that method, or use a strategy that revokes nothing."
            )
        logits = self.drafter.leave_one_out_logits(state, window)
        logits = self._checked(self.drafter, "leave_one_out_logits", logits, window)
        return self._drafts(logits, state, window, sampling)

    def next_token(self, state: DecodeState, window: Window, sampling: Sampling) -> Drafts:
        """The same from the verifier, for the token at the frontier; `window` is one column wide."""
        return self._drafts(self.verify(state, window, torch.zeros_like(window.columns)), state, window, sampling)

    def _drafts(self, logits: Logits, state: DecodeState, window: Window, sampling: Sampling) -> Drafts:
        parts, drawn = self._parts(window), self.fused(Models._drawn)
        return Drafts(parts, lambda part: drawn(self, logits[:, part], state, window.part(part), sampling))

    def _drawn(self, logits: Tensor, state: DecodeState, window: Window, sampling: Sampling) -> Draft:
        noise = sampling.noise(state, window)

        def pick(logits: Tensor, position: int) -> Tensor:
            return sampling.pick(sampling.warp(logits[:, None]), noise.at(position)).tokens[:, 0]

        logits = self._supported(logits, state, window)
        if self.processing.needs_history:
            logits = self.processing.along(logits, state, window, pick)
        scores = sampling.warp(logits)
        return Draft(*sampling.pick(scores, noise), logits, scores, noise)

    def verify(self, state: DecodeState, window: Window, draft: Tensor) -> Logits:
        """The verifier's raw logits at every position given the draft before it, `b m v`."""
        assert self.verifier is not None
        return self._checked(self.verifier, "logits", self.verifier.logits(state, window, draft), window)

    def verified(self, logits: Tensor, state: DecodeState, window: Window, draft: Tensor) -> Tensor:
        """log p_AR up to a constant, of every token of a window or a part of it, from the raw logits: `b c v`."""
        logits = self._supported(logits, state, window)
        if self.processing.needs_history:
            logits = self.processing.along(logits, state, window, lambda _, position: draft[:, position])
        return logits

    def fit(self, reach: Reach) -> bool:
        """Whether both models can take windows before the host knows where the rows stand."""
        sessions = [self.drafter] if self.verifier is None else [self.drafter, self.verifier]
        return all(isinstance(session, GoesAhead) and session.fits(reach) for session in sessions)

    def select(self, rows: Tensor) -> None:
        self.drafter.select(rows)
        if self.verifier is not None:
            self.verifier.select(rows)

    def join(self, state: DecodeState) -> None:
        self.drafter.join(state)
        if self.verifier is not None:
            self.verifier.join(state)

    def _checked(self, session: object, method: str, logits: Logits, window: Window) -> Logits:
        rows, width = window.columns.shape
        return CheckedLogits(logits, name_of(session, method), (rows, width), self.vocab_size)

    def _parts(self, window: Window) -> list[slice]:
        """The window in parts whose `b c v` tensors are small; whole where history or the caller wants it so."""
        rows, width = window.columns.shape
        if self.processing.needs_history or self.keeps_scores:
            return [slice(0, width)]
        at_once = max(1, MOST_ENTRIES // (rows * self.vocab_size))
        return [slice(start, min(start + at_once, width)) for start in range(0, width, at_once)]

    def _supported(self, logits: Tensor, state: DecodeState, window: Window) -> Tensor:
        if logits.shape[-1] > self.vocab_size:
            logits = logits[..., : self.vocab_size]
        logits = logits.float()  # processors expect float32, as in transformers
        return self.processing.at_once(logits.index_fill_(-1, self.removed, -torch.inf), state, window)


#: Entries of the largest tensor of a step, rows × positions × vocabulary: 512 MiB as float32. About eight live at once.
MOST_ENTRIES = 1 << 27


class Drafts:
    """The draft of a window, part by part; the `b c v` tensors of a part are there only while it is looked at.

    Args:
        parts: one after another, the whole window together.
        draw: the draft of one of them.
    """

    def __init__(self, parts: list[slice], draw: Callable[[slice], Draft]) -> None:
        self.parts = parts
        self.draw = draw
        self.only = draw(parts[0]) if len(parts) == 1 else None

    def __getitem__(self, part: slice) -> Draft:
        return self.draw(part) if self.only is None else self.only

    def tokens(self) -> Tensor:
        """The whole draft, `b m` int64; of several parts each is computed for it and again when it is looked at."""
        return joined(tuple(self[part].tokens for part in self.parts), self.parts[-1].stop)


class StrategySession(FollowsRows, Protocol):
    """A strategy's memory for the length of one call."""

    def propose(self, state: DecodeState, window: Window, models: Models, sampling: Sampling) -> Proposal:
        """Which tokens of the window to commit.

        A row that is done has no mask in the window, and nothing in it may be decisive. Of every other row a token must be
        committed within as many steps as it has masks.
        """


class Strategy(Protocol):
    """Which tokens a step commits. One small class each; `APD` below, its rivals in `strategies.py`."""

    @property
    def needs_verifier(self) -> bool:
        """Whether a verifier forward runs."""

    @property
    def left_to_right(self) -> bool:
        """Whether it commits prefixes of the window only."""

    def open(self, state: DecodeState) -> StrategySession:
        """Start a session for these rows."""


def check_strategy(strategy: Any) -> None:
    """Refuse what cannot be a `Strategy`.

    Raises:
        TypeError: a class, or an object without the protocol's attributes, such as a name.
    """
    if isinstance(strategy, type):
        raise TypeError(f"`strategy` must be an instance, got the class {strategy.__name__}. Call it.")
    if not all(hasattr(strategy, name) for name in ("needs_verifier", "left_to_right", "open")):
        raise TypeError(
            f"`strategy` must be an object such as `apd.Confidence(2)`, got {strategy!r}. Names are for the command "
            "line: make the object."
        )


class Memoryless:
    """A strategy that is its own session: what it commits depends on the state alone. Subclasses `propose`."""

    def open(self, state: DecodeState) -> Self:
        return self

    def select(self, rows: Tensor) -> None:
        pass

    def join(self, state: DecodeState) -> None:
        pass


@dataclass(frozen=True)
class APD(Memoryless):
    """Adaptive parallel decoding: commit the longest prefix on which draft and mixture agree.

    Args:
        mixture_weight: R; at 1 the verifier is not needed.
        accept: acceptance rule.

    Source: Israel, Van den Broeck, Grover 2025, arXiv:2506.00413.
    """

    mixture_weight: float
    accept: AcceptanceRule
    left_to_right = True

    def __post_init__(self) -> None:
        check_fraction("mixture_weight", self.mixture_weight, "1 trusts the drafter alone, 0 the verifier alone")

    @property
    def needs_verifier(self) -> bool:
        return self.mixture_weight < 1

    def propose(self, state: DecodeState, window: Window, models: Models, sampling: Sampling) -> Proposal:
        # 1. Draft.
        drafts = models.draft(state, window, sampling)
        drafted = drafts.tokens()

        # 2. Verify.
        verify = models.verify(state, window, drafted) if self.needs_verifier else None

        # Part by part while some row still agrees; a window has one part unless it is huge.
        judge = models.fused(type(self).judge)
        accepted: list[Accepted] = []
        for part in drafts.parts:
            if accepted and accepted[-1].misses[:, -1].all():
                break
            of_verifier = verify[:, part] if verify is not None else None
            accepted.append(
                judge(self, drafts[part], of_verifier, models, state, window.part(part), sampling, accepted[-1:])
            )

        width = window.columns.shape[1]
        tokens, chosen, decisive, *best = (
            joined(values, width) for values in zip(*(part[:5] for part in accepted), strict=True)
        )
        probs = [part.probs for part in accepted if part.probs is not None]
        return Proposal(
            tokens=tokens,
            chosen=chosen,
            decisive=decisive,
            best=tuple(best) if self.needs_verifier else tuple(best[:1]),
            draft=drafted,
            probs=joined(probs, width) if probs else None,
            models=("target", "drafter", "verifier") if self.needs_verifier else ("target", "drafter"),
            logits=accepted[0].logits,
            scores=accepted[0].scores,
        )

    def judge(
        self,
        draft: Draft,
        of_verifier: Tensor | None,
        models: Models,
        state: DecodeState,
        window: Window,
        sampling: Sampling,
        before: list[Accepted],
    ) -> Accepted:
        """What becomes of the draft of a window, or of a part of it.

        Args:
            of_verifier: its raw logits, `b c v`; `None` at R = 1.
            before: the part before this one, none for the first.
        """
        # 3. Mix raw, then warp: the other order gives empty supports. At R = 1 the target is the draft, bit for bit.
        logits, target_scores = [draft.logits, draft.logits], draft.scores
        if of_verifier is not None:
            verified = models.verified(of_verifier, state, window, draft.tokens)
            mixture = mix(draft.logits, verified, self.mixture_weight)
            logits, target_scores = [mixture, draft.logits, verified], sampling.warp(mixture)

        # 4. Accept.
        judgement = self.accept(
            draft=draft.tokens,
            draft_scores=draft.scores,
            target_scores=target_scores,
            target_logits=logits[0],
            noise=draft.noise,
            sampling=sampling,
            key=(state, window),
        )
        check_judgement(judgement, self.accept, draft.tokens)
        accepted = Accepted.of(
            judgement, draft.tokens, draft.best, window, logits, before, keeps_probs=models.keeps_probs
        )
        if not models.keeps_scores:
            return accepted
        # The drafter alone decides the first position, the mixture the others.
        deciding = log_normalise(torch.cat([draft.logits[:, :1], logits[0][:, 1:]], 1))
        # `_replace` would say it better; torch.compile of torch 2.11 cannot trace it.
        return Accepted(*accepted[:7], logits=deciding, scores=sampling.warp(deciding).of_all(models.vocab_size))


def joined(parts: Sequence[Tensor], width: int = 0) -> Tensor:
    """The parts of a window as one: `b c …` each → `b m …`, m at least `width`, zeros for the positions without any."""
    values = parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)
    missing = max(width - values.shape[1], 0)
    return pad(values, (*[0, 0] * (values.dim() - 2), 0, missing)) if missing else values


def check_proposal(proposal: object, by: str, window: Window) -> None:
    """Refuse what would be broadcast or cut when it is committed.

    Raises:
        TypeError, ValueError: see `check_returned`.
    """
    if not isinstance(proposal, Proposal):
        raise TypeError(f"`{by}` must return a `Proposal`, got {type(proposal).__name__}.")
    rows, width = window.columns.shape
    check_returned(proposal.tokens, f"{by}().tokens", (rows, width), torch.int64)
    check_returned(proposal.chosen, f"{by}().chosen", (rows, width), torch.bool)
    check_returned(proposal.decisive, f"{by}().decisive", (rows, width), torch.bool)
    check_returned(proposal.draft, f"{by}().draft", (rows, None), torch.int64)
    for best in proposal.best:
        check_returned(best, f"{by}().best", (rows, width), torch.float32)


def decode_step(
    state: DecodeState,
    *,
    strategy: StrategySession,
    models: Models,
    sampling: Sampling,
    window_size: WindowSize,
    stopping: Stopping,
    ahead: Window | None = None,
) -> tuple[DecodeState, StepInfo]:
    """One step of every row: the strategy proposes, and 5. what it chose is committed.

    Args:
        ahead: the window, where it is made before the host knows the layout.
    """
    window = ahead or Window.at_frontier(state, window_size, is_fixed=models.fused is not as_it_is)
    proposal = strategy.propose(state, window, models, sampling)
    check_proposal(proposal, name_of(strategy, "propose"), window)
    committed = models.fused(commit)
    after, info = committed(state, window, proposal, stopping=stopping, mask_token_id=models.mask_token_id)
    if window_size == "auto":
        pace = next_pace(state.pace, info.committed.sum(1), window.inside.sum(1))
        after = dataclasses.replace(after, pace=pace)
    return after, info
