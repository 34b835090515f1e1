"""The canvases that `Checked` drafts in one pass, and the way that its reference goes through them.

The *chain* is the likeliest canvas after 0, 1, 2, … steps of the reference. Other canvases may stand beside it. A step of
the chain that adds certain tokens only needs no canvas to start from.

Columns are counted from each row's frontier: `u` of them, up to the end of the row with most masks. A canvas is its row
with some of the guessed tokens written, so the mask of the columns that are decided on it, `u` bool, says which one it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from apd.decoding.commit import VALID, Proposal
from apd.decoding.pair import ModelPair
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState
from apd.decoding.window import Window
from apd.strategies.base import Unmasking
from apd.strategies.proposers import NO_GUESS
from apd.strategies.unmasking import LeftToRight


@dataclass(frozen=True)
class Guess:
    """What is guessed of the masks of each row, by column from the frontier on.

    Attributes:
        tokens: `b u` int64, `NO_GUESS` where there is none; decided columns hold their token.
        measure: `b u` float32, the reference's measure of each guessed token under the drafter's last marginals.
        measured: `b u` bool, False where there is no such measure.
        certain: `b u` bool, tokens that are taken without a check.
        ends: `b u` bool, tokens that end their row: stop tokens that are not in a hole.
        likely: `b u` bool, tokens that need no canvas of their own: certain ones, and those that will probably turn out to
            be certain by the marginals of an earlier canvas of the pass.
    """

    tokens: Tensor
    measure: Tensor
    measured: Tensor
    certain: Tensor
    likely: Tensor
    ends: Tensor


@dataclass(frozen=True)
class Canvases:
    """Guessed canvases of every row: g of them, first those of the chain, then others. Some are drafted.

    Attributes:
        state: the rows.
        columns: their undecided stretch, all columns from the frontier to the row's end: `b u`.
        base: `b u` bool, what is decided already, and columns behind the row's end.
        tokens: `b u` int64, see `Guess`.
        decided: `b g u` bool, the decided columns of each canvas.
        exists: `b g` bool; rows have different numbers of canvases.
        drafted: `b g` bool.
        certain: `b k` bool, steps of the chain that add certain tokens only.
        depth: `b g` int64, steps of the reference from the current canvas.
        index: `b g` int64, the number of each drafted canvas.
        first: `b` int64, the first drafted canvas of the chain.
        rows, at: `n` int64, row and canvas of each drafted one.
        states: the drafted canvases as n rows.
        windows: the windows that the reference has on them.
    """

    state: DecodeState
    columns: Window
    base: Tensor
    tokens: Tensor
    decided: Tensor
    exists: Tensor
    drafted: Tensor
    certain: Tensor
    depth: Tensor
    index: Tensor
    first: Tensor
    rows: Tensor
    at: Tensor
    states: DecodeState
    windows: Window

    def is_added(self, where: Tensor, rows: Tensor) -> Tensor:
        """Whether every token that a step of the chain adds is in `where`.

        Args:
            where: `n u` bool.
            rows: `n` int64.
        Returns:
            `n k` bool, for each step.
        """
        k = self.certain.shape[1]
        adds = self.decided[:, 1 : k + 1] & ~self.decided[:, :k]
        return (where[:, None] | ~adds[rows]).all(-1) & self.exists[rows, 1 : k + 1]

    def local(self, values: Tensor) -> Tensor:
        """Values at the first positions of the canvases' windows (`n m`) at the columns of the rows: `n u`, 0 elsewhere."""
        size = self.tokens.shape[1]
        position = self._positions(self.windows.columns[:, : values.shape[1]])
        return values.new_zeros(len(values), size + 1).scatter_(1, position, values)[:, :size]

    def of_rows(self, values: Tensor, columns: Tensor) -> Tensor:
        """Values of the rows (`b u`, such as `tokens`) at columns of the canvases: `n m` int64 → `n m`."""
        return values[self.rows].gather(1, self._positions(columns).clamp(max=values.shape[1] - 1))

    def before_next(self, visited: Tensor) -> Tensor:
        """Positions of visited canvases that are left of the frontier of the row's next visited one: `n` bool → `n m` bool."""
        far = self.state.width
        key = self.rows * (2 * far) + self.states.frontier
        end = torch.iinfo(key.dtype).max
        later = torch.where(visited, key, end).flip(0).cummin(0).values.flip(0)
        bound = pad(later[1:], (0, 1), value=end) - self.rows * (2 * far)
        return visited[:, None] & self.windows.inside & (self.windows.columns < bound[:, None])

    def collect(self, values: Tensor, where: Tensor, otherwise: Tensor) -> Tensor:
        """Values of several canvases in one row, each column from the canvas that it is taken from.

        Args:
            values: `n m …`, at the first positions of the canvases' windows.
            where: `n m` bool, what is taken; each column from one canvas at most.
            otherwise: `b u …`, the values of all other columns.
        """
        size, position = self.tokens.shape[1], self._positions(self.windows.columns[:, : where.shape[1]])
        slot = (self.rows[:, None] * size + position).masked_fill(~where, otherwise.shape[0] * size)
        flat = pad(otherwise.flatten(0, 1), (*[0, 0] * (otherwise.dim() - 2), 0, 1))
        flat[slot.flatten()] = values.flatten(0, 1)
        return flat[:-1].view_as(otherwise)

    def _positions(self, columns: Tensor) -> Tensor:
        """Columns of the canvases, counted from the row's frontier; u behind the row's end: `n m` → `n m` int64."""
        inside = self.windows.inside[:, : columns.shape[1]]
        return (columns - self.columns.columns[self.rows, :1]).masked_fill(~inside, self.tokens.shape[1])


