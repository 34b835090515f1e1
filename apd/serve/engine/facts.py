"""`Facts`: what checks of requests and texts of answers need to know of a sampler, without its models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apd.config import APDConfig
from apd.included import DRAFTER_DIR
from apd.sampler import APDSampler


@dataclass(frozen=True)
class Facts:
    """What is known of a sampler where its models are not.

    Attributes:
        tokenizer: of both models.
        vocab_size: ids below it exist in both.
        mask_token_id: no prompt may have it.
        max_length: most tokens of a row; `None` for no limit.
        config: the knobs.
        strategy: the strategy as text; `None` if it is APD.
        has_verifier: there is a verifier.
        is_included: it is the included pair.
    """

    tokenizer: Any
    vocab_size: int
    mask_token_id: int
    max_length: int | None
    config: APDConfig
    strategy: str | None
    has_verifier: bool
    is_included: bool

    @classmethod
    def of(cls, sampler: APDSampler) -> Facts:
        drafter, verifier = sampler.drafter, sampler.verifier
        lengths = [drafter.max_length, None if verifier is None else verifier.max_length]
        name = getattr(getattr(getattr(drafter, "model", None), "config", None), "name_or_path", None)
        return cls(
            tokenizer=sampler.tokenizer,
            vocab_size=sampler.vocab_size,
            mask_token_id=drafter.mask_token_id,
            max_length=min((length for length in lengths if length is not None), default=None),
            config=sampler.config,
            strategy=None if sampler.strategy is None else repr(sampler.strategy),
            has_verifier=verifier is not None,
            is_included=name == str(DRAFTER_DIR),
        )
