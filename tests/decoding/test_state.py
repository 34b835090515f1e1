"""`DecodeState`: what it says of every column, and rows that are stacked, selected and narrowed."""

import torch

from apd.decoding.state import DECIDED, GIVEN, PADDING, UNDECIDED, DecodeState

MASK = 9


def two_rows() -> DecodeState:
    """The first row is padded, and has decided a token in the middle of its masks."""
    prompt = torch.tensor([[0, 5, 6], [7, 8, 5]])
    state = DecodeState.start(prompt, max_new_tokens=3, mask_token_id=MASK, padding=torch.tensor([1, 0]))
    decided = state.decided.clone()
    decided[0, 4] = True
    return state.with_decided(state.tokens.where(~decided | state.decided, 4), decided)


def test_every_column_is_padding_given_decided_or_undecided() -> None:
    state = two_rows()
    assert state.kinds.tolist() == [
        [PADDING, GIVEN, GIVEN, UNDECIDED, DECIDED, UNDECIDED],
        [GIVEN, GIVEN, GIVEN, UNDECIDED, UNDECIDED, UNDECIDED],
    ]
    assert state.frontier.tolist() == [3, 3]  # the first undecided column
    finished = state.with_decided(state.tokens, torch.ones_like(state.decided))
    assert finished.frontier.tolist() == finished.end.tolist() == [6, 6]


def test_a_wider_row_makes_columns_behind_the_end_of_the_others_until_it_leaves() -> None:
    state, long = two_rows(), DecodeState.start(torch.full((1, 5), 2), max_new_tokens=4, mask_token_id=MASK)
    both = state.stack(long, MASK)
    assert both.tokens.shape == (3, 9)
    assert both.kinds[:2, :6].equal(state.kinds) and (both.kinds[:2, 6:] == PADDING).all()
    assert both.kinds[2].tolist() == [GIVEN] * 5 + [UNDECIDED] * 4
    alone = both.select(torch.tensor([1, 0])).narrowed()
    assert alone.tokens.equal(state.tokens.flip(0)) and alone.kinds.equal(state.kinds.flip(0))
