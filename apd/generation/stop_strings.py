"""Stop strings, searched in the decoded text."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from apd.text import BYTES_BEHIND, REPLACEMENT, check_text


class StopStrings(StoppingCriteria):
    """Ends a row with the token that completes one of the strings.

    transformers' own criterion precomputes overlaps with the vocabulary, which fails for tokenizers without sub-words.
    This one is called at every token, so a decoded tail suffices: it finds each match that a search of the whole text
    finds, also where several tokens spell one character.

    Args:
        stop_strings: one or many, none of them empty.
        tokenizer: has `decode`.
    Raises:
        ValueError: an empty string, or half a surrogate pair.
    """

    def __init__(self, stop_strings: str | Sequence[str], tokenizer: Any) -> None:
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings)
        if not all(self.stop_strings):
            raise ValueError(f"`stop_strings` must not be empty strings, got {self.stop_strings!r}.")
        for stop in self.stop_strings:
            check_text(stop, "`stop_strings`")
        self.tokenizer = tokenizer
        # A token is at least one byte, and a character at most four. Decoders treat the first token specially.
        self.reach = 4 * max(map(len, self.stop_strings), default=0) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        tails = input_ids[:, -self.reach - BYTES_BEHIND :].tolist()
        return torch.tensor([self._is_completed(tail) for tail in tails], device=input_ids.device)

    def _is_completed(self, ids: list[int]) -> bool:
        # A byte-fallback decoder makes no text of a run of byte tokens that is cut inside a character.
        start = max(len(ids) - self.reach, 0)
        now = self._text(ids[start:])
        while start > 0 and now.startswith(REPLACEMENT):
            start -= 1
            now = self._text(ids[start:])
        ends = [now.rindex(stop) + len(stop) for stop in self.stop_strings if stop in now]
        return bool(ends) and max(ends) > self._num_known(ids[start:], now)

    def _num_known(self, ids: list[int], now: str) -> int:
        """Number of leading characters that were complete before the last character began."""
        known = 0
        for left_out in range(1, BYTES_BEHIND + 2):
            before = self._text(ids[:-left_out])
            same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(before, now, strict=False))
            known = max(known, len(list(same)))
            if not before.endswith(REPLACEMENT):
                break
        return known

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
