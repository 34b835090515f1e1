"""`TextProposer`: a causal LM with a tokenizer of its own guesses the drafter's next tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apd.decoding.noise import Noise
from apd.decoding.pair import ModelPair
from apd.decoding.probability import Scores
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState, to_device
from apd.decoding.window import Window
from apd.models.chat_turns import ChatTurns, Translate, without_special_tokens
from apd.models.horizon import CAUSAL
from apd.models.retokenized import WORD_STARTS, Continuation, Language, Strings
from apd.models.span import Span
from apd.models.transformer import EagerPasses, Projection, TransformersModel, max_positions
from apd.models.verifier import CausalVerifier
from apd.models.ways import try_ways

__all__ = ["TextProposer"]

#: Most tokens at the end of a row that one token may replace, see `TextProposer`.
HEALED_TOKENS = 4
#: Least probability of tokens that the drafter has, too, for a guess to be drawn with the drafter's noise.
LEAST_SHARED = 0.5
MEAN_GUMBEL = 0.5772156649015329
#: Tokens before the frontier with which new ones are decoded; decoders need few.
CONTEXT = 16
#: The cache grows by so many columns at once.
CACHE_COLUMNS = 128


class TextProposer:
    """Guesses the drafter's next tokens with any causal LM: its text is tokenized again by the drafter's tokenizer.

    Each row's text, up to the last whole character, is translated (`translate`), tokenized by the proposer and continued
    token by token; `Language.continuation` gives the drafter's tokens of the continuation. Guesses can be wrong; whoever
    uses them checks them. The proposer's end token becomes the drafter's stop token.

    - Healing. Text that ends within a token of the proposer, as `"Emil` where it would have written `"Emil"`, is tokenized
      as it never was in training. So the first token may also be one that spells the end of the text and goes on, where
      the proposer finds such tokens more probable than a boundary. Tokens that the drafter has, too, are left out: it
      would have written them.
    - Sampling. With temperature, a proposer's token that the drafter has, too, gets the drafter's keyed noise: where both
      models agree, the guess is what the drafter draws. Other tokens get the mean of the noise, since noise of their own
      would only make guesses less probable; where they are the likely ones, the likeliest token is taken.
    - Cache. Each row keeps the keys of its tokens up to the first that re-tokenizing changed, behind a sliding window too.
      Other models (recurrent layers, positions that are not rotary or learned, scaled or capped logits) compute whole
      rows, one at a time.
    - Counts. Every pass is a verifier forward: one for each token that the proposer writes, for all rows together. Where
      rows are computed one at a time, the forwards of all rows for their next token count as one.

    The host reads all tokens: a call makes a host sync, and one for each token that the proposer writes.

    Args:
        model: a causal LM of transformers, a `CausalVerifier`, or any callable from `input_ids`, `1 n` int64, to an object
            with `logits`, `1 n v`.
        tokenizer: the model's tokenizer.
        drafter_tokenizer: the drafter's tokenizer.
        translate: from the row's text, special tokens of the drafter included, to the proposer's. By default a
            translation between the chat templates where both tokenizers have one (`ChatTurns`), else
            `without_special_tokens`.
        stop_token_id: what to guess where the proposer ends; by default what ends an answer in the drafter's chat
            template, else its `eos_token_id`.
        heal: allow first tokens that begin before the frontier.
        max_length: most tokens that the model reads; by default as its config says. Of longer rows it reads the end.

    Attributes:
        needs_verifier: False; the pair's verifier is not used.
        reads_marginals: False; the drafter's distributions are not used.
        is_cached: the model keeps keys from call to call, and reads rows together. Found by running the model on a few
            tokens, or given by the `way` of a `CausalVerifier`.

    Raises:
        TypeError: a tokenizer is missing, or, in a call, `translate` gives something else than text.
    """

    needs_verifier = False
    reads_marginals = False

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        drafter_tokenizer: Any,
        *,
        translate: Translate | None = None,
        stop_token_id: int | None = None,
        heal: bool = True,
        max_length: int | None = None,
    ) -> None:
        for name, given in (("tokenizer", tokenizer), ("drafter_tokenizer", drafter_tokenizer)):
            if not (callable(given) and hasattr(given, "decode")):
                raise TypeError(
                    f"`{name}` must be a tokenizer of transformers, got {type(given).__name__}. Models of two vocabularies "
                    "have nothing in common but text."
                )
        self.model: Any = model.model if isinstance(model, TransformersModel) else model
        self.language, self.drafter_language = Language(tokenizer), Language(drafter_tokenizer)
        turns = ChatTurns.of(drafter_tokenizer)
        plain = without_special_tokens(drafter_tokenizer)
        if translate is None and turns is not None and getattr(tokenizer, "chat_template", None):
            translate = turns.translator(tokenizer, plain)
        self.translate = translate or plain
        if stop_token_id is None and turns is not None:
            stop_token_id = turns.stop_token_id(self.drafter_language)
        self.stop_token_id = drafter_tokenizer.eos_token_id if stop_token_id is None else stop_token_id
        self.heals = heal and self.language.joins
        known = self.drafter_language.by_text
        spanning = [i for text, i in self.language.by_text.items() if text not in known] if self.heals else []
        self.spanning = Strings(self.language.strings(spanning), spanning)
        self.is_cached = model.way == "columns" if isinstance(model, CausalVerifier) else _keeps_keys(self.model)
        if max_length is None and isinstance(self.model, PreTrainedModel):
            max_length = max_positions(self.model.config)
        self.max_length = max_length
        self.end_ids = _end_ids(self.model, tokenizer, self.language.size)
        self.leading = self.language.leading
        first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.first = [] if first is None else [first]  # what stands for no text at all

    def __repr__(self) -> str:
        return f"TextProposer({type(self.model).__name__})"

    def open(self, state: DecodeState) -> TextSession:
        return TextSession(self, len(state.rows))

    def prompt(self, text: str) -> list[int]:
        """The proposer's ids of a row's text, begun as its tokenizer begins texts."""
        ids = self.language.encode(text).ids
        leading = [] if ids[: len(self.leading)] == self.leading else self.leading
        if self.max_length is not None:
            # The end of a row that is too long. It begins at the same token for many steps, so that the cache holds.
            step = max(self.max_length // 4, 1)
            excess = max(len(leading) + len(ids) + step - self.max_length, 0)
            ids = ids[math.ceil(excess / step) * step :]
        return [*leading, *ids] or list(self.first)

    @cached_property
    def noise_ids(self) -> Tensor:
        """The drafter's token that is written as each of the proposer's tokens, −1 if there is none: `v` int64."""
        found, known = [-1] * self.language.size, self.drafter_language.by_text
        for text, token in self.language.by_text.items():
            found[token] = known.get(text, -1)
        for token in self.end_ids:
            found[token] = -1 if self.stop_token_id is None else self.stop_token_id
        return torch.tensor(found, dtype=torch.int64, device="cpu")


class TextSession:
    """The rows of one call: what the model has read of them."""

    def __init__(self, proposer: TextProposer, num_rows: int) -> None:
        self.proposer = proposer
        self.read: _Reader = (_CachedReader if proposer.is_cached else _Reader)(proposer, num_rows)

    @torch.no_grad()
    def propose(
        self, state: DecodeState, window: Window, marginals: Any, pair: ModelPair, sampling: Sampling
    ) -> Tensor:
        """A guess for each column of the window, `b k` int64; −1 where there is none.

        Args:
            state: the rows.
            window: k columns from each row's frontier.
            marginals: not used.
            pair: counts a verifier forward for each pass over the rows.
            sampling: how the drafter's tokens are drawn.
        """
        layout = state.layout
        tokens, wanted = state.tokens.tolist(), window.inside.sum(1).tolist()
        noise = None if sampling.greedy else sampling.noise(state, window)
        rows: dict[int, _Row] = {}
        for row, count in enumerate(wanted):
            first, frontier = layout.padding[row], layout.frontier[row]
            if layout.done[row] or not count:
                continue
            draw = _Draw(self.proposer, sampling, noise, row)
            rows[row] = _Row(self.proposer, tokens[row][first:frontier], count, draw)
        while reading := {row: (each.ids, each.num_read) for row, each in rows.items() if each.is_open}:
            pair.verifier_forwards += 1
            for row, logits in zip(reading, self.read(reading), strict=True):
                rows[row].take(logits)
        guesses = torch.full(window.columns.shape, -1, dtype=torch.int64, device="cpu")
        for row, each in rows.items():
            guesses[row, : len(each.guess)] = torch.tensor(each.guess, dtype=torch.int64, device="cpu")
        return guesses.to(state.tokens.device)

    def select(self, rows: Tensor) -> None:
        self.read.select(rows)

    def join(self, state: DecodeState) -> None:
        self.read.join(len(state.rows))


@dataclass(frozen=True)
class _Draw:
    """How one row's tokens are drawn."""

    proposer: TextProposer
    sampling: Sampling
    noise: Noise | None
    row: int

    def scores(self, logits: Tensor, position: int) -> tuple[Tensor, Tensor]:
        """Scores and ids of the proposer's tokens, `n` each; the largest is to be taken.

        Args:
            logits: `v` float32.
            position: of the window, where the token's text begins; behind the window, tokens are not drawn.
        """
        noise = self.noise
        if noise is None or position >= noise.columns.shape[1]:
            return logits, torch.arange(len(logits), device=logits.device)
        device = noise.columns.device
        warped = self.sampling.warp(logits.to(device)[None, None])
        ids = torch.arange(warped.values.shape[-1], device=device) if warped.ids is None else warped.ids[0, 0]
        theirs = self.proposer.noise_ids.to(device)[ids]
        is_shared = theirs >= 0
        if float(warped.values[0, 0].softmax(0)[is_shared].sum()) < LEAST_SHARED:
            return warped.values[0, 0], ids
        row = slice(self.row, self.row + 1)
        mine = Noise(noise.seeds[row], noise.columns[row, position : position + 1], noise.padding[row], noise.stream)
        shared = mine.for_scores(Scores(warped.values, theirs.clamp(min=0)[None, None]))[0, 0]
        return warped.values[0, 0] + torch.where(is_shared, shared, MEAN_GUMBEL), ids


