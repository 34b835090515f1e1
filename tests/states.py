"""Decode states in the middle of a row, for tests."""

import dataclasses

from torch import Tensor

from apd.decoding.state import DecodeState


def state_of(
    tokens: Tensor,
    decided: Tensor,
    *,
    prompt_end: int | Tensor,
    end: Tensor | None = None,
    padding: Tensor | None = None,
    frontier: Tensor | None = None,
    seeds: Tensor | None = None,
) -> DecodeState:
    """Rows with these tokens, `b l`, of which some are decided; the frontier follows unless it is given."""
    state = DecodeState.start(tokens, max_new_tokens=0, mask_token_id=0, padding=padding, seeds=seeds)
    columns = state.prompt_end * 0
    state = dataclasses.replace(state, prompt_end=columns + prompt_end, end=state.end if end is None else end)
    given = state.between(state.padding, state.prompt_end)
    state = dataclasses.replace(state, given=given, given_end=state.prompt_end)
    state = state.with_decided(tokens, decided)
    state = dataclasses.replace(state, done=state.frontier == state.end)
    return state if frontier is None else dataclasses.replace(state, frontier=frontier)
