"""What a request may ask for besides answers that go on: the best length of a hole, scores of prompts, a watched decode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from apd.generation.batch import Generated
from apd.generation.infilling import Encoded, best_first, infilled, with_likelihood
from apd.integrations.scoring import token_logprobs
from apd.serve.engine import steps
from apd.serve.engine.jobs import Decoding, Row, Spent
from apd.serve.engine.logprobs import TokenLogprob, logprobs_of
from apd.serve.engine.resolving import Resolvers


@dataclass(frozen=True)
class Filled:
    """A hole that was filled: the text and tokens of the best length, and what all lengths have cost."""

    text: str
    new_tokens: int
    spent: Spent


@dataclass(frozen=True)
class Filling:
    """The best of decoded lengths of a hole, as `infill` chooses it; yields one `Filled`.

    Attributes:
        texts: prompt, hole and suffix for each row.
    """

    texts: Sequence[Encoded]

    def __call__(self, resolvers: Resolvers, answers: Sequence[Generated]) -> Iterator[Filled]:
        sampler, found = resolvers.sampler, []
        for text, answer in zip(self.texts, answers, strict=True):
            ids = list(text.ids)
            for token, column in zip(answer.tokens, answer.trace.columns, strict=True):
                ids[column] = token
            forwards = answer.drafter_forwards, answer.verifier_forwards
            filled = infilled(text, ids, answer.trace, forwards, sampler.tokenizer)
            if len(self.texts) > 1 and sampler.verifier is not None:
                filled = with_likelihood(filled, text, sampler.verifier, sampler.vocab_size, sampler.drafter.device)
            found.append(filled)
        best = best_first(found)
        spent = Spent(
            sum(answer.drafter_forwards for answer in answers),
            sum(answer.verifier_forwards for answer in answers),
            sum(answer.canvases for answer in answers),
        )
        yield Filled("".join(hole.text for hole in best.holes), best.new_tokens, spent)


@dataclass(frozen=True)
class Scored:
    """The tokens of a prompt with their log-probabilities; nothing is known of the first."""

    prompt: int
    entries: list[TokenLogprob | None]


@dataclass(frozen=True)
class Scoring:
    """The log-probability of every token of every prompt behind those before it, under one-token decoding of the drafter.

    Yields after every pass, `None` where no prompt is done.

    Attributes:
        prompts: their ids.
        batch_size: canvases of a pass.
        top: likeliest tokens at each position.
    """

    prompts: Sequence[list[int]]
    batch_size: int
    top: int

    def __call__(self, resolvers: Resolvers, answers: Sequence[Generated]) -> Iterator[Scored | None]:
        sampler, prompts = resolvers.sampler, self.prompts
        entries: list[list[TokenLogprob | None]] = [[None] * len(prompt) for prompt in prompts]
        left = [len(prompt) - 1 for prompt in prompts]
        for i, n in enumerate(left):
            if n == 0:
                yield Scored(i, entries[i])
        sizes = {"vocab_size": sampler.vocab_size, "batch_size": self.batch_size}
        for batch in token_logprobs(sampler.drafter, prompts, **sizes):
            for i, position, logprobs in batch:
                [entries[i][position]] = logprobs_of([prompts[i][position]], [logprobs], self.top)
                left[i] -= 1
                if left[i] == 0:
                    yield Scored(i, entries[i])
            yield None


@dataclass(frozen=True)
class Watching:
    """One decode, step by step: yields what `steps.events` does. It shares its steps with no other row."""

    row: Row
    decoding: Decoding

    def __call__(self, resolvers: Resolvers, answers: Sequence[Generated]) -> Iterator[dict[str, Any]]:
        sampler = resolvers.sampler
        yield from steps.events(sampler.loop(resolvers.request(self.row, self.decoding)), sampler.tokenizer)
