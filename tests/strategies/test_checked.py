"""Checked decoding beside its law (`tests/laws/test_laws_checked.py`): what it counts, records and refuses."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from pairs import left_padded
from torch import Tensor
from toy import tiny_pair, toy
from transformers import StoppingCriteria

from apd import EXAMPLE_PROMPTS, APDSampler
from apd.strategies import KLASS, WINO, Checked, Confidence, LeftToRight, Mixture, Threshold
from apd.strategies.proposers import NO_GUESS, Marginals, Proposed, Stateless
from apd.strategies.registry import parse

DRAFTER, VERIFIER = tiny_pair(3, vocab=20)
DRAFTER.model.double(), VERIFIER.model.double()
SAMPLER = APDSampler(DRAFTER, VERIFIER)
CALL: dict[str, Any] = {
    **left_padded([[3, 4], [5], [6, 7, 8, 9]], pad=0),
    "max_new_tokens": 14,
    "eos_token_id": [1],
    "pad_token_id": 0,
    "do_sample": True,
    "top_k": 0,
    "seed": [1, 2, 3],
    "return_dict_in_generate": True,
}


@dataclasses.dataclass(frozen=True)
class Told(Stateless):
    """Proposes given tokens, `b n` int64 from the end of the prompt on; `NO_GUESS` anywhere."""

    tokens: Tensor
    probs: float | None = None

    def propose(self, state: Any, window: Any, marginals: Any, pair: Any, sampling: Any) -> Proposed:
        at = (window.columns - state.prompt_end[:, None]).clamp(0, self.tokens.shape[1] - 1)
        tokens = self.tokens[state.rows].gather(1, at)
        return Proposed(tokens, None if self.probs is None else torch.full(tokens.shape, self.probs))


def sequential(**changes: Any) -> Any:
    return SAMPLER.generate(**CALL | changes, strategy=LeftToRight(1))


def answer(output: Any) -> Tensor:
    width = CALL["input_ids"].shape[1]
    new = torch.full((3, CALL["max_new_tokens"]), 2)
    new[:, : output.sequences.shape[1] - width] = output.sequences[:, width:]
    return new


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_right_guesses_take_one_pass_for_one_more_token_than_are_guessed(depth: int) -> None:
    sought = sequential()
    found = SAMPLER.generate(**CALL, strategy=Checked(proposer=Told(answer(sought)), num_checked=depth))
    assert torch.equal(found.sequences, sought.sequences)
    passes = [math.ceil(n / (depth + 1)) for n in sought.new_tokens.tolist()]
    assert found.drafter_forwards.tolist() == passes
    assert all(passes[i] <= n <= (depth + 1) * passes[i] for i, n in enumerate(found.canvases.tolist()))
    assert torch.equal(sought.canvases, sought.drafter_forwards)


@pytest.mark.parametrize("tokens", [NO_GUESS, 2, 19, 10_000])
def test_wrong_guesses_and_none_and_ids_that_cannot_be_drawn_cost_no_pass(tokens: int) -> None:
    guesses = torch.full((3, 14), tokens)
    sought = sequential()
    found = SAMPLER.generate(**CALL, strategy=Checked(proposer=Told(guesses), num_checked=5))
    assert torch.equal(found.sequences, sought.sequences)
    assert (found.drafter_forwards <= sought.drafter_forwards).all()
    if tokens != 2:  # 19 is the mask
        assert torch.equal(found.canvases, found.drafter_forwards)


def test_recorded_probabilities_and_scores_are_the_references() -> None:
    sought = sequential(output_scores=True, output_logits=True)
    found = SAMPLER.generate(**CALL | {"output_scores": True, "output_logits": True}, strategy=Checked())
    for mine, its in zip(found.trace, sought.trace, strict=True):
        assert torch.allclose(torch.tensor(mine.drafter_probs), torch.tensor(its.drafter_probs), atol=1e-5)
    for name in ("scores", "logits"):
        for mine, its in zip(getattr(found, name), getattr(sought, name), strict=True):
            assert torch.allclose(mine, its, atol=1e-4)


class Calls(StoppingCriteria):
    """Stops a row at its sixth token behind the prompt, and writes down what it saw."""

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> bool:
        self.seen.append(input_ids[0].tolist())
        return len(input_ids[0]) >= 9


def test_stopping_criteria_see_the_sequential_history_once() -> None:
    seen = []
    for strategy in (LeftToRight(1), Checked()):
        calls = Calls()
        SAMPLER.generate(**CALL, strategy=strategy, stopping_criteria=[calls])
        seen.append(sorted(calls.seen))
    assert seen[0] == seen[1]


@pytest.mark.parametrize(
    ("refresh", "size"),
    [(4, 5), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((None, None), (None, 5), (4, None)))],
)
def test_canvases_share_the_keys_of_a_cache(refresh: int | None, size: int | None) -> None:
    cache = {"kv_refresh": refresh, "window_size": size}
    whole = CALL | cache | {"kv_window": 100}  # every pass computes whole rows, so nothing is frozen
    sought = SAMPLER.generate(**whole, strategy=LeftToRight(1))
    assert torch.equal(sought.sequences, SAMPLER.generate(**whole, strategy=Checked()).sequences)
    frozen = CALL | cache | {"kv_window": 2}
    nothing = Told(torch.full((3, 14), NO_GUESS))
    sought = SAMPLER.generate(**frozen, strategy=LeftToRight(1))
    assert torch.equal(sought.sequences, SAMPLER.generate(**frozen, strategy=Checked(proposer=nothing)).sequences)
    assert SAMPLER.generate(**frozen, strategy=Checked()).new_tokens.min() > 0


def test_what_is_certain_is_taken_without_a_canvas() -> None:
    sought = sequential()
    told = Told(answer(sought), probs=1.0)
    checked = SAMPLER.generate(**CALL, strategy=Checked(proposer=told))
    trusted = SAMPLER.generate(**CALL, strategy=Checked(proposer=told, certainty=0.0))
    assert torch.equal(trusted.sequences, checked.sequences)
    assert trusted.canvases.sum() < checked.canvases.sum()
    assert all(0 <= p <= 1 for row in trusted.trace for p in row.drafter_probs)
    wrong = Told(torch.full((3, 14), 2), probs=1.0)
    believed = SAMPLER.generate(**CALL, strategy=Checked(proposer=wrong, certainty=0.0)).sequences
    assert (believed == 2).sum() > (sought.sequences == 2).sum()


def test_certainty_pools_what_drafter_and_proposer_say() -> None:
    p = torch.tensor([[0.5, 0.9, 0.8, 0.001, 0.9, 0.9]])
    columns, tokens = torch.arange(6)[None], torch.zeros(1, 6, dtype=torch.int64)
    marginals = Marginals(columns, columns < 5, tokens, torch.stack([p, 1 - p], -1).log())
    says = torch.tensor([[0.5, 0.9, torch.nan, 1.0, 0.1, 0.9]])
    # Odds of 9 and 1/9 cancel; without the proposer's, p_D is left; its certainty does not overrule the drafter.
    assert marginals.pooled(tokens, says)[0, :5].tolist() == pytest.approx([0.5, 0.9, 0.8, 0.5, 0.5], abs=1e-3)
    assert marginals.pooled(tokens, says)[0, 5] < 0.01  # nothing is known there
    assert marginals.pooled(torch.full_like(tokens, NO_GUESS), says).max() < 0.5


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_under_noise_a_token_is_as_sure_as_its_lead_where_its_proposer_has_read_what_is_before_it(weight) -> None:
    proposals: list[tuple[Tensor, Tensor, Tensor]] = []

    class Recording(Stateless):
        reads_marginals = needs_verifier = True

        def propose(self, state: Any, window: Any, marginals: Any, pair: Any, sampling: Any) -> Proposed:
            found = Mixture(weight).open(state).propose(state, window, marginals, pair, sampling)
            if marginals is not None:
                near = marginals.first(found.tokens.shape[1])
                proposals.append((found.probs, near.probs(found.tokens), near.known))
            return found

    checked = SAMPLER.generate(**CALL, strategy=Checked(proposer=Recording()))
    assert torch.equal(checked.sequences, sequential().sequences)
    probs, p, known = (torch.cat([each.flatten() for each in part]) for part in zip(*proposals, strict=True))
    if weight == 1.0:  # the drafter's own marginals know no more than p_D
        assert probs[known].equal(p[known])
        return
    assert (probs[known] >= 0.5).all()  # it is ahead of all others, however unlikely it was
    assert (p[known] < 0.5).float().mean() > 0.9


def test_a_number_of_guesses_that_follows_what_is_right_costs_fewer_canvases() -> None:
    wrong = Told(torch.full((3, 14), 2), probs=0.9)
    fixed = SAMPLER.generate(**CALL, strategy=Checked(proposer=wrong))
    auto = SAMPLER.generate(**CALL, strategy=Checked(proposer=wrong, num_checked="auto"))
    assert torch.equal(fixed.sequences, auto.sequences)
    assert auto.canvases.sum() < fixed.canvases.sum()


def test_streams_give_the_references_text() -> None:
    sampler = APDSampler.from_included()
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[:2], return_tensors="pt", padding=True)
    texts = []
    for strategy in ("left-to-right:1", "checked", "checked:0.9,K=auto"):
        chunks = list(sampler.stream(**inputs, max_new_tokens=12, strategy=strategy))
        texts.append(["".join(chunk.text for chunk in chunks if chunk.row == row) for row in range(2)])
    assert texts[0] == texts[1] and all(texts[0])


@pytest.mark.parametrize("reference", [LeftToRight(1), LeftToRight(2), Confidence(1), Threshold(0.2)], ids=repr)
@pytest.mark.parametrize("proposer", ["mixture", "verifier"])
def test_a_verifier_without_the_mask_token_proposes_to_rows_that_have_stopped(reference: Any, proposer: str) -> None:
    sampler = APDSampler(tiny_pair(3, vocab=40)[0], tiny_pair(4, vocab=30)[1])
    call = CALL | {"eos_token_id": list(range(1, 9)), "return_dict_in_generate": False}
    sought = sampler.generate(**call, strategy=reference)
    assert torch.equal(sought, sampler.generate(**call, strategy=Checked(reference, proposer, 5)))


class Fresh:
    """A verifier whose every pass is held against a session that has seen nothing before."""

    def __init__(self) -> None:
        self.vocab_size, self.max_length, self.passes = VERIFIER.vocab_size, None, 0

    def open(self, state: Any) -> "Fresh":
        self.session = VERIFIER.open(state)
        self.select, self.join = self.session.select, self.session.join
        return self

    def logits(self, state: Any, window: Any, draft: Tensor) -> Tensor:
        found, sought = (
            session.logits(state, window, draft)[:, :] for session in (self.session, VERIFIER.open(state))
        )
        assert torch.allclose(found[window.inside], sought[window.inside], atol=1e-9)
        self.passes += 1
        return found


@pytest.mark.parametrize("reference", [LeftToRight(1), LeftToRight(2), Confidence(1), Threshold(0.2)], ids=repr)
def test_proposals_are_made_behind_the_tokens_that_were_committed(reference: Any) -> None:
    """Not behind the guesses that turned out wrong: the verifier's cache must forget all of them."""
    verifier = Fresh()
    APDSampler(DRAFTER, verifier).generate(**CALL, strategy=Checked(reference, num_checked=6))
    assert verifier.passes > 10


