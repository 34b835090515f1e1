"""What a user's strategy, rule, model or processor returns is checked where it arrives, and the culprit is named."""

import dataclasses
from typing import Any

import pytest
import torch
from toy import toy
from transformers import LogitsProcessor, TemperatureLogitsWarper

from apd import WINO, APDSampler, Autoregressive, Blocks, Checked, Judgement, WindowPolicy
from apd.decoding.acceptance import Coupling
from apd.decoding.commit import Proposal
from apd.decoding.step import APD
from apd.decoding.strategy import Memoryless
from apd.integrations.scoring import sequential_logprobs
from apd.strategies import Unmasking
from apd.strategies.proposers import Stateless

ROWS, WIDTH = 2, 4
PROMPT = torch.zeros(ROWS, 1, dtype=torch.int64)


def decode(strategy: Any = None, *, drafter: Any = None, verifier: Any = None, **kwargs: Any) -> torch.Tensor:
    model = toy()
    sampler = APDSampler(drafter or model.drafter, verifier or model.verifier, mixture_weight=0.5)
    return sampler.generate(PROMPT, max_new_tokens=WIDTH, strategy=strategy, **kwargs)


# --- strategies


class Mine(Unmasking):
    """Chooses every candidate by default."""

    def __init__(self, choose: Any = None, measure: Any = None) -> None:
        self.own_choose, self.own_measure = choose or (lambda candidate: candidate), measure

    def measure(self, draft, window):
        confidence = draft.logprobs.amax(-1)
        return confidence if self.own_measure is None else self.own_measure(confidence)

    def choose(self, measure, candidate, state, window, sampling):
        return self.own_choose(candidate)


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda candidate: candidate[:, :1], ValueError, r"shape \[2, 4\], got \[2, 1\]"),
        (lambda candidate: candidate[0], ValueError, r"shape \[2, 4\], got \[4\]"),
        (lambda candidate: torch.cat([candidate, candidate], 1), ValueError, r"shape \[2, 4\], got \[2, 8\]"),
        (lambda candidate: candidate.float(), TypeError, r"bool, got torch.float32"),
        (lambda candidate: candidate.long(), TypeError, r"bool, got torch.int64"),
        (lambda candidate: candidate.tolist(), TypeError, r"bool, got list"),
        (lambda candidate: None, TypeError, r"bool, got NoneType"),
    ],
)
@pytest.mark.parametrize("wrap", [lambda strategy: strategy, lambda strategy: Blocks(strategy, 4)], ids=["", "blocks"])
def test_a_choice_is_checked(returned, error, message, wrap) -> None:
    with pytest.raises(error, match=rf"`Mine\.choose` must return a tensor of {message}"):
        decode(wrap(Mine(returned)))


@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (lambda best: best[:, :1], ValueError),
        (lambda best: best.sum(), ValueError),
        (lambda best: best > 0, TypeError),
        (lambda best: None, TypeError),
    ],
)
def test_a_measure_is_checked(returned, error) -> None:
    with pytest.raises(error, match=r"`Mine\.measure` must return a tensor of"):
        decode(Mine(measure=returned))


def test_a_measure_that_is_not_a_number_is_named() -> None:
    """Every comparison with NaN is False: the strategy was told that it commits nothing."""
    with pytest.raises(ValueError, match=r"`Mine\.measure` must return numbers, got NaN"):
        decode(Mine(lambda candidate: candidate, lambda best: best.log().sqrt()))


def test_a_strategy_without_choose_hears_what_is_missing() -> None:
    class Idle(Unmasking):
        pass

    with pytest.raises(NotImplementedError, match=r"`Idle` must have the method `choose\(measure, candidate, state,"):
        decode(Idle())


