"""Adaptive parallel decoding for masked-diffusion language models (arXiv:2506.00413)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apd.config import APDConfig
    from apd.drafter import Drafter, MaskedDiffusionDrafter
    from apd.embedded.tasks import EXAMPLE_PROMPTS
    from apd.ideal import IdealListModel
    from apd.many import Generated
    from apd.models import FAMILIES, ModelSpec, load_drafter, load_verifier
    from apd.output import APDOutput, RowTrace, Trace
    from apd.sampler import APDSampler
    from apd.strategies import (
        KLASS,
        WINO,
        Autoregressive,
        Blocks,
        Confidence,
        Entropy,
        EntropyBound,
        Factor,
        LeftToRight,
        Margin,
        OneStep,
        RandomOrder,
        Threshold,
    )
    from apd.streaming import Chunk
    from apd.verifier import CausalVerifier, Verifier

__version__ = "0.1.0"

# Names are imported when they are asked for: `apd --help` should not wait for torch.
_HOMES = {
    "APDConfig": "apd.config",
    "APDOutput": "apd.output",
    "APDSampler": "apd.sampler",
    "Autoregressive": "apd.strategies",
    "Blocks": "apd.strategies",
    "CausalVerifier": "apd.verifier",
    "Chunk": "apd.streaming",
    "Confidence": "apd.strategies",
    "Drafter": "apd.drafter",
    "EXAMPLE_PROMPTS": "apd.embedded.tasks",
    "Entropy": "apd.strategies",
    "EntropyBound": "apd.strategies",
    "FAMILIES": "apd.models",
    "Factor": "apd.strategies",
    "Generated": "apd.many",
    "IdealListModel": "apd.ideal",
    "KLASS": "apd.strategies",
    "LeftToRight": "apd.strategies",
    "Margin": "apd.strategies",
    "MaskedDiffusionDrafter": "apd.drafter",
    "ModelSpec": "apd.models",
    "OneStep": "apd.strategies",
    "RandomOrder": "apd.strategies",
    "RowTrace": "apd.output",
    "Threshold": "apd.strategies",
    "Trace": "apd.output",
    "Verifier": "apd.verifier",
    "WINO": "apd.strategies",
    "load_drafter": "apd.models",
    "load_verifier": "apd.models",
}

__all__ = [
    "EXAMPLE_PROMPTS",
    "FAMILIES",
    "KLASS",
    "WINO",
    "APDConfig",
    "APDOutput",
    "APDSampler",
    "Autoregressive",
    "Blocks",
    "CausalVerifier",
    "Chunk",
    "Confidence",
    "Drafter",
    "Entropy",
    "EntropyBound",
    "Factor",
    "Generated",
    "IdealListModel",
    "LeftToRight",
    "Margin",
    "MaskedDiffusionDrafter",
    "ModelSpec",
    "OneStep",
    "RandomOrder",
    "RowTrace",
    "Threshold",
    "Trace",
    "Verifier",
    "load_drafter",
    "load_verifier",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'apd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
