"""Proposers: they guess the tokens that `Checked` lets the drafter check. A wrong guess costs time, never a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from apd.config import check_count, check_fraction
from apd.decoding.noise import Noise
from apd.decoding.pair import ModelPair
from apd.decoding.probability import log_normalise, mix
from apd.decoding.protocols import RowMemory
from apd.decoding.returned import check_returned
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState, to_device
from apd.decoding.strategy import OwnSession
from apd.decoding.window import Window

#: What stands for "no guess" among guessed tokens.
NO_GUESS = -1

#: A proposer's probabilities count as at most this in `Marginals.pooled`: where the drafter all but excludes a token, a
#: proposer that is sure of it is not to be believed.
_MOST_BELIEVED = 0.999

#: Probabilities this close to 0 or 1 count alike, so that odds are finite.
_TINY = 1e-7


@dataclass(frozen=True)
class Marginals:
    """The drafter's distributions at columns of the canvas that was accepted last.

    Attributes:
        columns: `b k` int64, consecutive, from each row's frontier on.
        known: `b k` bool, False where there is no distribution: in rows that have had no pass yet, and behind the columns
            that the pass has read.
        tokens: `b k` int64, drawn from them with the keyed noise of their columns.
        logits: `b k v` float32, log p_D up to a constant, before temperature and truncation.
    """

    columns: Tensor
    known: Tensor
    tokens: Tensor
    logits: Tensor

    def probs(self, tokens: Tensor) -> Tensor:
        """p_D of these tokens, `b k` int64 → `b k` float32; 0 where nothing is known or there is no token."""
        probs = log_normalise(self.logits).gather(-1, tokens.clamp(min=0)[..., None]).squeeze(-1).exp()
        return probs.masked_fill(~self.known | (tokens < 0), 0.0)

    def pooled(self, tokens: Tensor, probs: Tensor) -> Tensor:
        """The probability that the drafter will draw these tokens, from p_D and from what their proposer says of them.

        Its log-odds are the mean of both log-odds. p_D was read before the tokens between were known; the proposer has read
        them, and knows the noise.

        Args:
            tokens: `b k` int64.
            probs: `b k` float32, the proposer's; NaN where it gives none, which leaves p_D.
        Returns:
            `b k` float32.
        """
        own = torch.logit(self.probs(tokens), _TINY)
        other = torch.logit(probs.clamp(max=_MOST_BELIEVED), _TINY)
        return torch.where(other.isnan(), own, (own + other) / 2).sigmoid()

    def select(self, rows: Tensor) -> Marginals:
        """The rows at these indices, `n` int64."""
        return Marginals(*(each.index_select(0, rows) for each in self))

    def first(self, width: int) -> Marginals:
        """The first columns, at most `width`."""
        return Marginals(*(each[:, :width] for each in self))

    def widened(self, num_rows: int) -> Marginals:
        """With further rows, of which nothing is known."""
        return Marginals(*(pad(each, (*[0, 0] * (each.dim() - 1), 0, num_rows - len(each))) for each in self))

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.columns, self.known, self.tokens, self.logits))


class Proposed(NamedTuple):
    """Guessed tokens, and how sure the proposer is of them.

    Attributes:
        tokens: `b k` int64, `NO_GUESS` where there is no guess.
        probs: `b k` float32, an estimate of the probability that the drafter draws the token, NaN where there is none;
            `None`: nowhere. It decides which guesses are worth a canvas (`num_checked="auto"`, `certainty`).
    """

    tokens: Tensor
    probs: Tensor | None = None


class ProposerSession(RowMemory, Protocol):
    """A proposer's memory for the length of one call."""

    def propose(
        self,
        state: DecodeState,
        window: Window,
        marginals: Marginals | None,
        pair: ModelPair,
        sampling: Sampling,
    ) -> Proposed | Tensor:
        """Guess the tokens of the window's columns.

        Args:
            state: the rows.
            window: the columns, from each row's frontier on.
            marginals: what the drafter's last pass says of the first columns of the window; `None` before its first pass.
            pair: its verifier may be run, one token at a time; forwards are counted.
            sampling: temperature, truncation and keyed noise. A proposer that draws with it agrees with the drafter more often.
        Returns:
            Guesses of the window's first k columns; tokens alone where their probabilities are unknown.
        """