class Changing(Memoryless):
    """A proposal with something else in it, or none."""

    needs_verifier = left_to_right = True

    def __init__(self, **changes: Any) -> None:
        self.changes = changes

    def propose(self, state, window, models, sampling):
        proposal = APD(0.5, Coupling()).propose(state, window, models, sampling)
        changed = {name: change(getattr(proposal, name)) for name, change in self.changes.items()}
        return dataclasses.replace(proposal, **changed) if changed else None


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("tokens", lambda tokens: tokens[:, :1], ValueError),
        ("tokens", lambda tokens: tokens.float(), TypeError),
        ("chosen", lambda chosen: chosen[:, :1], ValueError),
        ("chosen", lambda chosen: chosen.float(), TypeError),
        ("decisive", lambda decisive: decisive[0], ValueError),
        ("draft", lambda draft: draft[:1], ValueError),
        ("fault", lambda fault: fault[:, :1], ValueError),
    ],
)
def test_a_proposals_fields_are_checked(name, change, error) -> None:
    with pytest.raises(error, match=rf"`Changing\.propose\(\)\.{name}` must return a tensor of"):
        decode(Changing(**{name: change}))


def test_other_objects_than_a_proposal_or_session_are_refused() -> None:
    with pytest.raises(TypeError, match=r"`Changing\.propose` must return a `Proposal`, got NoneType"):
        decode(Changing())

    class Closed(Mine):
        open: Any = None

    with pytest.raises(TypeError, match=r"`strategy` must be .* without a method `open`"):
        decode(Closed())

    class Forgetful(Mine):
        def open(self, state):
            return None

    with pytest.raises(
        TypeError, match=r"`Forgetful\.open` must return a session with the method `propose`, got None"
    ):
        decode(Forgetful())


# --- windows


@pytest.mark.parametrize("end", [1, 0, 99])
def test_a_windows_ends_are_checked(end) -> None:
    """An empty window went on until the strategy was blamed; one that ended before the frontier was torch's error."""

    class Window(WindowPolicy):
        def ends(self, state):
            return [end] * len(state.layout.end)

    with pytest.raises(ValueError, match=rf"`Window\.ends` must end .* 2 to 5 in row 0, got {end}\."):
        decode(window_size=Window())


# --- progress


@pytest.mark.parametrize("first", [0, 1])
def test_a_strategy_that_commits_nothing_any_more_is_an_error(first) -> None:
    """It went on for ever. Steps that commit nothing are allowed, but not as many as there are masks."""
    strategy = Mine(lambda candidate: candidate & (candidate.cumsum(1) > candidate.shape[1] - first))
    message = rf"`Mine` must commit a token .* got none in {4 - first} steps of row 0, which has {4 - first}"
    with pytest.raises(RuntimeError, match=message):
        decode(strategy)


def test_a_strategy_may_think_for_fewer_steps_than_the_row_has_masks() -> None:
    asked = []

    def seldom(candidate):
        asked.append(int(candidate[0].sum()))
        return candidate & (candidate.cumsum(1) == 1) & (asked.count(asked[-1]) == asked[-1])

    decode(Mine(seldom))
    assert asked == [4] * 4 + [3] * 3 + [2] * 2 + [1]


def test_rows_that_join_have_their_own_count() -> None:
    """Row 0 is slow, the others come and go beside it."""
    model, asked = toy(), {}

    class Slow(Mine):
        def choose(self, measure, candidate, state, window, sampling):
            for row in state.rows.tolist():
                asked[row] = asked.get(row, 0) + 1
            waits = torch.tensor([row == 0 and asked[row] % 3 > 0 for row in state.rows.tolist()])
            return candidate & (candidate.cumsum(1) == 1) & ~waits[:, None]

    sampler = APDSampler(model.drafter, model.verifier, strategy=Slow())
    with pytest.raises(RuntimeError, match=r"got none in 2 steps of row 0, which has 2"):
        list(sampler.generate_many([[0]] * 4, batch_size=2, max_new_tokens=WIDTH))
    assert sum(asked.values()) > asked[0] + WIDTH


