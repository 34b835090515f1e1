"""The trace of one row, and the counts that every picture of it needs."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["RowTrace", "corrected", "counts", "drafted_per_step", "number"]


@dataclass
class RowTrace:
    """One row's decode, step by step. Positions count new tokens from 0.

    Attributes:
        tokens: ids of the new tokens, the stop token included.
        steps: the step, from 0, that committed each of them.
        target_probs: untempered p_T of each.
        drafter_probs: untempered p_D of each; empty when no drafter ran.
        verifier_probs: untempered p_AR of each; empty when no verifier ran.
        starts: per step, the position of the first drafted mask.
        drafts: per step, the drafted ids from there on; what was not committed was rejected.
        committed: per step, how many tokens were committed.
        prompt: ids of the prompt, without padding.
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


def corrected(row: RowTrace) -> list[bool]:
    """One Boolean per token: true if another token was drafted at its position in the same step."""
    return [
        row.drafts[step][position - row.starts[step]] != token
        for position, (token, step) in enumerate(zip(row.tokens, row.steps, strict=True))
    ]


def drafted_per_step(row: RowTrace) -> list[int]:
    """Masks drafted at each step. Any-order windows also hold decided columns, which do not count."""
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
