"""Stop strings, found in the decoded text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria


class StopStrings(StoppingCriteria):
    """Ends a row with the token that completes one of the strings.

    transformers' own criterion takes the vocabulary apart beforehand, which fails for tokenizers without sub-words.
    Asked at every single token, decoding a short tail is enough; the two agree on byte-level tokenizers (a test).

    Args:
        stop_strings: one or many, none of them empty.
        tokenizer: decodes the row.
    Raises:
        ValueError: an empty string, which would stop everywhere.
    """

    def __init__(self, stop_strings: str | Sequence[str], tokenizer: Any) -> None:
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if not all(self.stop_strings):
            raise ValueError(f"`stop_strings` must not be empty strings, got {self.stop_strings!r}.")
        self.tokenizer = tokenizer
        # A token is at least one byte, and a character at most four.
        self.reach = 4 * max(map(len, self.stop_strings), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        completed = [self._is_completed(row[-self.reach :]) for row in input_ids.tolist()]
        return torch.tensor(completed, device=input_ids.device)

    def _is_completed(self, tail: list[int]) -> bool:
        before, now = self._text(tail[:-1]), self._text(tail)
        same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, now, strict=False))
        known = len(list(same))  # a character that was incomplete before is new, too
        return any(stop in now and now.rindex(stop) + len(stop) > known for stop in self.stop_strings)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