# --- acceptance rules


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("accept", lambda accept: accept[:, :1], ValueError),
        ("accept", lambda accept: accept.float(), TypeError),
        ("replacement", lambda _: torch.zeros(ROWS, 1).long(), ValueError),
        ("use_replacement", lambda _: torch.tensor(True), ValueError),
    ],
)
def test_a_rules_result_is_checked(name, change, error) -> None:
    def rule(evidence):
        judgement = Coupling(correction=True)(evidence)
        return dataclasses.replace(judgement, **{name: change(getattr(judgement, name))})

    with pytest.raises(error, match=rf"`rule\(\)\.{name}` must return a tensor of"):
        decode(APD(0.5, rule))
    with pytest.raises(TypeError, match=r"`<lambda>` must return a `Judgement`, got NoneType"):
        decode(APD(0.5, lambda _: None))


@pytest.mark.parametrize("wrong", [-1, 3, 4, 99999])
@pytest.mark.parametrize("is_recorded", [False, True])
def test_a_replacement_that_cannot_be_drawn_is_named(wrong, is_recorded) -> None:
    """It was committed, or torch's index error; 3 is the toy's mask token."""
    assert toy().drafter.mask_token_id == 3

    def rule(evidence):
        accept = torch.zeros_like(evidence.draft, dtype=torch.bool)
        return Judgement(accept, torch.full_like(evidence.draft, wrong))

    message = rf"`rule\(\)\.replacement` must be ids that can be drawn, .* and not the mask token 3, got {wrong}\."
    with pytest.raises(ValueError, match=message):
        decode(APD(0.5, rule), return_dict_in_generate=is_recorded)


def test_a_replacement_that_is_not_used_may_be_anything() -> None:
    def rule(evidence):
        everything = torch.ones_like(evidence.draft, dtype=torch.bool)
        return Judgement(everything, torch.full_like(evidence.draft, -1))

    assert decode(APD(0.5, rule)).tolist() == decode(APD(1.0)).tolist()


# --- proposers


class Guessing(Stateless):
    def __init__(self, width: int) -> None:
        self.width = width

    def propose(self, state, window, marginals, pair, sampling):
        return torch.zeros(len(state.rows), self.width, dtype=torch.int64)


def test_guesses_behind_the_window_are_refused() -> None:
    """They were cut without a word."""
    assert decode(Checked(proposer=Guessing(1))).tolist() == decode("left-to-right").tolist()
    with pytest.raises(
        ValueError, match=r"`Guessing\.propose` must guess at most the 4 columns of the window, got 500"
    ):
        decode(Checked(proposer=Guessing(500)))


# --- models


class Model(Memoryless):
    """An exact model whose logits are changed."""

    def __init__(self, model: Any, change: Any) -> None:
        self.model, self.change = model, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def open(self, *args: Any) -> Any:
        self.model.open(*args)
        return self if self.change is not None else None

    def logits(self, *args: Any) -> Any:
        return self.change(self.model.logits(*args))

    def leave_one_out_logits(self, *args: Any) -> Any:
        return self.change(self.model.leave_one_out_logits(*args))


