"""Laws: what must hold for every model, whatever it was trained for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from apd.decoding.state import DecodeState, to_device
from apd.decoding.window import Window
from apd.generation.output import APDOutput
from apd.inspection.canvases import Canvas, CheckedDrafter, Scored, Stretch, masked_logits, read, state_of, window_ends
from apd.inspection.evidence import Margin
from apd.inspection.report import Finding, Verdict
from apd.inspection.texts import TEXT_OF_THEIRS
from apd.models.drafter import MaskedDiffusionDrafter
from apd.models.verifier import CausalVerifier
from apd.models.ways import relative_difference
from apd.sampler import APDSampler
from apd.strategies import LeftToRight

#: Largest difference that is taken for rounding, in units of the largest logit.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}
_COARSE = 5e-2
#: New tokens of an answer.
NEW_TOKENS = 16
#: Rows that are compared with themselves alone.
_ROWS = 4
#: Places behind the frontier after each step of a decode that is replayed, and how many are compared.
_STEPS, _COMPARED = (0, 3, 4, 9), 8


def drafter_laws(drafter: CheckedDrafter, stretches: Sequence[Stretch], scored: Scored) -> Iterator[Finding]:
    """Laws of the drafter's logits.

    Args:
        scored: what the drafter says of the canvases of all stretches.
    """
    places = int((~scored.true.isnan()).sum()) + scored.num_invalid
    yield Finding(
        "finite logits", f"{scored.num_invalid} bad of {places}", "0", "problem" if scored.num_invalid else "ok",
        "Logits are NaN or infinite. Try dtype=float32; if they still are, the weights are damaged."
        if scored.num_invalid else "",
    )  # fmt: skip
    yield _equal("batch = single", batch_difference(drafter, stretches), drafter.model.dtype)
    if isinstance(drafter, MaskedDiffusionDrafter):  # a masked LM has no cache
        name, difference = cache_difference(drafter, stretches)
        yield _equal(name, difference, drafter.model.dtype)


def _equal(name: str, difference: float, dtype: torch.dtype) -> Finding:
    """A finding about two computations of the same logits; the difference is in units of the largest."""
    tolerance = TOLERANCE.get(dtype, _COARSE)
    verdict: Verdict = "ok" if difference <= tolerance else "problem"
    advice = "" if verdict == "ok" else "Rounding does not explain this difference: please report it with this table."
    if verdict == "problem" and dtype not in TOLERANCE and difference <= 10 * tolerance:
        verdict, advice = (
            "not known",
            "This may be rounding. Check again with --dtype float32, where it would be seen.",
        )
    return Finding(name, f"{difference:.1e} of the largest", f"at most {tolerance:.0e}", verdict, advice)


def batch_difference(drafter: CheckedDrafter, stretches: Sequence[Stretch]) -> float:
    """The largest difference of logits between rows in a padded batch and each row alone."""
    made = [_open(stretch, index) for index, stretch in enumerate(stretches[:_ROWS])]
    _, drafted, together = masked_logits(drafter, made)
    worst = 0.0
    for row, canvas in enumerate(made):
        _, real, alone = masked_logits(drafter, [canvas], more_padding=0)
        count = int(real.sum())
        assert count == int(drafted[row].sum())
        worst = max(worst, relative_difference(together[row, :count], alone[0, :count]))
    return worst


def _open(stretch: Stretch, index: int) -> Canvas:
    """A stretch with its answer masked, but for a few tokens that differ from row to row."""
    start = len(stretch.prompt) + min(index, len(stretch.answer) - 1)
    ids = stretch.ids[: start + _COMPARED]
    return Canvas(ids, tuple(range(start, len(ids))), is_open=True)


def cache_difference(drafter: MaskedDiffusionDrafter, stretches: Sequence[Stretch]) -> tuple[str, float]:
    """The largest difference of logits between passes with a cache and passes that compute whole rows; and what was compared."""
    states, _ = _replayed(drafter, stretches)
    uncached = MaskedDiffusionDrafter(
        drafter.model,
        mask_token_id=drafter.mask_token_id,
        logit_shift=drafter.logit_shift,
        attention=drafter.attention.kind,
        block_size=drafter.attention.block_size,
        anchored=drafter.attention.anchored,
        cache=False,
    )
    if drafter.attention.is_final:
        name, session = "cached = uncached", drafter.open(states[0])
    else:
        # A KV window that covers the row is exact.
        name, session = "wide KV window", drafter.open_cached(states[0], states[0].width, None)
    worst = 0.0
    for state in states:
        window = Window.of_rows(state, window_ends(drafter, state))
        inside = window.inside[:, :_COMPARED]
        found, expected = (each.logits(state, window)[:, :_COMPARED] for each in (session, uncached.open(state)))
        worst = max(worst, relative_difference(found[inside], expected[inside]))
    return name, worst


def _replayed(drafter: CheckedDrafter, stretches: Sequence[Stretch]) -> tuple[list[DecodeState], Tensor]:
    """The states of a decode that commits the true tokens of a few stretches, ragged ones, and all true tokens: `b l` int64."""
    size = min(min(len(stretch.answer) for stretch in stretches), _STEPS[-1] + _COMPARED)
    rows = [
        Canvas(each.ids[: len(each.prompt) + size], tuple(range(len(each.prompt), len(each.prompt) + size)), True)
        for each in stretches[:_ROWS]
    ]
    first = state_of(drafter, rows)
    tokens = first.tokens.tolist()
    for row, canvas, padding in zip(tokens, rows, first.layout.padding, strict=True):
        row[padding : padding + len(canvas.ids)] = canvas.ids
    true, column = to_device(tokens, first.tokens.device), torch.arange(first.width, device=first.tokens.device)
    states = [first]
    for step in _STEPS[1:]:
        if step < size:
            decided = first.decided | (column < first.frontier[:, None] + step)
            states.append(first.with_decided(torch.where(decided, true, first.tokens), decided))
    return states, true


def verifier_laws(
    sampler: APDSampler, verifier: CausalVerifier, stretches: Sequence[Stretch], *, is_text: bool
) -> Iterator[Finding]:
    """Laws of the verifier, and whether it predicts the text.

    Args:
        is_text: the stretches are text, not random ids.
    """
    drafter: Any = sampler.drafter
    yield _equal("verifier: cache", verifier_cache_difference(drafter, verifier, stretches), verifier.model.dtype)
    if is_text:
        yield next_token("verifier: text", verifier, drafter, stretches)


def verifier_cache_difference(
    drafter: CheckedDrafter, verifier: CausalVerifier, stretches: Sequence[Stretch]
) -> float:
    """The largest difference of logits between one session for a whole decode and a new session at every step."""
    states, true = _replayed(drafter, stretches)
    session, worst = verifier.open(states[0]), 0.0
    for state in states:
        window = Window.of_rows(state, state.layout.end)
        draft, inside = window.gather(true), window.inside[:, :_COMPARED]
        found, expected = (
            each.logits(state, window, draft)[:, :_COMPARED] for each in (session, verifier.open(state))
        )
        worst = max(worst, relative_difference(found[inside], expected[inside]))
    return worst


def next_token(name: str, verifier: CausalVerifier, drafter: CheckedDrafter, stretches: Sequence[Stretch]) -> Finding:
    """Whether a causal model predicts the next tokens of the text better than tokens of other places."""
    scored = causal_scores(verifier, drafter, stretches)
    chance = -math.log(verifier.vocab_size)
    mean, information = float(scored.true.nanmean()), Margin.of(scored.true - scored.other)
    found, expected = f"{mean:.2f} nats a token", f"above chance, {chance:.2f}"
    if Margin.of(scored.true - chance).is_clear and information.is_clear:
        return Finding(name, found, expected, "ok")
    return Finding(
        name, found, expected, "not known" if not Margin.of(scored.true - chance).is_clear else "problem",
        f"The next token is no likelier than tokens of other places ({information}). These weights look untrained for that. "
        f"{TEXT_OF_THEIRS} Otherwise choose another verifier, or check the checkpoint.",
    )  # fmt: skip


def causal_scores(verifier: CausalVerifier, drafter: CheckedDrafter, stretches: Sequence[Stretch]) -> Scored:
    """What a causal model says of the answers of stretches: `n k` float32."""
    size = max(len(stretch.answer) for stretch in stretches)
    true = torch.full((len(stretches), size), torch.nan, device="cpu")
    other, num_invalid = true.clone(), 0
    everything = [token for stretch in stretches for token in stretch.answer if token < verifier.vocab_size]
    for row, stretch in enumerate(stretches):
        canvas = Canvas(stretch.ids, tuple(range(len(stretch.prompt), len(stretch.ids))), True)
        state = state_of(drafter, [canvas], more_padding=0)
        window = Window.of_rows(state, state.layout.end)
        draft, count = to_device([stretch.answer], state.tokens.device), len(stretch.answer)
        logits = verifier.open(state).logits(state, window, draft)[:, :]
        known = [token if token < verifier.vocab_size else 0 for token in stretch.answer]
        of_true, of_others, is_invalid = read(logits, [known], everything)
        is_known = torch.tensor([token < verifier.vocab_size for token in stretch.answer], device="cpu")
        true[row, :count] = of_true[0].where(is_known, torch.nan)
        other[row, :count] = of_others[0].where(is_known, torch.nan)
        num_invalid += int(is_invalid.sum())
    return Scored(true, other, num_invalid)


@dataclass(frozen=True)
class Answers:
    """Greedy answers to all prompts as one batch, and to a few of them alone."""

    together: APDOutput
    alone: list[APDOutput]


def answer_laws(sampler: APDSampler, stretches: Sequence[Stretch]) -> Iterator[Finding]:
    """Laws of answers: a short greedy decode of every prompt, as one batch, and of a few rows alone."""
    drafter: Any = sampler.drafter
    has_verifier = sampler.verifier is not None
    strategy = "apd" if has_verifier else LeftToRight(1)
    try:
        answers = _answer(sampler, stretches, strategy)
    except (ValueError, RuntimeError, FloatingPointError) as error:
        yield Finding("answers", type(error).__name__, "answers", "problem", str(error))
        return
    rows = _new_tokens(answers.together)
    stops = sum(len(row) < NEW_TOKENS for row in rows)
    drawn = sum(row.count(drafter.mask_token_id) for row in rows)
    said = "" if sampler.tokenizer is None else f"The first one is {sampler.tokenizer.decode(rows[0])!r:.200}."
    yield Finding(
        "answers", f"{stops} stop, {len(rows) - stops} to the limit", f"end by {NEW_TOKENS} tokens", "ok", said
    )
    yield Finding(
        "masks drawn", str(drawn), "0", "problem" if drawn else "ok",
        "The mask token was decoded: please report it with this table." if drawn else "",
    )  # fmt: skip
    differing = sum(_new_tokens(each)[0] != row for each, row in zip(answers.alone, rows, strict=False))
    exact = drafter.model.dtype in TOLERANCE
    yield Finding(
        "answers in a batch", f"{differing} of {len(answers.alone)} differ", "as alone",
        "ok" if not differing else "problem" if exact else "not known",
        "" if not differing else "Rounding may tip a near tie. If `batch = single` is ok, it did; else please report it.",
    )  # fmt: skip
    if has_verifier:
        yield _acceptance(answers.together)


def _answer(sampler: APDSampler, stretches: Sequence[Stretch], strategy: Any) -> Answers:
    width = max(len(stretch.prompt) for stretch in stretches)
    ids = torch.tensor([[0] * (width - len(each.prompt)) + list(each.prompt) for each in stretches], device="cpu")
    real = torch.tensor(
        [[0] * (width - len(each.prompt)) + [1] * len(each.prompt) for each in stretches], device="cpu"
    )
    common: dict[str, Any] = {
        "max_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "strategy": strategy,
        "return_dict_in_generate": True,
    }
    together: Any = sampler.generate(ids, attention_mask=real, **common)
    alone: list[Any] = [
        sampler.generate(torch.tensor([each.prompt], device="cpu"), **common) for each in stretches[:2]
    ]
    return Answers(together, alone)


def _new_tokens(output: APDOutput) -> list[list[int]]:
    return [list(row.tokens) for row in output.trace]


def _acceptance(output: APDOutput) -> Finding:
    drafted = sum(len(draft) for row in output.trace for draft in row.drafts)
    tokens, steps = int(output.new_tokens.sum()), int(output.drafter_forwards.sum())
    found = f"{tokens / steps:.1f} tokens a step, {tokens / drafted:.0%} of drafts"
    slow = tokens < 1.1 * steps
    return Finding(
        "pair: acceptance", found, "above 1 token a step", "not known" if slow else "ok",
        "Nearly every draft is rejected behind its first token. If the rest is ok, the models disagree on this text: try a "
        "larger mixture_weight." if slow else "",
    )  # fmt: skip
