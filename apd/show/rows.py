"""The trace of one row, and the counts derived from it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field


@dataclass
class RowTrace:
    """One row's decode, step by step. Positions count new tokens from 0.

    Attributes:
        tokens: ids of the new tokens, the stop token included.
        steps: per token, the step that committed it, from 0.
        target_probs: per token, p_T before temperature and truncation.
        drafter_probs: per token, p_D likewise; empty if no drafter ran.
        verifier_probs: per token, p_AR likewise; empty if no verifier ran.
        starts: per step, the position of the first drafted mask.
        drafts: per step, the drafted ids from there on; those not committed were rejected.
        committed: per step, number of committed tokens.
        prompt: ids of the prompt, without padding; with holes, their masks and what is given behind them.
        columns: per token, its column counted from the prompt's first; between holes, given tokens stand.
    """

    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    target_probs: list[float] = field(default_factory=list)
    drafter_probs: list[float] = field(default_factory=list)
    verifier_probs: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    prompt: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)


def given_tokens(row: RowTrace) -> list[list[int]]:
    """Ids of the given tokens before each generated one, from the one before it on, and of those behind the last.

    One list more than there are generated tokens. The first is the prompt, with holes what stands before the first of them.
    """
    start = len(row.prompt)
    columns = row.columns or list(range(start, start + len(row.tokens)))  # a trace made by hand may lack them
    given = [row.prompt[a + 1 : b] for a, b in itertools.pairwise([-1, *columns, start])]
    if len(given) > 1 and columns[0] < start:  # masks that a stop token left over
        given[-1] = [token for token in given[-1] if token != row.prompt[columns[0]]]
    return given


def follows_given(row: RowTrace) -> list[bool]:
    """One Boolean per token: true if given tokens stand between it and the generated token before it."""
    return [i > 0 and bool(given) for i, given in enumerate(given_tokens(row)[:-1])]


def corrected(row: RowTrace) -> list[bool]:
    """One Boolean per token: true if another token was drafted at its position in the same step."""
    return [
        row.drafts[step][position - row.starts[step]] != token
        for position, (token, step) in enumerate(zip(row.tokens, row.steps, strict=True))
    ]


def drafted_per_step(row: RowTrace) -> list[int]:
    """Masks drafted at each step; decided columns in the windows of any-order strategies do not count."""
    step_of = dict(enumerate(row.steps))
    return [
        sum(step_of.get(start + i, step) >= step for i in range(len(draft)))
        for step, (start, draft) in enumerate(zip(row.starts, row.drafts, strict=True))
    ]


def counts(row: RowTrace) -> str:
    """Tokens, steps and their ratio in words."""
    tokens, steps = len(row.tokens), len(row.committed)
    rate = f", {tokens / steps:.1f} per drafter forward" if steps else ""
    return f"{number(tokens, 'token')} in {number(steps, 'step')}{rate}"


def number(count: int, noun: str) -> str:
    """A count with its noun, in the plural unless the count is 1.

    Example:
        >>> number(1, "token"), number(2, "token")
        ('1 token', '2 tokens')
    """
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
