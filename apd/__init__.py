"""Adaptive parallel decoding for masked-diffusion language models (arXiv:2506.00413).

`APDSampler` takes the place of transformers' `generate()`, `APDConfig` has its knobs, and `strategy=` the other ways to
decode. Extensions are built on what else is here: models (`Drafter`, `Verifier`), strategies (`Strategy`, `Unmasking`,
`Proposal`), acceptance rules (`AcceptanceRule`, `Evidence`, `Judgement`) and windows (`WindowPolicy`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for type checkers: `X as X` is a public name
    from apd.config import APDConfig as APDConfig
    from apd.decoding.acceptance import AcceptanceRule as AcceptanceRule
    from apd.decoding.acceptance import Coupling as Coupling
    from apd.decoding.acceptance import Evidence as Evidence
    from apd.decoding.acceptance import Judgement as Judgement
    from apd.decoding.acceptance import Rejection as Rejection
    from apd.decoding.commit import Proposal as Proposal
    from apd.decoding.noise import mix_seed as mix_seed
    from apd.decoding.protocols import Drafter as Drafter
    from apd.decoding.protocols import Verifier as Verifier
    from apd.decoding.step import APD as APD
    from apd.decoding.strategy import Memoryless as Memoryless
    from apd.decoding.strategy import Strategy as Strategy
    from apd.decoding.window import AllMasks as AllMasks
    from apd.decoding.window import AutoWindow as AutoWindow
    from apd.decoding.window import BlockWindow as BlockWindow
    from apd.decoding.window import FixedWindow as FixedWindow
    from apd.decoding.window import WindowPolicy as WindowPolicy
    from apd.generation.infilling import Hole as Hole
    from apd.generation.infilling import Infilled as Infilled
    from apd.generation.many import Generated as Generated
    from apd.generation.output import APDOutput as APDOutput
    from apd.generation.streaming import Chunk as Chunk
    from apd.included.tasks import EXAMPLE_PROMPTS as EXAMPLE_PROMPTS
    from apd.inspection import check as check
    from apd.models import FAMILIES as FAMILIES
    from apd.models import ModelSpec as ModelSpec
    from apd.models import load_drafter as load_drafter
    from apd.models import load_tokenizer as load_tokenizer
    from apd.models import load_verifier as load_verifier
    from apd.models.drafter import MaskedDiffusionDrafter as MaskedDiffusionDrafter
    from apd.models.ideal import IdealListModel as IdealListModel
    from apd.models.masked_lm import MaskedLMDrafter as MaskedLMDrafter
    from apd.models.text_proposer import TextProposer as TextProposer
    from apd.models.verifier import CausalVerifier as CausalVerifier
    from apd.sampler import APDSampler as APDSampler
    from apd.show.rows import RowTrace as RowTrace
    from apd.show.trace import Trace as Trace
    from apd.strategies import KLASS as KLASS
    from apd.strategies import WINO as WINO
    from apd.strategies import Autoregressive as Autoregressive
    from apd.strategies import Blocks as Blocks
    from apd.strategies import Checked as Checked
    from apd.strategies import Confidence as Confidence
    from apd.strategies import ConfidentPrefix as ConfidentPrefix
    from apd.strategies import Entropy as Entropy
    from apd.strategies import EntropyBound as EntropyBound
    from apd.strategies import EntropyThreshold as EntropyThreshold
    from apd.strategies import Factor as Factor
    from apd.strategies import LeftToRight as LeftToRight
    from apd.strategies import Margin as Margin
    from apd.strategies import Mixture as Mixture
    from apd.strategies import OneStep as OneStep
    from apd.strategies import PromptLookup as PromptLookup
    from apd.strategies import Proposer as Proposer
    from apd.strategies import RandomOrder as RandomOrder
    from apd.strategies import Seeded as Seeded
    from apd.strategies import Threshold as Threshold
    from apd.strategies import Unmasking as Unmasking

__version__ = "0.1.0"

# Names are imported on first use: `apd --help` should not wait for torch.
_NAMES = {
    "apd.config": "APDConfig",
    "apd.decoding.acceptance": "AcceptanceRule Coupling Evidence Judgement Rejection",
    "apd.decoding.commit": "Proposal",
    "apd.decoding.noise": "mix_seed",
    "apd.decoding.protocols": "Drafter Verifier",
    "apd.decoding.step": "APD",
    "apd.decoding.strategy": "Memoryless Strategy",
    "apd.decoding.window": "AllMasks AutoWindow BlockWindow FixedWindow WindowPolicy",
    "apd.included.tasks": "EXAMPLE_PROMPTS",
    "apd.generation.infilling": "Hole Infilled",
    "apd.generation.many": "Generated",
    "apd.generation.output": "APDOutput",
    "apd.generation.streaming": "Chunk",
    "apd.inspection": "check",
    "apd.models": "FAMILIES ModelSpec load_drafter load_tokenizer load_verifier",
    "apd.models.drafter": "MaskedDiffusionDrafter",
    "apd.models.ideal": "IdealListModel",
    "apd.models.masked_lm": "MaskedLMDrafter",
    "apd.models.text_proposer": "TextProposer",
    "apd.models.verifier": "CausalVerifier",
    "apd.sampler": "APDSampler",
    "apd.show.rows": "RowTrace",
    "apd.show.trace": "Trace",
    "apd.strategies": (
        "Autoregressive Blocks Checked Confidence ConfidentPrefix Entropy EntropyBound EntropyThreshold Factor KLASS LeftToRight "
        "Margin Mixture OneStep PromptLookup Proposer RandomOrder Seeded Threshold Unmasking WINO"
    ),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names.split()}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'apd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
