"""One contract for all drafters, verifiers, strategies, acceptance rules and window policies: those of the package, and
the skeletons of `examples/`. Whoever writes another one adds it to a table here."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pairs import left_padded
from skeletons import skeleton
from states import state_of
from torch import Tensor
from toy import LENGTH, tiny_pair, toy
from transformers import LogitsProcessorList

import apd.strategies
from apd import APDSampler
from apd.decoding.acceptance import AcceptanceRule, Coupling, Rejection
from apd.decoding.commit import Proposal
from apd.decoding.protocols import Drafter, Verifier
from apd.decoding.sampling import Sampling
from apd.decoding.state import DecodeState
from apd.decoding.step import APD
from apd.decoding.strategy import Memoryless, check_strategy
from apd.decoding.window import AllMasks, AutoWindow, BlockWindow, FixedWindow, Window, WindowPolicy
from apd.models.loading import as_drafter
from apd.strategies import (
    KLASS,
    WINO,
    Autoregressive,
    Blocks,
    Checked,
    Confidence,
    Entropy,
    EntropyBound,
    Factor,
    LeftToRight,
    Margin,
    OneStep,
    RandomOrder,
    Threshold,
    Unmasking,
)
from benchmarks.masked_lms import VOCABULARY, tiny

PAIR = tiny_pair()
MASK, WORDS = PAIR[0].mask_token_id, PAIR[0].vocab_size
STOPS = list(range(1, 9))
PROMPTS = [[3, 4], [5], [6, 7, 8, 9], [10, 11, 12]]


def chain() -> tuple[Any, Any]:
    return skeleton("model").ChainDrafter(), skeleton("model").ChainVerifier()


# Models, with prompts of which each has another length, and the new tokens that each row has.
PAIRS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "transformers": lambda: PAIR,
    "ideal": lambda: (toy().drafter, toy().verifier),
    "extend_model": chain,
    "masked LM": lambda: (as_drafter(tiny("esm")), tiny_pair(vocab=VOCABULARY)[1]),
}
PAIR_PROMPTS = {
    "transformers": PROMPTS,
    "masked LM": [[7], [8, 9], [11, 12, 13, 14]],
    "ideal": [[0], [1, 2], [2, 0, 1]],
    "extend_model": [[0], [1, 2], [2, 0, 1]],
}

RULES: list[AcceptanceRule] = [
    Coupling(),
    Coupling(0.2, correction=True),
    Rejection(),
    skeleton("rule").Typical(),
    skeleton("rule").Plausible(0.02),
]
POLICIES: list[WindowPolicy] = [
    AllMasks(),
    FixedWindow(3),
    AutoWindow(1.5, 2),
    BlockWindow(4),
    skeleton("window").Share(0.5),
]
MEMORYLESS: list[Unmasking] = [
    Blocks(Confidence(2), 3),
    Blocks(RandomOrder(1), 2),
    Confidence(2),
    Entropy([1, 3]),
    EntropyBound(0.5),
    Factor(1.5),
    LeftToRight(2),
    Margin(2),
    OneStep(),
    RandomOrder(2),
    Threshold(0.3),
    skeleton("strategy").SurePrefix(0.2),
    skeleton("strategy").TwoRounds(0.3),
]
STRATEGIES: list[Any] = [
    *MEMORYLESS,
    APD(1.0),
    *(APD(0.5, rule) for rule in RULES),
    APD(0.2, Coupling(correction=True), first="judge"),
    APD(0.2, Rejection(), first="judge"),
    Autoregressive(),
    Checked(),
    Checked(proposer="drafter", num_checked="auto", certainty=0.2),
    Checked(Threshold(0.3), num_checked=3, breadth=2),
    Checked(Blocks(Confidence(1), 4), "lookup"),
    KLASS(0.1, 0.5, 1),
    WINO(0.1, 0.5, 4),
]


def test_every_strategy_of_the_package_is_in_the_table() -> None:
    tried = {type(strategy) for strategy in STRATEGIES}
    classes = {getattr(apd.strategies, name) for name in apd.strategies.__all__} - {Unmasking}
    assert tried >= {each for each in classes if issubclass(each, Memoryless) or hasattr(each, "left_to_right")}


# ---------------------------------------------------------------- proposals and counts


class Counted:
    """A model that writes down each pass of each row."""

    def __init__(self, model: Any, passes: Counter[int]) -> None:
        self.model, self.passes = model, passes
        self.vocab_size, self.max_length = model.vocab_size, model.max_length

    def open(self, state: DecodeState) -> "CountedSession":
        return CountedSession(self.model.open(state), self.passes)


class CountedDrafter(Counted):
    def __init__(self, model: Any, passes: Counter[int]) -> None:
        super().__init__(model, passes)
        self.mask_token_id, self.device = model.mask_token_id, model.device


class CountedSession:
    def __init__(self, session: Any, passes: Counter[int]) -> None:
        self.session, self.passes = session, passes
        self.select, self.join = session.select, session.join

    def logits(self, state: DecodeState, *args: Any) -> Any:
        self.passes.update(state.rows.tolist())
        return self.session.logits(state, *args)

    def canvas_logits(self, state: DecodeState, *args: Any) -> Any:
        self.passes.update(set(state.rows.tolist()))
        return self.session.canvas_logits(state, *args)

    def leave_one_out_logits(self, state: DecodeState, *args: Any) -> Any:
        self.passes.update(state.rows.tolist())
        return self.session.leave_one_out_logits(state, *args)


class Watched:
    """A strategy whose every proposal is held against `Proposal`'s docstring."""

    def __init__(self, strategy: Any) -> None:
        self.strategy, self.steps = strategy, 0
        for name in ("needs_drafter", "needs_verifier", "left_to_right", "is_random"):
            setattr(self, name, getattr(strategy, name))

    def open(self, state: DecodeState) -> "Watched":
        self.session = self.strategy.open(state)
        self.select, self.join = self.session.select, self.session.join
        return self

    def propose(self, state: DecodeState, window: Window, *args: Any) -> Proposal:
        before = [getattr(state, field.name).clone() for field in dataclasses.fields(state)]
        proposal = self.session.propose(state, window, *args)
        after = [getattr(state, field.name) for field in dataclasses.fields(state)]
        assert all(map(torch.equal, before, after)), "a strategy must not write to the state"
        window = proposal.window or window
        shape = window.columns.shape
        assert (proposal.tokens.shape, proposal.tokens.dtype) == (shape, torch.int64)
        assert (proposal.fault.shape, proposal.fault.dtype) == (shape, torch.int64)
        assert (proposal.chosen.shape, proposal.chosen.dtype) == (shape, torch.bool)
        assert (proposal.decisive.shape, proposal.decisive.dtype) == (shape, torch.bool)
        assert proposal.draft.shape[0] == shape[0] and proposal.draft.shape[1] <= shape[1]
        decides = self.needs_verifier and not isinstance(self.strategy, Checked)  # there the verifier only proposes
        ran = ("drafter",) * self.needs_drafter + ("verifier",) * decides
        assert proposal.models == ("target", *ran)
        assert proposal.probs is not None and proposal.probs.shape == (*shape, len(proposal.models))
        for recorded in (proposal.logits, proposal.scores):
            assert recorded is not None and recorded.shape == (*shape, WORDS)
        assert not (proposal.decisive & ~window.inside).any(), "nothing outside the window decides"
        chosen = window.within(proposal.chosen)
        assert not (chosen & window.gather(state.decided)).any(), "decided tokens never change"
        tokens = proposal.tokens[chosen]
        assert ((tokens >= 0) & (tokens < WORDS) & (tokens != MASK)).all()
        self.steps += 1
        return proposal


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_proposals_have_their_shapes_and_each_forward_is_counted_where_it_happens(strategy: Any) -> None:
    drafted, verified = Counter[int](), Counter[int]()
    drafter, verifier = PAIR
    watched = Watched(strategy)
    check_strategy(watched)
    sampler = APDSampler(CountedDrafter(drafter, drafted), Counted(verifier, verified))
    arguments = {"max_new_tokens": 9, "do_sample": True, "seed": 3, "eos_token_id": [1, 2], "pad_token_id": 0}
    inputs = left_padded(PROMPTS, pad=0)
    arguments |= {"return_dict_in_generate": True, "output_scores": True, "window_size": 5}
    output = sampler.generate(**inputs, **arguments, strategy=watched)
    assert output.drafter_forwards.tolist() == [drafted[row] for row in range(len(PROMPTS))]
    assert output.verifier_forwards.tolist() == [verified[row] for row in range(len(PROMPTS))]
    assert watched.steps == max(map(len, output.committed_per_step)) > 1
    assert bool(drafted) == strategy.needs_drafter and bool(verified) == strategy.needs_verifier