@dataclass
class _Row:
    """One row's guess while it is being written.

    Args:
        committed: the row's ids up to its frontier.
        count: tokens to guess, at least 1.

    Attributes:
        ids: the proposer's tokens, those of the prompt included.
        num_read: the number of last tokens behind which logits are wanted.
        is_open: another token is wanted.
        guess: the guess, once the row is not open any more.
    """

    proposer: TextProposer
    committed: list[int]
    count: int
    draw: _Draw
    ids: list[int] = field(default_factory=list)
    num_read: int = 1
    is_open: bool = False
    guess: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        proposer, speech = self.proposer, self.proposer.language
        text = proposer.translate(proposer.drafter_language.text(self.committed, special=True))
        if not isinstance(text, str):
            raise TypeError(f'`translate` must give text, got {type(text).__name__}. Return "" where there is none.')
        self.ids = proposer.prompt(text)
        self.healed = self._last_tokens()
        self.num_read = len(self.healed) + 1
        first = len(self.ids) - len(self.healed)
        self.start = min(speech.start_of(self.ids, CONTEXT), first)
        self.before = speech.text(self.ids[self.start :], special=False)
        # White space at the end of a row, where the proposer's tokenizer drops it and writes it before the next word.
        space = text[len(text.rstrip()) :]
        self.dropped = "" if self.before.endswith(space) else space
        self.num_written = 0  # tokens behind the committed text
        self.limit = 4 * self.count + 8
        self.is_open = bool(self.ids) and self._has_room()

    def take(self, logits: Tensor) -> None:
        """The next token, from the logits behind the last `num_read` tokens: `n v` float32."""
        self.num_read = 1
        if self.healed and (found := self._spanning(logits)) is not None:
            self.ids = found
        else:
            token = self._next(logits[-1])
            if token in self.proposer.language.special_ids or token in self.proposer.end_ids:
                self._finish(self._found(is_complete=token in self.proposer.end_ids), token)
                return
            self.ids.append(token)
        self.healed = []
        self.num_written += 1
        written = self._found()
        if len(written.ids) >= self.count or written.is_cut or self.num_written >= self.limit or not self._has_room():
            self._finish(written)

    def _finish(self, found: Continuation, token: int | None = None) -> None:
        stop = self.proposer.stop_token_id
        has_ended = token in self.proposer.end_ids and found.is_whole and stop is not None
        self.guess = [*found.ids, *[stop] * has_ended][: self.count]
        self.is_open = False

    def _found(self, *, is_complete: bool = False) -> Continuation:
        """The drafter's tokens of what is written so far."""
        written = self.proposer.language.text(self.ids[self.start :], special=False)
        text = written[len(self.before) :].removeprefix(self.dropped) if written.startswith(self.before) else ""
        return self.proposer.drafter_language.continuation(self.committed, text, is_complete=is_complete)

    def _next(self, logits: Tensor) -> int:
        """The token behind the last one, from its logits, `v` float32."""
        position = len(self._found(is_complete=True).ids) if self.draw.noise is not None else 0
        scores, ids = self.draw.scores(logits, position)
        return int(ids[scores.argmax()])

    def _spanning(self, logits: Tensor) -> list[int] | None:
        """Ids that end with a token across the frontier, if that is more probable than a boundary there; else `None`.

        Args:
            logits: `h+1 v` float32, of the h last tokens of the row and of the one behind them.
        """
        strings = self.proposer.language.strings(self.healed)
        logprobs = logits.log_softmax(-1)
        before, best, choice = 0.0, -math.inf, (0, -1)
        for i, token in enumerate(self.healed):
            ids = self.proposer.spanning.longer("".join(strings[i:])).to(logits.device)
            if len(ids) and (mass := before + float(logprobs[i, ids].logsumexp(0))) > best:
                # Keyed noise belongs to tokens that begin at the frontier, so this one is the most probable.
                best, choice = mass, (i, int(ids[logprobs[i, ids].argmax()]))
            before += float(logprobs[i, token])
        return [*self.ids[: len(self.ids) - len(self.healed) + choice[0]], choice[1]] if best > before else None

    def _last_tokens(self) -> list[int]:
        """The last tokens of the row that one token might replace: of its last word, and none that is special."""
        speech = self.proposer.language
        # At least one token stays, since there are no logits of the first.
        last = self.ids[len(self.proposer.leading) + 1 :][-HEALED_TOKENS:] if self.proposer.heals else []
        strings, first = speech.strings(last), len(last)
        while first > 0 and last[first - 1] not in speech.special_ids:
            first -= 1
            if strings[first].startswith(WORD_STARTS):
                break
        return last[first:]

    def _has_room(self) -> bool:
        return self.proposer.max_length is None or len(self.ids) < self.proposer.max_length