@dataclass(frozen=True)
class Way:
    """The canvases that the reference visits.

    Attributes:
        visited: `n` bool.
        last: `b` int64, the last one of each row, among the drafted ones.
        tokens: `b u` int64, the tokens at the end of the way.
        decided: `b u` bool, the decided columns there.
        steps: `b` int64, steps of the reference on the way.
    """

    visited: Tensor
    last: Tensor
    tokens: Tensor
    decided: Tensor
    steps: Tensor


def guess_canvases(
    reference: Unmasking,
    state: DecodeState,
    guess: Guess,
    pair: ModelPair,
    sampling: Sampling,
    *,
    depths: Tensor,
    breadth: int,
) -> Canvases:
    """The canvases that the reference may come to in its next steps.

    Args:
        reference: decides on each canvas.
        state: the rows.
        guess: the tokens.
        depths: `b` int64, steps that are guessed in each row.
        breadth: see `Checked`.
    """
    columns = Window.of_rows(state, state.layout.end)
    base = ~columns.inside | columns.gather(state.decided)
    most = int(depths.max())
    if type(reference) is LeftToRight and reference.tokens_per_step == 1:
        chain, exists = _prefixes(guess, base, most)
        others: list[tuple[Tensor, Tensor, int]] = []
    else:
        chain, exists, others = _simulated(reference, state, columns, guess, base, pair, sampling, most, breadth)
    level = torch.arange(most + 1, device=base.device)
    exists = exists & (level <= depths[:, None])

    # A canvas is left out if the next one exists and probably adds certain tokens only. The first one that is not followed by
    # certain tokens is always drafted.
    adds = chain[:, 1:] & ~chain[:, :-1]
    certain, likely = ((tokens[:, None] | ~adds).all(-1) & exists[:, 1:] for tokens in (guess.certain, guess.likely))
    has_mask = exists & ~_is_done(chain, guess)
    start = pad(certain, (0, 1)).long().cumprod(1).sum(1, keepdim=True)
    start = start.minimum(has_mask.sum(1, keepdim=True) - 1).clamp(min=0)
    drafted = has_mask & (~pad(likely, (0, 1)) | (level == start))
    drafted[:, 0] |= ~has_mask[:, 0]  # a finished row

    decided, depth = chain, level.expand(len(base), -1)
    if others:
        more = torch.stack([mask for mask, _, _ in others], 1)
        there = torch.stack([is_there for _, is_there, _ in others], 1)
        deep = level.new_tensor([number for _, _, number in others]).expand(len(base), -1)
        there = there & (deep <= depths[:, None])
        decided, exists, depth = (
            torch.cat([chain, more], 1),
            torch.cat([exists, there], 1),
            torch.cat([depth, deep], 1),
        )
        equal = (decided[:, :, None] == decided[:, None]).all(-1) & exists[:, None]
        number = torch.arange(decided.shape[1], device=base.device)
        exists = exists & ~(equal & (number < number[:, None])).any(-1)
        drafted = torch.cat([drafted, (exists & ~_is_done(decided, guess))[:, most + 1 :]], 1)
    rows, at = drafted.nonzero(as_tuple=True)
    index = (drafted.flatten().cumsum(0) - 1).view_as(drafted)
    first = index.gather(1, start).squeeze(1)

    mine = Window(columns.columns[rows], columns.inside[rows], (), ())
    states = state.select(rows)
    written = decided[rows, at]
    states = dataclasses.replace(states, steps=states.steps + depth[rows, at]).with_decided(
        mine.write(guess.tokens[rows], written & ~base[rows], states.tokens),
        mine.write(written, mine.inside, states.decided),
    )
    windows = pair.policy.window(states)
    parts = (base, guess.tokens, decided, exists, drafted, certain, depth, index, first, rows, at, states, windows)
    return Canvases(state, columns, *parts)


