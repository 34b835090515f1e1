"""From rows of a job to requests of the decode loop."""

from __future__ import annotations

import dataclasses
import re
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock

import torch

from apd.config import KNOBS
from apd.decoding.processing import AllowedTokens
from apd.decoding.request import Request
from apd.generation.arguments import Resolver
from apd.sampler import APDSampler
from apd.serve.engine.errors import APIError, refused
from apd.serve.engine.grammars import Constraint, Grammars
from apd.serve.engine.jobs import Decoding, Job, Row
from apd.serve.engine.processors import Penalties
from apd.serve.engine.spelling import Spelling

_KEPT = 256  # resolvers: most requests have the settings of earlier ones
_MOST_BIASES = 300  # of a resolver that is kept: 256 of 1 MiB would stay for ever


@dataclass(frozen=True)
class Prepared:
    """The requests of a job's rows, and what each may write if there is a grammar."""

    requests: list[Request]
    constraints: list[Constraint]


class Resolvers:
    """Makes requests, and keeps what checked their settings; called from several threads.

    Args:
        sampler: decodes.
        allowed: `prefix_allowed_tokens_fn` of rows with a grammar.
    """

    def __init__(self, sampler: APDSampler, allowed: AllowedTokens) -> None:
        self.sampler, self.allowed = sampler, allowed
        self.grammars = Grammars(Spelling(sampler.tokenizer), sampler.vocab_size)
        self.kept: OrderedDict[tuple[Decoding, int], Resolver] = OrderedDict()
        self.lock = Lock()

    def prepared(self, job: Job) -> Prepared:
        """What a job's rows are decoded by. Without rows, what it asks for is checked nevertheless.

        Raises:
            APIError: what `generate` would refuse, or a schema that cannot be obeyed.
        """
        requests = [self.request(row, job.decoding) for row in job.rows]
        resolve = self.resolver(job.decoding, job.rows[0].new_tokens if job.rows else 1)
        if job.schema is None:
            return Prepared(requests, [])
        lengths = [len(row.ids) for row in job.rows]
        return Prepared(requests, self.grammars.constraints(job.schema, resolve.stop_token_ids, lengths))

    def resolver(self, decoding: Decoding, new_tokens: int) -> Resolver:
        """What checks rows with so many masks.

        Raises:
            APIError: what `generate` would refuse.
        """
        key = (decoding, new_tokens)
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
        try:
            made = self.sampler.resolver(
                max_new_tokens=new_tokens,
                logits_processor=list(decoding.processors),
                prefix_allowed_tokens_fn=self.allowed if decoding.has_grammar else None,
                **dict(decoding.arguments),
            )
        except (ValueError, TypeError) as error:
            raise _refusal(error, decoding) from None
        if sum(len(getattr(each, "bias", ())) for each in decoding.processors) <= _MOST_BIASES:
            with self.lock:
                self.kept[key] = made
                if len(self.kept) > _KEPT:
                    self.kept.popitem(last=False)
        return made

    def request(self, row: Row, decoding: Decoding) -> Request:
        """The request of a row.

        Raises:
            APIError: what `generate` would refuse.
        """
        resolve = self.resolver(decoding, row.new_tokens)
        prompt = torch.tensor([row.ids], dtype=torch.int64)
        try:
            request = resolve(prompt, torch.ones_like(prompt), [row.seed])
        except (ValueError, TypeError) as error:
            raise _refusal(error, decoding) from None
        return dataclasses.replace(request, record_logits=True) if decoding.has_logits else request


def _refusal(error: Exception, decoding: Decoding) -> APIError:
    """The error names its argument first; requests have no `logits_processor`, but fields that become one."""
    message = str(error)
    if message.startswith("`logits_processor`"):
        field = _looks_back(decoding)
        message = (
            f"`{field}` looks at earlier tokens, which this strategy does not decide from left to right. Leave one of the two "
            "out, or take a strategy that does, such as apd or checked."
        )
        return refused(message, field, "invalid_value")
    named = re.match(r"`(\w+)`", message)
    fields = {*dict(decoding.arguments), *KNOBS}
    param = named[1] if named and named[1] in fields else "suffix" if decoding.has_holes else None
    return refused(message, param, "invalid_value")


def _looks_back(decoding: Decoding) -> str:
    """The field of a request by which logits depend on earlier tokens."""
    if decoding.has_grammar:
        return "response_format"
    penalties = [each for each in decoding.processors if isinstance(each, Penalties)]
    if not penalties:
        return "repetition_penalty"
    return "frequency_penalty" if penalties[0].frequency else "presence_penalty"
