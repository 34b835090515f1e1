"""`check`: is a checkpoint read as it should be, and does everything hold that must hold for every model?"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

from apd.config import check_count
from apd.included.tasks import EXAMPLES as INCLUDED_EXAMPLES
from apd.included.tasks import VOCABULARY
from apd.inspection.canvases import CheckedDrafter, Stretch
from apd.inspection.declarations import Ends, declarations, mask_candidates, verifier_declarations
from apd.inspection.evidence import Weigher, weigh
from apd.inspection.laws import NEW_TOKENS, answer_laws, drafter_laws, next_token, verifier_laws
from apd.inspection.parts import SECONDS, own_parts, part_report
from apd.inspection.report import Finding, Report
from apd.inspection.stored import Stored, offline
from apd.inspection.texts import (
    EXAMPLES,
    MOST_ANSWER,
    MOST_PAIRS,
    MOST_TOKENS,
    Example,
    cut,
    random_stretches,
    stretches_of,
    unknown_share,
)
from apd.models.loading import load_tokenizer
from apd.models.verifier import CausalVerifier
from apd.sampler import APDSampler

#: Share of unknown tokens above which a text says nothing about a model.
_MOST_UNKNOWN = 0.2


@torch.no_grad()
def check(
    sampler: APDSampler | Any,
    *,
    text: str | Sequence[tuple[str, str]] | None = None,
    revision: str | None = None,
    verifier_revision: str | None = None,
    new_tokens: int | None = None,
    seconds: float = SECONDS,
) -> Report:
    """Check that a checkpoint is read as it should be, or that a part of your own keeps its contract. Nothing is downloaded or
    written.

    A drafter, verifier, strategy, acceptance rule, window policy, proposer or `ModelSpec` is held against its contract (types,
    shapes, what must not be written to) and its laws (the same twice, rows apart, causal, exact, …); a finding says in words what
    is wrong. Of a sampler all its parts of your own are checked so.

    Of a checkpoint, three kinds of finding: what is used against what config.json, generation_config.json, the tokenizer and the family's table
    say; what the weights say, by how likely known text is in this reading and in others (logit shift, mask token, attention; of a
    masked LM the mask token only, since its class fixes the others); and laws, such as that a row in a batch is decoded as it is
    alone. Of the verifier and of the pair likewise.

    Args:
        sampler: the models to check, transformers models both; the verifier may be missing. Or a part of your own.
        text: what the weights are tried on: plain text, at least 48 tokens, better 500; or prompts, each with a good answer that
            follows it directly; of more than 48, as many, evenly spread. By default ten short prompts in English, code and numbers, as chats where the tokenizer has a
            template.
        revision, verifier_revision: with which models of the hub were loaded, to find their files in the cache.
        new_tokens: of a part: tokens of a row, for a model that gives probabilities of complete answers of one length only.
        seconds: of a part: how long each of its laws may take. One that does not come back is a problem.

    Returns:
        A report to print. `report.problems` is empty if nothing is wrong.

    Raises:
        TypeError: `sampler` is neither a sampler nor a part of one, or `text` is neither text nor pairs of texts.
        ValueError: `text` is too short, or an argument is out of range or without effect.

    Example:
        >>> report = apd.check(apd.APDSampler.from_included())
        >>> report.problems
        []
    """
    check_count("new_tokens", new_tokens, "It counts tokens of a row", or_none=True)
    if not seconds > 0:
        raise ValueError(f"`seconds` must be more than 0, got {seconds}. Leave it out for {SECONDS:g}.")
    limits: dict[str, Any] = {"new_tokens": new_tokens, "seconds": seconds}
    drafter: Any = getattr(sampler, "drafter", None)
    if not isinstance(drafter, CheckedDrafter):
        _refuse_idle(text=text, revision=revision, verifier_revision=verifier_revision)
    if not isinstance(sampler, APDSampler):
        return part_report(sampler, **limits)
    if not isinstance(drafter, CheckedDrafter):
        models = {"drafter": drafter, "verifier": sampler.verifier}
        reports = [part_report(each, kind=kind, **limits) for kind, each in models.items() if each is not None]
        parts = {name: found for report in reports for name, found in report.parts.items()} | own_parts(
            sampler, **limits
        )
        subject = {name: value for report in reports for name, value in report.subject.items()}
        return Report(subject, parts, {name: took for report in reports for name, took in report.seconds.items()})
    stored = Stored.of(drafter.model, revision)
    tried = _tried(sampler, drafter, text)
    verifier = sampler.verifier if isinstance(sampler.verifier, CausalVerifier) else None
    log = _Log()
    log.add("Drafter: declarations", lambda: declarations(sampler, drafter, stored))
    weigher = Weigher(drafter, tried.stretches, mask_candidates(drafter, stored, sampler.tokenizer))
    log.add("Drafter: evidence from the weights", lambda: _evidence(weigher, drafter, sampler.tokenizer, tried))
    log.add(
        "Drafter: laws",
        lambda: [
            *drafter_laws(drafter, tried.stretches, weigher.score(weigher.declared)),
            *answer_laws(sampler, tried.stretches),
        ],
    )
    if verifier is not None:
        log.add("Verifier", lambda: _verifier(sampler, verifier, tried, verifier_revision))
    if sampler.proposer is not None:
        differ = Finding("verifier: ids", "differ, guesses text", "any, in strategy checked", "ok")
        log.add("Verifier", lambda: [differ])
    own = own_parts(sampler, **limits)
    if sampler.verifier is not None and verifier is None:
        own |= part_report(sampler.verifier, kind="verifier", **limits).parts
    return Report(_subject(sampler, stored, tried), log.parts | own, log.seconds)


def _refuse_idle(**given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(
                f"`{name}` must be left out with a part of your own, got {value!r:.60}: it is for checkpoints, whose weights are tried on text."
            )


@dataclass
class _Log:
    """The parts of a check and the seconds that they took."""

    parts: dict[str, list[Finding]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, part: Callable[[], Iterable[Finding]]) -> None:
        start = time.perf_counter()
        self.parts[name] = list(part())
        self.seconds[name] = time.perf_counter() - start


@dataclass(frozen=True)
class _Tried:
    """What the models are tried on.

    Attributes:
        stretches: prompts with answers.
        name: where they come from.
        silence: why the stretches say nothing about the weights; "" if they do.
    """

    stretches: list[Stretch]
    name: str
    silence: str = ""


def _tried(sampler: APDSampler, drafter: CheckedDrafter, text: str | Sequence[tuple[str, str]] | None) -> _Tried:
    tokenizer, limits = sampler.tokenizer, [drafter.max_length, getattr(sampler.verifier, "max_length", None)]
    most = max(min([MOST_TOKENS, *(limit - NEW_TOKENS for limit in limits if limit is not None)]), 2)
    ends = Ends.of(sampler)
    banned = [drafter.mask_token_id, *ends.stop_token_ids]
    chance = random_stretches(sampler.vocab_size, banned, min(most, 2 * MOST_ANSWER))
    if tokenizer is None:
        if text is not None:
            raise ValueError("`text` must be None for a drafter without a tokenizer, which encodes it. Leave it out.")
        return _Tried(chance, "random ids", "There is no tokenizer, hence no text; put its files beside the weights.")
    if isinstance(text, str):
        made, name = cut(tokenizer, text), "your text"
    else:
        examples, name, stop = EXAMPLES, f"{len(EXAMPLES)} built-in prompts", ends.of_chat
        if tokenizer.get_vocab().keys() == set(VOCABULARY):  # it knows no other words
            examples = tuple(Example(each.prompt, each.answer) for each in INCLUDED_EXAMPLES)
            name, stop = "prompts of the included tasks", next(iter(ends.stop_token_ids), None)
        if text is not None:
            examples, name = _examples(text), "your prompts and answers"
        made = stretches_of(tokenizer, examples, stop)
    made = [_shortened(each, most) for each in made if each.prompt and each.answer]
    if not made:
        raise ValueError(
            f"`text` must have a prompt and an answer of at least one token each, got {text!r:.100}. Give others, or leave it out."
        )
    if max(token for each in made for token in each.ids) >= sampler.vocab_size:
        return _Tried(chance, "random ids", "The tokenizer gives ids that the models do not have.")
    silence = ""
    if (share := unknown_share(tokenizer, made)) > _MOST_UNKNOWN:
        silence = (
            f"{share:.0%} of the text's tokens are unknown to the tokenizer. Give text that it knows (--text FILE)."
        )
    return _Tried(made, name, silence)


def _examples(text: Any) -> tuple[Example, ...]:
    pairs = list(text) if isinstance(text, Sequence) else []
    fits = all(
        isinstance(pair, Sequence) and len(pair) == 2 and all(isinstance(part, str) and part for part in pair)
        for pair in pairs
    )
    if not pairs or not fits:
        raise TypeError(
            f"`text` must be text, or a list of (prompt, answer), two texts each, got {text!r:.100}. Leave it out for the "
            "built-in prompts."
        )
    count = min(len(pairs), MOST_PAIRS)
    return tuple(Example(*pairs[i * len(pairs) // count]) for i in range(count))


def _shortened(stretch: Stretch, most: int) -> Stretch:
    """At most so many tokens of a stretch: the end of its prompt and the beginning of its answer."""
    answer = stretch.answer[: max(min(most // 2, MOST_ANSWER), 1)]
    return Stretch(stretch.prompt[-max(most - len(answer), 1) :], answer)


def _evidence(weigher: Weigher, drafter: CheckedDrafter, tokenizer: Any, tried: _Tried) -> list[Finding]:
    if tried.silence:
        return [Finding("weights", "no evidence", "text to try them on", "not known", tried.silence)]
    found = weigh(weigher, tokenizer)
    if drafter.reads_causally and weigher.is_informed(weigher.declared):
        verifier = CausalVerifier(drafter.model)
        found.append(next_token("weights: next token", verifier, drafter, tried.stretches))
    return found


def _verifier(sampler: APDSampler, verifier: CausalVerifier, tried: _Tried, revision: str | None) -> Iterable[Finding]:
    stored, tokenizer = Stored.of(verifier.model, revision), None
    if stored.path:
        with suppress(ValueError, OSError):  # not in the cache
            tokenizer = load_tokenizer(stored.path, **offline(stored.path, revision))
    yield from verifier_declarations(sampler, verifier, stored, tokenizer)
    yield from verifier_laws(sampler, verifier, tried.stretches, is_text=not tried.silence)


def _subject(sampler: APDSampler, stored: Stored, tried: _Tried) -> dict[str, str]:
    from apd import __version__

    drafter: Any = sampler.drafter
    named = {"drafter": stored.path or "a model in memory"}
    if sampler.verifier is not None:
        model = getattr(sampler.verifier, "model", None)
        own = "the drafter's own weights"
        named["verifier"] = own if model is drafter.model else Stored.of(model).path if model is not None else "?"
    versions = f"apd {__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    dtype = str(drafter.model.dtype).removeprefix("torch.")
    parameters = sum(each.numel() for each in drafter.model.parameters())
    return named | {
        "drafter is": f"{type(drafter.model).__name__}, {parameters:,} parameters, {dtype} on {drafter.device}",
        "tried on": f"{tried.name}, {len(tried.stretches)} stretches",
        "versions": versions,
    }
