"""Exact models of enumerable list tasks: what a perfectly trained drafter and verifier would say.

Where every right answer can be listed, with its weight, p(token | known tokens) is a sum over the answers that fit.
`IdealListModel` gives these numbers behind the protocols of a neural model, so that every strategy and every
acceptance rule can be held against closed forms with no training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from apd.decoding.state import DecodeState
from apd.decoding.window import Window

LONGEST_SHUFFLE = 8  # 40,320 orders
_MOST_ENTRIES = 1 << 24  # of the table answer × position × context that is held at once


class IdealListModel:
    """A task given by all its right answers: one token per item, no separators, every answer equally long.

    The prompt's content is ignored. Contexts that rows have in common are computed once, so statistics over many
    thousand rows are cheap.

    Args:
        answers: `a n` integers, ids from 0 on; the id after the largest is the mask.
        weights: `a` positive numbers, how likely each answer is; equally likely when not given.

    Attributes:
        drafter, verifier: the two exact models, for `APDSampler`.
        answers: `a n` int64.
        weights: `a` float64, as given.
        mask_token_id: the largest id; `vocab_size` is one more.

    Raises:
        ValueError: the answers are no table of ids, there are too many of them, or a weight is not positive.

    Example:
        >>> model = IdealListModel.shuffle(4)
        >>> sampler = APDSampler(model.drafter, model.verifier, mixture_weight=0)
        >>> sequences = sampler.generate(torch.zeros(100, 1, dtype=torch.int64), max_new_tokens=4, do_sample=True)
        >>> bool(model.is_valid(sequences[:, 1:]).all())
        True
    """

    def __init__(self, answers: Tensor, weights: Tensor | Sequence[float] | None = None) -> None:
        if answers.dim() != 2 or answers.numel() == 0 or answers.is_floating_point() or int(answers.min()) < 0:
            raise ValueError(
                f"`answers` must be ids of shape [answers, length], at least one and none negative, got "
                f"{answers.dtype} of shape {list(answers.shape)}. Give one answer per row."
            )
        self.answers = answers.long()
        self.weights = _checked_weights(weights, self.answers)
        self.mask_token_id = int(answers.max()) + 1
        self.vocab_size = self.mask_token_id + 1
        if self.length * math.log2(self.vocab_size) >= 63:
            raise ValueError(
                f"`answers` must be few and short enough to enumerate, {self.vocab_size} ids at {self.length} positions "
                f"are not: {self.vocab_size}^{self.length} must be below 2^63. Use a shorter list."
            )
        self._place_values = self.vocab_size ** torch.arange(self.length, device=answers.device)
        self._answer_codes = self._encode(self.answers)
        holds = torch.nn.functional.one_hot(self.answers, self.vocab_size)  # a n v
        self._token_weights = (holds * self.weights[:, None, None]).flatten(1)  # a n·v
        self._fits = holds.permute(1, 2, 0).bool()  # n v a
        self._fits[:, self.mask_token_id] = True
        self.drafter = IdealDrafter(self)
        self.verifier = IdealVerifier(self)

    @classmethod
    def shuffle(cls, n: int) -> IdealListModel:
        """All n! orders of n items; the identity counts as one (ParallelBench leaves it out)."""
        _check_items(n, least=1)
        if n > LONGEST_SHUFFLE:
            raise ValueError(
                f"`n` must be at most {LONGEST_SHUFFLE}, got {n}: all {math.factorial(n)} orders are enumerated."
            )
        return cls(torch.tensor(list(itertools.permutations(range(n)))))

    @classmethod
    def replace_random(cls, n: int) -> IdealListModel:
        """Items 0 … n−1 in order, one of them, anywhere, replaced by the new item n."""
        _check_items(n, least=1)
        return cls(torch.tensor([[*range(i), n, *range(i + 1, n)] for i in range(n)]))

    @classmethod
    def insert_random(cls, n: int) -> IdealListModel:
        """Items 0 … n−1 in order with the new item n anywhere among them: length n+1."""
        _check_items(n, least=1)
        return cls(torch.tensor([[*range(i), n, *range(i, n)] for i in range(n + 1)]))

    @classmethod
    def remove_random(cls, n: int) -> IdealListModel:
        """Items 0 … n−1 in order, one of them, anywhere, left out: length n−1."""
        _check_items(n, least=2)
        return cls(torch.tensor([[*range(i), *range(i + 1, n)] for i in range(n)]))

    @property
    def length(self) -> int:
        """Tokens of an answer, n."""
        return self.answers.shape[1]

    def is_valid(self, tokens: Tensor) -> Tensor:
        """Which rows are one of the answers: `b n` ids → `b` bool."""
        if tokens.dim() != 2 or tokens.shape[1] != self.length:
            raise ValueError(
                f"`tokens` must have the shape [rows, {self.length}] of the answers, got {list(tokens.shape)}. Cut the "
                "prompt off."
            )
        known = (tokens >= 0) & (tokens < self.vocab_size)
        return known.all(1) & torch.isin(self._encode(tokens.where(known, 0)), self._answer_codes)

    def logits(self, known: Tensor, position: Tensor) -> Tensor:
        """log p(token at `position`, known tokens): as logits, the exact conditional given what is known.

        Args:
            known: `b k n` int64, the mask id where a token is not known.
            position: `b m` int64, 0 … n−1; k is m or 1.
        Returns:
            `b m v` float32, −∞ for every token where no answer fits what is known.
        """
        codes, row = self._encode(known).unique(return_inverse=True)
        contexts = codes[:, None] // self._place_values % self.vocab_size
        at_once = max(1, _MOST_ENTRIES // self.answers.numel())
        return torch.cat([self._log_weights(part) for part in contexts.split(at_once)])[row, position]

    def _log_weights(self, contexts: Tensor) -> Tensor:
        """Total weight of the answers that fit, by their token at each position: `c n` → `c n v`, as logarithms."""
        fits = self._fits[torch.arange(self.length, device=contexts.device), contexts].all(1)  # c a
        total = fits.double() @ self._token_weights
        return total.log().float().view(len(contexts), self.length, self.vocab_size)

    def _encode(self, tokens: Tensor) -> Tensor:
        """Rows as numbers, `… n` → `…`; the ids are digits."""
        return (tokens * self._place_values).sum(-1)


class _Ideal:
    """What drafter and verifier have in common. They remember nothing, so each is its own session."""

    max_length: int | None = None

    def __init__(self, model: IdealListModel) -> None:
        self.model = model
        self.vocab_size = model.vocab_size
        self.mask_token_id = model.mask_token_id
        self.device = model.answers.device

    def select(self, rows: Tensor) -> None:
        pass

    def join(self, state: DecodeState) -> None:
        pass

    def _check_length(self, state: DecodeState) -> None:
        new_tokens = int((state.end - state.prompt_end).max())
        if new_tokens != self.model.length:
            raise ValueError(
                f"`max_new_tokens` must be {self.model.length}, the length of every answer, got {new_tokens}: an exact "
                "model has nothing to say about other lengths."
            )

    def _positions(self, state: DecodeState, window: Window) -> Tensor:
        return (window.columns - state.prompt_end[:, None]).clamp(0, self.model.length - 1)

    def _answer(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """The columns behind each row's prompt, `b l` → `b n`."""
        columns = state.prompt_end[:, None] + torch.arange(self.model.length, device=tokens.device)
        return tokens.gather(1, columns)


