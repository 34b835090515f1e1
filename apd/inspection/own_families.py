"""Contract and laws of a family of one's own: its class is built small and decodes."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch

from apd.inspection.bed import Broken, Trial
from apd.inspection.own_models import drafter_laws
from apd.inspection.report import Finding
from apd.models.drafter import MaskedDiffusionDrafter
from apd.models.loading import as_drafter
from apd.models.spec import ModelSpec

#: Sizes of a small model, by the names that configs of transformers give them.
_SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_BLOCK = 4


def family_laws(trial: Trial, spec: ModelSpec) -> None:
    """Whether the patterns can be used, and whether the class, built small with random weights, keeps a drafter's laws."""
    trial.law("key_mapping", "patterns of one group", lambda: _check_patterns(spec), needed=True)
    trial.law("config_fields", "json → arguments", lambda: _check_fields(spec), needed=True)
    built: list[Any] = []
    if trial.law("small model", "can be built", lambda: built.append(_small(spec))):
        trial.part = f"{spec.name} ({spec.model_class.__name__})"
        drafter_laws(trial, built[0], 8)
    trial.findings.append(
        Finding(
            "weights",
            "no checkpoint",
            "to be checked",
            "not known",
            "What rows and masks mean is in the weights: `apd check --drafter PATH --spec NAME`, or "
            "`apd.check(APDSampler.from_pretrained(path, spec=SPEC, mixture_weight=1))`.",
        )
    )


def _check_patterns(spec: ModelSpec) -> str:
    for pattern in spec.key_mapping:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise Broken(
                f"`key_mapping` of {spec.name!r} must have regular expressions, got {pattern!r}: {error}."
            ) from None
        if groups > 1:
            raise Broken(
                f"`key_mapping` of {spec.name!r} must have at most one group in a pattern, got {groups} in {pattern!r}: transformers would "
                "leave these weights at random values. Write a pattern for each name."
            )
    return f"{len(spec.key_mapping)} patterns"


def _check_fields(spec: ModelSpec) -> str:
    if len(inspect.signature(spec.config_fields).parameters) != 1:
        raise Broken(
            f"`config_fields` of {spec.name!r} must be a function of one argument, the content of config.json."
        )
    return "a function of one argument"


def _small(spec: ModelSpec) -> Any:
    known = inspect.signature((spec.config_class or spec.model_class.config_class).__init__).parameters
    config = spec.config({name: value for name, value in _SMALL.items() if name in known or name == "vocab_size"})
    if spec.attention == "full" and not spec.is_masked_lm:
        config.is_causal = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = spec.model_class(config).eval().requires_grad_(False)
    if spec.is_masked_lm:
        return as_drafter(model, mask_token_id=31)
    return MaskedDiffusionDrafter(
        model,
        mask_token_id=31,
        logit_shift=spec.logit_shift,
        attention=spec.attention,
        block_size=spec.block_size or (_BLOCK if spec.attention == "block" or spec.anchored else None),
        anchored=spec.anchored,
    )
