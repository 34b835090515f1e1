"""`window_size="auto"` against every fixed window, where the tokens that a step could commit are drawn."""

import numpy as np
import pytest
import torch
from pairs import trace_prompts, trace_sampler
from states import state_of
from thinned import thinned
from torch import Tensor

from apd.decoding.state import FIRST_COMMIT_RATE
from apd.decoding.window import AutoWindow, FixedWindow, window_policy
from apd.models.graphs import BucketedWindow

LENGTH, ROWS = 512, 50
STEP = 64  # columns that a step costs beside its masks


def tokens_per_column(mean_at, window_size) -> float:
    """Rows whose steps could commit a geometric number of tokens; its mean depends on the frontier."""
    noise = torch.Generator().manual_seed(0)
    done, columns, auto = torch.zeros(ROWS), 0.0, AutoWindow()
    rate = torch.full((ROWS,), FIRST_COMMIT_RATE)
    while (going := done < LENGTH).any():
        left = LENGTH - done
        wanted = (
            (auto.headroom * rate).ceil().clamp(min=auto.least) if window_size == "auto" else torch.tensor(window_size)
        )
        masks = wanted.minimum(left)
        uniform = torch.rand(ROWS, generator=noise).clamp(min=1e-6)
        could = 1 + (uniform.log() / torch.log1p(-1 / mean_at(done))).floor()
        committed = could.minimum(masks)
        rate = auto.next_rate(rate, committed, masks)
        columns += float((STEP + masks)[going].sum())
        done += committed * going
    return ROWS * LENGTH / columns


def constant(mean: float):
    return lambda done: torch.full_like(done, mean)


def jumping(done: Tensor) -> Tensor:
    return torch.where((done // 64) % 2 == 0, 40.0, 2.0)


def best_fixed(mean_at) -> float:
    return max(tokens_per_column(mean_at, m) for m in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512))


@pytest.mark.parametrize("mean", thinned([1.5, 3.0, 8.0, 20.0, 60.0], 2))
def test_the_auto_window_is_near_the_best_fixed_window(mean) -> None:
    best = best_fixed(constant(mean))
    assert tokens_per_column(constant(mean), "auto") > 0.88 * best
    assert tokens_per_column(constant(mean), 512) < 0.55 * best


def test_it_beats_every_fixed_window_where_the_text_changes() -> None:
    assert tokens_per_column(jumping, "auto") > 1.2 * best_fixed(jumping)


def test_a_number_of_numpy_is_a_number() -> None:
    """It is not taken for "auto"."""
    settings = {"max_new_tokens": 8, "eos_token_id": [], "return_dict_in_generate": True}
    output = trace_sampler().generate(torch.tensor([trace_prompts()[0]]), window_size=np.int64(3), **settings)
    assert max(map(len, output.trace[0].drafts)) == 3


def test_a_window_is_the_same_whether_or_not_its_rows_are_known_to_be_level() -> None:
    tokens, end = torch.arange(18).view(2, 9), torch.tensor([9, 9])
    decided = (torch.arange(9) < 5).expand(2, -1)
    state = state_of(tokens, decided, prompt_end=5, end=end)
    level, ragged = (policy.window(state) for policy in (FixedWindow(3), BucketedWindow(FixedWindow(3))))
    assert level.ragged is None and ragged.ragged is not None
    draft = torch.tensor([[1, 2, 3], [4, 5, 6]])
    for window in (level, ragged):
        assert window.columns.tolist() == [[5, 6, 7]] * 2 and window.inside.all()
        assert window.fill(draft, tokens)[:, 5:].tolist() == [[1, 2, 3, 8], [4, 5, 6, 17]]


def test_a_fixed_window_is_hardly_wider_than_the_masks_left() -> None:
    """Logits beyond the masks left would be computed for nothing."""
    tokens, end = torch.zeros(2, 520, dtype=torch.int64), torch.tensor([520, 510])
    decided = (torch.arange(520) < 500).expand(2, -1) | (torch.arange(520) >= end[:, None])
    state = state_of(tokens, decided, prompt_end=500, end=end)
    for window_size, width in ((None, 64), (400, 64), (100, 64), ("auto", 64), (6, 6)):
        window = BucketedWindow(window_policy(window_size)).window(state)
        assert window.columns.shape == (2, width)
        placed = window.fill(torch.ones_like(window.columns), tokens)
        assert placed.sum(1).tolist() == window.inside.sum(1).tolist()