@pytest.mark.parametrize("proposer", ["mixture", "verifier", "drafter", "lookup", Told(torch.full((3, 14), 9))])
def test_a_grammar_is_asked_about_possible_prefixes_only(proposer: Any) -> None:
    def three(row: int, ids: Tensor) -> list[int]:
        """Three successors of each token."""
        last = [int(token) for token in ids[-2:]]
        assert len(last) < 2 or (last[1] - 2) in [(3 * last[0] + k) % 17 for k in range(3)] or len(ids) <= 4
        return [2 + (3 * last[-1] + k) % 17 for k in range(3)]

    prompts = left_padded([[3, 4], [5], [6, 7]], pad=0)
    call = CALL | prompts | {"prefix_allowed_tokens_fn": three, "eos_token_id": None}
    sought = SAMPLER.generate(**call, strategy=LeftToRight(1))
    assert torch.equal(sought.sequences, SAMPLER.generate(**call, strategy=Checked(proposer=proposer)).sequences)


@pytest.mark.parametrize("certainty", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_what_is_taken_unchecked_does_not_depend_on_the_batch(certainty: float) -> None:
    call = {name: CALL[name] for name in ("max_new_tokens", "do_sample", "top_k", "pad_token_id")}
    prompts, strategy = [[1, 2], [3], [4, 5, 6], [7]], Checked(certainty=certainty, num_checked=8)
    found = [
        [
            answer.tokens
            for answer in SAMPLER.generate_many(
                prompts, batch_size=size, strategy=strategy, seed=7, eos_token_id=[10], **call
            )
        ]
        for size in (1, 2, 4)
    ]
    assert found[0] == found[1] == found[2]


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"reference": KLASS()}, "`reference` must be an `Unmasking` strategy without memory"),
        ({"reference": WINO()}, "`reference` must be an `Unmasking` strategy without memory"),
        ({"proposer": "oracle"}, "`proposer` must be one of 'mixture'"),
        ({"proposer": 3}, "`proposer` must have the attribute `open`"),
        ({"proposer": Mixture}, "`proposer` must be an instance"),
        ({"num_checked": 0}, "`num_checked` must be at least 1"),
        ({"num_checked": "many"}, "`num_checked` must be a whole number"),
        ({"certainty": 1.5}, "`certainty` must be in"),
        ({"breadth": 0}, "`breadth` must be at least 1"),
        ({"pass_columns": 0}, "`pass_columns` must be at least 1"),
    ],
)
def test_parameters_outside_their_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Checked(**wrong)


