"""Adaptive parallel decoding for masked-diffusion language models (arXiv:2506.00413)."""

from apd.config import APDConfig
from apd.drafter import Drafter, MaskedDiffusionDrafter
from apd.embedded.tasks import EXAMPLE_PROMPTS
from apd.models import FAMILIES, ModelSpec, load_drafter, load_verifier
from apd.output import APDOutput, RowTrace
from apd.sampler import APDSampler
from apd.strategies import Confidence, LeftToRight
from apd.streaming import Chunk
from apd.verifier import CausalVerifier, Verifier

__version__ = "0.1.0"

__all__ = [
    "EXAMPLE_PROMPTS",
    "FAMILIES",
    "APDConfig",
    "APDOutput",
    "APDSampler",
    "CausalVerifier",
    "Chunk",
    "Confidence",
    "Drafter",
    "LeftToRight",
    "MaskedDiffusionDrafter",
    "ModelSpec",
    "RowTrace",
    "Verifier",
    "load_drafter",
    "load_verifier",
]