def _prefixes(guess: Guess, base: Tensor, depth: int) -> tuple[Tensor, Tensor]:
    """The canvases of sequential decoding: the first 0, 1, … `depth` guessed tokens. `b g u` bool and `b g` bool."""
    place = ((~base).cumsum(1) - 1)[:, None]  # decided columns, such as given ones between two holes, are no guesses
    level = torch.arange(depth + 1, device=base.device)[:, None]
    chain = base[:, None] | (place < level)
    # A canvas exists if every token on it is guessed, and if the one before it has a mask.
    missing = (~base & (guess.tokens == NO_GUESS))[:, None] & (place < level)
    exists = ~missing.any(-1) & ~pad(_is_done(chain, guess)[:, :-1], (1, 0))
    exists[:, 0] = True
    return chain, exists


class _Node(NamedTuple):
    """A guessed canvas from which further ones are guessed.

    Attributes:
        decided: `b u` bool.
        exists: `b` bool, rows in which it exists and has a mask left.
        passed: `b u` bool, masks that were to come earlier and that it leaves out.
        skipped: the number of steps that were to add them. Every further step passes over them.
        left: what further steps may pass over in sum.
    """

    decided: Tensor
    exists: Tensor
    passed: Tensor
    skipped: int
    left: int


def _simulated(
    reference: Unmasking,
    state: DecodeState,
    columns: Window,
    guess: Guess,
    base: Tensor,
    pair: ModelPair,
    sampling: Sampling,
    depth: int,
    breadth: int,
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor, int]]]:
    """The canvases that the reference would go through if the marginals stayed what they were.

    Returns:
        The likeliest canvas after 0, 1, … steps, `b g u` bool; whether it exists, `b g` bool; and others beside them, each
        with its mask `b u`, whether it exists, `b`, and its number of steps: those whose steps pass over at most
        `breadth` − 1 steps of the chain in sum, and those of the leftmost masks. With the masks of the chain numbered in
        its order these are, after two steps, {1, 3} for a breadth of 2, and {2, 3} and {1, 4} besides for 3.
    """
    # Where nothing is measured yet, in the first step of a row, every guessed token is a candidate.
    usable = (guess.measured | ~guess.measured.any(1, keepdim=True)) & (guess.tokens != NO_GUESS)
    chain, there, others = [base], [torch.ones_like(state.done)], []
    nodes = [_Node(base, there[0], torch.zeros_like(base), 0, breadth - 1)]
    for step in range(depth):
        behind: list[_Node] = []
        for node in nodes:
            canvas = dataclasses.replace(state, steps=state.steps + step).with_decided(
                columns.write(guess.tokens, node.decided & ~base, state.tokens),
                columns.write(node.decided, columns.inside, state.decided),
            )
            window = pair.policy.window(canvas)
            position = (window.columns - columns.columns[:, :1]).clamp(0, base.shape[1] - 1)
            measure = guess.measure.gather(1, position)
            passed, skipped = node.passed, node.skipped
            while skipped <= node.left:
                candidate = window.within((usable & ~node.decided & ~passed).gather(1, position))
                chosen = reference.chosen(measure, candidate, canvas, window, sampling)
                adds = columns.inside & window.write(chosen, window.inside, torch.zeros_like(state.decided)).gather(
                    1, columns.columns
                )
                after, follows = node.decided | adds, node.exists & adds.any(1)
                if not behind:
                    chain.append(after)
                    there.append(follows)
                elif follows.any():
                    others.append((after, follows, step + 1))
                else:
                    break
                behind.append(_Node(after, follows & ~_is_done(after, guess), passed, skipped, node.left - skipped))
                passed, skipped = passed | adds, skipped + 1
        nodes = behind
    if breadth > 1:
        left, exists = base, torch.ones_like(state.done)
        for step in range(depth):
            first = ~left & ((~left).cumsum(1) == 1)
            exists = exists & (usable & first).any(1)
            left = left | first
            others.append((left, exists, step + 1))
            exists = exists & ~_is_done(left, guess)
    return torch.stack(chain, 1), torch.stack(there, 1), others


