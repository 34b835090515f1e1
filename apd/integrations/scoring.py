"""Log-probabilities of given continuations under sequential decoding of the drafter, left to right.

log p(x | context) = Σ_j log p_D(x_j | context, x_<j, masks at j and behind it): the chain rule on a canvas of just the
continuation's length, so this is the probability with which `LeftToRight(1)` samples it there. No knob enters into it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from apd.decoding.probability import log_normalise
from apd.decoding.protocols import Drafter
from apd.decoding.returned import CheckedLogits, check_session, name_of
from apd.decoding.state import DecodeState
from apd.decoding.window import AllMasks

__all__ = ["sequential_logprobs", "token_logprobs"]


@dataclass(frozen=True)
class _Row:
    """A canvas: context, the continuation's known prefix, then masks; and the requests that need its first mask."""

    context: tuple[int, ...]
    before: tuple[int, ...]
    masks: int
    requests: list[int]


def sequential_logprobs(
    drafter: Drafter, pairs: Sequence[tuple[list[int], list[int]]], *, vocab_size: int, batch_size: int
) -> Iterator[tuple[int, float, bool, int]]:
    """Score given continuations, each on a canvas of just its length.

    One forward per position; requests with equal context, length and prefix share it.

    Args:
        drafter: neural or exact.
        pairs: ids of context (at least one) and continuation.
        vocab_size: ids below it can be decoded, the mask token aside; all others have probability 0.
        batch_size: rows per forward.
    Yields:
        Index of the pair, log p of its continuation in nats, whether every token is the likeliest, and the number of
        forwards, shared ones counted for one pair only. As soon as a pair is scored, in no particular order.
    Raises:
        FloatingPointError: the drafter gave NaN, +∞ or nothing finite.
    """
    total = [0.0] * len(pairs)
    greedy = [True] * len(pairs)
    num_rows = [0] * len(pairs)
    for i, (_, continuation) in enumerate(pairs):
        if not continuation:
            yield i, 0.0, True, 0
    rows = _rows(pairs)
    while batch := list(islice(rows, batch_size)):
        logprobs = _first_mask(drafter, batch, vocab_size)
        wanted = [(r, i, pairs[i][1][len(row.before)]) for r, row in enumerate(batch) for i in row.requests]
        of_row, tokens = torch.tensor([[r, token] for r, _, token in wanted], device=logprobs.device).T
        values = logprobs[of_row, tokens.clamp(max=vocab_size - 1)].masked_fill(tokens >= vocab_size, -torch.inf)
        likeliest = logprobs.argmax(-1)[of_row] == tokens
        for (r, i, _), value, is_likeliest in zip(wanted, values.tolist(), likeliest.tolist(), strict=True):
            total[i] += value
            greedy[i] &= is_likeliest
            num_rows[i] += i == batch[r].requests[0]
            if batch[r].masks == 1:
                yield i, total[i], greedy[i], num_rows[i]


def token_logprobs(
    drafter: Drafter, texts: Sequence[list[int]], *, vocab_size: int, batch_size: int
) -> Iterator[list[tuple[int, int, Tensor]]]:
    """Score every token of every text but its first, behind the tokens before it.

    The last n of them sum to what `sequential_logprobs` gives for the last n tokens as the continuation.

    Args:
        texts: ids, at least one each.
        drafter, vocab_size, batch_size: as in `sequential_logprobs`.
    Yields:
        After every forward, of each of its rows the index of the text, the position, and log p of every token there in nats,
        `v` float32.
    Raises:
        FloatingPointError: the drafter gave NaN, +∞ or nothing finite.
    """
    rows = (
        _Row((ids[0],), tuple(ids[1:position]), len(ids) - position, [i])
        for i, ids in enumerate(texts)
        for position in range(1, len(ids))
    )
    while batch := list(islice(rows, batch_size)):
        logprobs = _first_mask(drafter, batch, vocab_size)
        yield [(row.requests[0], 1 + len(row.before), logprobs[r]) for r, row in enumerate(batch)]


def _rows(pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[_Row]:
    """One row per position, wide ones first; pairs with equal canvas and prefix share a row."""
    canvases: defaultdict[tuple[tuple[int, ...], int], list[int]] = defaultdict(list)
    for i, (context, continuation) in enumerate(pairs):
        canvases[tuple(context), len(continuation)].append(i)
    for (known, length), members in sorted(canvases.items(), key=lambda item: -len(item[0][0]) - item[0][1]):
        for position in range(length):
            by_prefix: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
            for i in members:
                by_prefix[tuple(pairs[i][1][:position])].append(i)
            for before, requests in by_prefix.items():
                yield _Row(known, before, length - position, requests)


@torch.inference_mode()
def _first_mask(drafter: Drafter, rows: list[_Row], vocab_size: int) -> Tensor:
    """log p_D at the first mask of each row, `b v` float32; 0 probability for tokens never drawn, as in the sampler."""
    state = _canvases(rows, drafter.mask_token_id, drafter.device)
    # A window of one column that ends behind all masks: they are attended to, their logits are not computed.
    window = dataclasses.replace(AllMasks().window(state).first(), ends=state.layout.end)
    session = drafter.open(state)
    check_session(session, name_of(drafter, "open"), "logits")
    of_window = CheckedLogits(session.logits(state, window), name_of(session, "logits"), (len(rows), 1), vocab_size)
    logits = of_window[:, :1][:, 0, :vocab_size].float()
    stops = getattr(getattr(drafter, "generation_config", None), "eos_token_id", None)
    stops = stops if isinstance(stops, list) else [stops]
    special = [id for id in getattr(drafter, "never_drawn", ()) if id not in stops]
    logits[:, [id for id in (drafter.mask_token_id, *special) if id < vocab_size]] = -torch.inf
    logprobs = log_normalise(logits)
    if logprobs.isnan().any():
        raise FloatingPointError(
            "The drafter gave NaN, infinite or no finite logits for a given text. Check its weights and dtype (float16 "
            "overflows where bfloat16 does not)."
        )
    return logprobs


def _canvases(rows: list[_Row], mask_token_id: int, device: torch.device) -> DecodeState:
    """The rows as one batch, aligned on the right; prefix and masks count as generated."""
    known = [row.context + row.before for row in rows]
    width = max(len(ids) + row.masks for ids, row in zip(known, rows, strict=True))
    masks = torch.tensor([row.masks for row in rows], device="cpu")
    padding = masks.new_tensor([width - len(ids) - row.masks for ids, row in zip(known, rows, strict=True)])
    tokens = [[0] * (width - len(ids) - row.masks) + [*ids] for ids, row in zip(known, rows, strict=True)]
    ids = masks.new_tensor([ids + [mask_token_id] * row.masks for ids, row in zip(tokens, rows, strict=True)])
    decided = torch.arange(width, device="cpu") < width - masks[:, None]
    prompt_end = width - masks - masks.new_tensor([len(row.before) for row in rows])
    ids, padding, decided, prompt_end = (each.to(device) for each in (ids, padding, decided, prompt_end))
    state = DecodeState.start(ids, max_new_tokens=0, mask_token_id=mask_token_id, padding=padding)
    return dataclasses.replace(state, prompt_end=prompt_end).with_decided(ids, decided)