class _Reader:
    """Reads whole rows, one at a time."""

    def __init__(self, proposer: TextProposer, num_rows: int) -> None:
        self.model, self.size = proposer.model, proposer.language.size
        self.arguments = {"use_cache": False} if isinstance(self.model, PreTrainedModel) else {}

    def __call__(self, rows: dict[int, tuple[list[int], int]]) -> list[Tensor]:
        """The logits behind the last n tokens of each of these rows, given as ids and n: `n v` float32 each."""
        device = getattr(self.model, "device", None)
        inputs = [(torch.tensor([ids], device=device), n) for ids, n in rows.values()]
        return [self.model(input_ids=ids, **self.arguments).logits[0, -n:, : self.size].float() for ids, n in inputs]

    def select(self, rows: Tensor) -> None:
        pass

    def join(self, num_rows: int) -> None:
        pass


class _CachedReader(_Reader):
    """Reads all rows together, and of each only the tokens behind those that it has read before."""

    def __init__(self, proposer: TextProposer, num_rows: int) -> None:
        super().__init__(proposer, num_rows)
        self.head = self.model.get_output_embeddings()
        self.done: list[list[int]] = [[] for _ in range(num_rows)]  # tokens whose keys are in the cache
        self.width = CACHE_COLUMNS
        self.passes = EagerPasses(self.model, attention=CAUSAL, cache_shape=(num_rows, self.width), role="proposer")

    def __call__(self, rows: dict[int, tuple[list[int], int]]) -> list[Tensor]:
        # A row that waits computes its last token again.
        wanted = [rows.get(row, (done or [0], 1)) for row, done in enumerate(self.done)]
        starts = [_common(ids[: len(ids) - n], done) for (ids, n), done in zip(wanted, self.done, strict=True)]
        self.done = [list(ids) for ids, _ in wanted]
        ends = [len(ids) for ids in self.done]
        if max(ends) > self.width:
            self.width = math.ceil(max(ends) / CACHE_COLUMNS) * CACHE_COLUMNS
            self._grow()
        device = self.passes.device
        tokens = to_device([ids + [0] * (max(ends) - len(ids)) for ids in self.done], device)
        span = Span.of_rows(starts, ends, [0] * len(ends), device)
        most = max(n for _, n in wanted)
        last = to_device(
            [[end - start - i for i in range(most, 0, -1)] for start, end in zip(starts, ends, strict=True)], device
        )
        logits = Projection.at(self.head, self.passes(tokens, span), last)[:, :][..., : self.size]
        logits = logits.float().cpu()  # rows decide one by one, so the only host sync of a pass is here
        return [logits[row, most - n :] for row, (_, n) in rows.items()]

    def select(self, rows: Tensor) -> None:
        self.done = [self.done[row] for row in rows.tolist()]
        self.passes.select(rows)

    def join(self, num_rows: int) -> None:
        self.done += [[] for _ in range(num_rows - len(self.done))]
        self._grow()

    def _grow(self) -> None:
        assert self.passes.cache is not None
        self.passes.cache.grow(len(self.done), self.width)


def _common(ids: Sequence[int], before: Sequence[int]) -> int:
    """The number of first tokens that are equal."""
    pairs = enumerate(zip(ids, before, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(before)))


def _keeps_keys(model: Any) -> bool:
    """True if the model keeps the keys of every token, so that some can be replaced, and can read ragged rows."""
    if not isinstance(model, PreTrainedModel):
        return False
    way, _ = try_ways(model)
    return way == "columns"


def _end_ids(model: Any, tokenizer: Any, size: int) -> frozenset[int]:
    """The ids below `size` with which the model ends a text."""
    configs = (getattr(model, name, None) for name in ("generation_config", "config"))
    named = [tokenizer.eos_token_id, *(getattr(config, "eos_token_id", None) for config in configs)]
    lists = [value if isinstance(value, (list, tuple)) else [value] for value in named]
    return frozenset(int(token) for value in lists for token in value if token is not None and 0 <= token < size)
