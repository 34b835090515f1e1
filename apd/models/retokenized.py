"""Text from one tokenizer to another: what a tokenizer makes of text that goes on behind tokens it did not choose.

Committed tokens are never tokenized again. A continuation is tokenized together with the text before it, and counts from
the committed boundary on; see `Language.continuation`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from apd.text import REPLACEMENT, whole_text

__all__ = ["WORD_STARTS", "Continuation", "Encoded", "Language", "Strings", "retokenize"]

#: Tokens before a continuation that are tokenized with it. Tokenizers that split text into words look no further back.
CONTEXT = 32
#: Tokens at the end of a text that more text may change, in scripts that do not separate words.
OPEN_TOKENS = 8
#: How the strings of tokens begin that begin a word.
WORD_STARTS = ("▁", "Ġ", " ")


class Encoded(NamedTuple):
    """Token ids of a text; those from `open` on, its last word, may change when the text goes on."""

    ids: list[int]
    open: int


class Continuation(NamedTuple):
    """The tokens of text behind committed tokens.

    Attributes:
        ids: the tokens.
        is_whole: they spell the whole text.
        is_cut: they end where the text would need a special token, so more text adds nothing.
    """

    ids: list[int]
    is_whole: bool
    is_cut: bool


class Language:
    """A tokenizer, fast or slow, as a translator needs it. No text and no ids make it fail.

    Args:
        tokenizer: a tokenizer of transformers.

    Attributes:
        size: ids from here on do not exist.
        special_ids: special tokens and the unknown token, which no text is meant to spell.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.size = max(tokenizer.get_vocab().values(), default=-1) + 1
        added = getattr(tokenizer, "added_tokens_decoder", {})
        named = [
            *tokenizer.all_special_ids,
            tokenizer.unk_token_id,
            *(i for i, token in added.items() if token.special),
        ]
        self.special_ids = frozenset(token for token in named if token is not None)

    def text(self, ids: Sequence[int], *, special: bool, whole: bool = True) -> str:
        """The text of tokens, without clean-up of spaces.

        Args:
            ids: token ids; those that do not exist are left out.
            special: write special tokens, too.
            whole: leave out an unfinished character at the end.
        """
        known = [token for token in ids if 0 <= token < self.size]
        arguments = {"skip_special_tokens": not special, "clean_up_tokenization_spaces": False}
        return whole_text(self.tokenizer, known, **arguments) if whole else self.tokenizer.decode(known, **arguments)

    def encode(self, text: str) -> Encoded:
        """The tokens of a text, none added in front or behind."""
        # A lone surrogate, which a decoder or a caller's function may give, is no character.
        text = text.encode("utf-8", "replace").decode()
        encoding = self.tokenizer(text, add_special_tokens=False, verbose=False)
        ids = encoding["input_ids"]
        return Encoded(ids, max(self._last_word(encoding), len(ids) - OPEN_TOKENS))

    def _last_word(self, encoding: Any) -> int:
        """The first token of the last word."""
        ids = encoding["input_ids"]
        words = encoding.word_ids() if getattr(encoding, "is_fast", False) else []
        if len(set(words)) > 1:  # the tokenizer splits words, and merges nothing across
            return len(ids) - 1 if words[-1] is None else words.index(words[-1])
        tokens = self.tokenizer.convert_ids_to_tokens(ids)
        return max((i for i, token in enumerate(tokens) if str(token).startswith(WORD_STARTS)), default=0)

    def continuation(self, ids: Sequence[int], text: str, *, is_complete: bool = False) -> Continuation:
        """The tokens of `text` behind the committed tokens `ids`.

        The text is tokenized behind the text of the last committed tokens. Where the tokenizer puts a boundary between
        the two, its tokens from there on are the answer, whatever ids it gives to the text before. Otherwise, and where
        the committed tokens end within a character, the answer is tokens that spell the text behind the very ids that
        are committed, if the tokenizer writes any; else nothing.

        Args:
            ids: n committed ids.
            text: what follows the text of `ids` without an unfinished character at its end.
            is_complete: nothing follows `text`. If False, the last word is left out, since its tokens depend on what
                follows.
        Returns:
            Tokens up to the first special one.
        """
        tail = [token for token in ids[-CONTEXT:] if 0 <= token < self.size]
        before = self.text(tail, special=True)
        both = self.encode(before + text)
        start = None
        if before == self.text(tail, special=True, whole=False):
            known = self.encode(before).ids
            # The text of a first token that is a space is empty in SentencePiece.
            if both.ids[: len(known)] == known and (before or not tail):
                start = len(known)
        if start is None:
            exactly = self._behind_exactly(tail, before, text)
            if exactly is None:
                return Continuation([], is_whole=False, is_cut=False)
            both, start = exactly
        end = len(both.ids) if is_complete else max(start, both.open)
        found = both.ids[start:end]
        usable = next((i for i, token in enumerate(found) if token in self.special_ids), len(found))
        return Continuation(found[:usable], start + usable == len(both.ids), usable < len(found))

    def _behind_exactly(self, tail: list[int], before: str, text: str) -> tuple[Encoded, int] | None:
        """Tokens that begin with the last of `tail`, and where they end; the longest such context that there is.

        A tokenizer may write a space before any text, so one more token may come first.
        """
        for length in range(len(tail), -1, -1):
            last = tail[len(tail) - length :]
            both = self.encode(self.text(last, special=True) + text)
            for start in (length, length + 1):
                follows = both.ids[start - length : start] == last
                if follows and self.text([*tail, *both.ids[start:]], special=True) == before + text:
                    return both, start
        return None

    @cached_property
    def leading(self) -> list[int]:
        """The special tokens that the tokenizer puts before a text."""
        plain = self.encode("a").ids
        whole = list(self.tokenizer("a", verbose=False)["input_ids"])
        return whole[: next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)]

    @cached_property
    def by_text(self) -> dict[str, int]:
        """The tokens that are not special by their strings, in which a space is a space in every kind of tokenizer."""
        vocabulary = self.tokenizer.get_vocab().items()
        return {s.replace("Ġ", " ").replace("▁", " "): i for s, i in vocabulary if i not in self.special_ids}

    @cached_property
    def joins(self) -> bool:
        """True if the strings of tokens join to those of longer tokens, as in BPE and Unigram."""
        model = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        return type(model).__name__ in ("BPE", "Unigram")

    def strings(self, ids: Sequence[int]) -> list[str]:
        """The strings of tokens, as `Strings` compares them."""
        return [str(string) for string in self.tokenizer.convert_ids_to_tokens(list(ids))]

    def start_of(self, ids: Sequence[int], tokens: int) -> int:
        """The index of the last `tokens` ids, or of up to three before, so that the text from there begins with a character."""
        first = max(len(ids) - tokens, 0)
        for start in range(first, max(first - 4, -1), -1):
            if not self.text(ids[start:], special=True).startswith(REPLACEMENT):
                return start
        return first