def checked_guesses(proposed: Proposed | Tensor, by: str, window: Window, pair: ModelPair) -> tuple[Tensor, Tensor]:
    """A proposer's tokens and probabilities, `b k` each, NaN where there are none. Ids that cannot be drawn are no guess.

    Args:
        proposed: what it returned; a bare tensor is tokens.
        by: name of the method, for the message.
        window: the columns that it was asked for.

    Raises:
        TypeError, ValueError: another shape or dtype, or more columns than there are.
    """
    tokens, probs = proposed if isinstance(proposed, Proposed) else (proposed, None)
    if isinstance(tokens, tuple):
        raise TypeError(f"`{by}` must return a tensor of tokens or `Proposed(tokens, probs)`, got a tuple.")
    rows, width = window.columns.shape
    check_returned(tokens, by, (rows, None), torch.int64)
    if probs is None:
        probs = torch.full(tokens.shape, torch.nan, device=tokens.device)
    check_returned(probs, f"{by}().probs", tuple(tokens.shape), torch.float32)
    if tokens.shape[1] > width:
        raise ValueError(
            f"`{by}` must guess at most the {width} columns of the window, got {tokens.shape[1]}. Return "
            "`guesses[:, : window.columns.shape[1]]`: what is behind it is never checked."
        )
    can_be_drawn = (tokens >= 0) & (tokens < pair.support.vocab_size) & (tokens != pair.mask_token_id)
    return tokens.masked_fill(~can_be_drawn, NO_GUESS), probs


def allowed_guesses(tokens: Tensor, known: Tensor, state: DecodeState, pair: ModelPair) -> Tensor:
    """Guesses up to the first that `prefix_allowed_tokens_fn` does not allow, so that it sees no impossible prefix.

    Args:
        tokens: `b u` int64, guesses of the columns from each row's frontier on.
        known: `b u` bool, columns that are decided already.
    """
    allowed = pair.support.processing.allowed_tokens
    if allowed is None:
        return tokens
    stops, found = pair.support.processing.stop_token_ids.tolist(), torch.full_like(tokens, NO_GUESS)
    for i, guesses in enumerate(tokens.tolist()):
        ids = state.tokens[i, state.layout.padding[i] : state.layout.frontier[i]]
        for j, guess in enumerate(guesses):
            is_known = bool(known[i, j])
            if guess == NO_GUESS or (
                not is_known and guess not in torch.as_tensor(allowed(int(state.rows[i]), ids)).tolist()
            ):
                break
            found[i, j] = guess
            if guess in stops and not is_known:
                break
            ids = torch.cat([ids, found[i, j : j + 1]])
    return found


class Proposer(Protocol):
    """Guesses tokens for `Checked`.

    Attributes:
        needs_verifier: True if the pair's verifier runs.
        reads_marginals: True if it reads the drafter's marginals.
    """

    @property
    def needs_verifier(self) -> bool: ...

    @property
    def reads_marginals(self) -> bool: ...

    def open(self, state: DecodeState) -> ProposerSession:
        """Start a session for these rows."""


class Stateless(OwnSession):
    """A proposer that remembers nothing, and is its own session. Subclasses define `propose`."""

    needs_verifier = False
    reads_marginals = False


