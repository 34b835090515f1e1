"""Grammars of `response_format`, by llguidance: which tokens may come next so that an answer is JSON of a schema."""

from __future__ import annotations

import json
from collections.abc import Sequence
from threading import Lock
from typing import Any

import numpy
import torch
from torch import Tensor

from apd.extras import install
from apd.serve.engine.errors import APIError, refused
from apd.serve.engine.spelling import Spelling

_PARAM = "response_format"
#: A space may come first: many vocabularies have no other token for the beginning of a text. Nothing is forced: forced
#: text is tokenized by itself, which a vocabulary of words may not be able to spell.
_GRAMMAR = """%llguidance {{"no_forcing": true}}
start: " "? answer
answer: %json {schema}
"""


#: A space, or an indented line; without an end, a weak model may write spaces until its limit.
_WHITESPACE = r" |\n {0,8}"
_OPTIONS = {"x-guidance": {"whitespace_pattern": _WHITESPACE}}


class Grammars:
    """Makes the constraints of `response_format` for one tokenizer.

    Args:
        spelling: the bytes of tokens.
        vocab_size: ids below it can be decoded.
    """

    def __init__(self, spelling: Spelling, vocab_size: int) -> None:
        self.spelling, self.vocab_size = spelling, vocab_size
        self.lock = Lock()
        self.tokenizers: dict[tuple[int, ...], Any] = {}  # by stop tokens

    def constraints(
        self, schema: dict[str, Any], stop_ids: Sequence[int], prompt_lengths: Sequence[int]
    ) -> list[Constraint]:
        """What rows of these prompts may write.

        Raises:
            APIError: llguidance is missing, the tokenizer cannot be used, or the schema is none or allows nothing.
        """
        if not stop_ids:
            raise refused(f"`{_PARAM}` needs a model with a stop token, which ends the answer.", _PARAM)
        matcher = self._matcher(schema, stop_ids)

        def make(prompt_length: int) -> Constraint:
            return Constraint(matcher.deep_copy(), prompt_length, stop_ids[0], self.vocab_size)

        first = make(0)
        if not len(first.allowed(torch.zeros(0, dtype=torch.int64))) or first.dead_ends:
            raise refused(
                f"`{_PARAM}`: no token of this model may begin an answer of this schema.", _PARAM, "grammar_dead_end"
            )
        return [make(length) for length in prompt_lengths]

    def _matcher(self, schema: dict[str, Any], stop_ids: Sequence[int]) -> Any:
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise refused(
                f"`{_PARAM}` needs a package that this server lacks: {install('grammar')}.",
                _PARAM,
                "unsupported_parameter",
            ) from None
        tokenizer = self._tokenizer(tuple(stop_ids))
        grammar = LLMatcher.grammar_from_lark(_GRAMMAR.format(schema=json.dumps(schema | _OPTIONS)))
        matcher = LLMatcher(tokenizer, grammar, log_level=0)
        if matcher.is_error():
            reason = matcher.get_error().splitlines()[0]
            raise refused(f"Invalid schema for `{_PARAM}`: {reason}", _PARAM, "invalid_json_schema")
        return matcher

    def _tokenizer(self, stop_ids: tuple[int, ...]) -> Any:
        with self.lock:
            if stop_ids not in self.tokenizers:
                self.tokenizers[stop_ids] = self._made(list(stop_ids))
            return self.tokenizers[stop_ids]

    def _made(self, stop_ids: list[int]) -> Any:
        import llguidance
        import llguidance.hf

        tokenizer = self.spelling.tokenizer
        size = len(tokenizer)
        try:
            return llguidance.hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=stop_ids)
        except ValueError:
            pass  # a decoder that llguidance does not read; the tokens can be spelled nevertheless where it only joins them
        if not self.spelling.joins:
            raise refused(
                f"`{_PARAM}` needs a tokenizer whose tokens have bytes of their own, which this model's does not.",
                _PARAM,
                "unsupported_parameter",
            )
        return llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Joined(self.spelling, size, stop_ids[0])), n_vocab=size, eos_token=stop_ids
        )


class _Joined:
    """A tokenizer as llguidance's `TokenizerWrapper` wants it."""

    def __init__(self, spelling: Spelling, size: int, stop_id: int) -> None:
        self.spelling = spelling
        self.eos_token_id, self.bos_token_id = stop_id, None
        self.special_token_ids = sorted(set(spelling.tokenizer.all_special_ids))
        self.tokens = [spelling.spelled(token) for token in range(size)]

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError
        return []


class Constraint:
    """What one row may write.

    Args:
        matcher: of llguidance, before the first token.
        prompt_length: ids of the row that are not part of the answer.
        stop_id: allowed where the grammar allows nothing, so that the draft ends there; see `dead_ends`.
        vocab_size: ids from here on are never allowed.

    Attributes:
        dead_ends: answers behind which nothing was allowed. A draft may run into one and be rejected; an answer may not.
    """

    def __init__(self, matcher: Any, prompt_length: int, stop_id: int, vocab_size: int) -> None:
        self.matcher, self.prompt_length, self.stop_id, self.vocab_size = matcher, prompt_length, stop_id, vocab_size
        self.consumed: list[int] = []
        self.dead_ends: set[tuple[int, ...]] = set()

    def allowed(self, ids: Tensor) -> Tensor:
        """The ids that may come behind these, `n` int64."""
        answer = ids[self.prompt_length :].tolist()
        if self._move_to(answer):
            bits = numpy.frombuffer(self.matcher.compute_bitmask(), dtype=numpy.uint8)
            found = torch.from_numpy(numpy.unpackbits(bits, bitorder="little")[: self.vocab_size].nonzero()[0])
            if not self.matcher.is_accepting():
                found = found[found != self.stop_id]  # which it allows where it allows nothing
            if len(found):
                return found
        self.dead_ends.add(tuple(answer))
        return torch.tensor([self.stop_id])

    def _move_to(self, answer: list[int]) -> bool:
        """Let the matcher have consumed just `answer`; drafted positions come again and again. False if it cannot."""
        same = 0
        for then, now in zip(self.consumed, answer, strict=False):
            if then != now:
                break
            same += 1
        if len(self.consumed) > same:
            self.matcher.rollback(len(self.consumed) - same)
        self.consumed = answer[:same]
        rest = answer[same:]
        self.consumed += rest[: self.matcher.try_consume_tokens(rest)] if rest else []
        return len(self.consumed) == len(answer)

    def check(self, tokens: Sequence[int]) -> None:
        """Refuse an answer that went on where nothing was allowed.

        Raises:
            APIError: the model's tokens cannot spell what the schema wants.
        """
        for dead_end in self.dead_ends:
            if len(tokens) > len(dead_end) and tuple(tokens[: len(dead_end)]) == dead_end:
                raise APIError(
                    400,
                    f"`{_PARAM}`: no token of this model may follow {len(dead_end)} tokens of the answer.",
                    param=_PARAM,
                    code="grammar_dead_end",
                )
