"""`apd.check` of parts of one's own: what is sound has no problem, and each fault is told in a sentence."""

import dataclasses
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from skeletons import skeleton
from toy import LENGTH, tiny_pair, toy
from transformers import BertForMaskedLM, Qwen2ForCausalLM

import apd
from apd import (
    APD,
    KLASS,
    WINO,
    APDSampler,
    Autoregressive,
    AutoWindow,
    Blocks,
    BlockWindow,
    Checked,
    Confidence,
    Coupling,
    Judgement,
    LeftToRight,
    Memoryless,
    ModelSpec,
    RandomOrder,
    Rejection,
    Seeded,
    Threshold,
    Unmasking,
    WindowPolicy,
)
from apd.strategies.proposers import PromptLookup, Stateless

VOCABULARY = 10


def problems(part: Any, **options: Any) -> list[str]:
    return [finding.advice for finding in apd.check(part, **options).problems]


# ---------------------------------------------------------------- sound parts

QUICK: list[Any] = [
    skeleton("strategy").SurePrefix(0.2),
    skeleton("rule").Typical(),
    skeleton("model").ChainVerifier(),
]
SLOW: list[Any] = [
    *(
        Threshold(0.3),
        LeftToRight(2),
        RandomOrder(2),
        Blocks(Confidence(2), 4, aligned=True),
        Seeded(Confidence(2), 3),
    ),
    *(APD(0.2, Rejection(), first="judge"), Autoregressive(), KLASS(0.1, 0.5, 1), WINO(0.1, 0.5, 4)),
    *(Checked(Threshold(0.3), num_checked=3, breadth=2), skeleton("strategy").TwoRounds(0.3)),
    *(Coupling(0.2, correction=True), Rejection(), skeleton("rule").Plausible(0.02)),
    *(AutoWindow(1.5, 2), BlockWindow(4), skeleton("window").Share(0.5)),
    *(PromptLookup(), skeleton("proposer").EarlierAnswers(((1, 2, 3, 4),))),
    skeleton("model").ChainDrafter(),
    *(apd.FAMILIES[name] for name in ("dream", "sdar", "llada2", "wedlm", "nemotron")),
]


