"""Keyed noise: random numbers that are a pure function of (row seed, position, stream, token id).

A position that is drafted again gets the noise that it had before, so a rejected draft is not redrawn conditionally on
its rejection. The hash and its test vector are a public contract: a seed gives equal noise in every release. Shapes: `b`
rows, `m` positions, `n` tokens.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from apd.decoding.probability import Scores

# The streams of keyed noise. A rule that needs several draws per token takes them from different streams: draws from one
# stream are equal, not independent.
DRAFT, ACCEPT, RESIDUAL, ORDER = 0, 1, 2, 3

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: successive multiples are spread evenly
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SEED_MASK = (1 << 63) - 1

#: Less than any Gumbel noise: −log(−log(1−v)) is −2.8115 for the largest uniform draw, 1 − 2⁻²⁴.
LEAST_GUMBEL = -2.82
_BLOCK = 32_768  # hashes at a time, which stay in a core's cache


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
    keys = _keys(seeds, positions, stream)
    return _shift_right(_finalise(keys[..., None] + _wrap(_GOLDEN) * (tokens + 1)), 32)


def keyed_uniform(seeds: Tensor, positions: Tensor, stream: int, tokens: Tensor) -> Tensor:
    """Uniform draws in (0, 1) from `keyed_bits`: `b m n` float32. Arguments as there.

    They are (bits + 1/2) / 2^32, rounded once. Small values keep the full resolution of 32 bits; values that would round to 1
    are clamped to 1 − 2⁻²⁴.
    """
    return _uniform(keyed_bits(seeds, positions, stream, tokens))


def keyed_gumbel(seeds: Tensor, positions: Tensor, stream: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise from `keyed_uniform`: `b m n` float32. Arguments as in `keyed_bits`.

    g = −log(−log(1−v)) rather than −log(−log v): large noise, which decides the argmax, then comes from small v, where
    float32 is precise.
    """
    return _gumbel(keyed_bits(seeds, positions, stream, tokens))


def step_seeds(seeds: Tensor, steps: Tensor) -> Tensor:
    """Seeds that change with the row's step count, for `noise="step"`: `b`, `b` → `b` int64."""
    return _finalise(seeds + _wrap(_GOLDEN) * (steps + 1))


def _keys(seeds: Tensor, positions: Tensor, stream: int) -> Tensor:
    """What a token's id is added to: `b`, `b m` → `b m` int64."""
    return _finalise(_finalise(seeds)[:, None] + _wrap(_GOLDEN) * (positions * 4 + stream + 1))


def _uniform(bits: Tensor) -> Tensor:
    return ((bits << 1) | 1).float().mul_(2.0**-33).clamp_(max=1 - 2.0**-24)


def _gumbel(bits: Tensor) -> Tensor:
    return _uniform(bits).neg_().log1p_().neg_().log_().neg_()


def _finalise(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64. Products of int64 wrap modulo 2^64, as the hash requires."""
    x = _shift_right(x, 30).bitwise_xor_(x).mul_(_wrap(_MIX_1))
    x = _shift_right(x, 27).bitwise_xor_(x).mul_(_wrap(_MIX_2))
    return _shift_right(x, 31).bitwise_xor_(x)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own is arithmetic."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


@lru_cache(maxsize=1024)
def _tokens_below(key: int, limit: int, vocab_size: int) -> NDArray[np.int64]:
    """The tokens whose bits under a key are less than `limit`, in order: about v·limit / 2^32 of them.

    NumPy has logical shifts. What is found is kept, since most positions of a window were in the one before.

    Args:
        limit: even, so that the last shift of the hash, which changes the lowest of the 32 bits alone, is not needed.
    """
    multiples = np.arange(1, _BLOCK + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    x, shifted = np.empty_like(multiples), np.empty_like(multiples)
    found = []
    for start in range(0, vocab_size, _BLOCK):
        np.add(multiples, np.uint64((key + start * _GOLDEN) % (1 << 64)), out=x)
        for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
            np.right_shift(x, np.uint64(bits), out=shifted)
            np.bitwise_xor(x, shifted, out=x)
            np.multiply(x, np.uint64(factor), out=x)
        found.append(start + np.flatnonzero(x[: vocab_size - start] < np.uint64(limit << 32)))
    return np.concatenate(found)


def _wrap(value: int) -> int:
    """An unsigned 64-bit constant as the signed integer with the same bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


class Loud(NamedTuple):
    """The tokens with the most noise at some positions.

    Attributes:
        ids: `k n` int64, k = b·m; may repeat.
        gumbel: `k n` float32, their noise.
        bound: no other token's noise is larger.
    """

    ids: Tensor
    gumbel: Tensor
    bound: float


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
        self.loudest: Loud | None = None

    @property
    def positions(self) -> Tensor:
        """`b m` int64, counted from each row's first real token."""
        return self.columns - self.padding[:, None]

    def for_scores(self, scores: Scores) -> Tensor:
        """The noise of each score: `b m n` float32."""
        positions = self.positions
        if scores.ids is not None:
            return keyed_gumbel(self.seeds, positions, self.stream, scores.ids)
        if self.full is None:  # draft and target use the same noise
            tokens = torch.arange(scores.values.shape[-1], device=positions.device)
            self.full = keyed_gumbel(self.seeds, positions, self.stream, tokens)
        return self.full

    def uniform(self) -> Tensor:
        """One uniform draw in (0, 1) per position: `b m` float32."""
        token = torch.zeros(1, dtype=torch.int64, device=self.columns.device)
        return keyed_uniform(self.seeds, self.positions, self.stream, token).squeeze(-1)

    def loud(self, vocab_size: int) -> Loud:
        """The loudest 2·√v tokens or so of each position, found by integers alone; on the CPU.

        So many that about as many others can win against the best of them.
        """
        if self.loudest is None:
            limit = 2 * int((1 << 32) / math.sqrt(vocab_size))
            keys = _keys(self.seeds, self.positions, self.stream).flatten().tolist()
            found = [_tokens_below(key, limit, vocab_size) for key in keys]
            ids = torch.zeros(len(keys), max(map(len, found)), dtype=torch.int64)
            for row, tokens in zip(ids.numpy(), found, strict=True):
                row[: len(tokens)] = tokens
            # Logarithms are only almost monotone in float32.
            bound = _gumbel(torch.tensor([limit])).item() + 1e-3
            gumbel = keyed_gumbel(self.seeds, self.positions, self.stream, ids.view(*self.columns.shape, -1))
            self.loudest = Loud(ids, gumbel.flatten(0, 1), bound)
        return self.loudest

    def of_pairs(self, rows: Tensor, tokens: Tensor) -> Tensor:
        """The noise of single tokens: `k` int64 positions, counted through all rows, and `k` int64 ids → `k` float32."""
        seeds = self.seeds.repeat_interleave(self.columns.shape[1])[rows]
        return keyed_gumbel(seeds, self.positions.flatten()[rows, None], self.stream, tokens[:, None, None]).flatten()

    def at(self, position: int) -> Noise:
        """The noise at one position of the window, `b 1`."""
        return Noise(self.seeds, self.columns[:, position : position + 1], self.padding, self.stream)