class Strings:
    """The strings of tokens in order, to find those that go on as a string does.

    Args:
        strings: the strings.
        ids: the token id of each.
    """

    def __init__(self, strings: Sequence[str], ids: Sequence[int]) -> None:
        pairs = sorted(zip(strings, ids, strict=True))
        self.strings = [string for string, _ in pairs]
        self.ids = torch.tensor([i for _, i in pairs], dtype=torch.int64, device="cpu")

    def longer(self, string: str) -> Tensor:
        """The tokens that spell this string and more: `n` int64."""
        first = bisect.bisect_right(self.strings, string)
        return self.ids[first : bisect.bisect_left(self.strings, string + chr(0x10FFFF))]


def retokenize(ids: Sequence[int], text: str, tokenizer: Any, *, is_complete: bool = False) -> list[int]:
    """The ids of a tokenizer for `text` behind committed ids; arguments as in `Language.continuation`.

    Example:
        >>> from apd.models.loading import load_tokenizer
        >>> from apd.included import DRAFTER_DIR
        >>> tokenizer = load_tokenizer(DRAFTER_DIR)
        >>> ids = retokenize(tokenizer(' ["Ada')["input_ids"], '", "Bea", "Cle', tokenizer)
        >>> tokenizer.decode(ids)
        '", "Bea", "'
    """
    return Language(tokenizer).continuation(ids, text, is_complete=is_complete).ids
