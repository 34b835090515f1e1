"""The exact models against enumeration by hand, and the published numbers of their tasks."""

import itertools
import math

import pytest
import torch
from states import state_of
from torch import Tensor
from toy import toy

from apd import APDSampler, Drafter, LeftToRight, Verifier
from apd.decoding.state import DecodeState
from apd.decoding.window import AllMasks, window_policy
from apd.models.ideal import IdealListModel

TASKS = {
    "shuffle": IdealListModel.shuffle,
    "replace": IdealListModel.replace_random,
    "insert": IdealListModel.insert_random,
    "remove": IdealListModel.remove_random,
}
MODELS = {name: task(4 if name != "insert" else 3) for name, task in TASKS.items()} | {"toy": toy()}

PROMPT = 2  # columns


def lay_out(model: IdealListModel, new_tokens: Tensor) -> DecodeState:
    """Rows with these new tokens, the mask id where nothing is decided."""
    tokens = torch.cat([torch.zeros(len(new_tokens), PROMPT, dtype=torch.int64), new_tokens], 1)
    return state_of(tokens, tokens != model.mask_token_id, prompt_end=PROMPT)


def marginals(model: IdealListModel, new_tokens: Tensor, window_size: int | None = None) -> Tensor:
    """p_D of the window at the frontier, `b m v`."""
    state = lay_out(model, new_tokens)
    session = model.drafter.open(state)
    return session.logits(state, window_policy(window_size).window(state)).softmax(-1)


def by_hand(model: IdealListModel, known: dict[int, int], position: int) -> list[float]:
    """Total weight of the answers that have the known tokens, by their token at `position`."""
    totals = [0.0] * model.vocab_size
    for answer, weight in zip(model.answers.tolist(), model.weights.tolist(), strict=True):
        if all(answer[i] == token for i, token in known.items()):
            totals[answer[position]] += weight
    return totals


