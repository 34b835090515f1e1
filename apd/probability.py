"""Pure tensor mathematics of a decode step: normalised log-probabilities, the mixture, keyed noise.

Shapes: `b` rows, `m` positions of the window, `v` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The streams of keyed noise. A rule that needs more than one draw per token takes them from different streams, since
# reusing the draft's noise would tie the second draw to the first.
DRAFT, ACCEPT, RESIDUAL, ORDER = 0, 1, 2, 3

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: successive multiples are spread evenly
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SEED_MASK = (1 << 63) - 1


def log_normalise(logits: Tensor) -> Tensor:
    """Log-probabilities of raw logits.

    Args:
        logits: `… v`, any float dtype; −∞ removes a token.
    Returns:
        `… v` float32 natural logarithms; in a row that is no distribution, one that holds NaN or +∞ or nothing finite,
        all of it is NaN.
    """
    return logits.log_softmax(-1, dtype=torch.float32)


def largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value, NaN where there is one, and its first place: `… v` → `…` each, the place int64.

    In two stages, a block and a place in it: torch's own takes ten times the time of `amax` on a CPU.
    """
    size = values.shape[-1]
    block = min(size & -size, 64)  # the largest power of two that divides the row
    if block < 16:
        value, place = values.max(-1)
        return value, place
    blocks = values.unflatten(-1, (size // block, block))
    best = blocks.amax(-1).argmax(-1)
    within = blocks.gather(-2, best[..., None, None].expand(*best.shape, 1, block)).squeeze(-2)
    value, place = within.max(-1)
    return value, best * block + place


def mix(draft_logits: Tensor, verify_logits: Tensor | None, mixture_weight: float) -> Tensor:
    """The product p_D^R · p_AR^(1−R) in log space, not normalised; nor need its factors be.

    A weight of 0 leaves its model out altogether, so that 0 · −∞ counts as 0 (a naive product is NaN there) and so that
    R = 1 is the draft bit for bit.

    Args:
        draft_logits: `b m v` float32.
        verify_logits: `b m v` float32, same vocabulary; may be `None` at R = 1.
        mixture_weight: R in [0, 1].
    Returns:
        `b m v` float32.

    Source: arXiv:2506.00413, the target distribution of its algorithm.
    """
    if verify_logits is None or mixture_weight == 1:
        return draft_logits
    if mixture_weight == 0:
        return verify_logits
    return (mixture_weight * draft_logits).add_(verify_logits, alpha=1 - mixture_weight)


def gather_tokens(values: Tensor, tokens: Tensor) -> Tensor:
    """The entry of each token: `b m v`, `b m` → `b m`."""
    return values.gather(-1, tokens[..., None]).squeeze(-1)


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
    """32 random bits for every (row seed, position, stream, token id), a pure function of these four.

    With `F` the finaliser of SplitMix64 and γ = 0x9E3779B97F4A7C15, all modulo 2^64:
    key = F(F(seed) + γ·(position·4 + stream + 1)); bits(token) = F(key + γ·(token + 1)) >> 32. Version 1. Test vector:
    seed 1, position 2, stream 0, tokens 0, 1, 2 → 1880143404, 589619419, 2152507911.

    Args:
        seeds: `b` int64.
        positions: `b m` int64, counted from each row's first real token.
        stream: `DRAFT`, `ACCEPT`, `RESIDUAL` or `ORDER`.
        tokens: `b m n` int64 ids, or `n` for the same at every position.
    Returns:
        `b m n` int64 in [0, 2^32).

    Source of the finaliser: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    key = _finalise(_finalise(seeds)[:, None] + _wrap(_GOLDEN) * (positions * 4 + stream + 1))
    return _shift_right(_finalise(key[..., None] + _wrap(_GOLDEN) * (tokens + 1)), 32)


def keyed_uniform(seeds: Tensor, positions: Tensor, stream: int, tokens: Tensor) -> Tensor:
    """Uniform draws in (0, 1) under the same key as `keyed_bits`: `b m n` float32.

    Small values keep all 32 bits; the largest is held below 1, where float32 has no room for them.
    """
    bits = keyed_bits(seeds, positions, stream, tokens)
    return ((bits.double() + 0.5) * 2.0**-32).float().clamp(max=1 - 2.0**-24)


def keyed_gumbel(seeds: Tensor, positions: Tensor, stream: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise under the same key: `b m n` float32.

    g = −log(−log(1−v)) rather than −log(−log v): large noise, which decides every draw, then comes from small v, where
    float32 is precise.
    """
    return -(-torch.log1p(-keyed_uniform(seeds, positions, stream, tokens))).log()


def step_seeds(seeds: Tensor, steps: Tensor) -> Tensor:
    """Seeds that change with the row's step count, for `noise="step"`: `b`, `b` → `b` int64."""
    return _finalise(seeds + _wrap(_GOLDEN) * (steps + 1))


def _finalise(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, whose products wrap modulo 2^64 as the hash wants."""
    x = (x ^ _shift_right(x, 30)) * _wrap(_MIX_1)
    x = (x ^ _shift_right(x, 27)) * _wrap(_MIX_2)
    return x ^ _shift_right(x, 31)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift; torch's own is arithmetic."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _wrap(value: int) -> int:
    """An unsigned 64-bit constant as the signed integer with the same bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)
