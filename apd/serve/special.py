"""What a completion may ask for besides going on: a hole before a suffix, and the log-probabilities of its own prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from apd.config import KNOBS
from apd.generation.batch import Generated
from apd.generation.infilling import Encoded, Infilled, best_first, encode_parts, infilled, with_likelihood
from apd.integrations.scoring import token_logprobs
from apd.sampler import APDSampler
from apd.serve.chunks import TokenLogprob, logprob_of

#: Most lengths of a hole that are tried.
MOST_LENGTHS = 8


@dataclass(frozen=True)
class Filled:
    """A hole that was filled: the best of the lengths that were tried, and what all of them have cost."""

    best: Infilled
    tried: Sequence[Generated]


@dataclass(frozen=True)
class Scored:
    """The tokens of a prompt with their log-probabilities; nothing is known of the first."""

    prompt: int
    entries: list[TokenLogprob | None]


def lengths_of_hole(max_tokens: int) -> range:
    """The lengths that are tried, the same distance apart, up to `max_tokens` or just below."""
    step = -(-max_tokens // MOST_LENGTHS)
    return range(step, max_tokens + 1, step)


def holes_of(prompt: str, suffix: str, max_tokens: int, sampler: APDSampler) -> list[Encoded]:
    """Prompt, hole and suffix as ids, for every length."""
    mask = sampler.drafter.mask_token_id
    return [
        encode_parts([part for part in (prompt, n, suffix) if part != ""], sampler.tokenizer, mask)
        for n in lengths_of_hole(max_tokens)
    ]


def strategy_for_holes(sampler: APDSampler, given: object) -> dict[str, str]:
    """The strategy with which `infill` decodes holes of unknown length, unless a strategy or a knob was given."""
    if sampler.strategy is not None or set(given) & {"strategy", *KNOBS}:  # type: ignore[call-overload]
        return {}
    return {"strategy": "checked" if sampler.verifier is not None else "checked:proposer=drafter"}


def best_of(rows: Sequence[Encoded], sampler: APDSampler, answers: Sequence[Generated]) -> Iterator[Filled]:
    """The best of decoded lengths, as `infill` chooses it; yields once."""
    found = []
    for row, answer in zip(rows, answers, strict=True):
        ids = list(row.ids)
        for token, column in zip(answer.tokens, answer.trace.columns, strict=True):
            ids[column] = token
        forwards = answer.drafter_forwards, answer.verifier_forwards
        filled = infilled(row, ids, answer.trace, forwards, sampler.tokenizer)
        if len(rows) > 1 and sampler.verifier is not None:
            filled = with_likelihood(filled, row, sampler.verifier, sampler.vocab_size, sampler.drafter.device)
        found.append(filled)
    yield Filled(best_first(found), answers)


def scores_of(
    prompts: Sequence[list[int]], sampler: APDSampler, *, batch_size: int, top: int
) -> Iterator[Scored | None]:
    """The log-probability of every token of every prompt behind those before it, under one-token decoding of the drafter.

    Yields after every pass, `None` where no prompt is done.
    """
    entries: list[list[TokenLogprob | None]] = [[None] * len(prompt) for prompt in prompts]
    left = [len(prompt) - 1 for prompt in prompts]
    for i, n in enumerate(left):
        if n == 0:
            yield Scored(i, entries[i])
    for batch in token_logprobs(sampler.drafter, prompts, vocab_size=sampler.vocab_size, batch_size=batch_size):
        for i, position, logprobs in batch:
            entries[i][position] = logprob_of(prompts[i][position], logprobs, top)
            left[i] -= 1
            if left[i] == 0:
                yield Scored(i, entries[i])
        yield None
