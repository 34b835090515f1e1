"""Decoding strategies other than APD, each behind the protocol `Strategy`."""

from apd.strategies.unmasking import (
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
    Unmasking,
)

__all__ = [
    "KLASS",
    "WINO",
    "Autoregressive",
    "Blocks",
    "Confidence",
    "Entropy",
    "EntropyBound",
    "Factor",
    "LeftToRight",
    "Margin",
    "OneStep",
    "RandomOrder",
    "Threshold",
    "Unmasking",
]
