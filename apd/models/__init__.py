"""Implementations of the drafter and verifier protocols: checkpoints of known families, transformers decoders, exact models."""

from apd.models.families import FAMILIES, ModelSpec
from apd.models.loading import load_drafter, load_tokenizer, load_verifier

__all__ = ["FAMILIES", "ModelSpec", "load_drafter", "load_tokenizer", "load_verifier"]
