"""Law 12: a step whose first token is judged, too, with R = 0 and a correction: the output is the verifier's own decoding.

Models are exact, or random networks in float64, where a tie within rounding has a probability below 1e-8 per drawn token.
Frequencies are compared with closed forms; a correct sampler fails for a seed taken at random with a chance of at most
`FALSE_ALARM` for each comparison.
"""

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from pairs import left_padded, new_tokens
from test_laws_exact import FALSE_ALARM, ROWS, at, chance_of_counts, follows, toy_truth
from thinned import thinned
from torch import Tensor
from toy import LENGTH, TOKENS, tiny_pair, toy
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor, SuppressTokensLogitsProcessor

from apd import APD, APDSampler, Autoregressive, Coupling, Evidence, Judgement, Rejection
from apd.models.ideal import IdealListModel

LAW_12 = {"mixture_weight": 0.0, "correction": True, "first": "judge"}


def neural(seed: int) -> APDSampler:
    drafter, verifier = tiny_pair(seed, vocab=12, num_layers=1)
    drafter.model.double(), verifier.model.double()
    return APDSampler(drafter, verifier)


def listed(seed: int) -> IdealListModel:
    """Every sequence of 2 tokens and length 7, with random weights."""
    answers = torch.tensor(list(itertools.product(range(2), repeat=7)))
    noise = torch.randn(len(answers), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return IdealListModel(answers, noise.mul(2).exp())


def strangers(one: IdealListModel, other: IdealListModel) -> APDSampler:
    """The drafter of one task, the verifier of another."""
    return APDSampler(one.drafter, other.verifier)


SAMPLERS = [neural(0), neural(1), strangers(listed(0), listed(1)), strangers(toy(0), toy(1))]
SHARP = [IdealListModel(toy(seed).answers, toy(seed).weights ** 2) for seed in (0, 5)]
LENGTHS, STOPS = (12, 12, 7, LENGTH), ([10], [10], None, None)


def allowed(row: int, ids: Tensor) -> list[int]:
    """A grammar: every id but two, which depend on the tokens before."""
    return [token for token in range(11) if token not in (int(ids[-1]), int(ids.sum()) % 11)]


def case(seed: int) -> tuple[APDSampler, list[list[int]], dict[str, Any], dict[str, Any]]:
    """A sampler, prompts, the arguments of a call, and those that change how the tokens come about, but not which."""
    rng = random.Random(seed)
    which = rng.choice((0, 0, 1, 1, 2, 3))
    words = 10 if which < 2 else 2
    prompts = [[rng.randrange(words) for _ in range(rng.randint(1, 5))] for _ in range(rng.randint(1, 4))]
    call: dict[str, Any] = {"max_new_tokens": LENGTHS[which], "eos_token_id": STOPS[which], "pad_token_id": 0}
    if rng.random() < 0.7:
        call |= {"do_sample": True, "temperature": rng.choice((0.5, 1.0, 1.5)), "top_k": rng.choice((0, 0, 3))}
        call |= {"top_p": rng.choice((1.0, 1.0, 0.8)), "min_p": rng.choice((0.0, 0.0, 0.1))}
    if which < 2:
        call["min_new_tokens"] = rng.choice((0, 0, 1, 5))
        call["logits_processor"] = rng.choice(
            (
                None,
                None,
                [SuppressTokensLogitsProcessor([2, 3])],
                [NoRepeatNGramLogitsProcessor(2)],
                [RepetitionPenaltyLogitsProcessor(1.7)],
            )
        )
        call["prefix_allowed_tokens_fn"] = rng.choice((None, None, None, allowed))
    knobs: dict[str, Any] = {"window_size": rng.choice((None, None, 1, 2, 3, 5, "auto"))}
    if which < 2 and rng.random() < 0.4:
        knobs |= {"kv_window": rng.choice((1, 3)), "kv_refresh": rng.choice((None, 1, 4))}
    return SAMPLERS[which], prompts, call, knobs


def answers(sampler: APDSampler, prompts: list[list[int]], mode: str, seed: int, **call: Any) -> list[list[int]]:
    """The new tokens of each prompt, decoded together, in a stream, or as rows become free."""
    if mode == "many":
        return [one.tokens for one in sampler.generate_many(prompts, batch_size=2, seed=seed, **call)]
    inputs = left_padded(prompts, pad=0)
    if mode == "stream":
        rows: list[list[int]] = [[] for _ in prompts]
        for chunk in sampler.stream(**inputs, seed=seed, **call):
            rows[chunk.row] += chunk.tokens
        return rows
    return new_tokens(sampler.generate(**inputs, seed=seed, return_dict_in_generate=True, **call))


def differing(seeds: range, **law: Any) -> list[int]:
    """The cases in which a row is not what the verifier alone decodes."""
    wrong = []
    for seed in seeds:
        sampler, prompts, call, knobs = case(seed)
        mode = ("generate", "generate", "many", "stream")[seed % 4]
        expected = answers(sampler, prompts, mode, seed, strategy=Autoregressive(), **call)
        if answers(sampler, prompts, mode, seed, **call, **knobs, **law) != expected:
            wrong.append(seed)
    return wrong


def test_law_12_the_output_is_the_verifiers_own() -> None:
    assert differing(range(16), **LAW_12) == []


def test_law_12_needs_the_first_token_judged_and_the_drafter_left_out() -> None:
    assert len(differing(range(12), **LAW_12 | {"first": "draft"})) > 6
    assert len(differing(range(12), **LAW_12 | {"mixture_weight": 0.5})) > 6


@pytest.mark.slow
def test_law_12_the_output_is_the_verifiers_own_in_five_hundred_cases() -> None:
    assert differing(range(16, 516), **LAW_12) == []


@pytest.mark.parametrize("entries", [1, pytest.param(100, marks=pytest.mark.slow), 300])
def test_law_12_a_window_that_is_judged_in_parts(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setattr("apd.decoding.pair.MAX_LOGIT_ENTRIES", entries)
    assert differing(range(100, 106), **LAW_12) == []


def test_law_12_takes_fewer_passes_than_tokens() -> None:
    inputs = left_padded([[3, 4], [5], [6, 7, 8]], pad=0)
    call = inputs | {"max_new_tokens": 24, "eos_token_id": None, "return_dict_in_generate": True, "do_sample": True}
    output = SAMPLERS[0].generate(**call, **LAW_12, seed=1)
    assert torch.equal(output.drafter_forwards, output.verifier_forwards)
    assert (output.drafter_forwards <= output.new_tokens).all()
    assert output.drafter_forwards.sum() < output.new_tokens.sum()
    assert all(min(row) >= 1 for row in output.committed_per_step)


def test_the_scores_of_a_judged_token_are_the_targets() -> None:
    call = left_padded([[3, 4], [5]], pad=0) | {"max_new_tokens": 9, "eos_token_id": None, "pad_token_id": 0}
    call |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, "seed": 4}
    call |= at(0.7)
    judged, alone = SAMPLERS[0].generate(**call, **LAW_12), SAMPLERS[0].generate(**call, strategy=Autoregressive())
    for name in ("scores", "logits"):
        torch.testing.assert_close(judged[name], alone[name], atol=1e-5, rtol=0)
    for row, other in zip(judged.trace, alone.trace, strict=True):
        assert row.target_probs == pytest.approx(other.target_probs, rel=1e-4)
        assert row.verifier_probs == row.target_probs
    assert any(
        row.drafts[step][0] != row.tokens[start] for row in judged.trace for step, start in enumerate(row.starts)
    ), "a first token was replaced"


# ---------------------------------------------------------------- in distribution


def drawn(rows: int = ROWS, temperature: float = 1.0, **knobs: Any) -> Tensor:
    """New tokens of strangers, row i with seed i: `rows n`."""
    sampler = strangers(*SHARP)
    call = at(temperature) | {"max_new_tokens": LENGTH, "seed": list(range(rows))} | knobs
    return sampler.generate(torch.zeros(rows, 1, dtype=torch.int64), **call)[:, 1:]


RULES = [
    {"acceptance": "rejection"},
    {"acceptance": "rejection", "noise": "step"},
    {"correction": True},
    {"correction": True, "noise": "step"},
]


@pytest.mark.parametrize("window_size", [pytest.param(None, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("temperature", [0.7, pytest.param(1.0, marks=pytest.mark.slow)])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_with_r_0_a_judged_first_token_follows_the_verifier(
    rule: dict[str, Any], temperature: float, window_size: int | None
) -> None:
    call = rule | {"mixture_weight": 0.0, "temperature": temperature, "window_size": window_size}
    truth = toy_truth(SHARP[1], temperature)
    assert follows(drawn(**call, first="judge"), truth)
    assert not follows(drawn(**call, first="draft"), truth)


def first_token(model: IdealListModel) -> Tensor:
    """The marginal of the first token, by enumeration."""
    return toy_truth(model).flatten(1).sum(1)


@pytest.mark.parametrize("mixture_weight", thinned([0.3, 0.0, 0.8]))
@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 2.0])
@pytest.mark.parametrize("rule", RULES[::2], ids=str)
def test_a_judged_first_token_follows_the_mixture(
    rule: dict[str, Any], temperature: float, mixture_weight: float
) -> None:
    call = rule | {"mixture_weight": mixture_weight, "temperature": temperature}
    logs = [first_token(model).log() for model in SHARP]
    truth = ((mixture_weight * logs[0] + (1 - mixture_weight) * logs[1]) / temperature).softmax(-1)
    of_drafter = (logs[0] / temperature).softmax(-1)

    def counts(first: str) -> Tensor:
        return torch.bincount(drawn(**call, first=first)[:, 0], minlength=TOKENS)

    assert chance_of_counts(counts("judge"), truth) > FALSE_ALARM
    assert chance_of_counts(counts("judge"), of_drafter) < FALSE_ALARM
    assert chance_of_counts(counts("draft"), of_drafter) > FALSE_ALARM


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_at_r_1_the_target_is_the_draft_and_nothing_is_rejected(rule: dict[str, Any], temperature: float) -> None:
    call = rule | {"mixture_weight": 1.0, "rows": 200, "temperature": temperature}
    assert torch.equal(drawn(**call, first="judge"), drawn(**call, first="draft"))


# ---------------------------------------------------------------- rules that could commit nothing


@dataclasses.dataclass(frozen=True)
class Strict:
    """Rejects the first token of each window, and replaces it or not."""

    gives: bool
    may: bool = True

    def __call__(self, evidence: Evidence) -> Judgement:
        accept = torch.arange(evidence.draft.shape[1]) > 0
        accept = accept.expand_as(evidence.draft)
        replacement = evidence.draft if self.gives else None
        return Judgement(accept, replacement, None if self.may else accept)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize("rule", [Strict(False), Strict(True, may=False)], ids=str)
def test_a_rule_that_rejects_the_first_token_without_another_is_an_error(rule: Strict, compiles: bool) -> None:
    sampler = APDSampler(*tiny_pair())
    with torch.compiler.set_stance("force_eager"):
        if compiles:
            sampler.compile(backend="eager")
        call = left_padded([[3, 4], [5]], pad=0) | {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
        assert sampler.generate(**call, acceptance=rule).shape == (2, 8)
        with pytest.raises(
            ValueError, match=r"`rule` must replace .* got no replacement at step 0 of row 0 from Strict"
        ):
            sampler.generate(**call, acceptance=rule, first="judge")
        with pytest.raises(ValueError, match=r"`rule` must replace"):
            list(sampler.stream(**call, acceptance=rule, first="judge"))


def test_a_rule_that_replaces_the_first_token_commits_one_per_step() -> None:
    sampler = APDSampler(*tiny_pair())
    call = left_padded([[3, 4], [5]], pad=0) | {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None}
    output = sampler.generate(**call, strategy=APD(0.5, Strict(True), "judge"), return_dict_in_generate=True)
    assert output.committed_per_step == [[1] * 6] * 2


@pytest.mark.parametrize("rule", [Coupling(), Coupling(0.2, correction=True), Coupling(0.2)], ids=str)
def test_coupling_that_could_commit_nothing_is_refused(rule: Coupling) -> None:
    with pytest.raises(ValueError, match=r"`rule` must replace every first token .* got Coupling\(.*first='draft'"):
        APD(0.5, rule, first="judge")
    with pytest.raises(ValueError, match="`rule` must replace every first token"):
        APDSampler(*tiny_pair(), acceptance=rule, first="judge")
    assert APD(0.5, Rejection(), first="judge").judges_first
