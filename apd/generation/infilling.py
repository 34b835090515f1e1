"""Texts with holes: strings and numbers of masks become prompts, and decoded rows become texts again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from apd.decoding.pair import ModelPair, Support
from apd.decoding.processing import Processing
from apd.decoding.protocols import Verifier
from apd.decoding.state import DecodeState
from apd.decoding.step import PLAIN
from apd.decoding.window import Window
from apd.kinds import WHOLE
from apd.show.rows import RowTrace
from apd.text import check_text, whole_text

#: A given string, a number of masks, or several numbers to choose from.
Part: TypeAlias = "str | int | range"

#: Most rows that one text with holes of unknown length may become.
MOST_LENGTHS = 64

# Text before a part while it is encoded: some tokenizers put a space in front of what they encode first.
_ANCHORS = ("\n", ".", "a")


@dataclass(frozen=True)
class Hole:
    """A hole that was filled.

    Attributes:
        start: its first token, counted from the first token of the row.
        ids: its tokens.
        text: its text; empty without a tokenizer.
        logprob: log-probability of its tokens in nats, each when it was committed, before temperature and truncation: under
            the drafter; where only the mixture is known, under that.
    """

    start: int
    ids: list[int]
    text: str
    logprob: float


@dataclass(frozen=True)
class Infilled:
    """A text whose holes were filled.

    Attributes:
        parts: given strings and texts of holes, in order; given strings are exactly those of the caller.
        holes: the holes in order; what was appended behind the text is none.
        text: the parts, joined, and what was appended.
        ids: all ids of the row, without padding.
        score: mean log-probability per filled token, in nats; 0 without one.
        new_tokens: number of decoded tokens, in holes and behind the text.
        drafter_forwards, verifier_forwards: passes of the row; the verifier's one for `likelihood` counts.
        likelihood: with holes of unknown length and a verifier, log p_AR of the text from its first hole on, in nats, without
            what was appended; else `None`.
        others: with holes of unknown length, the other lengths, the best first: by `likelihood`, without a verifier by `score`.
    """

    parts: list[str]
    holes: list[Hole]
    text: str
    ids: list[int]
    score: float
    new_tokens: int
    drafter_forwards: int
    verifier_forwards: int
    likelihood: float | None = None
    others: list[Infilled] = field(default_factory=list)


@dataclass(frozen=True)
class Encoded:
    """A text with holes as ids.

    Attributes:
        parts: strings, and numbers of masks.
        ids: the ids of the row.
        holes: the first and the last column, exclusive, of each hole.
    """

    parts: list[str | int]
    ids: list[int]
    holes: list[tuple[int, int]]


def texts_of(parts: Any) -> list[list[Part]]:
    """One text or a list of texts, each a list of parts, checked.

    Raises:
        TypeError: something that is no part.
        ValueError: no part, no string, or a hole of no length.
    """
    is_list = isinstance(parts, Sequence) and not isinstance(parts, (str, range))
    if not is_list or not len(parts):
        raise TypeError(
            f"`parts` must be a list of strings and numbers of masks, such as ['a = ', 3, ' + 1'], got {parts!r}."
        )
    texts = [list(text) for text in parts] if all(isinstance(text, (list, tuple)) for text in parts) else [list(parts)]
    for text in texts:
        for part in text:
            _check_part(part)
        if not any(isinstance(part, str) and part for part in text):
            raise ValueError(f"`parts` must have a string, got {text!r}. The drafter needs text beside the hole.")
    return texts


def refuse_without_hole(texts: Sequence[Sequence[Part]]) -> None:
    """Refuse a text in which there is nothing to fill.

    Raises:
        ValueError: the message has the text, and what a number that is written as text becomes.
    """
    for text in texts:
        if all(isinstance(part, str) for part in text):
            digits = next((part for part in text if isinstance(part, str) and part.strip().isdecimal()), None)
            remedy = "Use `generate` to continue a text" if digits is None else f"Write {int(digits)} for {digits!r}"
            raise ValueError(f"A text must have a hole, a number of masks such as 8, got {list(text)!r}. {remedy}.")


def _check_part(part: Any) -> None:
    if isinstance(part, str):
        check_text(part, "A part")
    elif isinstance(part, range):
        if not len(part) or min(part) < 1:
            raise ValueError(
                f"A range of lengths must hold whole numbers of at least 1, got {part!r}. Use range(4, 9)."
            )
    elif not WHOLE.fits(part):
        raise TypeError(
            f"A part must be a string, a number of masks or a range of numbers, got {type(part).__name__} {part!r}."
        )
    elif part < 1:
        raise ValueError(f"A hole must have at least 1 mask, got {part!r}. Leave it out.")


def lengths_of(text: Sequence[Part]) -> list[list[str | int]]:
    """The text with every combination of its ranges' lengths; adjacent holes are one.

    Raises:
        ValueError: more than 64 combinations.
    """
    choices = [list(part) if isinstance(part, range) else [part] for part in text]
    count = math.prod(map(len, choices))
    if count > MOST_LENGTHS:
        raise ValueError(
            f"The ranges of a text may have {MOST_LENGTHS} combinations of lengths, got {count}: each is a row. Shorten them."
        )
    found = []
    for combination in itertools.product(*choices):
        parts: list[str | int] = []
        for part in combination:
            if isinstance(part, int) and parts and isinstance(parts[-1], int):
                parts[-1] += part
            elif part != "":
                parts.append(part)
        found.append(parts)
    return found


def encode_parts(parts: Sequence[str | int], tokenizer: Any, mask_token_id: int) -> Encoded:
    """A text with holes as ids, with the special tokens that the tokenizer puts around a text."""
    before, behind = _special_tokens(tokenizer)
    ids, holes, pieces = list(before), [], list(parts)
    mask = getattr(tokenizer, "mask_token", None)
    for i, part in enumerate(pieces):
        if isinstance(part, int):
            holes.append((len(ids), len(ids) + part))
            ids += [mask_token_id] * part
        else:
            if mask is not None and mask in part:
                raise ValueError(
                    f"A part must not hold the tokenizer's mask token {mask!r}, got {part!r}. Write holes as numbers."
                )
            ids += _ids_of(part, tokenizer, is_first=i == 0)
    return Encoded(pieces, ids + behind, holes)


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and behind a text."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


def _ids_of(part: str, tokenizer: Any, *, is_first: bool) -> list[int]:
    """Ids that decode to the very part behind other text, if the tokenizer has such ids."""

    def encoded(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    plain = encoded(part)
    if is_first:
        return plain
    for anchor in _ANCHORS:
        start, whole = encoded(anchor), encoded(anchor + part)
        for ids in (plain, whole[len(start) :] if whole[: len(start)] == start else None):
            if ids is not None and _decoded(start + ids, tokenizer) == anchor + part:
                return ids
    return plain


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return whole_text(tokenizer, ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def infilled(
    encoded: Encoded, ids: Sequence[int], trace: RowTrace, forwards: tuple[int, int], tokenizer: Any
) -> Infilled:
    """The text of a decoded row.

    Args:
        encoded: the row before decoding.
        ids: the row after decoding, without padding.
        trace: what was decoded, in the order of its positions.
        forwards: passes of drafter and verifier.
    """
    holes = filled_holes(encoded.holes, ids, trace, tokenizer)
    num_filled = sum(len(hole.ids) for hole in holes)
    filled = iter(holes)
    parts = [part if isinstance(part, str) else next(filled).text for part in encoded.parts]
    appended = list(ids[len(encoded.ids) :])
    more = whole_text(
        tokenizer, [*encoded.ids[-1:], *appended], skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    last = whole_text(tokenizer, encoded.ids[-1:], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    total = sum(hole.logprob for hole in holes)
    return Infilled(
        parts=parts,
        holes=holes,
        text="".join(parts) + (more[len(last) :] if appended else ""),
        ids=list(ids),
        score=total / num_filled if num_filled else 0.0,
        new_tokens=len(trace.tokens),
        drafter_forwards=forwards[0],
        verifier_forwards=forwards[1],
    )


def filled_holes(
    spans: Sequence[tuple[int, int]], ids: Sequence[int], trace: RowTrace, tokenizer: Any = None
) -> list[Hole]:
    """The holes of a decoded row; one at the end may be shorter than it was, where a stop token ended the row.

    Args:
        spans: the first and the last column, exclusive, of each hole, counted from the first token of the row.
        ids: the ids of the row after decoding, without padding.
        trace: what was decoded, in the order of its positions.
        tokenizer: spells the tokens; may be missing.
    """
    logprobs = [math.log(max(p, 1e-45)) for p in trace.drafter_probs or trace.target_probs]
    holes, position = [], 0
    for start, end in spans:
        tokens = list(ids[start:end])
        text = "" if tokenizer is None else _text_behind(ids[:start], tokens, tokenizer)
        holes.append(Hole(start, tokens, text, sum(logprobs[position : position + len(tokens)])))
        position += len(tokens)
    return holes


def holes_of(trace: RowTrace, mask_token_id: int, tokenizer: Any = None) -> list[Hole]:
    """The holes of a row: the masks of its prompt."""
    if mask_token_id not in trace.prompt:
        return []
    new = iter(trace.tokens)
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for column, token in enumerate(trace.prompt):
        if token != mask_token_id:
            ids.append(token)
            continue
        if (filled := next(new, None)) is None:  # a stop token has ended the row
            break
        ids.append(filled)
        if not spans or spans[-1][1] < column:
            spans.append((column, column))
        spans[-1] = (spans[-1][0], column + 1)
    return filled_holes(spans, ids, trace, tokenizer)


def _text_behind(before: Sequence[int], ids: Sequence[int], tokenizer: Any) -> str:
    """The text of tokens that stand behind others, where spaces depend on what is before."""
    for context in (list(before)[-8:], []):
        text, start = _visible([*context, *ids], tokenizer), _visible(context, tokenizer)
        if text.startswith(start):
            return text[len(start) :]
    return _visible(ids, tokenizer)


def _visible(ids: Sequence[int], tokenizer: Any) -> str:
    return whole_text(tokenizer, ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def padded(rows: Sequence[Encoded], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """The rows as one tensor, padded on the left, and its attention mask: `b l` int64 each."""
    width = max(len(row.ids) for row in rows)
    ids = [[pad_token_id] * (width - len(row.ids)) + row.ids for row in rows]
    real = [[0] * (width - len(row.ids)) + [1] * len(row.ids) for row in rows]
    return torch.tensor(ids, device="cpu"), torch.tensor(real, device="cpu")


def best_first(rows: Sequence[Infilled]) -> Infilled:
    """The likeliest row, or without likelihoods the one with the best score; the others are in its `others`."""
    best, *others = sorted(rows, key=lambda row: -(row.score if row.likelihood is None else row.likelihood))
    return replace(best, others=others)


@torch.no_grad()
def with_likelihood(
    row: Infilled, encoded: Encoded, verifier: Verifier, vocab_size: int, device: torch.device
) -> Infilled:
    """The row with log p_AR of its text from the first hole on: a length is right if what is given behind it fits, too.

    Makes one pass of the verifier, which `verifier_forwards` counts.
    """
    start = max(1, encoded.holes[0][0])  # nothing is known of a first token
    ids = torch.tensor([row.ids[: len(encoded.ids)]], device=device)
    if start == ids.shape[1]:
        return replace(row, likelihood=0.0)
    state = DecodeState.start(ids[:, :start], max_new_tokens=ids.shape[1] - start, mask_token_id=-1)
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    support = Support(vocab_size, removed=nothing, processing=Processing(stop_token_ids=nothing))
    pair = ModelPair(None, verifier.open(state), support, mask_token_id=-1, kernels=PLAIN)
    score = pair.score(state, Window.of_rows(state, state.layout.end), ids[:, start:])
    forwards = row.verifier_forwards + pair.verifier_forwards
    return replace(row, likelihood=float(score.sum()), verifier_forwards=forwards)