def test_a_window_that_follows_the_last_step_is_refused() -> None:
    with pytest.raises(ValueError, match="`window_size` must be a number or None with Checked"):
        SAMPLER.generate(**CALL | {"window_size": "auto"}, strategy=Checked())


class Narrow(Stateless):
    def propose(self, *arguments: Any) -> Any:
        return torch.zeros(1, dtype=torch.int32)


def test_a_proposer_that_returns_something_else_is_named() -> None:
    with pytest.raises(TypeError, match="Narrow"):
        SAMPLER.generate(**CALL, strategy=Checked(proposer=Narrow()))


@dataclasses.dataclass(frozen=True)
class Junk(Stateless):
    def open(self, state: Any) -> Any:
        return object()


def test_a_proposer_that_opens_no_session_is_named() -> None:
    with pytest.raises(TypeError, match="Junk"):
        SAMPLER.generate(**CALL, strategy=Checked(proposer=Junk()))


def test_a_drafter_that_computes_one_canvas_only_is_named() -> None:
    class Single:
        def __init__(self) -> None:
            self.inner = toy().drafter
            self.vocab_size, self.mask_token_id = self.inner.vocab_size, self.inner.mask_token_id
            self.max_length, self.device = None, self.inner.device

        def open(self, state: Any) -> "Single":
            return self

        def logits(self, state: Any, window: Any) -> Tensor:
            return self.inner.logits(state, window)

        def select(self, rows: Any) -> None: ...
        def join(self, state: Any) -> None: ...

    with pytest.raises(TypeError, match="canvas_logits"):
        APDSampler(Single(), mixture_weight=1.0).generate(
            torch.zeros(1, 1, dtype=torch.int64), max_new_tokens=4, strategy=Checked(proposer="drafter")
        )


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("spec", "strategy"),
    [
        ("checked", Checked()),
        ("checked:0.9", Checked(certainty=0.9)),
        ("checked:c=.9,K=auto", Checked(certainty=0.9, num_checked="auto")),
        ("checked:K=auto,pass=20", Checked(num_checked="auto", pass_columns=20)),
        ("checked:K=4,R=0.7", Checked(num_checked=4, proposer=Mixture(0.7))),
        ("checked:proposer=drafter/threshold:0.8", Checked(Threshold(0.8), "drafter")),
        ("checked:breadth=2/confidence:1", Checked(Confidence(1), breadth=2)),
    ],
)
def test_names_say_what_is_checked(spec: str, strategy: Checked) -> None:
    setting = parse(spec)
    assert setting.strategy == strategy
    assert parse(setting.spec).strategy == strategy and parse(setting.spec).spec == setting.spec


@pytest.mark.parametrize(
    "spec", ["checked/klass:0.9", "checked/apd", "checked:K=none", "checked:R=2", "threshold:1/2"]
)
def test_names_that_mean_nothing_are_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"checked|strategy|K must be|R"):
        parse(spec)


def test_probabilities_of_guesses_are_computed_only_where_they_decide_something() -> None:
    """They cost a second draw of the noise of all ids."""
    kept = {"c=1": Checked(), "c<1": Checked(certainty=0.9), "auto": Checked(num_checked="auto")}
    state = {name: strategy.guesser.gives_probs for name, strategy in kept.items()}
    assert state == {"c=1": False, "c<1": True, "auto": True}

    @dataclasses.dataclass(frozen=True)
    class Own(Mixture):
        """A caller's own is left as it is."""

    assert Checked(proposer=Own()).guesser == Own()