@dataclass(frozen=True)
class Mixture:
    """Draws from p_D^R · p_AR^(1−R), token by token, with the row's keyed noise.

    p_D are the marginals of the drafter's last pass, p_AR is the verifier's distribution given the tokens before. Before
    the first pass p_AR proposes alone. The probability of a guess is σ(margin), with the margin of its noised score (see
    `Sampling.margin`): what decides under noise is not how likely a token is, but how far it is ahead. At R = 1 it is p_D.

    Args:
        mixture_weight: R in [0, 1]. 0 is the verifier alone; 1 is the drafter's own marginals and needs no verifier.
        gives_probs: whether guesses have probabilities, for which the noise of all ids is drawn a second time.
    """

    mixture_weight: float = 0.5
    gives_probs: bool = True

    def __post_init__(self) -> None:
        check_fraction("mixture_weight", self.mixture_weight, "1 trusts the drafter alone, 0 the verifier alone")

    @property
    def needs_verifier(self) -> bool:
        return self.mixture_weight < 1

    @property
    def reads_marginals(self) -> bool:
        return self.mixture_weight > 0

    def open(self, state: DecodeState) -> MixtureSession:
        return MixtureSession(self, state)


class MixtureSession:
    """The verifier's part in proposing.

    Attributes:
        starts: per row, the first column whose keys in the verifier's cache may be those of a wrong guess: where the last
            guesses began; while guessing, the next column.
    """

    def __init__(self, mixture: Mixture, state: DecodeState) -> None:
        self.mixture = mixture
        self.starts: Sequence[int] = state.layout.frontier

    def propose(
        self,
        state: DecodeState,
        window: Window,
        marginals: Marginals | None,
        pair: ModelPair,
        sampling: Sampling,
    ) -> Proposed:
        if not self.mixture.needs_verifier:
            if marginals is None:
                return Proposed(torch.full_like(window.columns, NO_GUESS))
            near = marginals.first(window.columns.shape[1])
            tokens = near.tokens.masked_fill(~near.known, NO_GUESS)
            # Not σ(margin): these marginals know nothing of the tokens between, so it would take unchecked what p_D doubts.
            return Proposed(tokens, near.probs(tokens))
        stops = pair.support.processing.stop_token_ids
        undecided = window.within(~window.gather(state.decided))
        tokens = torch.where(window.inside, window.gather(state.tokens), NO_GUESS)
        probs = torch.ones(tokens.shape, device=tokens.device) if self.mixture.gives_probs else None
        goes_on = torch.ones_like(state.done)
        for j in range(window.columns.shape[1]):
            goes_on = goes_on & window.inside[:, j]
            wanted = goes_on & undecided[:, j]
            if not goes_on.any():
                break
            if wanted.any():
                logits, noise = self._read(j, state, window, tokens, marginals, pair, sampling)
                drawn = sampling.sample(sampling.warp(logits), noise).tokens
                tokens[:, j] = torch.where(wanted, drawn[:, 0], torch.where(goes_on, tokens[:, j], NO_GUESS))
                if probs is not None:
                    likely = sampling.margin(logits, drawn, noise).sigmoid()
                    probs[:, j] = torch.where(wanted, likely[:, 0], 1.0)
            goes_on = goes_on & ~torch.isin(tokens[:, j], stops)
        self.starts = window.starts
        return Proposed(tokens, probs)

    def _read(
        self,
        j: int,
        state: DecodeState,
        window: Window,
        tokens: Tensor,
        marginals: Marginals | None,
        pair: ModelPair,
        sampling: Sampling,
    ) -> tuple[Tensor, Noise]:
        """The mixture at position j, given the tokens before it, `b 1 v` float32 up to a constant, and its noise."""
        here, single = _behind(state, window, tokens[:, :j], pair.support.vocab_size)
        noise = sampling.noise(here, single)

        def sample(logits: Tensor, _: int) -> Tensor:
            return sampling.sample(sampling.warp(logits[:, None]), noise).tokens[:, 0]

        logits = pair.support.restrict(self._verified(here, single, pair), here, single, sample)
        if self.mixture.reads_marginals and marginals is not None and j < marginals.known.shape[1]:
            mixture = mix(marginals.logits[:, j : j + 1], logits, self.mixture.mixture_weight)
            # Marginals may allow nothing that is allowed behind these guesses.
            usable = marginals.known[:, j : j + 1] & mixture.amax(-1).isfinite()
            logits = torch.where(usable[..., None], mixture, logits)
        return logits, noise

    def _verified(self, state: DecodeState, single: Window, pair: ModelPair) -> Tensor:
        """The verifier's raw logits at `single`, after a pass from the first column whose keys may be of a wrong guess."""
        starts = [min(start, column) for start, column in zip(self.starts, single.starts, strict=True)]
        width = max(end - start for start, end in zip(starts, single.ends, strict=True))
        first, behind = to_device([starts, list(single.ends)], state.tokens.device)[..., None].unbind()
        columns = first + torch.arange(width, device=first.device)
        window = Window(columns % state.width, columns < behind, starts, single.ends)
        logits = pair.verify(state, window, window.gather(state.tokens))
        self.starts = [column + 1 for column in single.starts]
        rows = torch.arange(len(starts), device=first.device)[:, None]
        return logits[rows, behind - first - 1]

    def select(self, rows: Tensor) -> None:
        self.starts = [self.starts[row] for row in rows.tolist()]

    def join(self, state: DecodeState) -> None:
        self.starts = [*self.starts, *state.layout.frontier[len(self.starts) :]]


