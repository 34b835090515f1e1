"""Contract and laws of strategies, acceptance rules, window policies and proposers of one's own."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from apd.config import APDConfig
from apd.decoding.acceptance import Distribution, Evidence, Judgement, judgement_of
from apd.decoding.commit import Proposal, check_proposal
from apd.decoding.pair import Draft, ModelPair
from apd.decoding.returned import check_session, name_of
from apd.decoding.sampling import Sampling, Scores
from apd.decoding.state import DecodeState
from apd.decoding.step import APD
from apd.decoding.strategy import check_strategy
from apd.decoding.window import Window, WindowPolicy, check_window
from apd.inspection.bed import NEW_TOKENS, Broken, Trial, answers, prompts_of, sampler_of_bed, state_of_rows
from apd.inspection.lent import Kept, Lent, lend, written
from apd.inspection.report import Finding
from apd.strategies.base import Unmasking
from apd.strategies.checked import Checked
from apd.strategies.proposers import Marginals, Proposed

_CALL: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "eos_token_id": list(range(1, 5))}


def strategy_laws(trial: Trial, strategy: Any) -> None:
    """A strategy: attributes, proposals, progress, and that its rows keep apart."""
    trial.law("attributes", "those of `Strategy`", lambda: check_strategy(strategy), needed=True)
    if not trial.is_over:
        _decoding_laws(trial, strategy, strategy)


def rule_laws(trial: Trial, rule: Any) -> None:
    """An acceptance rule: what it returns, that it judges each position by itself, and that rows keep apart."""
    trial.law("hashable", "a frozen dataclass", lambda: APDConfig(acceptance=rule), needed=True)
    if trial.is_over:
        return
    spy, failed = _JudgedInParts(rule, trial.part), list[Exception]()

    def evidence() -> None:
        try:
            _decode(APD(0.5, spy), do_sample=True)
        except Exception as error:  # perhaps for what was written; else the next law says it
            failed.append(error)
        spy.raise_if_written()

    def judgement() -> None:
        for error in failed:
            raise error

    trial.law("evidence", "is not written to", evidence, needed=True)
    trial.law("judgement", "accept, `b m` bool", judgement, needed=True)
    trial.law("position by position", "parts as the whole", spy.raise_if_parts_differ)
    if not trial.is_over:
        _decoding_laws(trial, APD(0.5, rule), rule)


def policy_laws(trial: Trial, policy: Any) -> None:
    """A window policy: windows from the frontier on, not empty, within the row, whatever the other rows do."""
    trial.law("hashable", "a frozen dataclass", lambda: APDConfig(window_size=policy), needed=True)
    trial.law("windows", "1 mask to the row's end", lambda: _windows(policy, trial.part), needed=True)
    if not trial.is_over:
        _batch_law(trial, {"window_size": policy, "strategy": "apd"})


def proposer_laws(trial: Trial, proposer: Any) -> None:
    """A proposer: what it guesses, and that checked decoding with it gives the reference's tokens."""
    names = ("needs_verifier", "reads_marginals", "open")

    def attributes() -> None:
        if missing := [name for name in names if not hasattr(proposer, name)]:
            raise Broken(
                f"`{trial.part}` must have the attribute `{missing[0]}`. Subclass `Stateless`, which has all of them."
            )

    trial.law("attributes", "those of `Proposer`", attributes, needed=True)
    if trial.is_over:
        return
    strategy = Checked(proposer=proposer)
    trial.law("guesses", "ids, `b k` int64", lambda: _decode(strategy), needed=True)
    lent = _LentProposer(proposer, trial.part)
    trial.law("arguments", "are not written to", lambda: _decode(Checked(proposer=lent)), needed=True)
    if trial.is_over:
        return
    if lent.foreign:
        size = sampler_of_bed().vocab_size
        advice = (
            f"`{trial.part}.propose` guesses {lent.foreign[0]}, which the models of this check do not have. Such a guess counts as "
            "none, so it was not tried. If your models have no such id either, it is never right."
        )
        trial.findings.append(Finding("guessed ids", str(lent.foreign[0]), f"below {size}", "not known", advice))

    def exact() -> None:
        for do_sample in (False, True):
            if _decode(strategy, do_sample=do_sample) != _decode("left-to-right", do_sample=do_sample):
                raise Broken(
                    f"`{trial.part}` changes what checked decoding gives. A proposer must only guess: leave `state`, `marginals` and "
                    "the pair's drafter alone."
                )

    trial.law("exact", "the reference's tokens", exact)
    if not trial.is_over:
        _batch_law(trial, {"strategy": strategy})


