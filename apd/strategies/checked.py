"""`Checked`: another strategy's tokens, exactly, in fewer drafter passes.

A strategy without memory is a function from a canvas to the next one: given the drafter's marginals of the canvas and
keyed noise, it decides which masks become which tokens. So the canvases to come can be guessed, drafted together in one
batched pass, and followed for as long as the strategy's next canvas is among them:

    1. Propose.  A proposer guesses the tokens of the next columns (`proposers.py`).
    2. Guess.    From them follow the canvases that the strategy may come to (`canvases.py`).
    3. Check.    One drafter pass over all of them; the strategy decides on each what it would commit there.
    4. Follow.   From the current canvas, go to the one that the strategy makes of it, while that one was drafted.
    5. Commit.   What the strategy decided on the way, and on the last canvas, which costs no further pass.

The last canvas' own decision is always committed, so a pass is never worse than one of the strategy's own steps.

Source: the idea of checking a diffusion LM's own guesses in one batch is that of FreeDave (arXiv:2510.00294) and Spiffy
(arXiv:2509.18085); keyed noise makes it exact at every temperature and for every proposer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from apd.config import check_count, check_fraction
from apd.decoding.commit import Proposal
from apd.decoding.pair import CanvasPair, Draft, Drafts, ModelPair, concatenate
from apd.decoding.probability import log_normalise
from apd.decoding.returned import check_session, name_of
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState, to_device
from apd.decoding.window import Window
from apd.strategies.base import Unmasking
from apd.strategies.canvases import Canvases, Guess, Way, follow, guess_canvases
from apd.strategies.proposers import (
    NO_GUESS,
    PROPOSERS,
    Marginals,
    Mixture,
    Proposer,
    allowed_guesses,
    checked_guesses,
)
from apd.strategies.unmasking import LeftToRight

_SEQUENTIAL = LeftToRight(1)


@dataclass(frozen=True)
class Checked:
    """Decodes as `reference` does, token for token, and lets the drafter check several guessed canvases per pass.

    Args:
        reference: any `Unmasking` strategy without memory. `LeftToRight(1)` is sequential decoding.
        proposer: what guesses tokens: `"mixture"` (p_D^R · p_AR^(1−R), R = 0.5), `"verifier"`, `"drafter"` (needs no
            verifier), `"lookup"` (neither), or a `Proposer`.
        num_checked: K, steps of the reference that are guessed per pass, at least 1. `"auto"`: as many as pay, by what was
            right in the row's last passes and by what a canvas costs.
        certainty: c in [0, 1]. A guessed token is taken without a canvas of its own if it is at least this probable that
            the drafter draws it: by its last marginals and by the proposer, who knows the noise (`Marginals.pooled`). 1 is
            exact.
        breadth: B, at least 1, for orders other than left to right. Above 1, canvases in which the likeliest steps come in
            another order are drafted too: all in which a step comes at most B − 1 places early, summed over the steps, and
            those of the leftmost masks. Up to 3, 5, 8, 13, … canvases per step.
        pass_columns: for `"auto"`, the fixed cost of a drafter pass, in columns. Reading all weights takes a GPU as long as
            computing about 128 columns; on a CPU, columns are all that counts.

    Attributes:
        adapts_window: False, since a window that follows the last step is unknown for guessed steps.

    Raises:
        TypeError, ValueError: a parameter is outside its range, or `reference` keeps a memory.
    """

    reference: Unmasking = _SEQUENTIAL
    proposer: str | Proposer = "mixture"
    num_checked: int | Literal["auto"] = 16
    certainty: float = 1.0
    breadth: int = 1
    pass_columns: int = 128
    needs_drafter = True
    adapts_window = False

    def __post_init__(self) -> None:
        if not isinstance(self.reference, Unmasking):
            raise TypeError(
                f"`reference` must be an `Unmasking` strategy without memory, got {self.reference!r}: only what follows "
                "from a canvas alone can be guessed. Use LeftToRight, Confidence, Threshold or the like."
            )
        if isinstance(self.proposer, str) and self.proposer not in PROPOSERS:
            names = ", ".join(map(repr, PROPOSERS))
            raise ValueError(f"`proposer` must be one of {names} or a `Proposer`, got {self.proposer!r}.")
        if isinstance(self.proposer, type):
            raise TypeError(f"`proposer` must be an instance, got the class {self.proposer.__name__}. Call it.")
        if not isinstance(self.proposer, str):
            for name in ("open", "needs_verifier", "reads_marginals"):
                if not hasattr(self.proposer, name):
                    raise TypeError(
                        f"`proposer` must have the attribute `{name}`, which {self.proposer!r} has not. See `apd.Proposer`."
                    )
        if self.num_checked != "auto":
            check_count("num_checked", self.num_checked, "Use 'auto' to follow what is accepted")
        check_fraction("certainty", self.certainty, "1 is exact")
        check_count("breadth", self.breadth, "1 is one canvas per guessed step")
        check_count("pass_columns", self.pass_columns, "It counts columns")

    @property
    def guesser(self) -> Proposer:
        """The proposer as an object."""
        found = PROPOSERS[self.proposer] if isinstance(self.proposer, str) else self.proposer
        reads_probs = self.certainty < 1 or self.num_checked == "auto"
        return found if reads_probs or type(found) is not Mixture else dataclasses.replace(found, gives_probs=False)

    @property
    def needs_verifier(self) -> bool:
        return self.guesser.needs_verifier

    @property
    def left_to_right(self) -> bool:
        return self.reference.left_to_right

    @property
    def is_random(self) -> bool:
        return self.reference.is_random

    @property
    def most_checked(self) -> int:
        """The most steps that are guessed per pass."""
        return _MOST_CHECKED if self.num_checked == "auto" else self.num_checked

    def most_canvases(self, masks: int) -> int:
        """The most canvases that a pass drafts of a row with so many masks: its own, and those of the guessed steps."""
        per_step = 1
        if self.breadth > 1 and self.reference != _SEQUENTIAL:
            # The ways in which steps come early are partitions of 0, …, B − 1 places; one more has the leftmost masks.
            ways = [1] + [0] * (min(self.breadth, _MOST_BREADTH) - 1)
            for early in range(1, len(ways)):
                for places in range(early, len(ways)):
                    ways[places] += ways[places - early]
            per_step = sum(ways) + 1
        return 1 + per_step * min(self.most_checked, masks - 1)

    def open(self, state: DecodeState) -> CheckedSession:
        return CheckedSession(self, state)


#: For `num_checked="auto"`: the most steps that are guessed, and the weight of earlier passes after one more.
_MOST_CHECKED, _MEMORY = 24, 0.8

#: Larger breadths are counted as this one, whose millions of canvases no machine drafts.
_MOST_BREADTH = 64

#: For `num_checked="auto"`: the probability of a guess whose proposer gives none.
_UNKNOWN = 0.5

#: Marginals count for nothing behind a token that had a lower probability: they tell little of what follows it.
_UNEXPECTED = 0.5


class CheckedSession:
    """The proposer's memory, and the drafter's marginals of the canvas that was accepted last.

    Attributes:
        expected: `b` bool, False where the marginals are those of a canvas whose own next token was unlikely.
        misses: `b 2` float32, how many wrong guesses were met and how many were expected by the proposer's probabilities;
            later passes count more.
    """

    def __init__(self, strategy: Checked, state: DecodeState) -> None:
        self.strategy = strategy
        self.proposer = strategy.guesser.open(state)
        check_session(self.proposer, name_of(strategy.guesser, "open"), "propose")
        self.marginals: Marginals | None = None
        self.misses = torch.ones(len(state.rows), 2, device=state.tokens.device)
        self.expected = torch.ones_like(state.done)
        self.most = strategy.most_checked
        self.keeps_marginals = strategy.guesser.reads_marginals or strategy.certainty < 1 or not strategy.left_to_right

    def propose(self, state: DecodeState, window: Window, pair: ModelPair, sampling: Sampling) -> Proposal:
        reference = self.strategy.reference

        # 1. Propose.
        guess, probs = self._guess(state, window, pair, sampling)

        # 2. Guess.
        canvases = guess_canvases(
            reference,
            state,
            guess,
            pair,
            sampling,
            depths=self._depths(guess, probs, state, window),
            breadth=self.strategy.breadth,
        )

        # 3. Check.
        drafter = pair.of_canvases(canvases.rows)
        decision = reference.propose(canvases.states, canvases.windows, drafter, sampling)

        # 4. Follow.
        certain, marginals = None, None
        if self.strategy.certainty < 1:
            marginals = self._own_marginals(canvases, drafter, sampling)
            tokens, guessed = (canvases.of_rows(each, marginals.columns) for each in (canvases.tokens, probs))
            probable = marginals.pooled(tokens, guessed) >= self.strategy.certainty
            certain = canvases.local(probable & marginals.known)
        counts_steps = sampling.redraw or reference.counts_steps
        way = follow(canvases, decision, counts_steps=counts_steps, certain=certain)

        # 5. Commit.
        proposal = self._proposal(canvases, decision, way, marginals, pair, sampling)
        self._count(canvases, way, probs)
        self.marginals = self._marginals_behind(canvases, way, drafter, sampling) if self.keeps_marginals else None
        if marginals is not None:
            self.expected = self._is_expected(canvases, decision, way, marginals)
        return proposal

    def _guess(self, state: DecodeState, window: Window, pair: ModelPair, sampling: Sampling) -> tuple[Guess, Tensor]:
        """The proposer's tokens, what the last marginals say of them, and how sure it is of each (NaN: unknown): `b u`."""
        near = Window.of_rows(state, state.columns_behind([self.most] * len(state.rows)))
        size = max(end - t for t, end in zip(state.layout.frontier, state.layout.end, strict=True))
        # The row with the widest window may have left.
        marginals = None if self.marginals is None else self.marginals.first(window.columns.shape[1])
        proposed = self.proposer.propose(state, near, marginals, pair, sampling)
        tokens, probs = checked_guesses(proposed, name_of(self.proposer, "propose"), near, pair)
        tokens = pad(tokens, (0, size - tokens.shape[1]), value=NO_GUESS)
        probs = pad(probs, (0, size - probs.shape[1]), value=torch.nan)
        known = Window.of_rows(state, state.layout.end)
        is_known = known.within(known.gather(state.decided))
        tokens = torch.where(is_known, known.gather(state.tokens), tokens)
        tokens = allowed_guesses(tokens, is_known, state, pair)
        measure = torch.zeros(tokens.shape, device=tokens.device)
        measured = certain = likely = torch.zeros_like(tokens, dtype=torch.bool)
        if marginals is None:
            if self.strategy.certainty < 1:
                likely = probs >= self.strategy.certainty
            return Guess(tokens, measure, measured, certain, likely, self._ends(tokens, known, state, pair)), probs
        width = marginals.tokens.shape[1]
        rest = (0, size - width)
        measured = pad(marginals.known, rest)
        if not self.strategy.left_to_right:
            drawn = pad(marginals.tokens.masked_fill(~marginals.known, NO_GUESS), rest, value=NO_GUESS)
            tokens = torch.where(tokens == NO_GUESS, drawn, tokens)
            part = window.part(slice(0, width))
            draft = Draft(
                tokens[:, :width].clamp(min=0),
                ~marginals.known,
                marginals.logits,
                sampling.warp(marginals.logits),
                sampling.noise(state, part),
            )
            measure = pad(self.strategy.reference.measure(draft, part), rest)
        if self.strategy.certainty < 1:
            # A new row has no marginals; there the proposer's own probabilities say what will probably be certain.
            expected = pad(marginals.pooled(tokens[:, :width], probs[:, :width]), rest)
            certain = measured & (expected >= self.strategy.certainty) & self.expected[:, None]
            likely = torch.where(measured, expected, probs) >= self.strategy.certainty
        return Guess(tokens, measure, measured, certain, likely, self._ends(tokens, known, state, pair)), probs

    @staticmethod
    def _ends(tokens: Tensor, columns: Window, state: DecodeState, pair: ModelPair) -> Tensor:
        """True for tokens that end their row, `b u` bool: stop tokens behind the last hole."""
        stops = torch.isin(tokens, pair.support.processing.stop_token_ids)
        return stops & (columns.columns >= state.given_end[:, None])

    def _depths(self, guess: Guess, probs: Tensor, state: DecodeState, window: Window) -> Tensor:
        """K of each row: `b` int64. `probs` is `b u`, how sure the proposer is of each token."""
        if self.strategy.num_checked != "auto":
            return torch.full_like(state.steps, min(self.most, probs.shape[1]))  # a step decides a mask at least
        # k guesses commit one token and as many more as are right in a row: 1 + a_1 + a_1 a_2 + …
        probs = probs[:, : self.most].nan_to_num(_UNKNOWN)
        right = (1 - (1 - probs) * (self.misses[:, :1] / self.misses[:, 1:])).clamp(0, 1)
        tokens = 1 + pad(right.cumprod(1).cumsum(1), (1, 0))
        columns = to_device(window.ends, probs.device)[:, None] - state.padding[:, None]
        drafted = 1 + pad((~guess.likely[:, : self.most]).cumsum(1), (1, 0)) * 2 ** min(self.strategy.breadth - 1, 8)
        cost = self.strategy.pass_columns + drafted * columns
        return (tokens / cost).argmax(1)

    def _is_expected(self, canvases: Canvases, decision: Proposal, way: Way, marginals: Marginals) -> Tensor:
        """Whether the tokens that the last canvas of each row added were likely by its own marginals: `b` bool."""
        probs = marginals.probs(decision.tokens[:, : marginals.tokens.shape[1]])
        added = (decision.chosen & canvases.windows.inside)[:, : probs.shape[1]]
        return ((probs >= _UNEXPECTED) | ~added).all(1)[way.last]

    def _count(self, canvases: Canvases, way: Way, probs: Tensor) -> None:
        """Count wrong guesses that were met, and those that were to be expected among the guesses that were checked."""
        right = way.steps - 1
        met = (right < canvases.exists[:, : canvases.certain.shape[1] + 1].sum(1) - 1).float()
        checked = torch.arange(probs.shape[1], device=probs.device) < (right + met)[:, None]
        expected = ((1 - probs.nan_to_num(_UNKNOWN)) * checked).sum(1)
        self.misses = 1 - _MEMORY + _MEMORY * self.misses + torch.stack([met, expected], 1)

    def _columns_near(self, state: DecodeState) -> int:
        """Columns from the frontier on that have the next K + 1 masks, of the row that needs most."""
        ends = state.columns_behind([self.most + 1] * len(state.rows))
        near = [end - t for t, end in zip(state.layout.frontier, ends, strict=True)]
        return max(self.most + 1, *near) if state.has_holes else self.most + 1

    def _own_marginals(self, canvases: Canvases, drafter: CanvasPair, sampling: Sampling) -> Marginals:
        """What the pass says of the next columns of every canvas: rows are canvases here."""
        near = self._columns_near(canvases.states)
        window = canvases.windows.part(slice(0, min(near, canvases.windows.columns.shape[1])))
        n, width = window.columns.shape
        number = torch.arange(n, device=window.columns.device)
        position = torch.arange(width, device=number.device).expand(n, -1)
        return _marginals(
            drafter.draft_again(number, position, canvases.states, window, sampling), window.columns, window.inside
        )

    def _marginals_behind(
        self, canvases: Canvases, way: Way, drafter: CanvasPair, sampling: Sampling
    ) -> Marginals | None:
        """What the pass says of the columns that are still undecided behind the last canvas of each row."""
        state, columns = canvases.state, canvases.columns
        after = dataclasses.replace(state, steps=state.steps + way.steps).with_decided(
            columns.write(way.tokens, way.decided & columns.inside & (way.tokens >= 0), state.tokens),
            columns.write(way.decided, columns.inside, state.decided),
        )
        window = drafter.policy.window(after)
        if self.strategy.left_to_right:
            window = window.part(slice(0, self._columns_near(after)))
        if not window.columns.shape[1]:
            return None
        seen = canvases.windows
        starts = to_device([seen.starts, seen.ends], state.tokens.device)[:, way.last]
        columns_seen = window.columns
        position = columns_seen - starts[0][:, None]
        known = window.within(columns_seen < starts[1][:, None])
        position = position.clamp(0, seen.columns.shape[1] - 1)
        drafts = drafter.draft_again(way.last, position, after, window, sampling)
        return _marginals(drafts, columns_seen, known)

    def _proposal(
        self,
        canvases: Canvases,
        decision: Proposal,
        way: Way,
        marginals: Marginals | None,
        pair: ModelPair,
        sampling: Sampling,
    ) -> Proposal:
        """Everything that was decided on the way, as one proposal; `marginals` are the canvases' own."""
        state, rows = canvases.state, canvases.rows
        ends = list(state.layout.frontier)
        for row, end in zip(rows.tolist(), canvases.windows.ends, strict=True):
            ends[row] = max(ends[row], end)
        window = Window.of_rows(state, ends)
        width = window.columns.shape[1]
        columns = slice(0, width)
        chosen = (way.decided & ~canvases.base)[:, columns]
        guess = canvases.tokens[:, columns]
        tokens = torch.where(chosen, way.tokens[:, columns], pair.mask_token_id)
        decisive = canvases.local(decision.decisive & canvases.windows.inside)[way.last][:, columns]
        fault = canvases.local(decision.fault)[way.last][:, columns]

        # Of a token that no canvas has checked, the canvas before it is all that is known, or else the last pass.
        def recorded(values: Tensor | None, unchecked: Callable[[Marginals], Tensor]) -> Tensor | None:
            if values is None:
                return None
            gathered = values.new_zeros(*canvases.tokens.shape, *values.shape[2:])
            if self.marginals is not None and marginals is not None:
                known = unchecked(self.marginals.first(gathered.shape[1]))
                gathered[:, : known.shape[1]] = known
            if marginals is not None:
                own = unchecked(marginals)
                own = own.expand(*own.shape[:2], *values.shape[2:])
                gathered = canvases.collect(own, canvases.before_next(way.visited)[:, : own.shape[1]], gathered)
            return canvases.collect(values, decision.chosen & way.visited[:, None], gathered)[:, columns]

        def probs(of: Marginals) -> Tensor:
            return of.probs(
                canvases.of_rows(canvases.tokens, of.columns)
                if of is marginals
                else canvases.tokens[:, : of.tokens.shape[1]]
            )[..., None]

        def logits(of: Marginals) -> Tensor:
            return log_normalise(of.logits)

        def scores(of: Marginals) -> Tensor:
            return sampling.warp(logits(of)).dense(pair.support.vocab_size)

        return Proposal(
            tokens=tokens,
            chosen=chosen,
            decisive=decisive | chosen,
            fault=fault,
            draft=torch.where(guess == NO_GUESS, tokens, guess),
            models=decision.models,
            probs=recorded(decision.probs, probs),
            logits=recorded(decision.logits, logits),
            scores=recorded(decision.scores, scores),
            window=window,
            steps=way.steps,
        )

    def select(self, rows: Tensor) -> None:
        self.proposer.select(rows)
        self.misses = self.misses.index_select(0, rows)
        self.expected = self.expected.index_select(0, rows)
        if self.marginals is not None:
            self.marginals = self.marginals.select(rows)

    def join(self, state: DecodeState) -> None:
        self.proposer.join(state)
        self.expected = pad(self.expected, (0, len(state.rows) - len(self.expected)), value=True)
        self.misses = pad(self.misses, (0, 0, 0, len(state.rows) - len(self.misses)), value=1.0)
        if self.marginals is not None:
            self.marginals = self.marginals.widened(len(state.rows))


def _marginals(drafts: Drafts, columns: Tensor, known: Tensor) -> Marginals:
    parts = [draft for _, draft in drafts]
    known = known & ~concatenate([draft.fault for draft in parts])
    return Marginals(
        columns, known, concatenate([draft.tokens for draft in parts]), concatenate([draft.logits for draft in parts])
    )
