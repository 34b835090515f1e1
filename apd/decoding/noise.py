"""Keyed noise: random numbers that are a pure function of (row seed, position, stream, token id).

A position that is drafted again gets the noise that it had before, so a rejected draft is not redrawn conditionally on
its rejection. The hash and its test vector are a public contract: a seed gives equal noise in every release. Shapes: `b`
rows, `m` positions, `n` tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from apd.decoding.sampling import Scores

# The streams of keyed noise. A rule that needs several draws per token takes them from different streams: draws from one
# stream are equal, not independent.
DRAFT, ACCEPT, RESIDUAL, ORDER = 0, 1, 2, 3

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: successive multiples are spread evenly
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SEED_MASK = (1 << 63) - 1


def mix_seed(seed: int, index: int) -> int:
    """The seed of expanded row (or prompt) `index` under a call's one seed; index 0 keeps the seed itself.

    Args:
        seed: an integer; taken modulo 2^63.
        index: at least 0.
    """
    if index == 0:
        return seed & SEED_MASK
    return int(_finalise(torch.tensor(_wrap(seed + index * _GOLDEN), device="cpu"))) & SEED_MASK


def keyed_bits(seeds: Tensor, positions: Tensor, stream: int, tokens: Tensor) -> Tensor:
    """32 random bits, a pure function of row seed, position, stream and token id.

    With `F` the finaliser of SplitMix64 and γ = 0x9E3779B97F4A7C15, all modulo 2^64:
    key = F(F(seed) + γ·(position·4 + stream + 1)); bits(token) = F(key + γ·(token + 1)) >> 32. Version 1. Test vector:
    seed 1, position 2, stream 0, tokens 0, 1, 2 → 1880143404, 589619419, 2152507911.

    Args:
        seeds: `b` int64.
        positions: `b m` int64, counted from each row's first real token.
        stream: `DRAFT`, `ACCEPT`, `RESIDUAL` or `ORDER`.
        tokens: int64 ids, `b m n`, or `n` if they are equal at all positions.
    Returns:
        `b m n` int64 in [0, 2^32).

    Source of the finaliser: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    key = _finalise(_finalise(seeds)[:, None] + _wrap(_GOLDEN) * (positions * 4 + stream + 1))
    return _shift_right(_finalise(key[..., None] + _wrap(_GOLDEN) * (tokens + 1)), 32)


def keyed_uniform(seeds: Tensor, positions: Tensor, stream: int, tokens: Tensor) -> Tensor:
    """Uniform draws in (0, 1) from `keyed_bits`: `b m n` float32. Arguments as there.

    Small values keep the full resolution of 32 bits; values that would round to 1 are clamped to 1 − 2⁻²⁴.
    """
    bits = keyed_bits(seeds, positions, stream, tokens)
    return ((bits.double() + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24)


def keyed_gumbel(seeds: Tensor, positions: Tensor, stream: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise from `keyed_uniform`: `b m n` float32. Arguments as in `keyed_bits`.

    g = −log(−log(1−v)) rather than −log(−log v): large noise, which decides the argmax, then comes from small v, where
    float32 is precise.
    """
    return -(-torch.log1p(-keyed_uniform(seeds, positions, stream, tokens))).log()


def step_seeds(seeds: Tensor, steps: Tensor) -> Tensor:
    """Seeds that change with the row's step count, for `noise="step"`: `b`, `b` → `b` int64."""
    return _finalise(seeds + _wrap(_GOLDEN) * (steps + 1))


def _finalise(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64. Products of int64 wrap modulo 2^64, as the hash requires."""
    x = (x ^ _shift_right(x, 30)) * _wrap(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _wrap(_MIX_2)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    """An unsigned 64-bit constant as the signed integer with the same bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


class Noise:
    """Keyed Gumbel noise at some positions, computed for the requested tokens.

    Args:
        seeds: `b` int64.
        columns: `b m` int64.
        padding: `b` int64; positions are columns counted from each row's first real token.
        stream: `DRAFT`, `ACCEPT`, `RESIDUAL` or `ORDER`.
    """

    def __init__(self, seeds: Tensor, columns: Tensor, padding: Tensor, stream: int) -> None:
        self.seeds, self.columns, self.padding, self.stream = seeds, columns, padding, stream
        self.full: Tensor | None = None  # noise of every token, computed on first use

    def for_scores(self, scores: Scores) -> Tensor:
        """The noise of each score: `b m n` float32."""
        positions = self.columns - self.padding[:, None]
        if scores.ids is not None:
            return keyed_gumbel(self.seeds, positions, self.stream, scores.ids)
        if self.full is None:  # draft and target use the same noise
            tokens = torch.arange(scores.values.shape[-1], device=positions.device)
            self.full = keyed_gumbel(self.seeds, positions, self.stream, tokens)
        return self.full

    def uniform(self) -> Tensor:
        """One uniform draw in (0, 1) per position: `b m` float32."""
        token = torch.zeros(1, dtype=torch.int64, device=self.columns.device)
        return keyed_uniform(self.seeds, self.columns - self.padding[:, None], self.stream, token).squeeze(-1)

    def at(self, position: int) -> Noise:
        """The noise at one position of the window, `b 1`."""
        return Noise(self.seeds, self.columns[:, position : position + 1], self.padding, self.stream)