# ---------------------------------------------------------------- laws of decoding


def _decode(strategy: Any, **call: Any) -> Any:
    sampler = sampler_of_bed()
    prompts = prompts_of(sampler.vocab_size, sampler.drafter.mask_token_id)
    return answers(sampler, prompts, batch_size=len(prompts), strategy=strategy, **{**_CALL, **call})


def _decoding_laws(trial: Trial, strategy: Any, part: Any) -> None:
    """The laws of a strategy; `part` is the caller's, the strategy itself or a rule of it."""
    kept, first = [Kept(part)], list[Any]()
    watched = _Watched(strategy)
    if isinstance(strategy, Unmasking):
        trial.law("arguments", "are not written to", lambda: first.extend(_lend(strategy)), needed=True)
    trial.law("proposals", "as in `Proposal`", lambda: first.append(_decode(watched, passes=True)), needed=True)
    kept.append(Kept(part))  # what the first call has made
    for do_sample in (False, True):
        how = "sampled" if do_sample else "greedy"

        def repeatable(do_sample: bool = do_sample) -> None:
            again = [_decode(strategy, do_sample=do_sample, passes=True) for _ in range(2)]
            if any(each != again[0] for each in (again if do_sample else first + again)):
                raise Broken(
                    f"`{name_of(part)}` gives other tokens, or takes other steps, when it is called again with the same seeds. Take random "
                    "numbers from `sampling.noise(state, window, stream)`, and keep nothing of a call on the object."
                )

        trial.law(f"same twice, {how}", "equal", repeatable)
    if not trial.is_over:
        _batch_law(trial, {"strategy": strategy})

    def remembers_nothing() -> None:
        in_session = "Keep what a row remembers in the session that `open(state)` returns."
        remedy = in_session if part is strategy else "A rule is a pure function of its evidence."
        for each in kept:
            each.check(name_of(part), remedy)

    trial.law("own attributes", "as before the calls", remembers_nothing)


def _lend(strategy: Unmasking) -> list[Any]:
    """Refuse a strategy whose `choose` or `measure` writes to what it is given. What else is wrong, the next law says.

    Returns:
        The answers, if a decode gives the same where nothing is watched.
    """
    try:
        found = _decode(_LentUnmasking(strategy), passes=True)
    except Broken:
        raise
    except Exception:  # code of the caller raises anything
        return []
    return [found] if type(strategy).propose is Unmasking.propose else []


def _batch_law(trial: Trial, call: dict[str, Any]) -> None:
    sampler = sampler_of_bed()
    prompts = prompts_of(sampler.vocab_size, sampler.drafter.mask_token_id)
    for do_sample in (False, True):
        options = {**_CALL, **call, "do_sample": do_sample}

        def apart(options: dict[str, Any] = options) -> None:
            together = answers(sampler, prompts, batch_size=2, **options)
            if together != answers(sampler, prompts, batch_size=1, alone=True, **options):
                raise Broken(
                    f"`{trial.part}` makes a row's tokens depend on the other rows of its batch. Compute along positions and ids, "
                    "never along rows, and let a session's `select` and `join` follow the rows."
                )

        trial.law(f"rows apart, {'sampled' if do_sample else 'greedy'}", "tokens as alone", apart)


