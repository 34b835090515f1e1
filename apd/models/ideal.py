"""Exact models of enumerable list tasks: the distributions of a perfectly trained drafter and verifier.

If all right answers and their weights can be listed, p(token | known tokens) is a sum over the answers that fit.
`IdealListModel` computes these sums behind the protocols of neural models, so strategies and acceptance rules can be
compared with closed forms without training.
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
_MOST_ENTRIES = 1 << 24  # entries of the largest temporary table, answers × positions × contexts


class IdealListModel:
    """Exact drafter and verifier of a task that is given by all its right answers, each of n tokens.

    The prompt's content is ignored. A context that several rows share is computed once, so statistics over many thousand
    rows are cheap.

    Args:
        answers: `a n` integers, ids from 0 on; the id after the largest is the mask.
        weights: `a` positive numbers proportional to the probability of each answer; equal by default.

    Attributes:
        drafter, verifier: the two exact models, for `APDSampler`.
        answers: `a n` int64.
        weights: `a` float64, as given.
        mask_token_id: the largest id; `vocab_size` is one more.

    Raises:
        ValueError: `answers` is not a table of ids or is too large to enumerate, or a weight is not positive.

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
        """All n! orders of n items, the identity included (ParallelBench excludes it). `n` is 1 to `LONGEST_SHUFFLE`."""
        _check_items(n, least=1)
        if n > LONGEST_SHUFFLE:
            raise ValueError(
                f"`n` must be at most {LONGEST_SHUFFLE}, got {n}: all {math.factorial(n)} orders are enumerated."
            )
        return cls(torch.tensor(list(itertools.permutations(range(n)))))

    @classmethod
    def replace_random(cls, n: int) -> IdealListModel:
        """Items 0 … n−1 in order, with the new item n in place of any one of them: length n."""
        _check_items(n, least=1)
        return cls(torch.tensor([[*range(i), n, *range(i + 1, n)] for i in range(n)]))

    @classmethod
    def insert_random(cls, n: int) -> IdealListModel:
        """Items 0 … n−1 in order with the new item n anywhere among them: length n+1."""
        _check_items(n, least=1)
        return cls(torch.tensor([[*range(i), n, *range(i, n)] for i in range(n + 1)]))

    @classmethod
    def remove_random(cls, n: int) -> IdealListModel:
        """Items 0 … n−1 in order without any one of them: length n−1. `n` is at least 2."""
        _check_items(n, least=2)
        return cls(torch.tensor([[*range(i), *range(i + 1, n)] for i in range(n)]))

    @property
    def length(self) -> int:
        """Number of tokens per answer, n."""
        return self.answers.shape[1]

    def is_valid(self, tokens: Tensor) -> Tensor:
        """True for rows that are one of the answers: `b n` int64 → `b` bool.

        Raises:
            ValueError: another shape than `b n`.
        """
        if tokens.dim() != 2 or tokens.shape[1] != self.length:
            raise ValueError(
                f"`tokens` must have the shape [rows, {self.length}] of the answers, got {list(tokens.shape)}. Cut the "
                "prompt off."
            )
        known = (tokens >= 0) & (tokens < self.vocab_size)
        return known.all(1) & torch.isin(self._encode(tokens.where(known, 0)), self._answer_codes)

    def logits(self, known: Tensor, position: Tensor) -> Tensor:
        """log p(token at `position`, known tokens) up to a constant: logits of the exact conditional.

        Args:
            known: `b k n` int64, the known tokens; the mask id elsewhere.
            position: `b m` int64, 0 … n−1; k is m or 1.
        Returns:
            `b m v` float32; −∞ for every token if no answer fits the known tokens.
        """
        codes, row = self._encode(known).unique(return_inverse=True)
        contexts = codes[:, None] // self._place_values % self.vocab_size
        at_once = max(1, _MOST_ENTRIES // self.answers.numel())
        return torch.cat([self._log_weights(part) for part in contexts.split(at_once)])[row, position]

    def _log_weights(self, contexts: Tensor) -> Tensor:
        """Log of the total weight of the fitting answers, by their token at each position: `c n` int64 → `c n v` float32."""
        fits = self._fits[torch.arange(self.length, device=contexts.device), contexts].all(1)  # c a
        total = fits.double() @ self._token_weights
        return total.log().float().view(len(contexts), self.length, self.vocab_size)

    def _encode(self, tokens: Tensor) -> Tensor:
        """Rows as numbers whose digits are the ids: `… n` → `…` int64."""
        return (tokens * self._place_values).sum(-1)


class _Ideal:
    """Base of the exact drafter and verifier. Both are stateless, so each is its own session."""

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
                "model gives probabilities of complete answers only."
            )

    def _positions(self, state: DecodeState, window: Window) -> Tensor:
        return (window.columns - state.prompt_end[:, None]).clamp(0, self.model.length - 1)

    def _answer(self, tokens: Tensor, state: DecodeState) -> Tensor:
        """The n tokens behind each row's prompt, `b l` → `b n`."""
        columns = state.prompt_end[:, None] + torch.arange(self.model.length, device=tokens.device)
        return tokens.gather(1, columns)


class IdealDrafter(_Ideal):
    """Exact marginals p(token at a column | all decided new tokens), independent of window and cache settings."""

    def open(self, state: DecodeState) -> IdealDrafter:
        self._check_length(state)
        return self

    def logits(self, state: DecodeState, window: Window) -> Tensor:
        return self._marginals(self._answer(state.tokens, state)[:, None], state, window)

    def canvas_logits(self, state: DecodeState, window: Window, rows: Tensor) -> Tensor:
        return self.logits(state, window)

    def leave_one_out_logits(self, state: DecodeState, window: Window) -> Tensor:
        """Logits of p(token at a column | all other decided new tokens), exact: `b m v` float32."""
        itself = torch.arange(self.model.length, device=self.device) == self._positions(state, window)[..., None]
        others = self._answer(state.tokens, state)[:, None].masked_fill(itself, self.mask_token_id)  # b m n
        return self._marginals(others, state, window)

    def _marginals(self, known: Tensor, state: DecodeState, window: Window) -> Tensor:
        logits = self.model.logits(known, self._positions(state, window))
        # Parallel draws may commit tokens that no answer contains. Decoding goes on with a uniform distribution.
        impossible = logits.isneginf().all(-1, keepdim=True)
        return logits.masked_fill(impossible, 0.0)


class IdealVerifier(_Ideal):
    """Exact conditionals p(token at a column | the tokens before it, drafted ones included).

    Logits are −∞ for every token behind a prefix that no answer has.
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
    return weights  # not normalised: sums of counts are exact, so equal marginals are equal bit for bit


def _check_items(n: int, *, least: int) -> None:
    if n < least:
        raise ValueError(f"`n` must be at least {least}, got {n}: the items of the list are counted.")