WRONG_LOGITS = [
    (lambda logits: logits[:, 1:], ValueError, r"shape \[2, 4, any\], got \[2, 3, 4\]"),
    (lambda logits: torch.cat([logits, logits[:, :1]], 1), ValueError, r"shape \[2, 4, any\], got \[2, 5, 4\]"),
    (lambda logits: logits[:, :1], ValueError, r"shape \[2, 4, any\], got \[2, 1, 4\]"),
    (lambda logits: logits[0], ValueError, r"shape \[2, 4, any\], got \[4, 4\]"),
    (lambda logits: logits[..., :3], ValueError, r"logits of at least 4 ids, the model's `vocab_size`, got 3"),
    (lambda logits: logits.nan_to_num().long(), TypeError, r"tensor of float, got torch.int64"),
    (lambda logits: logits.numpy(), TypeError, r"tensor of float, got ndarray"),
    (lambda logits: None, TypeError, r"tensor of float, got NoneType"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG_LOGITS)
@pytest.mark.parametrize("role", ["drafter", "verifier"])
def test_a_models_logits_are_checked(role, change, error, message) -> None:
    model = Model(getattr(toy(), role), change)
    with pytest.raises(error, match=rf"`Model\.logits` must return .*{message}"):
        decode(**{role: model})


def test_logits_of_other_passes_are_checked() -> None:
    drafter, verifier = (
        Model(toy().drafter, lambda logits: logits[:, :1]),
        Model(toy().verifier, lambda logits: logits[:1]),
    )
    with pytest.raises(ValueError, match=r"`Model\.leave_one_out_logits` must return a tensor of shape \[2, 4, any\]"):
        decode(WINO(), drafter=drafter)
    with pytest.raises(
        ValueError, match=r"`Model\.logits` must return a tensor of shape \[2, 1, any\], got \[1, 1, 4\]"
    ):
        decode(Autoregressive(), verifier=verifier)
    wide = Model(toy().drafter, lambda logits: torch.cat([logits, logits], 1))
    with pytest.raises(
        ValueError, match=r"`Model\.logits` must return a tensor of shape \[1, 1, any\], got \[1, 2, 4\]"
    ):
        list(sequential_logprobs(wide, [([0], [1, 2, 0, 1])], vocab_size=4, batch_size=1))


@pytest.mark.parametrize("role", ["drafter", "verifier"])
def test_a_model_that_opens_no_session(role) -> None:
    model = Model(getattr(toy(), role), None)
    with pytest.raises(TypeError, match=r"`Model\.open` must return a session with the method `logits`, got NoneType"):
        decode(**{role: model})
    model.open = None
    with pytest.raises(TypeError, match=rf"`{role}` must be a transformers model or an"):
        decode(**{role: model})


# --- processors


@pytest.mark.parametrize("history_free", [True, False])
@pytest.mark.parametrize(
    ("returned", "error"),
    [
        (lambda scores: scores[:, :1], ValueError),
        (lambda scores: scores[0], ValueError),
        (lambda scores: scores > 0, TypeError),
        (lambda scores: None, TypeError),
    ],
)
def test_a_processors_result_is_checked(returned, error, history_free) -> None:
    class Biased(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return returned(scores)

    Biased.history_free = history_free
    with pytest.raises(error, match=r"`Biased` must return a tensor of"):
        decode(logits_processor=[Biased()])


def test_a_warper_of_ones_own() -> None:
    class Warm(TemperatureLogitsWarper):
        def __call__(self, input_ids, scores):
            return scores[:, 0]

    with pytest.raises(ValueError, match=r"`Warm` must return a tensor of shape"):
        decode(logits_processor=[Warm(2.0)], do_sample=True)


class Built(Memoryless):
    """Builds its proposal by hand, without what a recorded call needs, or with a model that is not opened."""

    def __init__(self, runs_verifier: bool) -> None:
        self.runs_verifier = runs_verifier

    def propose(self, state, window, pair, sampling):
        [(_, draft)] = pair.draft(state, window, sampling)
        if self.runs_verifier:
            pair.verify(state, window, draft.tokens)
        everything = torch.ones_like(draft.fault)
        models = ("target", "drafter")
        return Proposal(draft.tokens, everything, everything, draft.fault.long(), draft.tokens, models)


def test_a_proposal_without_what_is_recorded_is_refused_by_name() -> None:
    assert decode(Built(False)).shape == (ROWS, 1 + WIDTH)
    with pytest.raises(TypeError, match=r"`Built\.propose\(\)\.probs` must return a tensor of float, got NoneType"):
        decode(Built(False), return_dict_in_generate=True)


def test_a_model_that_the_strategy_does_not_need_is_not_open() -> None:
    with pytest.raises(TypeError, match=r"attribute `needs_verifier` = True"):
        decode(Built(True))


def test_a_strategy_without_its_attributes_hears_which() -> None:
    class Bare:
        def propose(self, state, window, pair, sampling):
            raise AssertionError

    with pytest.raises(TypeError, match=r"attribute `needs_drafter`.*Subclass `apd.Memoryless`"):
        decode(Bare())