class _Watched:
    """A strategy, or its session, whose every proposal is held against `Proposal`."""

    def __init__(self, strategy: Any, session: Any = None) -> None:
        self.strategy, self.session, self.__name__ = strategy, session, name_of(strategy)
        for name in (
            "needs_drafter",
            "needs_verifier",
            "left_to_right",
            "is_random",
            "adapts_window",
            "reads_decided",
        ):
            if hasattr(strategy, name):
                setattr(self, name, getattr(strategy, name))

    def open(self, state: DecodeState) -> _Watched:
        session = self.strategy.open(state)
        check_session(session, f"{self.__name__}.open", "propose")
        for name in ("select", "join"):
            if not callable(getattr(session, name, None)):
                raise Broken(
                    f"`{name_of(session)}` must have the method `{name}`, since rows leave and join. Subclass `Memoryless`."
                )
        return _Watched(self.strategy, session)

    def select(self, rows: Tensor) -> None:
        self.session.select(rows)

    def join(self, state: DecodeState) -> None:
        self.session.join(state)

    def propose(self, state: DecodeState, window: Window, pair: ModelPair, sampling: Sampling) -> Proposal:
        by = f"{self.__name__}.propose"
        lent, kernels = [Lent(state=state, window=window)], pair.kernels

        def draw(*args: Any) -> Draft:
            draft = kernels.draw(*args)
            lent.append(lend(draft))
            return draft

        pair.kernels = dataclasses.replace(kernels, draw=draw)
        try:
            proposal: Proposal = self.session.propose(state, window, pair, sampling)
        finally:
            pair.kernels = kernels
        for each in lent:
            each.check(by)
        window = getattr(proposal, "window", None) or window
        check_proposal(proposal, by, window, probs=pair.record_probs, scores=pair.record_scores)
        chosen = window.within(proposal.chosen)
        if (chosen & window.gather(state.decided)).any():
            raise Broken(
                f"`{by}` chooses decided columns, whose tokens never change. Choose `window.within(~window.gather(state.decided))`."
            )
        if (proposal.decisive & ~window.inside).any():
            raise Broken(
                f"`{by}().decisive` must be False outside `window.inside`: nothing there decides. Use `window.within(...)`."
            )
        tokens = proposal.tokens[chosen]
        if ((tokens < 0) | (tokens >= pair.support.vocab_size) | (tokens == pair.mask_token_id)).any():
            raise Broken(
                f"`{by}().tokens` must be ids that can be drawn, got the mask token or one outside the vocabulary."
            )
        undecided = window.within(~window.gather(state.decided))
        gaps = (undecided & ~chosen).cumsum(1) > 0
        if self.strategy.left_to_right and (chosen & gaps).any():
            raise Broken(
                f"`{self.__name__}.left_to_right` is True, and `{by}` chooses a mask behind one that it leaves. Choose a prefix of the "
                "window, or set `left_to_right = False`."
            )
        return proposal


class _LentUnmasking(Unmasking):
    """A strategy whose `measure` and `choose` must leave their arguments as they are."""

    def __init__(self, strategy: Unmasking) -> None:
        self.strategy, self.__name__, self.__module__ = strategy, name_of(strategy), type(strategy).__module__
        self.reach, self.counts_steps = strategy.reach, strategy.counts_steps
        self.left_to_right, self.is_random = strategy.left_to_right, strategy.is_random

    def measure(self, draft: Draft, window: Window) -> Tensor:
        lent = [lend(draft), Lent(window=window)]
        found = self.strategy.measure(draft, window)
        for each in lent:
            each.check(f"{self.__name__}.measure")
        return found

    def choose(
        self, measure: Tensor, candidate: Tensor, state: DecodeState, window: Window, sampling: Sampling
    ) -> Tensor:
        lent = Lent(measure=measure, candidate=candidate, state=state, window=window)
        found = self.strategy.choose(measure, candidate, state, window, sampling)
        lent.check(f"{self.__name__}.choose")
        return found


