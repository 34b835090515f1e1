"""Loads a drafter, its verifier and their tokenizers, which must fit each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from apd.decoding.protocols import Verifier
from apd.models.checks import check_vocabularies
from apd.models.drafter import MaskedDiffusionDrafter
from apd.models.families import ModelSpec
from apd.models.loading import (
    HUB_ARGUMENTS,
    PLACING_ARGUMENTS,
    SELF,
    SPLITTING_ARGUMENTS,
    as_verifier,
    check_reads_causally,
    drafter_config,
    drafter_family,
    load_drafter,
    load_tokenizer,
    load_verifier,
    verifier_config,
)
from apd.models.masked_lm import MaskedLMDrafter

__all__ = ["PAIR_OPTIONS", "LoadedPair", "load_pair", "shared_vocab_size"]

#: Options of `load_pair` that are passed on to transformers.
PAIR_OPTIONS = (*HUB_ARGUMENTS, *PLACING_ARGUMENTS, *SPLITTING_ARGUMENTS)


class LoadedPair(NamedTuple):
    """Two models and their tokenizers; `None` where there is no verifier of its own, or a checkpoint has no tokenizer files."""

    drafter: MaskedDiffusionDrafter | MaskedLMDrafter
    verifier: Verifier | None
    tokenizer: PreTrainedTokenizerBase | None
    verifier_tokenizer: PreTrainedTokenizerBase | None


def load_pair(
    drafter: str,
    verifier: str | None = None,
    *,
    spec: ModelSpec | str | None = None,
    mask_token_id: int | None = None,
    block_size: int | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    verifier_revision: str | None = None,
    vocabularies_may_differ: bool = False,
    check_family: Callable[[ModelSpec], None] | None = None,
    **options: Any,
) -> LoadedPair:
    """Load drafter, verifier and tokenizers; configurations and vocabularies are checked before weights are read.

    Args:
        drafter, verifier, …, verifier_revision: as in `APDSampler.from_pretrained`.
        vocabularies_may_differ: take a verifier with another vocabulary, if both checkpoints have a tokenizer.
        check_family: raises if the drafter's family does not fit the caller's other arguments.
        **options: `HUB_ARGUMENTS` and `PLACING_ARGUMENTS` for both models, `SPLITTING_ARGUMENTS` for the drafter.

    Raises:
        ValueError, OSError: see `APDSampler.from_pretrained`.
    """
    hub, placing, splitting = (
        {name: options[name] for name in names if name in options}
        for names in (HUB_ARGUMENTS, PLACING_ARGUMENTS, SPLITTING_ARGUMENTS)
    )
    shared = {"dtype": dtype, "attn_implementation": attn_implementation, **placing}
    drafter_hub, verifier_hub = hub | {"revision": revision}, hub | {"revision": verifier_revision}
    family: dict[str, Any] = {"spec": spec, "mask_token_id": mask_token_id, "block_size": block_size}

    is_own = isinstance(verifier, str) and verifier == SELF
    found = drafter_family(drafter, spec=spec, **drafter_hub)
    if check_family is not None:
        check_family(found)
    if is_own:
        check_reads_causally(found.reads_causally, f"the family {found.name!r}")
        if verifier_revision is not None:
            raise ValueError(
                f"`verifier_revision` must be None with verifier={SELF!r}, got {verifier_revision!r}: the drafter's own weights "
                "verify. Set `revision`, or leave it out."
            )
    config = drafter_config(drafter, **family, **drafter_hub)
    tokenizer, verifier_tokenizer = load_tokenizer(drafter, **drafter_hub), None
    if verifier is not None and not is_own:
        vocab_size = verifier_config(verifier, **verifier_hub).get_text_config(decoder=True).vocab_size
        verifier_tokenizer = load_tokenizer(verifier, **verifier_hub)
        shared_vocab_size(
            config.vocab_size,
            vocab_size,
            tokenizer,
            verifier_tokenizer,
            mask_token_id=config.mask_token_id,
            may_differ=vocabularies_may_differ,
        )

    loaded = load_drafter(drafter, **family, device_map=device_map, **shared, **splitting, **drafter_hub)
    loaded_verifier: Verifier | None = None
    if is_own:
        loaded_verifier = as_verifier(SELF, loaded)
    elif verifier is not None:
        if splitting.keys() & {"tp_plan", "distributed_config"}:
            device_map = loaded.device  # the verifier stays whole, on the device of this process's part of the drafter
        loaded_verifier = load_verifier(verifier, device_map=device_map, **shared, **verifier_hub)
    return LoadedPair(loaded, loaded_verifier, tokenizer, verifier_tokenizer)


def shared_vocab_size(
    drafter_vocab_size: int,
    verifier_vocab_size: int,
    tokenizer: PreTrainedTokenizerBase | None,
    verifier_tokenizer: PreTrainedTokenizerBase | None,
    *,
    mask_token_id: int,
    may_differ: bool,
) -> int | None:
    """The number of ids that the two models share; `None` if their vocabularies differ and may do so.

    Args:
        may_differ: the verifier only guesses text, which needs both tokenizers and no shared ids.
        drafter_vocab_size, …, mask_token_id: as in `check_vocabularies`.

    Raises:
        ValueError: the vocabularies differ, and must not or a tokenizer is missing.
    """
    try:
        return check_vocabularies(
            drafter_vocab_size, verifier_vocab_size, tokenizer, verifier_tokenizer, mask_token_id=mask_token_id
        )
    except ValueError as error:
        tokenizers = {"drafter": tokenizer, "verifier": verifier_tokenizer}
        missing = " and ".join(role for role, found in tokenizers.items() if found is None)
        if may_differ and not missing:
            return None
        if may_differ:
            remedy = (
                f"Models without a shared vocabulary have only text in common: give the tokenizer of the {missing}."
            )
        else:
            remedy = "With both tokenizers, `strategy=Checked()` takes a transformers verifier of any vocabulary."
        raise ValueError(f"{error} {remedy}") from None