def _is_done(decided: Tensor, guess: Guess) -> Tensor:
    """Whether these decided columns leave nothing to decode: no mask, or none before a stop token: `b … u` → `b …` bool."""
    settled = (~decided).cumsum(-1) == 0
    ends = guess.ends.view(len(guess.ends), *[1] * (decided.dim() - 2), -1) & settled
    return decided.all(-1) | ends.any(-1)


def follow(canvases: Canvases, decision: Proposal, *, counts_steps: bool, certain: Tensor | None = None) -> Way:
    """The way of the reference through the canvases.

    Args:
        decision: what it decides on each drafted canvas.
        counts_steps: a canvas is the reference's only if it was reached in as many steps as it was drafted for.
        certain: `n u` bool, guessed tokens that are certain by a canvas' own marginals; `None`: none.
    """
    rows, at, k = canvases.rows, canvases.at, canvases.certain.shape[1]
    chosen = canvases.local(decision.chosen & canvases.windows.inside)
    tokens = torch.where(chosen, canvases.local(decision.tokens), canvases.tokens[rows])
    decided = canvases.decided[rows, at] | chosen
    steps = canvases.depth[rows, at] + 1

    # The canvas that each decision leads to, if there is one.
    agrees = (tokens == canvases.tokens[rows]).all(1) & chosen.any(1)
    agrees = agrees & ~((decision.fault != VALID) & decision.decisive).any(1)
    leads = (decided[:, None] == canvases.decided[rows]).all(-1) & canvases.exists[rows] & agrees[:, None]
    if counts_steps:
        leads = leads & (canvases.depth[rows] == steps[:, None])
    arrives, target = leads.long().max(1)

    # Along the chain it goes on over certain tokens, up to a canvas that is drafted.
    passes = canvases.certain[rows]
    if certain is not None:
        passes = passes | canvases.is_added(certain, rows)
    level = torch.arange(k + 1, device=rows.device)
    halts = (canvases.drafted[rows, : k + 1] | ~pad(passes, (0, 1))) & (level >= target[:, None])
    target = torch.where(target <= k, halts.long().argmax(1), target)
    goes_on = (arrives > 0) & canvases.drafted[rows, target]
    following = torch.where(goes_on, canvases.index[rows, target], -1)
    ends_there = ((arrives > 0) & ~goes_on)[:, None]
    tokens = torch.where(ends_there, canvases.tokens[rows], tokens)
    decided = torch.where(ends_there, canvases.decided[rows, target], decided)
    steps = torch.where(ends_there[:, 0], canvases.depth[rows, target], steps)

    last = canvases.first
    visited = torch.zeros_like(rows, dtype=torch.bool).index_fill_(0, last, True)
    for _ in range(canvases.decided.shape[1]):
        further = following[last]
        if not (further >= 0).any():
            break
        last = torch.where(further >= 0, further, last)
        visited = visited.index_fill(0, last, True)
    return Way(visited, last, tokens[last], decided[last], steps[last])
