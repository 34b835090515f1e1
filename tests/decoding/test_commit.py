"""`commit`, against its rules in plain Python, on every small row there is."""

import itertools

import pytest
import torch
from states import state_of

from apd.decoding.commit import DRAFT_FAULT, TARGET_FAULT, VALID, Proposal, Stopping, commit
from apd.decoding.window import AllMasks, window_policy
from apd.models.graphs import BucketedWindow

MASK, STOP, OLD, NEW = 9, 1, 3, 4
PROMPT, WIDTH = [STOP, MASK, OLD], 8  # what stands in a prompt stops nothing and is no mask
FREE, SETTLED = [None, NEW, STOP], [OLD, STOP]  # what a step chooses for a mask; what an earlier one chose


def cases(window_size):
    """(columns left, and for each column of the window its token and whether it is chosen)."""
    for left in range(1, WIDTH - len(PROMPT) + 1):
        masks = min(window_size or left, left)
        options = [[(MASK, new) for new in FREE] + [(old, None) for old in SETTLED]] * (masks - 1)
        for first in FREE:
            for others in itertools.product(*options):
                yield left, [(MASK, first), *others]


def plainly(left, columns):
    """Tokens behind the prompt, which of them are decided, the columns passed, whether the row stopped or is done."""
    tokens = [old if new is None else new for old, new in columns] + [MASK] * (left - len(columns))
    for passed, token in enumerate(tokens):
        if token == MASK:
            return tokens, passed, False, False
        if token == STOP:
            return [*tokens[: passed + 1], *[MASK] * (left - passed - 1)], passed + 1, True, True
    return tokens, left, False, True


@pytest.mark.parametrize("is_fixed", [False, True], ids=["plain", "fixed"])
@pytest.mark.parametrize("window_size", [2, 3, None])
def test_every_small_row_is_committed_as_the_rules_say(window_size, is_fixed) -> None:
    rows = list(cases(window_size))
    tokens, decided = torch.full((len(rows), WIDTH), OLD), torch.ones(len(rows), WIDTH, dtype=torch.bool)
    end = torch.tensor([len(PROMPT) + left for left, _ in rows])
    for i, (left, columns) in enumerate(rows):
        behind = [old for old, _ in columns] + [MASK] * (left - len(columns))
        tokens[i, : end[i]] = torch.tensor(PROMPT + behind)
        decided[i, len(PROMPT) : end[i]] = torch.tensor([token != MASK for token in behind])
    state = state_of(tokens, decided, prompt_end=len(PROMPT), end=end)
    policy = window_policy(window_size)
    window = (BucketedWindow(policy) if is_fixed else policy).window(state)

    proposed = torch.full_like(window.columns, STOP)  # nobody may look at what is not chosen
    chosen = torch.zeros_like(window.inside)
    for i, (_, columns) in enumerate(rows):
        for j, (_, new) in enumerate(columns):
            chosen[i, j] = new is not None
            proposed[i, j] = STOP if new is None else new
    chosen |= ~window.inside  # nor at what is outside
    fault = torch.zeros_like(proposed)
    proposal = Proposal(proposed, chosen, window.inside, fault, proposed, ("target", "drafter"))
    after, info = commit(state, window, proposal, stopping=Stopping(torch.tensor([STOP])), mask_token_id=MASK)

    for i, (left, columns) in enumerate(rows):
        expected, passed, stopped, done = plainly(left, columns)
        assert after.tokens[i].tolist() == PROMPT + expected + [OLD] * (WIDTH - len(PROMPT) - left)
        assert after.decided[i, len(PROMPT) : end[i]].tolist() == [token != MASK for token in expected]
        assert after.decided[i, : len(PROMPT)].all() and after.decided[i, end[i] :].all()
        assert (after.frontier[i] - len(PROMPT), info.stopped[i], after.done[i]) == (passed, stopped, done)
        kept = [new is not None and expected[j] != MASK for j, (_, new) in enumerate(columns)]
        assert info.committed[i].tolist() == kept + [False] * (chosen.shape[1] - len(kept))
    assert not info.broken.any()


@pytest.mark.parametrize("fault", [DRAFT_FAULT, TARGET_FAULT])
def test_only_a_decisive_position_must_have_a_distribution(fault) -> None:
    tokens = torch.tensor([[OLD, MASK, MASK]] * 2)
    state = state_of(tokens, tokens != MASK, prompt_end=1)
    window = AllMasks().window(state)
    first = torch.tensor([[True, False]] * 2)
    faults = torch.tensor([[fault, VALID], [VALID, fault]])
    proposal = Proposal(torch.full((2, 2), NEW), first, first, faults, tokens[:, 1:], ("target", "drafter"))
    after, info = commit(state, window, proposal, stopping=Stopping(torch.tensor([STOP])), mask_token_id=MASK)
    assert info.broken.tolist() == after.done.tolist() == [True, False]