def test_a_strategy_that_drafts_twice_pays_twice_and_commits_what_two_steps_would() -> None:
    sampler = APDSampler(PAIR[0], mixture_weight=1.0)
    arguments = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
    inputs = left_padded(PROMPTS, pad=0)
    once = sampler.generate(**inputs, **arguments, strategy=Threshold(0.3))
    twice = sampler.generate(**inputs, **arguments, strategy=skeleton("strategy").TwoRounds(0.3))
    assert torch.equal(once.sequences, twice.sequences)
    steps = torch.tensor(list(map(len, twice.committed_per_step)))
    assert torch.equal(twice.drafter_forwards, 2 * steps)
    assert torch.equal(steps, (once.drafter_forwards + 1) // 2)  # an odd last round is paid for, too


# ---------------------------------------------------------------- rows keep apart


def answers(sampler: APDSampler, prompts: list[list[int]], batch_size: int, **arguments: Any) -> list[Any]:
    found = sampler.generate_many(prompts, batch_size=batch_size, seed=5, pad_token_id=0, do_sample=True, **arguments)
    return [(one.tokens, one.drafter_forwards, one.verifier_forwards, one.finish) for one in found]


def alone(sampler: APDSampler, prompts: list[list[int]], **arguments: Any) -> list[Any]:
    """Each prompt in a call of its own."""
    parts = [
        list(sampler.generate_many([p], indices=[i], seed=5, pad_token_id=0, do_sample=True, **arguments))
        for i, p in enumerate(prompts)
    ]
    return [(one.tokens, one.drafter_forwards, one.verifier_forwards, one.finish) for [one] in parts]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_a_row_does_not_depend_on_its_batch_mates_coming_and_going(strategy: Any) -> None:
    sampler = APDSampler(*PAIR)
    arguments = {"max_new_tokens": 7, "eos_token_id": STOPS, "strategy": strategy, "window_size": 6}
    together = answers(sampler, PROMPTS, batch_size=2, **arguments)
    separate = alone(sampler, PROMPTS, **arguments)
    if isinstance(strategy, Checked):  # a proposer goes on token by token while any row of the batch does
        together, separate = ([(one[0], one[1], one[3]) for one in found] for found in (together, separate))
    assert together == separate
    assert len({len(tokens) for tokens, *_ in together}) > 1, "rows leave at different times"


@pytest.mark.parametrize("kv_window", [None, 2])
@pytest.mark.parametrize("name", PAIRS)
def test_a_models_sessions_keep_rows_apart(name: str, kv_window: int | None) -> None:
    drafter, verifier = PAIRS[name]()
    assert isinstance(drafter, Drafter) and isinstance(verifier, Verifier)
    if kv_window is not None and not getattr(drafter, "keeps_keys", True):
        pytest.skip("a drafter without a cache")
    sampler = APDSampler(drafter, verifier, mixture_weight=0.5, kv_window=kv_window)
    prompts = PAIR_PROMPTS[name] * 2
    arguments = {"max_new_tokens": LENGTH, "window_size": 3, "eos_token_id": 1 if name == "transformers" else None}
    assert answers(sampler, prompts, batch_size=3, **arguments) == alone(sampler, prompts, **arguments)


@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_a_policys_windows_start_at_the_frontier_and_do_not_depend_on_batch_mates(policy: WindowPolicy) -> None:
    assert isinstance(policy, WindowPolicy) and hash(policy) == hash(policy)
    rows = [row(frontier, padding, rate) for frontier, padding, rate in [(3, 2, 4.0), (11, 0, 9.0), (6, 1, 1.0)]]
    batch = rows[0].stack(rows[1], MASK).stack(rows[2], MASK)
    together = policy.window(batch)
    assert together.columns.dtype == torch.int64
    for i, state in enumerate(rows):
        window = policy.window(state)
        own = window.columns[0][window.inside[0]]
        assert own.tolist() == list(range(int(state.frontier), int(state.frontier) + len(own)))
        assert 1 <= len(own) <= int(state.end - state.frontier)
        assert torch.equal(together.columns[i][together.inside[i]], own)
        assert together.starts[i] == window.starts[0] == own[0] and together.ends[i] == window.ends[0] == own[-1] + 1


def row(frontier: int, padding: int, commit_rate: float) -> DecodeState:
    columns = torch.arange(12)[None]
    state = state_of(columns, columns < frontier, prompt_end=3, padding=torch.tensor([padding]))
    return dataclasses.replace(state, commit_rate=torch.tensor([commit_rate]))


# ---------------------------------------------------------------- strategies without memory


@pytest.mark.parametrize("strategy", MEMORYLESS, ids=repr)
def test_of_finished_rows_nothing_is_chosen(strategy: Unmasking) -> None:
    state = state_of(torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.bool), prompt_end=3)
    window = AllMasks().window(state)
    nothing = torch.zeros(window.columns.shape)
    assert not strategy.chosen(nothing, nothing.bool(), state, window, Sampling(LogitsProcessorList(), True)).any()


