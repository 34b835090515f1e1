"""Attention is one number: 1 is causal, none both ways, b within blocks of b tokens and to earlier blocks."""

import itertools

import pytest
import torch
from states import state_of
from transformers import Qwen2Config, Qwen2ForCausalLM

from apd import MaskedDiffusionDrafter
from apd.decoding.window import AllMasks, BlockWindow
from apd.models.span import Span

MASK = 15
PADDINGS, STARTS, ENDS = [0, 3, 1], [4, 3, 9], [9, 7, 12]


def tiny() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "initializer_range": 0.4}
    config = Qwen2Config(vocab_size=16, num_attention_heads=2, num_key_value_heads=1, **sizes)
    model = Qwen2ForCausalLM(config).eval()
    model.config.is_causal = False
    return model


@pytest.mark.parametrize("num_cached", [None, 12])
@pytest.mark.parametrize("block_size", [None, 1, 2, 4, 64])
@pytest.mark.parametrize("is_level", [False, True])
def test_a_mask_is_its_definition(is_level, block_size, num_cached) -> None:
    paddings, starts, ends = ([0] * 3, [4] * 3, [9] * 3) if is_level else (PADDINGS, STARTS, ENDS)
    span = Span.of_rows(starts, ends, paddings, torch.device("cpu"))
    mask = span.mask(num_cached, block_size)
    if mask is None:
        assert is_level and block_size is None
        return
    mask = mask.expand(3, -1, -1, -1)
    keys = range(num_cached) if num_cached else None
    for row, (padding, start, end) in enumerate(zip(paddings, starts, ends, strict=True)):
        columns = keys or range(start, start + span.width)
        for query, (k, key) in itertools.product(range(start, end), enumerate(columns)):
            seen = padding <= key < end
            if block_size is not None:
                seen = seen and (key - padding) // block_size <= (query - padding) // block_size
            assert bool(mask[row, 0, query - start, k]) == seen or (is_level and not padding <= key < end)


@pytest.mark.parametrize("block_size", [2, 4])
def test_a_window_ends_with_the_block_and_frozen_keys_behind_it_are_exact(block_size) -> None:
    """With attention within blocks, what is committed never sees later tokens: a cache of a block or more is exact."""
    drafter = MaskedDiffusionDrafter(tiny(), mask_token_id=MASK, logit_shift=0, block_size=block_size)
    tokens = torch.randint(0, 15, (3, 14), generator=torch.Generator().manual_seed(1))
    padding = torch.tensor(PADDINGS)
    policy, sessions = BlockWindow(block_size), {}
    for frontier in range(5, 14):
        canvas = tokens.where(torch.arange(14) < frontier, MASK)
        decided = (torch.arange(14) < frontier).expand(3, -1)
        state = state_of(canvas, decided, prompt_end=5, padding=padding)
        window = policy.window(state)
        ends = [p + ((frontier - p) // block_size + 1) * block_size for p in PADDINGS]
        assert list(window.ends) == [min(end, 14) for end in ends]
        if not sessions:
            sessions = {"exact": drafter.open(state), "cached": drafter.open_cached(state, block_size, None)}
        with torch.no_grad():
            exact, cached = (session.logits(state, window)[:, :] for session in sessions.values())
        torch.testing.assert_close(cached[window.inside], exact[window.inside], atol=1e-4, rtol=1e-4)
        # Masks of later blocks are not seen: all of them in the window change nothing within the block.
        with torch.no_grad():
            wide = drafter.open(state).logits(state, AllMasks().window(state))[:, : window.columns.shape[1]]
        torch.testing.assert_close(wide[window.inside], exact[window.inside], atol=1e-4, rtol=1e-4)
