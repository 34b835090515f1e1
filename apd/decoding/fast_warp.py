"""Exact shortcuts for large vocabularies on the CPU: a nucleus without torch's sort, and a draw that hashes in integers.

Each gives what the plain path gives, or `None` where it does not apply: on other devices, where a pass over the vocabulary
costs little and a host sync much, and under `torch.compile`, which cannot trace it. NumPy has what torch's CPU kernels
lack: logical shifts of 64-bit integers, and vector instructions to sort values and to find indices.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from apd.decoding.noise import LEAST_GUMBEL, Noise
from apd.decoding.probability import Scores, largest

#: Rows of at most so many tokens are sorted, and hashed one and all; in longer ones the few that matter are searched.
SMALL_VOCABULARY = 8192
_SAMPLE = 4096  # tokens from which the edge of a nucleus is estimated


def runs_numpy(values: Tensor) -> bool:
    """Whether NumPy may read these values: a float32 tensor on the CPU that is not traced and needs no gradient."""
    if torch.compiler.is_compiling():
        return False
    return type(values) is Tensor and values.is_cpu and values.dtype == torch.float32 and not values.requires_grad


# --------------------------------------------------------------------------------------------------------- the nucleus
class Nucleus(Scores):
    """Scores after top-p, computed when `values` is read: a draw rarely needs them.

    Args:
        whole: `b m v` float32, the scores before.
        top_p: p in [0, 1].
    """

    whole: Tensor
    top_p: float

    def __init__(self, whole: Tensor, top_p: float) -> None:
        vars(self).update(whole=whole, top_p=top_p, ids=None)  # the base class is frozen

    @cached_property
    def values(self) -> Tensor:
        return truncated(self.whole.flatten(0, 1), self.top_p).view_as(self.whole)

    @cached_property
    def _largest(self) -> tuple[Tensor, Tensor]:
        return largest(self.whole)  # the likeliest always stays


def nucleus(scores: Tensor, top_p: float) -> Scores | None:
    """Scores after top-p, `b m v` float32: the likeliest tokens, until the mass of those that are likelier is p.

    Kept is what transformers' `TopPLogitsWarper` keeps. Among tokens that tie for the last place these are the highest ids;
    there the choice is its sort's. In rows longer than `SMALL_VOCABULARY` the mass is summed in another order: one token can
    differ, where the mass at the edge is p to within the rounding of a float32 sum, a relative 1e-6.

    Args:
        scores: rows that are no distribution stay as they are.
        top_p: p in [0, 1].
    """
    if not runs_numpy(scores):
        return None
    lazy = Nucleus(scores.contiguous(), top_p)
    return lazy if scores.shape[-1] > SMALL_VOCABULARY else Scores(lazy.values)  # short rows cost as much as a draw


def truncated(rows: Tensor, top_p: float) -> Tensor:
    """See `nucleus`: `n v` → `n v`."""
    if rows.shape[-1] <= SMALL_VOCABULARY:
        least, ties = _edges_by_sorting(rows, top_p)
    else:
        least, ties = map(torch.cat, zip(*(_edge_of_long_row(row, top_p) for row in rows), strict=True))
    values = torch.where(rows < least, -torch.inf, rows)
    for i in (ties > 0).nonzero()[:, 0].tolist():
        values[i, (rows[i] == least[i]).nonzero()[: int(ties[i]), 0]] = -torch.inf
    return values


def _edges_by_sorting(rows: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """See `_edges`; masses are computed as transformers does."""
    ascending = torch.from_numpy(np.sort(rows.numpy()))
    return _edges(ascending, (ascending.softmax(-1).cumsum(-1) <= 1 - top_p).sum(-1, keepdim=True))


def _edge_of_long_row(row: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """See `_edges`: of one row, `v`, without sorting it.

    A sorted sample says between which scores the edge is, give or take some tokens. Only the tokens between these scores are
    sorted; the mass of those below is summed.
    """
    values, peak = row.numpy(), row.amax()
    mass = (row - peak).exp_()
    total = float(mass.sum())
    if not math.isfinite(total):  # no distribution
        return torch.full((1, 1), -torch.inf), torch.zeros(1, 1, dtype=torch.int64)
    sample = np.sort(values[:: len(values) // _SAMPLE])
    below = np.cumsum(np.exp(sample - peak.numpy())) * (len(values) / len(sample))
    at = int(np.searchsorted(below, (1 - top_p) * total))
    # A token below the edge weighs less than one at the edge, so the estimate is off by about the root of their number.
    reach = 4 + 4 * math.isqrt(at)
    low = sample[at - reach] if at >= reach else -np.inf
    high = sample[at + reach] if at + reach < len(sample) else np.inf
    for least, most in ((low, high), (-np.inf, np.inf)):
        is_below = values < least
        near = np.sort(values[np.flatnonzero((values <= most) > is_below)])
        mass_below = float((mass * torch.from_numpy(is_below.astype(np.float32))).sum())
        cumulative = mass_below + np.exp(near - peak.numpy()).cumsum(dtype=np.float64)
        removed = int(np.count_nonzero((cumulative / total).astype(np.float32) <= np.float32(1 - top_p)))
        if (removed > 0 or least == -np.inf) and (removed < len(near) or most == np.inf):
            break  # the edge is between these scores, as almost always
    return _edges(torch.from_numpy(near)[None], torch.tensor([[removed]]))


def _edges(ascending: Tensor, removed: Tensor) -> tuple[Tensor, Tensor]:
    """Where the nucleus of each row ends: its least score, and the number of tokens with this score that are not in it.

    Args:
        ascending: `n k` float32, sorted scores.
        removed: `n 1` int64, how many of these are not in the nucleus, and all that are less likely than they.
    Returns:
        `n 1` float32 and `n 1` int64. The tokens that are not in it are those with the lowest ids.
    """
    index = removed.clamp(max=ascending.shape[-1] - 1)  # p = 0 removes all; the likeliest token stays
    least = ascending.gather(-1, index)
    return least, index - torch.searchsorted(ascending, least)


def _is_surely_inside(row: Tensor, peak: Tensor, token: Tensor, top_p: float) -> bool:
    """Whether a token is in the nucleus of its row, and not so close to its edge that it must be found."""
    values, mass = row.numpy(), (row - peak).exp_()
    score, enough = float(row[token]), (top_p - 1e-5) * float(mass.sum())
    no_less = float(torch.dot(mass, torch.from_numpy((values >= score).astype(np.float32))))
    if no_less < enough:
        return True
    return no_less - float(mass[token]) < enough and np.count_nonzero(values == score) == 1


# ------------------------------------------------------------------------------------------------------------ the draw
def sample(scores: Scores, noise: Noise) -> tuple[Tensor, Tensor] | None:
    """The token with the largest score after noise, the first of those that tie, and that score: `b m` each."""
    values = scores.whole if isinstance(scores, Nucleus) else scores.values
    if scores.ids is not None or values.shape[-1] <= SMALL_VOCABULARY or not runs_numpy(values):
        return None
    rows, (peak, at_peak) = values.flatten(0, 1), (each.flatten() for each in scores.largest)
    tokens, best = _drawn(rows, peak, noise, torch.arange(len(rows)))
    is_valid = peak - peak == 0
    if isinstance(scores, Nucleus):
        # The best of all tokens is the best of the nucleus if it is in it.
        valid = is_valid.nonzero().squeeze(-1).tolist()
        missed = [i for i in valid if not _is_surely_inside(rows[i], peak[i], tokens[i], scores.top_p)]
        if missed:
            few = torch.tensor(missed)
            tokens[few], best[few] = _drawn(truncated(rows[few], scores.top_p), peak[few], noise, few)
    tokens, best = torch.where(is_valid, tokens, at_peak), torch.where(is_valid, best, peak)
    return tokens.view(values.shape[:2]), best.view(values.shape[:2])


def _drawn(values: Tensor, peak: Tensor, noise: Noise, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The winning tokens and their scores with noise, `n` each; of rows that are no distribution, anything.

    Noise is computed for two kinds of tokens: the loud ones, with the most noise of all, and those whose score is so large
    that less noise lets them win.

    Args:
        values: `n v` float32.
        peak: `n`, the largest of each row.
        positions: `n` int64, their places in `noise`, counted through all rows of the batch.
    """
    vocab_size = values.shape[-1]
    loud = noise.loud(vocab_size)
    ids, gumbel = loud.ids[positions], loud.gumbel[positions]
    sums = values.gather(-1, ids) + gumbel
    best = sums.amax(-1)

    # Rounding keeps the order of sums, so these bounds hold for float32.
    bound = torch.maximum(best, peak + LEAST_GUMBEL)
    undecided = ((peak - peak == 0) & (peak + loud.bound >= bound)).nonzero().squeeze(-1)
    found = [np.flatnonzero(values[i].numpy() + loud.bound >= bound[i].item()) for i in undecided.tolist()]
    row = undecided.repeat_interleave(torch.tensor([len(tokens) for tokens in found], dtype=torch.int64))
    others = torch.from_numpy(np.concatenate([*found, np.empty(0, np.int64)]))
    sums_of_others = values[row, others] + noise.of_pairs(positions[row], others)

    best = best.scatter_reduce(0, row, sums_of_others, "amax")
    tokens = torch.where(sums == best[:, None], ids, vocab_size).amin(-1)
    tokens = tokens.scatter_reduce(0, row, torch.where(sums_of_others == best[row], others, vocab_size), "amin")
    return tokens, best
