"""Adaptive parallel decoding for masked-diffusion language models (arXiv:2506.00413)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apd.config import APDConfig
    from apd.decoding.protocols import Drafter, Verifier
    from apd.embedded.tasks import EXAMPLE_PROMPTS
    from apd.generation.many import Generated
    from apd.generation.output import APDOutput
    from apd.generation.streaming import Chunk
    from apd.models.drafter import MaskedDiffusionDrafter
    from apd.models.ideal import IdealListModel
    from apd.models.loading import FAMILIES, ModelSpec, load_drafter, load_verifier
    from apd.models.verifier import CausalVerifier
    from apd.sampler import APDSampler
    from apd.show.rows import RowTrace
    from apd.show.trace import Trace
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

__version__ = "0.1.0"

# Names are imported when they are asked for: `apd --help` should not wait for torch.
_HOMES = {
    "APDConfig": "apd.config",
    "APDOutput": "apd.generation.output",
    "APDSampler": "apd.sampler",
    "Autoregressive": "apd.strategies",
    "Blocks": "apd.strategies",
    "CausalVerifier": "apd.models.verifier",
    "Chunk": "apd.generation.streaming",
    "Confidence": "apd.strategies",
    "Drafter": "apd.decoding.protocols",
    "EXAMPLE_PROMPTS": "apd.embedded.tasks",
    "Entropy": "apd.strategies",
    "EntropyBound": "apd.strategies",
    "FAMILIES": "apd.models",
    "Factor": "apd.strategies",
    "Generated": "apd.generation.many",
    "IdealListModel": "apd.models.ideal",
    "KLASS": "apd.strategies",
    "LeftToRight": "apd.strategies",
    "Margin": "apd.strategies",
    "MaskedDiffusionDrafter": "apd.models.drafter",
    "ModelSpec": "apd.models",
    "OneStep": "apd.strategies",
    "RandomOrder": "apd.strategies",
    "RowTrace": "apd.show.rows",
    "Threshold": "apd.strategies",
    "Trace": "apd.show.trace",
    "Verifier": "apd.decoding.protocols",
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
