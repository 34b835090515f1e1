"""The laws of the design that need exact probabilities, under their numbers.

Frequencies are compared with closed forms. Seeds are fixed, so nothing here is flaky; what is stated is the chance that
a correct sampler fails for a seed taken at random: at most `FALSE_ALARM` for each comparison. Each kind of test is also
shown to fail for a sampler that is known to be wrong.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from thinned import thinned
from torch import Tensor
from toy import LENGTH, TOKENS, tiny_pair, toy

from apd import APDSampler, Confidence, LeftToRight
from apd.decoding.acceptance import Evidence, Judgement, Rejection
from apd.decoding.noise import ACCEPT, DRAFT, RESIDUAL, Noise
from apd.decoding.sampling import Sampling
from apd.decoding.step import APD
from apd.decoding.window import Window, window_policy
from apd.models.ideal import IdealListModel

FALSE_ALARM = 1e-6
ROWS = 20_000
TEMPERATURES = [0.0, 1.0, 2.0, 0.5]  # where they are thinned, 0 and 2 are tried by default

shuffle, replace_random = IdealListModel.shuffle, IdealListModel.replace_random
insert_random, remove_random = IdealListModel.insert_random, IdealListModel.remove_random


# --- Sampling and comparing


def at(temperature: float) -> dict:
    """Arguments of `generate` for untruncated sampling, or greedy decoding at 0."""
    return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}


def draw(model: IdealListModel, rows: int = ROWS, temperature: float = 1.0, verifier=True, **kwargs) -> Tensor:
    """New tokens of many rows, row i with seed i: `rows n`."""
    sampler = APDSampler(model.drafter, model.verifier if verifier else None)
    prompt = torch.zeros(rows, 1, dtype=torch.int64)
    kwargs = at(temperature) | {"max_new_tokens": model.length, "seed": list(range(rows))} | kwargs
    return sampler.generate(prompt, **kwargs)[:, 1:]


def tokens_per_step(model: IdealListModel, rows: int = 2000, **kwargs) -> float:
    sampler = APDSampler(model.drafter, model.verifier)
    prompt = torch.zeros(rows, 1, dtype=torch.int64)
    kwargs = at(1.0) | {"max_new_tokens": model.length, "seed": list(range(rows))} | kwargs
    output = sampler.generate(prompt, return_dict_in_generate=True, **kwargs)
    return float(output.new_tokens.sum() / output.drafter_forwards.sum())


def chance_of_counts(counts: Tensor, probs: Tensor) -> float:
    """p-value of Pearson's chi-square; the rarest outcomes are pooled until 20 of them are expected."""
    assert counts.shape == probs.shape
    total = counts.sum()
    if counts[probs == 0].any():
        return 0.0
    order = probs.argsort()
    expected, counts = probs[order].double() * total, counts[order].double()
    pooled = int((expected.cumsum(0) < 20).sum()) + 1
    expected = torch.cat([expected[:pooled].sum(0, keepdim=True), expected[pooled:]])
    counts = torch.cat([counts[:pooled].sum(0, keepdim=True), counts[pooled:]])
    statistic = ((counts - expected).square() / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def chance_of_share(hits: Tensor, prob: float) -> float:
    """Chernoff's bound on the chance of a share of True at least this far from `prob`."""
    share, total = float(hits.double().mean()), len(hits)
    divergence = sum(a * math.log(a / b) for a, b in ((share, prob), (1 - share, 1 - prob)) if a > 0)
    return 2 * math.exp(-total * divergence)


def follows(tokens: Tensor, probs: Tensor) -> bool:
    """Whether rows of toy tokens follow `probs`, a tensor with one dimension per position."""
    code = (tokens * TOKENS ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
    return chance_of_counts(torch.bincount(code, minlength=TOKENS**LENGTH), probs.flatten()) > FALSE_ALARM


def toy_truth(model: IdealListModel, temperature: float = 1.0) -> Tensor:
    """What sequential sampling gives: the product of the tempered conditionals, a dimension per position."""
    weights = model.weights.view((TOKENS,) * LENGTH)
    truth = torch.ones_like(weights)
    for position in range(LENGTH):
        prefix = weights.reshape((TOKENS,) * (position + 1) + (-1,)).sum(-1)  # weight of every prefix up to here
        conditional = (prefix.log() / temperature).softmax(-1)
        truth = truth * conditional.reshape(conditional.shape + (1,) * (LENGTH - 1 - position))
    return truth


def test_the_tempered_truth_is_the_model_itself_at_temperature_one():
    model = toy()
    torch.testing.assert_close(toy_truth(model).flatten(), model.weights / model.weights.sum())


# --- Law 6: a perfect verifier changes nothing


class AskTheDrafter:
    """A verifier that is the drafter's sequential conditional: at every position, one forward on the canvas that
    sequential decoding would have there."""

    max_length = None

    def __init__(self, drafter, window_size: int | None) -> None:
        self.drafter, self.window_size = drafter, window_size
        self.vocab_size = drafter.vocab_size

    def open(self, state):
        return self

    def select(self, rows: Tensor) -> None:
        pass

    def logits(self, state, window: Window, draft: Tensor) -> Tensor:
        canvas = window.write(draft, window.inside, state.tokens)
        logits = torch.zeros(*draft.shape, self.vocab_size)
        for j in range(draft.shape[1]):
            decided = torch.arange(state.width) < window.columns[:, j, None]
            tokens = canvas.where(decided, self.drafter.mask_token_id)
            rows = window.inside[:, j].nonzero().squeeze(1)
            frontier = window.columns[:, j]
            there = dataclasses.replace(state, tokens=tokens, decided=decided, frontier=frontier).select(rows)
            session = self.drafter.open(there)
            logits[rows, j] = session.logits(there, window_policy(self.window_size).window(there))[:, 0]
        return logits


EXACT_MODELS = {
    "toy": toy(),
    "shuffle": shuffle(5),
    "replace": replace_random(6),
    "insert": insert_random(5),
    "remove": remove_random(6),
}


@pytest.mark.parametrize("temperature", thinned(TEMPERATURES, 2))
@pytest.mark.parametrize("name", EXACT_MODELS)
def test_law_6_a_perfect_verifier_changes_no_token_of_an_exact_model(name, temperature):
    """Every pair of model, temperature and window occurs."""
    place = [*EXACT_MODELS].index(name) + TEMPERATURES.index(temperature)
    model, window_size = EXACT_MODELS[name], [1, 2, 3, None][place % 4]
    arguments = {"rows": 1000, "temperature": temperature, "window_size": window_size}
    sequential = draw(model, strategy=LeftToRight(1), **arguments)
    for correction in (False, True):
        assert draw(model, mixture_weight=0, correction=correction, **arguments).equal(sequential)


def test_law_6_holds_under_truncation():
    for truncation in ({"top_k": 2}, {"top_p": 0.8}, {"min_p": 0.3}):
        sequential = draw(toy(), rows=2000, strategy=LeftToRight(1), **truncation)
        assert draw(toy(), rows=2000, mixture_weight=0, **truncation).equal(sequential)


def test_law_6_holds_at_every_threshold():
    sequential = draw(toy(), rows=2000, strategy=LeftToRight(1))
    for acceptance_threshold in (0.3, 0.6, 1.0):
        knobs = {"mixture_weight": 0, "acceptance_threshold": acceptance_threshold, "correction": True}
        assert draw(toy(), rows=2000, **knobs).equal(sequential)


def test_law_6_fails_when_noise_is_redrawn():
    sequential = draw(toy(), rows=2000, strategy=LeftToRight(1))
    assert not draw(toy(), rows=2000, mixture_weight=0, noise="step").equal(sequential)


NEURAL = list(itertools.product([0.0, 0.7, 1.0, 2.0], [1, 2, 3, 4, None]))


@pytest.mark.parametrize(
    ("temperature", "window_size"),  # by default a third of the pairs: every temperature, every window
    [pytest.param(*each, marks=() if i % 3 == 0 else pytest.mark.slow) for i, each in enumerate(NEURAL)],
)
def test_law_6_a_perfect_verifier_changes_no_token_of_a_neural_drafter(temperature, window_size):
    model_seed = ((window_size or 5) + int(temperature)) % 2
    drafter, _ = tiny_pair(model_seed)
    sampler = APDSampler(drafter, AskTheDrafter(drafter, window_size), mixture_weight=0, window_size=window_size)
    prompt = torch.randint(drafter.mask_token_id, (12, 5), generator=torch.Generator().manual_seed(model_seed))
    ragged = torch.arange(5) >= torch.arange(12)[:, None] % 4
    arguments = at(temperature) | {"attention_mask": ragged, "max_new_tokens": 9, "return_dict_in_generate": True}
    sequential = sampler.generate(prompt, strategy=LeftToRight(1), seed=0, **arguments)
    assert (sequential.drafter_forwards == 9).all()
    for correction in (False, True):
        parallel = sampler.generate(prompt, correction=correction, seed=0, **arguments)
        assert parallel.sequences.equal(sequential.sequences)
        assert window_size == 1 or parallel.drafter_forwards.sum() < sequential.drafter_forwards.sum()


def test_law_6_fails_when_the_canvas_is_not_the_sequential_one():
    drafter, _ = tiny_pair()
    sampler = APDSampler(drafter, AskTheDrafter(drafter, 2), mixture_weight=0)
    prompt = torch.randint(drafter.mask_token_id, (12, 5), generator=torch.Generator().manual_seed(0))
    arguments = at(1.0) | {"max_new_tokens": 9, "seed": 0}
    assert not sampler.generate(prompt, **arguments).equal(
        sampler.generate(prompt, strategy=LeftToRight(1), **arguments)
    )


@pytest.mark.parametrize(("temperature", "window_size"), thinned([(0.5, 2), (2.0, 2), (1.0, None)], 2, several=True))
@pytest.mark.parametrize(
    "knobs",
    [{"acceptance": "rejection"}, {"acceptance": "rejection", "noise": "step"}, {}, {"correction": True}],
    ids=["rejection", "rejection-step", "coupling", "correction"],
)
def test_law_6_a_perfect_verifier_gives_the_sequential_distribution(knobs, temperature, window_size):
    tokens = draw(toy(), temperature=temperature, window_size=window_size, mixture_weight=0, **knobs)
    assert follows(tokens, toy_truth(toy(), temperature))


@pytest.mark.parametrize("knobs", [{"acceptance": "rejection"}, {}, {"correction": True}])
def test_law_6_greedy_rules_agree_with_sequential_decoding(knobs):
    sequential = draw(toy(), rows=1, temperature=0, strategy=LeftToRight(1))
    assert draw(toy(), rows=1, temperature=0, mixture_weight=0, **knobs).equal(sequential)


def test_law_6_redrawn_noise_is_found_biased():
    """A rejected position is redrawn given that it disagreed. A token that always replaces it takes the bias away."""
    truth = toy_truth(toy())
    assert not follows(draw(toy(), mixture_weight=0, noise="step"), truth)
    assert follows(draw(toy(), mixture_weight=0, noise="step", correction=True), truth)


@dataclasses.dataclass(frozen=True)
class NoResidual(Rejection):
    """Known wrong: nothing is committed at the first rejection, so the rejected token is drawn again."""

    def __call__(self, evidence: Evidence) -> Judgement:
        return Judgement(super().__call__(evidence).accept)


class OneGumbelStream(Sampling):
    def noise(self, state, window: Window, stream: int = DRAFT) -> Noise:
        return super().noise(state, window, DRAFT if stream == RESIDUAL else stream)


class OneUniformStream(Sampling):
    def noise(self, state, window: Window, stream: int = DRAFT) -> Noise:
        return super().noise(state, window, DRAFT if stream == ACCEPT else stream)


@dataclasses.dataclass(frozen=True)
class NoiseAgain(Rejection):
    """Known wrong: the residual, or the decision to accept, is drawn with the noise of the draft."""

    streams: type[Sampling]

    def __call__(self, evidence: Evidence) -> Judgement:
        return super().__call__(dataclasses.replace(evidence, sampling=self.streams(**vars(evidence.sampling))))


def test_law_6_the_rejection_rule_is_unbiased_at_the_resolution_that_finds_broken_ones():
    assert follows(draw(toy(), 200_000, strategy=APD(0.0, Rejection())), toy_truth(toy()))


@pytest.mark.parametrize(
    ("rule", "rows"),
    [(NoResidual(), ROWS), (NoiseAgain(OneGumbelStream), 200_000), (NoiseAgain(OneUniformStream), ROWS)],
    ids=str,
)
def test_law_6_broken_rejection_rules_are_found_biased(rule, rows):
    """The draft's noise in the residual is the hardest to see: total variation .011."""
    assert not follows(draw(toy(), rows, strategy=APD(0.0, rule)), toy_truth(toy()))


# --- Law 7: temperature is applied once


LAW_7_ROWS = 3000


@pytest.mark.parametrize("temperature", [0.5, pytest.param(1.0, marks=pytest.mark.slow), 2.0])
@pytest.mark.parametrize(
    "knobs",
    thinned(
        [
            {"strategy": LeftToRight(3)},
            {"strategy": LeftToRight(1)},
            {"mixture_weight": 0.5},
            {"mixture_weight": 1},
            {"mixture_weight": 0.5, "correction": True},
            {"mixture_weight": 0.5, "noise": "step"},
            {"mixture_weight": 0.5, "acceptance": "rejection"},
        ],
        2,
    ),
    ids=str,
)
def test_law_7_temperature_is_applied_once(knobs, temperature):
    drafter, verifier = tiny_pair()
    prompt = torch.tensor([[3, 14, 15, 9]])
    masks = torch.full((1, 3), drafter.mask_token_id)
    logits = drafter.model(torch.cat([prompt, masks], 1)).logits[0, prompt.shape[1] - drafter.logit_shift]
    logits[drafter.mask_token_id] = -torch.inf

    arguments = at(temperature) | {"max_new_tokens": masks.shape[1], "seed": list(range(LAW_7_ROWS))}
    sequences = APDSampler(drafter, verifier).generate(prompt.repeat(LAW_7_ROWS, 1), **arguments, **knobs)
    counts = torch.bincount(sequences[:, prompt.shape[1]], minlength=drafter.vocab_size)
    assert chance_of_counts(counts, (logits / temperature).softmax(-1)) > FALSE_ALARM
    for wrong in {temperature**2, 1.0} - {temperature}:  # applied twice, or not at all
        assert chance_of_counts(counts, (logits / wrong).softmax(-1)) < FALSE_ALARM


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("knobs", [{}, {"correction": True}, {"acceptance": "rejection"}], ids=str)
def test_law_7_temperature_is_applied_once_at_every_position(knobs, temperature):
    tokens = draw(toy(), temperature=temperature, mixture_weight=0, **knobs)
    assert follows(tokens, toy_truth(toy(), temperature))
    assert not follows(tokens, toy_truth(toy(), temperature**2))
    assert not follows(tokens, toy_truth(toy(), 1.0))


# --- Law 9: Shuffle


def shuffle_accuracy(n: int, k: int) -> float:
    """k tokens per step: each step must draw different items of those left (PARALLELBENCH §1.3); the rest goes last."""
    steps = [(left, min(k, left)) for left in range(n, 0, -k)]
    return math.prod(math.perm(left, size) / left**size for left, size in steps)


RULES = [{}, {"correction": True}, {"acceptance": "rejection"}, {"noise": "step"}, {"acceptance_threshold": 0.4}]


@pytest.mark.parametrize("knobs", RULES, ids=str)
@pytest.mark.parametrize("temperature", thinned(TEMPERATURES, 2))
def test_law_9_the_verifier_alone_is_always_valid(knobs, temperature):
    model = shuffle(5)
    for window_size in (1, 3, 5, None):
        tokens = draw(model, 500, temperature, mixture_weight=0, window_size=window_size, **knobs)
        assert model.is_valid(tokens).all()


def test_law_9_every_order_is_drawn_equally_often():
    model = shuffle(4)
    for knobs in RULES[:3]:
        tokens = draw(model, mixture_weight=0, **knobs)
        orders = (tokens[:, None] == model.answers).all(-1).sum(0)
        assert chance_of_counts(orders, torch.full((24,), 1 / 24)) > FALSE_ALARM


@pytest.mark.parametrize("window_size", [4, 7, None])
def test_law_9_the_drafter_alone_draws_independently(window_size):
    model = shuffle(4)
    tokens = draw(model, verifier=False, mixture_weight=1, window_size=window_size)
    valid = model.is_valid(tokens)
    assert chance_of_share(valid, math.factorial(4) / 4**4) > FALSE_ALARM
    assert chance_of_share(valid, shuffle_accuracy(4, 2)) < FALSE_ALARM
    assert draw(model, strategy=LeftToRight(4)).equal(tokens)


@pytest.mark.parametrize(("n", "window_size"), thinned([(4, 1), (4, 2), (5, 2), (6, 2), (6, 3)], 2, several=True))
def test_law_9_smaller_windows_follow_the_closed_form(n, window_size):
    model = shuffle(n)
    tokens = draw(model, verifier=False, mixture_weight=1, window_size=window_size)
    assert chance_of_share(model.is_valid(tokens), shuffle_accuracy(n, window_size)) > FALSE_ALARM
    assert draw(model, strategy=LeftToRight(window_size)).equal(tokens)


def test_law_9_any_weight_on_the_verifier_keeps_every_row_valid():
    """What one model forbids, the mixture forbids."""
    model = shuffle(5)
    for knobs in RULES:
        assert model.is_valid(draw(model, 2000, mixture_weight=0.9, **knobs)).all()


# --- Strategies on list tasks, PARALLELBENCH §1.3 and §1.4

ALMOST_GREEDY = 0.01  # decides as greedy decoding does, but breaks exact ties by noise, as noisy logits would


def replace_accuracy(n: int, k: int) -> float:
    """k tokens per step from the left, temperature 1: no step before brings the new item, and one step brings one."""
    total, nothing_yet = 0.0, 1.0
    for left in range(n, 0, -k):
        size = min(k, left)
        total += nothing_yet * size / left * (1 - 1 / left) ** (size - 1)
        nothing_yet *= (1 - 1 / left) ** size
    return total


@pytest.mark.parametrize(
    ("n", "k"), thinned([(4, 1), (4, 3), (4, 4), (5, 2), (6, 3), (6, 2), (6, 4)], 2, several=True)
)
def test_k_from_the_left_follow_the_closed_form(n, k):
    for model, accuracy in ((shuffle(n), shuffle_accuracy(n, k)), (replace_random(n), replace_accuracy(n, k))):
        valid = model.is_valid(draw(model, strategy=LeftToRight(k)))
        if k == 1:
            assert valid.all()
        else:
            assert chance_of_share(valid, accuracy) > FALSE_ALARM


def test_the_closed_forms_are_the_published_ones():
    published = {(6, 2): 0.7335, (6, 3): 0.604, (6, 6): 0.402, (10, 2): 0.812, (10, 5): 0.570, (10, 10): 0.387}
    for (n, k), accuracy in published.items():
        assert replace_accuracy(n, k) == pytest.approx(accuracy, abs=6e-4)
    assert shuffle_accuracy(6, 2) == pytest.approx(5 * 3 / (6 * 4 * 2) * 1)
    assert shuffle_accuracy(6, 6) == pytest.approx(math.factorial(6) / 6**6)


def greedy(model: IdealListModel, strategy) -> list[int]:
    return draw(model, rows=1, temperature=0, strategy=strategy)[0].tolist()


def test_greedy_decoding_breaks_exact_ties_by_the_lowest_id():
    """The closed forms of greedy decoding are about noisy logits. Exact ties are broken the same way at every position."""
    # Shuffle: every item left is equally likely, so one step puts the same item everywhere.
    assert greedy(shuffle(4), LeftToRight(1)) == [0, 1, 2, 3]
    assert greedy(shuffle(4), LeftToRight(4)) == [0, 0, 0, 0]
    assert greedy(shuffle(4), LeftToRight(2))[:2] == [0, 0]
    # Replace Random: "keep" wins until two are left, ties there, and has the lower id. Alone, the last one is replaced.
    assert greedy(replace_random(4), LeftToRight(1)) == [0, 1, 2, 4]
    assert greedy(replace_random(4), LeftToRight(2)) == [0, 1, 2, 3]
    assert greedy(replace_random(6), LeftToRight(3)) == [0, 1, 2, 3, 4, 5]
    assert greedy(replace_random(5), LeftToRight(2)) == [0, 1, 2, 3, 5]  # the last step has one token
    # Remove Random is right at once, Insert Random never: the new item does not win anywhere.
    assert greedy(remove_random(6), LeftToRight(5)) == [0, 1, 2, 4, 5]
    assert 4 not in greedy(insert_random(4), LeftToRight(5))


@pytest.mark.parametrize("strategy", [LeftToRight, Confidence])
@pytest.mark.parametrize("n", thinned([4, 6], 2))
def test_greedy_decoding_with_ties_broken_at_random_follows_the_closed_form(strategy, n):
    for k in (1, 2, n):
        replaced = replace_random(n).is_valid(draw(replace_random(n), 8000, ALMOST_GREEDY, strategy=strategy(k)))
        shuffled = shuffle(n).is_valid(draw(shuffle(n), 8000, ALMOST_GREEDY, strategy=strategy(k)))
        if k == 1:
            assert replaced.all() and shuffled.all()
            continue
        assert chance_of_share(shuffled, shuffle_accuracy(n, k)) > FALSE_ALARM
        if k == 2:
            assert chance_of_share(replaced, 0.5) > FALSE_ALARM
        else:
            assert not replaced.any()


@pytest.mark.parametrize("noise", ["keyed", "step"])
@pytest.mark.parametrize("k", thinned([2, 1, 3]))
def test_confidence_on_shuffle_follows_the_closed_form(k, noise):
    """All drafts are equally sure, so which are taken has nothing to do with what they are."""
    model = shuffle(6)
    valid = model.is_valid(draw(model, strategy=Confidence(k), noise=noise))
    assert valid.all() if k == 1 else chance_of_share(valid, shuffle_accuracy(6, k)) > FALSE_ALARM


def confidence_on_replace(left: int) -> float:
    """Two most confident of `left` at a time, noise redrawn: with two "keep" among the drafts nothing is brought in."""
    if left == 2:
        return 0.5
    one_keeps = left * (1 / left) ** (left - 1) * (1 - 1 / left)
    none_keeps = (1 / left) ** left
    return (1 - one_keeps - none_keeps) * confidence_on_replace(left - 2) + one_keeps


@pytest.mark.parametrize("n", [4, 6])
def test_confidence_on_replace_random_postpones_the_new_item(n):
    """About 0.5 rather than the 0.73 or more of the left-to-right order: "replace" is never the most confident draft."""
    valid = replace_random(n).is_valid(draw(replace_random(n), strategy=Confidence(2), noise="step"))
    assert chance_of_share(valid, confidence_on_replace(n)) > FALSE_ALARM
    assert chance_of_share(valid, replace_accuracy(n, 2)) < FALSE_ALARM


def test_confidence_with_keyed_noise_remembers_why_a_draft_was_postponed():
    """Keyed noise makes a position "replace" at 4 masks if u < 1/4, at 2 masks if the same u < 1/2.

    Four positions, two at a time, by the number of u < 1/4. None: both that wait have u > 1/4, one is < 1/2 with
    chance 4/9. One: it waits, and the other must be > 1/2, 2/3. Two: both wait, both replace, 0. Three: one of them is
    taken, 1. Four: 0.
    """
    accuracy = (81 * 4 / 9 + 108 * 2 / 3 + 12) / 256
    valid = replace_random(4).is_valid(draw(replace_random(4), strategy=Confidence(2)))
    assert chance_of_share(valid, accuracy) > FALSE_ALARM
    assert chance_of_share(valid, confidence_on_replace(4)) < FALSE_ALARM


# --- What the toy shows


def test_keyed_noise_is_unbiased_and_redrawn_noise_is_not():
    """Total variation to the truth. Its floor, what as many draws of the truth have, is
    taken from sequential decoding."""
    truth = toy_truth(toy()).flatten()

    def variation(**knobs) -> float:
        code = (draw(toy(), 60_000, **knobs) * TOKENS ** torch.arange(LENGTH - 1, -1, -1)).sum(1)
        return float((torch.bincount(code, minlength=len(truth)) / len(code) - truth).abs().sum() / 2)

    floor = variation(strategy=LeftToRight(1))
    assert variation(mixture_weight=0) == floor  # token for token
    assert variation(mixture_weight=0, correction=True) == floor
    assert variation(mixture_weight=0, acceptance="rejection") < 1.5 * floor
    assert variation(mixture_weight=0, noise="step") > 5 * floor


@pytest.mark.parametrize("mixture_weight", [0, 0.5])
def test_correction_raises_tokens_per_step(mixture_weight):
    plain = tokens_per_step(toy(), mixture_weight=mixture_weight)
    corrected = tokens_per_step(toy(), mixture_weight=mixture_weight, correction=True)
    assert 1 < plain < corrected - 0.3
    assert tokens_per_step(toy(), strategy=LeftToRight(1)) == 1


def test_more_trust_in_the_drafter_raises_tokens_per_step():
    rates = [tokens_per_step(toy(), mixture_weight=weight) for weight in (0, 0.25, 0.5, 0.75, 1)]
    assert rates == sorted(rates) and rates[-1] == LENGTH