class IdealDrafter(_Ideal):
    """Exact marginals: p(token at a column | all decided new tokens), whatever the window and the cache."""

    def open(self, state: DecodeState) -> IdealDrafter:
        self._check_length(state)
        return self

    def logits(self, state: DecodeState, window: Window) -> Tensor:
        return self._marginals(self._answer(state.tokens, state)[:, None], state, window)

    def leave_one_out_logits(self, state: DecodeState, window: Window) -> Tensor:
        """Exact too: p(token at a column | all other decided new tokens)."""
        itself = torch.arange(self.model.length, device=self.device) == self._positions(state, window)[..., None]
        others = self._answer(state.tokens, state)[:, None].masked_fill(itself, self.mask_token_id)  # b m n
        return self._marginals(others, state, window)

    def _marginals(self, known: Tensor, state: DecodeState, window: Window) -> Tensor:
        logits = self.model.logits(known, self._positions(state, window))
        # Parallel draws may commit what no answer has. Decoding goes on, and one token is then as good as another.
        impossible = logits.isneginf().all(-1, keepdim=True)
        return logits.masked_fill(impossible, 0.0)


class IdealVerifier(_Ideal):
    """Exact conditionals: p(token at a column | the tokens before it, drafted ones included).

    −∞ for every token behind a prefix that no answer has.
    """

    def open(self, state: DecodeState) -> IdealVerifier:
        self._check_length(state)
        return self

    def logits(self, state: DecodeState, window: Window, draft: Tensor) -> Tensor:
        canvas = self._answer(window.fill(draft, state.tokens), state)[:, None]
        position = self._positions(state, window)
        before = torch.arange(self.model.length, device=canvas.device) < position[..., None]  # b m n
        return self.model.logits(canvas.where(before, self.mask_token_id), position)


def _checked_weights(weights: Tensor | Sequence[float] | None, answers: Tensor) -> Tensor:
    if weights is None:
        weights = torch.ones(len(answers), device=answers.device)
    weights = torch.as_tensor(weights, device=answers.device).double()
    if weights.shape != answers.shape[:1]:
        raise ValueError(
            f"`weights` must hold one number per answer, {len(answers)}, got shape {list(weights.shape)}."
        )
    if not ((weights > 0) & weights.isfinite()).all():
        raise ValueError(
            f"`weights` must be positive and finite, got {weights.min():g} to {weights.max():g}. Leave out answers "
            "that never occur."
        )
    return weights  # not divided by their sum: counts add up exactly, so equal marginals are equal bit for bit


def _check_items(n: int, *, least: int) -> None:
    if n < least:
        raise ValueError(f"`n` must be at least {least}, got {n}: the items of the list are counted.")