class _LentProposer:
    """A proposer, or its session, that must leave its arguments as they are."""

    def __init__(self, proposer: Any, name: str, session: Any = None, foreign: list[int] | None = None) -> None:
        self.proposer, self.session, self.__name__ = proposer, session, name
        #: Guesses that the models do not have, of all sessions.
        self.foreign: list[int] = [] if foreign is None else foreign
        self.needs_verifier, self.reads_marginals = proposer.needs_verifier, proposer.reads_marginals

    def open(self, state: DecodeState) -> _LentProposer:
        return _LentProposer(self.proposer, self.__name__, self.proposer.open(state), self.foreign)

    def select(self, rows: Tensor) -> None:
        self.session.select(rows)

    def join(self, state: DecodeState) -> None:
        self.session.join(state)

    def propose(
        self, state: DecodeState, window: Window, marginals: Marginals | None, pair: ModelPair, sampling: Sampling
    ) -> Any:
        lent = Lent(state=state, window=window, marginals=marginals)
        found = self.session.propose(state, window, marginals, pair, sampling)
        lent.check(f"{self.__name__}.propose")
        guesses = found.tokens if isinstance(found, Proposed) else found
        self.foreign += guesses[guesses >= pair.support.vocab_size].tolist()
        return found


class _JudgedInParts:
    """A rule that is asked again about parts of what it judges, and whether it writes to its evidence."""

    def __init__(self, rule: Any, name: str) -> None:
        self.rule, self.__name__ = rule, name
        self.__module__ = getattr(rule, "__module__", "")  # its values are checked as the caller's are
        self.scores_only = getattr(rule, "scores_only", False)
        self.differ, self.written = False, list[str]()

    def __hash__(self) -> int:
        return id(self)

    def __call__(self, evidence: Evidence) -> Judgement:
        lent = Lent(evidence=evidence)
        judgement = judgement_of(self.rule, evidence)
        self.written += [name for name in [lent.written] if name]
        inside, width = evidence.window.inside, evidence.draft.shape[1]
        for start in range(width):
            part = slice(start, start + 1)
            alone = self.rule(_part(evidence, part))
            for name in ("accept", "replacement", "use_replacement"):
                whole, piece = getattr(judgement, name), getattr(alone, name)
                if whole is not None and piece is not None:
                    self.differ |= not torch.equal(whole[:, part][inside[:, part]], piece[inside[:, part]])
        return judgement

    def raise_if_parts_differ(self) -> None:
        if self.differ:
            raise Broken(
                f"`{self.__name__}` judges a position otherwise when the window is judged in parts, as large windows are. Judge each "
                "position by its own distributions, not by its neighbours: the loop takes care of the prefix."
            )

    def raise_if_written(self) -> None:
        if self.written:
            raise Broken(written(self.__name__, self.written[0]))


def _part(evidence: Evidence, part: slice) -> Evidence:
    def of(distribution: Any) -> Any:
        if distribution is None:
            return None
        scores = distribution.scores
        ids = None if scores.ids is None else scores.ids[:, part]
        return Distribution(distribution.logits[:, part], Scores(scores.values[:, part], ids))

    window = evidence.window.part(part)
    scored = evidence.verifier_logprobs
    return dataclasses.replace(
        evidence,
        draft=evidence.draft[:, part],
        drafter=of(evidence.drafter),
        verifier=of(evidence.verifier),
        target=of(evidence.target),
        verifier_logprobs=None if scored is None else scored[:, part],
        draft_noise=evidence.sampling.noise(evidence.state, window),
        window=window,
    )


def _windows(policy: WindowPolicy, name: str) -> None:
    sampler = sampler_of_bed()
    mask = sampler.drafter.mask_token_id
    state = state_of_rows(prompts_of(sampler.vocab_size, mask), mask, NEW_TOKENS, sampler.device)
    column, rows = torch.arange(state.width), len(state.rows)
    decided = state.decided | (column < state.frontier[:, None] + 2 * torch.arange(rows)[:, None])
    state = state.with_decided(torch.where(decided & ~state.decided, 3, state.tokens), decided)
    lent = Lent(state=state)
    ends = list(policy.ends(state))
    if len(ends) != rows or not all(isinstance(end, int) for end in ends):
        raise Broken(
            f"`{name}.ends` must return one whole number per row, got {ends!r:.80}. Use `state.layout`, numbers on the host."
        )
    lent.check(f"{name}.ends")
    check_window(policy.window(state), state, name)
    for row in range(rows):
        alone = list(policy.ends(state.select(torch.tensor([row]))))
        if alone != [ends[row]]:
            raise Broken(
                f"`{name}.ends` of row {row} is {ends[row]} in a batch and {alone[0]} alone: it must not depend on other rows."
            )