@pytest.mark.parametrize("part", QUICK, ids=repr)
def test_a_sound_part_has_no_problem(part: Any) -> None:
    report = apd.check(part)
    assert not report.problems, str(report)
    assert len(list(report)) >= 3 and max(map(len, str(report).splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("part", SLOW, ids=lambda part: getattr(part, "name", type(part).__name__))
def test_a_sound_part_has_no_problem_either(part: Any) -> None:
    report = apd.check(part, seconds=60)
    assert not report.problems, str(report)


@pytest.mark.slow
def test_exact_models_of_a_length_keep_their_laws() -> None:
    model = toy()
    sampler = APDSampler(model.drafter, model.verifier, strategy=skeleton("strategy").SurePrefix(0.2))
    report = apd.check(sampler, new_tokens=LENGTH)
    assert not report.problems, str(report)
    assert {"Drafter: contract and laws", "Verifier: contract and laws", "Strategy: contract and laws"} == set(
        report.parts
    )


# ---------------------------------------------------------------- broken drafters and verifiers


class Drafter:
    """Sound: logits are a function of position and last decided token."""

    vocab_size, mask_token_id, max_length, device = VOCABULARY, VOCABULARY - 1, None, torch.device("cpu")

    def open(self, state):
        return self

    def select(self, rows):
        pass

    def join(self, state):
        pass

    def logits(self, state, window):
        before = (window.columns - 1).clamp(min=0)
        seen = state.tokens.gather(1, before) + window.columns - state.padding[:, None]
        return -((torch.arange(VOCABULARY) - seen[..., None]) % VOCABULARY).float()


class Narrow(Drafter):
    def logits(self, state, window):
        return super().logits(state, window)[..., :-1]


class Wide(Drafter):
    def logits(self, state, window):
        return torch.nn.functional.pad(super().logits(state, window), (0, 1))


class OneTooFew(Drafter):
    def logits(self, state, window):
        return super().logits(state, window)[:, :-1]


class Moody(Drafter):
    def logits(self, state, window):
        return super().logits(state, window) + torch.rand(VOCABULARY)


class Entangled(Drafter):
    def logits(self, state, window):
        logits = super().logits(state, window)
        return logits - logits.mean(0)


class Nan(Drafter):
    def logits(self, state, window):
        return super().logits(state, window) / 0


class Keeping(Drafter):
    def __init__(self) -> None:
        self.kept: dict[Any, torch.Tensor] = {}

    def logits(self, state, window):
        key = (state.tokens.numpy().tobytes(), window.columns.numpy().tobytes())
        return self.kept.setdefault(key, super().logits(state, window))


class Writing(Drafter):
    def logits(self, state, window):
        logits = super().logits(state, window)
        state.tokens.fill_(1)
        return logits


class Forgetting(Drafter):
    """Remembers the first token of its rows, and does not follow the rows when they leave."""

    def open(self, state):
        session = Forgetting()
        session.first = state.tokens[torch.arange(len(state.rows)), state.padding]
        return session

    def join(self, state):
        self.first = torch.cat([self.first, state.tokens[len(self.first) :, -1]])

    def logits(self, state, window):
        logits = super().logits(state, window)
        return torch.stack([row.roll(int(first), -1) for row, first in zip(logits, self.first, strict=False)])


class Learned(Drafter):
    """Its weights want gradients, and it takes for granted that decoding wants none."""

    def __init__(self) -> None:
        self.weight = torch.nn.Parameter(torch.ones(VOCABULARY))

    def logits(self, state, window):
        return torch.from_numpy((super().logits(state, window) * self.weight).numpy())


class Asking(Drafter):
    def logits(self, state):
        return None


class Verifier:
    vocab_size, max_length = VOCABULARY, None
    open, select, join = Drafter.open, Drafter.select, Drafter.join

    def logits(self, state, window, draft):
        return torch.nn.functional.one_hot(draft, VOCABULARY).float()


# ---------------------------------------------------------------- broken strategies, rules, policies, proposers, families


@dataclass(frozen=True)
class Choosing(Unmasking):
    how: Any

    def choose(self, measure, candidate, state, window, sampling):
        return self.how(measure, candidate)


def endless(measure: Any, candidate: Any) -> Any:
    while True:
        time.sleep(0.05)


class Skipping(Choosing):
    left_to_right = True


class Unseeded(Choosing):
    pass


class Writes(Unmasking):
    """Writes to what `measure` or `choose` is given."""

    def __init__(self, draft: Any = None, choice: Any = None) -> None:
        self.draft, self.choice = draft or (lambda draft: None), choice or (lambda measure, candidate: None)

    def measure(self, draft, window):
        found = super().measure(draft, window)
        self.draft(draft)
        return found

    def choose(self, measure, candidate, state, window, sampling):
        chosen = candidate & (candidate.cumsum(1) == 1)
        self.choice(measure, candidate)
        return chosen


class Undefined(Unmasking):
    def measure(self, draft, window):
        return super().measure(draft, window).log().sqrt()

    def choose(self, measure, candidate, state, window, sampling):
        return candidate & (measure < 1)


class Rewrites(Writes):
    """Writes to its draft in a `propose` of its own."""

    def propose(self, state, window, pair, sampling):
        [(_, draft)] = pair.draft(state, window, sampling)
        proposal = super().propose(state, window, pair, sampling)
        draft.logits.zero_()
        return proposal


class Counts(Unmasking):
    """Its n-th step commits n tokens: what it gives depends on the calls before."""

    def __init__(self) -> None:
        self.n = 0

    def choose(self, measure, candidate, state, window, sampling):
        self.n += 1
        return candidate & (candidate.cumsum(1) <= self.n)


class Wears(Unmasking):
    """Is slower after the first call, and has nothing on the object to show for it."""

    age: list[int] = []  # noqa: RUF012  # of the class

    def choose(self, measure, candidate, state, window, sampling):
        self.age.append(1)
        return candidate & (candidate.cumsum(1) <= (4 if len(self.age) < 3 else 1))


class Sums(Unmasking):
    """Keeps a tensor of its own up to date, which decides nothing."""

    def __init__(self) -> None:
        self.seen = {"tokens": torch.zeros(())}

    def choose(self, measure, candidate, state, window, sampling):
        self.seen["tokens"] += candidate.sum()
        return candidate


class Ring(Unmasking):
    """Sound: has itself and its work sheet among its attributes, and computes one of them when it is first asked."""

    def __init__(self) -> None:
        self.own, self.sheet = [self], {"least": torch.tensor([0.3])}

    @functools.cached_property
    def least(self) -> torch.Tensor:
        return self.sheet["least"]

    def choose(self, measure, candidate, state, window, sampling):
        return candidate & ((measure > self.least) | (candidate.cumsum(1) == 1))


class Bare:
    def propose(self, *args):
        pass


class Wordless(Memoryless):
    def propose(self, state, window, pair, sampling):
        return pair.draft(state, window, sampling).tokens


class Deciding(Memoryless):
    """Commits every column of its window, the given ones too."""

    def propose(self, state, window, pair, sampling):
        proposal = Threshold(0.0).propose(state, window, pair, sampling)
        return dataclasses.replace(
            proposal, chosen=torch.ones_like(proposal.chosen), tokens=proposal.tokens * 0 + pair.mask_token_id
        )


@dataclass(frozen=True)
class Rule:
    how: Any

    def __call__(self, evidence):
        return self.how(evidence)


class Policy(WindowPolicy):
    def __init__(self, ends: Any) -> None:
        self.own = ends

    def ends(self, state):
        return self.own(state)


class Proposer(Stateless):
    reads_marginals = True

    def __init__(self, guess: Any, write: Any = None) -> None:
        self.guess, self.write = guess, write

    def propose(self, state, window, marginals, pair, sampling):
        if self.write is not None and marginals is not None:
            self.write(marginals)
        return self.guess(state, window)


def neighbours(evidence: Any) -> Any:
    p = evidence.target.logprob(evidence.draft).exp()
    return Judgement(p > p.mean(1, keepdim=True))


def writing(write: Any) -> Rule:
    """A rule that accepts everything, and writes to its evidence."""

    def judge(evidence: Any) -> Any:
        accept = torch.ones_like(evidence.draft, dtype=torch.bool)
        write(evidence)
        return Judgement(accept)

    return Rule(judge)


def nothing(state: Any, window: Any) -> Any:
    return torch.full_like(window.columns, -1)


@dataclass(frozen=True)
class Tallies:
    """A rule that counts, on a list that its frozen field holds."""

    seen: list[int]
    __hash__ = object.__hash__

    def __call__(self, evidence):
        self.seen.append(1)
        return Judgement(torch.ones_like(evidence.draft, dtype=torch.bool))


def ghost(**changes: Any) -> ModelSpec:
    return dataclasses.replace(ModelSpec("ghost", Qwen2ForCausalLM, logit_shift=1), **changes)


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "narrow logits": (Narrow, "`Narrow.logits` must return a logit for each of its 10 ids (`vocab_size`), got 9."),
    "wide logits": (Wide, "`Wide.logits` must return a logit for each of its 10 ids (`vocab_size`), got 11."),
    "a column too few": (OneTooFew, "`OneTooFew.logits` must return a tensor of shape [4, 8, any], got [4, 7, 10]."),
    "random logits": (Moody, "`Moody.logits` gives other logits when it is asked again;"),
    "rows entangled": (
        Entangled,
        "`Entangled.logits` gives other logits for row 0 of a padded batch than for this row alone;",
    ),
    "NaN": (Nan, "`Nan.logits` must return numbers, got NaN or +∞ inside the window."),
    "kept tensors": (
        Keeping,
        "`Keeping.logits` gives other logits after the caller wrote to the result;",
    ),
    "state written to": (Writing, "`Writing.logits` writes to `state.tokens`. Clone what you change"),
    "rows not followed": (
        Forgetting,
        "`Forgetting` gives rows other tokens when rows leave and join the batch. `select` must",
    ),
    "another signature": (Asking, "TypeError: Asking.logits() takes 2 positional arguments but 3 were given"),
    "a verifier that peeks": (
        Verifier,
        "`Verifier.logits` gives other logits where drafted tokens at or behind a position change;",
    ),
    "nothing chosen": (
        lambda: Choosing(lambda measure, candidate: candidate & False),
        "`Choosing` must commit a token of every row within as many steps as it has masks, got none in 8 steps",
    ),
    "floats chosen": (
        lambda: Choosing(lambda measure, candidate: measure),
        "`Choosing.choose` must return a tensor of bool, got torch.float32.",
    ),
    "broadcast": (
        lambda: Choosing(lambda measure, candidate: candidate.any(1, keepdim=True)),
        "`Choosing.choose` must return a tensor of shape [4, 8], got [4, 1].",
    ),
    "never back": (
        lambda: Choosing(endless),
        "`Choosing` did not come back within 3 seconds: a loop in it may never end.",
    ),
    "not a prefix": (
        lambda: Skipping(lambda measure, candidate: candidate & (candidate.flip(1).cumsum(1).flip(1) == 1)),
        "`Skipping.left_to_right` is True, and `Skipping.propose` chooses a mask behind one that it leaves.",
    ),
    "unseeded": (
        lambda: Unseeded(
            lambda measure, candidate: candidate & ((torch.rand(candidate.shape) < 0.3) | (candidate.cumsum(1) == 1))
        ),
        "`Unseeded` gives other tokens, or takes other steps, when it is called again with the same seeds.",
    ),
    "along rows": (
        lambda: Choosing(
            lambda measure, candidate: (
                candidate & (measure >= measure.amax((0, 1)) * 0.4) | (candidate & (candidate.cumsum(1) == 1))
            )
        ),
        "`Choosing` makes a row's tokens depend on the other rows of its batch.",
    ),
    "no attributes": (Bare, "`strategy` must have the attribute `needs_drafter`"),
    "no proposal": (Wordless, "`Wordless.propose` must return a `Proposal`, got Tensor."),
    "masks proposed": (Deciding, "`Deciding.propose().tokens` must be ids that can be drawn, got the mask token"),
    "no judgement": (lambda: Rule(lambda evidence: evidence.draft), "`Rule` must return a `Judgement`, got Tensor."),
    "neighbours judged": (
        lambda: Rule(neighbours),
        "`Rule` judges a position otherwise when the window is judged in parts",
    ),
    "accepts ids": (
        lambda: Rule(lambda e: Judgement(e.draft)),
        "`Rule().accept` must return a tensor of bool, got torch.int64",
    ),
    "draft zeroed by a rule": (
        lambda: writing(lambda evidence: evidence.draft.zero_()),
        "`Rule` writes to `evidence.draft`. Clone what you change: it belongs to others",
    ),
    "drafter changed by a rule": (
        lambda: writing(lambda evidence: evidence.drafter.logits.mul_(2)),
        "`Rule` writes to `evidence.drafter.logits`.",
    ),
    "scores changed by a rule": (
        lambda: writing(lambda evidence: evidence.target.scores.values.add_(1)),
        "`Rule` writes to `evidence.target.",
    ),
    "rows moved by a rule": (
        lambda: writing(lambda evidence: evidence.state.frontier.add_(1)),
        "`Rule` writes to `evidence.state.frontier`.",
    ),
    "draft changed by measure": (
        lambda: Writes(lambda draft: draft.tokens.fill_(3)),
        "`Writes.measure` writes to `draft.tokens`.",
    ),
    "log-probabilities changed by measure": (
        lambda: Writes(lambda draft: draft.logprobs.exp_()),
        "`Writes.measure` writes to `draft.logprobs`.",
    ),
    "candidates changed by choose": (
        lambda: Writes(choice=lambda measure, candidate: candidate.zero_()),
        "`Writes.choose` writes to `candidate`.",
    ),
    "draft changed by propose": (Rewrites, "`Rewrites.propose` writes to `draft.logits`."),
    "marginals changed by a proposer": (
        lambda: Proposer(nothing, lambda marginals: marginals.logits.zero_()),
        "`Proposer.propose` writes to `marginals.logits`.",
    ),
    "a replacement that no model has": (
        lambda: Rule(
            lambda e: Judgement(torch.zeros_like(e.draft, dtype=torch.bool), torch.full_like(e.draft, 99999))
        ),
        "`Rule().replacement` must be ids that can be drawn, 0 to 31 and not the mask token 31, got 99999.",
    ),
    "a measure of NaN": (
        Undefined,
        "`Undefined.measure` must return numbers, got NaN",
    ),
    "a counter": (Counts, "`Counts.n` changes while it decodes, from 0 to "),
    "a rule that counts": (
        lambda: Tallies([]),
        "calls may overlap. A rule is a pure function of its evidence.",
    ),
    "a counter of the class": (Wears, "`Wears` gives other tokens, or takes other steps, when it is called again"),
    "a tensor kept": (Sums, "`Sums.seen.tokens` changes while it decodes, from tensor(0.) to tensor("),
    "empty windows": (
        lambda: Policy(lambda state: state.layout.frontier),
        "`Policy.ends` must end each row's window behind its frontier and at most at the row's end, 5 to 12 in row 0, got 4.",
    ),
    "windows of the batch": (
        lambda: Policy(lambda state: [min(max(state.layout.frontier) + 1, end) for end in state.layout.end]),
        "`Policy.ends` of row 0 is",
    ),
    "float guesses": (
        lambda: Proposer(lambda state, window: window.columns.float()),
        "`Proposer.propose` must return a tensor of int64, got torch.float32.",
    ),
    "two groups": (
        lambda: ghost(key_mapping={"(a)(b)": "c"}),
        "must have at most one group in a pattern, got 2 in '(a)(b)'",
    ),
    "a class": (lambda: Threshold, "`check` must be given an instance, got the class Threshold. Call it."),
    "nothing": (lambda: 3, "`check` must be given an APDSampler, or a drafter, verifier, strategy"),
}
FAST = ("narrow logits", "rows entangled", "kept tensors", "a verifier that peeks", "nothing chosen", "not a prefix", "no judgement",
        "empty windows", "a class", "draft zeroed by a rule", "draft changed by measure", "marginals changed by a proposer",
        "a counter", "a tensor kept")  # fmt: skip


def said_of(part: Any) -> str:
    try:
        return "\n".join(problems(part, seconds=3))
    except TypeError as error:
        return str(error)


@pytest.mark.parametrize("fault", FAST)
def test_a_fault_is_told_in_a_sentence(fault: str) -> None:
    make, sentence = BROKEN[fault]
    assert sentence in said_of(make())


@pytest.mark.slow
@pytest.mark.parametrize("fault", sorted(set(BROKEN) - set(FAST)))
def test_every_fault_is_told_in_a_sentence(fault: str) -> None:
    make, sentence = BROKEN[fault]
    assert sentence in said_of(make())


def test_guesses_that_the_check_has_no_ids_for_are_not_called_right() -> None:
    report = apd.check(Proposer(lambda state, window: torch.full_like(window.columns, 10**6)))
    assert not report.problems
    [said] = [finding.advice for finding in report if finding.verdict == "not known"]
    assert said.startswith("`Proposer.propose` guesses 1000000, which the models of this check do not have.")


def test_the_part_itself_is_sound() -> None:
    """What is broken above differs from it by one fault."""
    assert not problems(Drafter()) and not problems(Learned()) and not problems(Ring())
    assert not problems(Choosing(lambda measure, candidate: candidate & (candidate.cumsum(1) == 1)))


def test_a_verifier_of_ones_own_beside_a_checkpoint_is_tried_too() -> None:
    sampler = APDSampler(tiny_pair(num_layers=1)[0], Verifier())
    assert "`Verifier.logits` gives other logits where drafted tokens" in said_of(sampler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "`seconds` must be more than 0, got 0"),
        ({"new_tokens": 0}, "`new_tokens` must be at least 1, got 0"),
        ({"text": "some text"}, "`text` must be left out with a part of your own, got 'some text'"),
        ({"revision": "main"}, "`revision` must be left out"),
    ],
)
def test_arguments_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    for part in (Threshold(0.3), APDSampler(toy().drafter, mixture_weight=1.0)):
        with pytest.raises(ValueError, match=message):
            apd.check(part, **options)


@pytest.mark.slow
def test_a_family_is_built_and_decodes() -> None:
    report = apd.check(ghost())
    assert not report.problems and any("--spec NAME" in finding.advice for finding in report)
    assert not problems(ModelSpec("ghost", BertForMaskedLM, logit_shift=0))