def _behind(state: DecodeState, window: Window, tokens: Tensor, vocab_size: int) -> tuple[DecodeState, Window]:
    """The rows once the first `j` columns of the window hold `tokens` (`b j`), and the window of the next column.

    Args:
        vocab_size: no id in the rows is larger; the mask may not exist in the verifier.
    """
    j = tokens.shape[1]
    starts = [min(start + j, end - 1) for start, end in zip(window.starts, state.layout.end, strict=True)]
    columns = to_device(starts, state.tokens.device)[:, None]
    single = Window(columns, None, starts, [start + 1 for start in starts])
    written = state.tokens
    if j:
        first = window.part(slice(0, j))
        written = first.write(tokens, first.within(tokens >= 0), state.tokens)
    written = written.where(written < vocab_size, 0)
    return dataclasses.replace(state, tokens=written, frontier=columns[:, 0], steps=state.steps + j), single


@dataclass(frozen=True)
class PromptLookup(Stateless):
    """Proposes what followed the last n tokens where they stood before in the row. It runs no model.

    Args:
        longest: the largest n that is looked up, at least 1; shorter ones are tried down to 1.

    Source: prompt lookup decoding (Saxena 2023); `prompt_lookup_num_tokens` of transformers.
    """

    longest: int = 3

    def __post_init__(self) -> None:
        check_count("longest", self.longest, "It counts tokens")

    def propose(
        self,
        state: DecodeState,
        window: Window,
        marginals: Marginals | None,
        pair: ModelPair,
        sampling: Sampling,
    ) -> Proposed:
        width = window.columns.shape[1]
        guesses = []
        for row, t in enumerate(window.starts):
            ids = state.tokens[row, state.layout.padding[row] : t].tolist()
            guess = self._continuation(ids)[:width]
            guesses.append(guess + [NO_GUESS] * (width - len(guess)))
        return Proposed(to_device(guesses, state.tokens.device))

    def _continuation(self, ids: Sequence[int]) -> list[int]:
        """What followed the latest earlier occurrence of the longest matching end of `ids`."""
        ids = list(ids)
        for n in range(min(self.longest, len(ids) - 1), 0, -1):
            end = ids[-n:]
            for start in range(len(ids) - n - 1, -1, -1):
                if ids[start : start + n] == end:
                    return ids[start + n :]
        return []


#: Proposers by name.
PROPOSERS: dict[str, Any] = {
    "mixture": Mixture(),
    "verifier": Mixture(0.0),
    "drafter": Mixture(1.0),
    "lookup": PromptLookup(),
}
