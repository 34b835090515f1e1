"""A completion with a suffix: the lengths of the hole that are tried."""

from __future__ import annotations

from apd.config import KNOBS
from apd.generation.infilling import Encoded, encode_parts
from apd.serve.engine.facts import Facts

#: Most lengths of a hole that are tried.
MOST_LENGTHS = 8


def lengths_of_hole(max_tokens: int) -> range:
    """The lengths that are tried, the same distance apart, up to `max_tokens` or just below."""
    step = -(-max_tokens // MOST_LENGTHS)
    return range(step, max_tokens + 1, step)


def holes_of(prompt: str, suffix: str, max_tokens: int, facts: Facts) -> list[Encoded]:
    """Prompt, hole and suffix as ids, for every length."""
    return [
        encode_parts([part for part in (prompt, n, suffix) if part != ""], facts.tokenizer, facts.mask_token_id)
        for n in lengths_of_hole(max_tokens)
    ]


def strategy_for_holes(facts: Facts, given: object) -> dict[str, str]:
    """The strategy with which `infill` decodes holes of unknown length, unless a strategy or a knob was given."""
    if facts.strategy is not None or set(given) & {"strategy", *KNOBS}:  # type: ignore[call-overload]
        return {}
    return {"strategy": "checked" if facts.has_verifier else "checked:proposer=drafter"}
