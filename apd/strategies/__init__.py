"""Decoding strategies other than APD. Each implements the protocol `apd.decoding.strategy.Strategy`."""

from apd.strategies.base import Unmasking
from apd.strategies.blocks import Blocks, Seeded
from apd.strategies.checked import Checked
from apd.strategies.klass import KLASS
from apd.strategies.proposers import Mixture, PromptLookup, Proposer
from apd.strategies.unmasking import (
    Autoregressive,
    Confidence,
    ConfidentPrefix,
    Entropy,
    EntropyBound,
    EntropyThreshold,
    Factor,
    LeftToRight,
    Margin,
    OneStep,
    RandomOrder,
    Threshold,
)
from apd.strategies.wino import WINO

__all__ = [
    "KLASS",
    "WINO",
    "Autoregressive",
    "Blocks",
    "Checked",
    "Confidence",
    "ConfidentPrefix",
    "Entropy",
    "EntropyBound",
    "EntropyThreshold",
    "Factor",
    "LeftToRight",
    "Margin",
    "Mixture",
    "OneStep",
    "PromptLookup",
    "Proposer",
    "RandomOrder",
    "Seeded",
    "Threshold",
    "Unmasking",
]