@pytest.mark.parametrize("strategy", MEMORYLESS, ids=repr)
def test_choose_is_a_pure_function_of_any_batch_of_canvases(strategy: Unmasking) -> None:
    """Canvases with holes, of rows that are elsewhere, the last one done: choosing for all is choosing for each."""
    assert strategy.open(row(3, 0, 1.0)) is strategy
    generator = torch.Generator().manual_seed(0)
    tokens = torch.zeros(5, 12, dtype=torch.int64)
    decided = torch.rand(5, 12, generator=generator) < 0.4
    decided[:, :3], decided[4] = True, True
    state = state_of(tokens, decided, prompt_end=3, seeds=torch.arange(5))
    state = dataclasses.replace(state, steps=torch.tensor([0, 1, 2, 3, 9]))
    sampling = Sampling(LogitsProcessorList(), greedy=False)

    def choose(state: DecodeState, measure: Tensor) -> Tensor:
        window = FixedWindow(6).window(state)
        candidate = window.within(~window.gather(state.decided))
        given = measure[:, : window.columns.shape[1]]
        arguments = [given.clone(), candidate.clone()]
        chosen = strategy.choose(*arguments, state, window, sampling)
        assert torch.equal(arguments[0], given) and torch.equal(arguments[1], candidate), (
            "arguments are not written to"
        )
        assert torch.equal(chosen, strategy.choose(given, candidate, state, window, sampling))
        assert chosen.dtype == torch.bool and chosen.shape == candidate.shape
        assert (chosen & candidate).any(1).tolist() == candidate.any(1).tolist()
        return chosen & candidate

    measure = torch.rand(5, 6, generator=generator)
    together = choose(state, measure)
    for i in range(4):
        one = choose(state.select(torch.tensor([i])), measure[i : i + 1])
        assert torch.equal(together[i, : one.shape[1]], one[0]) and not together[i, one.shape[1] :].any()
