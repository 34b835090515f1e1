"""`check` of a part of one's own: which part it is, and its report."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

from apd.inspection.bed import NEW_TOKENS, Trial, run
from apd.inspection.own_families import family_laws
from apd.inspection.own_models import drafter_laws, verifier_laws
from apd.inspection.own_strategies import policy_laws, proposer_laws, rule_laws, strategy_laws
from apd.inspection.report import Finding, Report
from apd.models.spec import ModelSpec
from apd.sampler import APDSampler

#: Seconds within which each law of a part must come back.
SECONDS = 8.0


def part_report(part: Any, *, new_tokens: int | None, seconds: float, kind: str | None = None) -> Report:
    """The report of a drafter, verifier, strategy, acceptance rule, window policy, proposer or family.

    Args:
        new_tokens: tokens of a row, for models that give probabilities of complete answers of one length only.
        seconds: see `SECONDS`.
        kind: what it is, where that is known; by default what it looks like.

    Raises:
        TypeError: it is none of these.
    """
    kind = kind or _kind_of(part)
    laws = _laws_of(kind, part, new_tokens or NEW_TOKENS)
    trial = Trial(part.name if isinstance(part, ModelSpec) else type(part).__name__)
    start = time.perf_counter()
    found = list(run(trial, laws, seconds))
    took = time.perf_counter() - start
    name = f"{kind.capitalize()}: contract and laws"
    return Report(_subject(part, kind), {name: found}, {name: took})


def own_parts(sampler: APDSampler, *, new_tokens: int | None, seconds: float) -> dict[str, Sequence[Finding]]:
    """The findings about the parts of a sampler that are not of this package: strategy, rule, window policy, proposer."""
    given = [
        sampler.strategy,
        getattr(sampler.strategy, "proposer", None),
        sampler.config.acceptance if sampler.strategy is None else getattr(sampler.strategy, "rule", None),
        sampler.config.window_size,
    ]
    found: dict[str, Sequence[Finding]] = {}
    for part in given:
        if part is None or isinstance(part, (str, int, float)) or type(part).__module__.split(".")[0] == "apd":
            continue
        found |= {
            name: list(each) for name, each in part_report(part, new_tokens=new_tokens, seconds=seconds).parts.items()
        }
    return found


def _laws_of(kind: str, part: Any, new_tokens: int) -> Callable[[Trial], None]:
    laws: dict[str, Callable[[Trial], None]] = {
        "family": lambda trial: family_laws(trial, part),
        "drafter": lambda trial: drafter_laws(trial, part, new_tokens),
        "verifier": lambda trial: verifier_laws(trial, part, new_tokens),
        "proposer": lambda trial: proposer_laws(trial, part),
        "strategy": lambda trial: strategy_laws(trial, part),
        "window policy": lambda trial: policy_laws(trial, part),
        "rule": lambda trial: rule_laws(trial, part),
    }
    return laws[kind]


def _kind_of(part: Any) -> str:
    """What a part is, by what it has."""
    if isinstance(part, type):
        raise TypeError(f"`check` must be given an instance, got the class {part.__name__}. Call it.")
    if isinstance(part, ModelSpec):
        return "family"
    if hasattr(part, "vocab_size") or hasattr(part, "mask_token_id"):
        takes = inspect.signature(part.logits).parameters if hasattr(part, "logits") else {}
        return "drafter" if hasattr(part, "mask_token_id") and len(takes) < 3 else "verifier"
    if hasattr(part, "reads_marginals"):
        return "proposer"
    if any(hasattr(part, name) for name in ("propose", "choose", "left_to_right")):
        return "strategy"
    if hasattr(part, "ends"):
        return "window policy"
    if callable(part):
        return "rule"
    raise TypeError(
        f"`check` must be given an APDSampler, or a drafter, verifier, strategy, acceptance rule, window policy, proposer or "
        f"`ModelSpec` of your own, got {type(part).__name__}. docs/extending.md says what each of them has."
    )


def _subject(part: Any, kind: str) -> dict[str, str]:
    from apd import __version__

    versions = f"apd {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    return {kind: f"{part!r:.300}", "versions": versions}