@pytest.mark.parametrize("name", MODELS)
def test_the_drafter_gives_the_marginals_given_whatever_is_decided(name):
    model = MODELS[name]
    contexts = torch.tensor(list(itertools.product(range(model.vocab_size), repeat=model.length)))
    contexts = contexts[(contexts == model.mask_token_id).any(1)]
    probs, frontier = marginals(model, contexts), (contexts == model.mask_token_id).long().argmax(1)
    for row, (context, first) in enumerate(zip(contexts.tolist(), frontier.tolist(), strict=True)):
        known = {i: token for i, token in enumerate(context) if token != model.mask_token_id}
        for position in range(first, model.length):
            totals = by_hand(model, known, position)
            if not sum(totals):
                totals = [1.0] * model.vocab_size  # no answer fits: one token is as good as another
            expected = torch.tensor(totals) / sum(totals)
            torch.testing.assert_close(probs[row, position - first], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_the_verifier_gives_the_conditional_of_every_drafted_token(name):
    model = MODELS[name]
    drafts = torch.tensor(list(itertools.product(range(model.mask_token_id), repeat=model.length)))
    for start in (0, 1, model.length - 1):
        canvas = drafts.clone()
        canvas[:, start:] = model.mask_token_id
        state = lay_out(model, canvas)
        window = AllMasks().window(state)
        totals = model.verifier.open(state).logits(state, window, drafts[:, start:]).exp()
        for row, draft in enumerate(drafts.tolist()):
            for position in range(start, model.length):
                expected = torch.tensor(by_hand(model, dict(enumerate(draft[:position])), position))
                torch.testing.assert_close(totals[row, position - start], expected, rtol=1e-5, atol=0)


def test_ragged_rows_are_each_scored_at_their_own_frontier():
    model = toy()
    mask = model.mask_token_id
    contexts = torch.tensor([[0, 1, mask, mask], [2, mask, mask, mask], [1, 1, 0, mask]])
    together = marginals(model, contexts, window_size=2)
    for row, context in enumerate(contexts):
        alone = marginals(model, context[None], window_size=2)
        assert together[row, : alone.shape[1]].equal(alone[0])


def test_equally_likely_tokens_are_equal_bit_for_bit():
    probs = marginals(IdealListModel.shuffle(7), torch.full((1, 7), 7))[0, :, :7]
    assert (probs == probs[0, 0]).all()


def test_weights_count_as_repeated_answers():
    answers = torch.tensor([[0, 1], [1, 0], [1, 1]])
    weighted = IdealListModel(answers, torch.tensor([1, 2, 3]))
    repeated = IdealListModel(answers[[0, 1, 1, 2, 2, 2]])
    contexts = torch.tensor([[2, 2], [1, 2], [2, 1]])
    assert marginals(weighted, contexts).equal(marginals(repeated, contexts))


# --- The tasks


def test_the_tasks_have_the_answers_of_their_definitions():
    assert IdealListModel.shuffle(3).answers.tolist() == [list(p) for p in itertools.permutations(range(3))]
    assert IdealListModel.replace_random(3).answers.tolist() == [[3, 1, 2], [0, 3, 2], [0, 1, 3]]
    assert IdealListModel.insert_random(2).answers.tolist() == [[2, 0, 1], [0, 2, 1], [0, 1, 2]]
    assert IdealListModel.remove_random(3).answers.tolist() == [[1, 2], [0, 2], [0, 1]]


def total_correlation(model: IdealListModel) -> float:
    """C in bits: what one parallel step loses at least, Σ H(y_i) − H(y)."""
    probs = marginals(model, torch.full((1, model.length), model.mask_token_id))[0].double()
    joint = model.weights / model.weights.sum()
    return float(-probs.xlogy(probs).sum() + joint.xlogy(joint).sum()) / math.log(2)


def one_step_accuracy(model: IdealListModel) -> float:
    """Chance that independent draws from the marginals are an answer."""
    probs = marginals(model, torch.full((1, model.length), model.mask_token_id))[0].double()
    return float(probs.log()[torch.arange(model.length), model.answers].sum(1).exp().sum())


# C in bits and accuracy of one step at temperature 1: PARALLELBENCH §1.4.
PUBLISHED = {
    "replace": {3: (1.170, 0.444), 4: (1.245, 0.422), 5: (1.288, 0.410), 6: (1.315, 0.402), 10: (1.368, 0.387)},
    "shuffle": {3: (2.170, 0.222), 4: (3.415, 0.0938), 5: (4.703, 0.0384), 6: (6.018, 0.0154)},
    "insert": {3: (2.623, 0.188), 4: (3.386, 0.123), 5: (4.137, 0.0823), 6: (4.880, 0.0560), 10: (7.817, 0.0130)},
    "remove": {3: (0.252, 0.889), 4: (0.623, 0.750), 5: (1.064, 0.614), 6: (1.552, 0.494), 10: (3.764, 0.186)},
}


def entropy(*probs: float) -> float:
    return -sum(p * math.log2(p) for p in probs if p)


CLOSED_FORMS = {
    "replace": lambda n: (n - 1) * (math.log2(n) - math.log2(n - 1)),
    "shuffle": lambda n: n * math.log2(n) - math.log2(math.factorial(n)),
    "insert": lambda n: (
        sum(entropy(1 / (n + 1), (n + 1 - i) / (n + 1), (i - 1) / (n + 1)) for i in range(1, n + 2)) - math.log2(n + 1)
    ),
    "remove": lambda n: sum(entropy(i / n, 1 - i / n) for i in range(1, n)) - math.log2(n),
}


@pytest.mark.parametrize(("task", "n"), [(task, n) for task, rows in PUBLISHED.items() for n in rows])
def test_total_correlation_and_one_step_accuracy_are_the_published_ones(task, n):
    model = TASKS[task](n)
    correlation, accuracy = PUBLISHED[task][n]
    assert total_correlation(model) == pytest.approx(CLOSED_FORMS[task](n), abs=1e-5)
    assert total_correlation(model) == pytest.approx(correlation, abs=6e-4)
    assert one_step_accuracy(model) == pytest.approx(accuracy, rel=6e-3)


@pytest.mark.parametrize("name", MODELS)
def test_total_correlation_bounds_the_accuracy_of_one_step(name):
    assert one_step_accuracy(MODELS[name]) >= 2 ** -total_correlation(MODELS[name]) - 1e-6


def test_only_the_answers_are_valid():
    for model in MODELS.values():
        everything = torch.tensor(list(itertools.product(range(model.vocab_size), repeat=model.length)))
        answers = {tuple(answer) for answer in model.answers.tolist()}
        expected = [tuple(row) in answers for row in everything.tolist()]
        assert model.is_valid(everything).tolist() == expected
    assert IdealListModel.remove_random(3).is_valid(torch.tensor([[1, 2], [-1, 3], [5, 1], [1, 99]])).tolist() == [
        True,
        False,
        False,
        False,
    ]


# --- Where it meets the sampler


def test_both_sides_fulfil_the_protocols():
    model = IdealListModel.shuffle(3)
    assert isinstance(model.drafter, Drafter) and isinstance(model.verifier, Verifier)
    assert model.drafter.vocab_size == model.verifier.vocab_size == 4 and model.drafter.mask_token_id == 3


def test_the_prompt_and_the_cache_window_do_not_matter():
    model = toy()
    sampler = APDSampler(model.drafter, model.verifier, mixture_weight=0.5)
    arguments = {"max_new_tokens": 4, "do_sample": True, "top_k": 0}
    seeds = torch.arange(200).tolist()
    plain = sampler.generate(torch.zeros(200, 1, dtype=torch.int64), seed=seeds, **arguments)[:, 1:]
    assert sampler.generate(torch.ones(200, 1, dtype=torch.int64), seed=seeds, kv_window=1, **arguments)[:, 1:].equal(
        plain
    )


def test_a_wrong_prefix_does_not_end_decoding():
    """Parallel draws can commit what no answer has; the row is lost, but its batch mates are not."""
    model = IdealListModel.shuffle(4)
    sampler = APDSampler(model.drafter)
    prompt = torch.zeros(500, 1, dtype=torch.int64)
    sequences = sampler.generate(prompt, max_new_tokens=4, do_sample=True, seed=0, strategy=LeftToRight(2))
    assert 0 < model.is_valid(sequences[:, 1:]).sum() < 500
    assert (sequences < model.mask_token_id).all()


def test_thousands_of_contexts_are_computed_in_parts(monkeypatch):
    model = toy()
    contexts = torch.tensor(list(itertools.product(range(4), repeat=4)))[:, None]
    position = torch.arange(4).expand(len(contexts), 4)
    whole = model.logits(contexts, position)
    monkeypatch.setattr("apd.models.ideal._MOST_ENTRIES", 1)
    torch.testing.assert_close(model.logits(contexts, position), whole)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: IdealListModel(torch.tensor([0, 1])), r"`answers` must be ids of shape \[answers, length\].*\[2\]"),
        (lambda: IdealListModel(torch.zeros(0, 3).long()), r"`answers` must be .* at least one .*\[0, 3\]"),
        (lambda: IdealListModel(torch.ones(2, 2)), r"`answers` must be ids .*torch\.float32"),
        (lambda: IdealListModel(torch.tensor([[0, -1]])), r"`answers` must be .* none negative"),
        (lambda: IdealListModel.replace_random(16), r"`answers` must be few and short .* below 2\^63"),
        (
            lambda: IdealListModel(torch.tensor([[0], [1]]), torch.ones(3)),
            r"`weights` must hold .* 2, got shape \[3\]",
        ),
        (
            lambda: IdealListModel(torch.tensor([[0], [1]]), [1, 0]),
            r"`weights` must be positive .* got 0 to 1\. Leave",
        ),
        (lambda: IdealListModel(torch.tensor([[0], [1]]), [1, torch.nan]), r"`weights` must be positive and finite"),
        (lambda: IdealListModel.shuffle(0), r"`n` must be at least 1, got 0"),
        (lambda: IdealListModel.remove_random(1), r"`n` must be at least 2, got 1"),
        (lambda: IdealListModel.shuffle(9), r"`n` must be at most 8, got 9: all 362880 orders"),
        (lambda: toy().is_valid(torch.zeros(5, 3).long()), r"`tokens` must have the shape \[rows, 4\].*\[5, 3\]"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("max_new_tokens", [2, 4])
def test_another_length_is_refused(max_new_tokens):
    model = IdealListModel.shuffle(3)
    arguments = {"inputs": torch.zeros(1, 1, dtype=torch.int64), "max_new_tokens": max_new_tokens}
    message = f"`max_new_tokens` must be 3, the length of every answer, got {max_new_tokens}"
    with pytest.raises(ValueError, match=message):
        APDSampler(model.drafter, mixture_weight=1).generate(**arguments)
    with pytest.raises(ValueError, match=message):
        model.verifier.open(lay_out(model, torch.full((1, max_new_tokens), model.mask_token_id)))
