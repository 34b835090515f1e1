"""Holes: masks anywhere in a prompt are filled, from left to right, with everything given on both sides in sight."""

import functools
import itertools
import random
import warnings
from collections import Counter

import pytest
import torch
from holes_by_definition import outcomes
from scipy import stats
from thinned import thinned
from toy import tiny_pair

from apd import APDSampler, MaskedDiffusionDrafter
from apd.decoding.state import DecodeState
from apd.decoding.strategy import OwnSession

VOCAB = 32
MASK, STOP = VOCAB - 1, 7
LTR = "left-to-right:1"


def samplers(kind: int) -> APDSampler:
    return APDSampler(*tiny_pair(kind, VOCAB))


def row_with_holes(rng: random.Random, length: int) -> list[int]:
    ids = [rng.choice([i for i in range(VOCAB - 1) if i != STOP]) for _ in range(length)]
    for _ in range(rng.randint(1, 3)):
        start = rng.randrange(1, length)
        for i in range(start, min(length, start + rng.randint(1, 4))):
            ids[i] = MASK
    return ids


def left_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, rows))
    return {
        "inputs": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


def fill(sampler: APDSampler, rows: list[list[int]], **settings) -> list[list[int]]:
    found = sampler.generate(**left_padded(rows), pad_token_id=0, **settings).tolist()
    width = max(map(len, rows))
    return [ids[width - len(row) :] for ids, row in zip(found, rows, strict=True)]


def check_settings(count: int, seed: int) -> None:
    wrong: list[str] = []
    tally = Counter(outcomes(count, seed, wrong.append))
    assert not wrong, wrong[0]
    assert tally["equal"] > count / 2 and tally["tie"] <= 1 + count / 50, tally


@pytest.mark.parametrize("part", range(3))
def test_holes_are_filled_by_definition(part) -> None:
    check_settings(10, part)


@pytest.mark.slow
def test_holes_are_filled_by_definition_in_200_settings() -> None:
    check_settings(200, 100)


STRATEGIES = [
    None,
    LTR,
    "left-to-right:3",
    "threshold:0.3",
    "confidence:2",
    "checked",
    "checked:proposer=drafter",
    "blocks:3/confidence:1",
]


def check_a_case(case: int) -> None:
    """Rows alone = in a batch = joining as rows become free; given tokens stay; checked decoding is sequential."""
    rng = random.Random(1000 + case)
    sampler = samplers(case % 5)
    rows = [row_with_holes(rng, rng.randint(3, 12)) for _ in range(rng.randint(2, 4))]
    strategy = rng.choice(STRATEGIES)
    settings = {
        "do_sample": rng.random() < 0.6,
        "temperature": rng.choice((0.7, 1.0)),
        "window_size": rng.choice((None, None, 2, 4)),
        "eos_token_id": STOP,
        "max_new_tokens": rng.choice((0, 0, 4)),
        "strategy": strategy,
    }
    if not settings["do_sample"]:
        del settings["temperature"]
    if strategy is None:
        settings |= {"mixture_weight": rng.choice((0.0, 0.5, 1.0)), "kv_window": rng.choice((None, 3))}
    seeds = [rng.randrange(99) for _ in rows]
    batch = [found for found in fill(sampler, rows, seed=seeds, **settings)]
    for row, seed, found in zip(rows, seeds, batch, strict=True):
        # Behind the last given token a stop token ends the row.
        assert len(found) >= max(i for i, token in enumerate(row) if token != MASK) + 1
        assert all(a in (MASK, b) for a, b in zip(row, found, strict=False)), (case, settings, row, found)
        alone = fill(sampler, [row], seed=[seed], **settings)[0]
        assert found[: len(alone)] == alone and set(found[len(alone) :]) <= {0}, (case, settings, row)
        if strategy in ("checked", "checked:proposer=drafter"):
            assert alone == fill(sampler, [row], seed=[seed], **settings | {"strategy": LTR})[0], (case, settings, row)
    prompts = [*rows, *rows]
    many = list(sampler.generate_many(prompts, batch_size=2, seed=5, pad_token_id=0, **settings))
    again = list(sampler.generate_many(prompts, batch_size=3, seed=5, pad_token_id=0, **settings))
    assert [answer.tokens for answer in many] == [answer.tokens for answer in again]


@pytest.mark.parametrize("case", thinned(range(6)))
def test_a_row_with_holes_does_not_depend_on_its_batch(case) -> None:
    check_a_case(case)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_a_row_with_holes_does_not_depend_on_its_batch_in_200_cases(part) -> None:
    for case in range(100 + 20 * part, 120 + 20 * part):
        check_a_case(case)


@pytest.mark.parametrize("strategy", [LTR, "confidence:1", None])
def test_a_row_of_blocks_does_not_depend_on_a_hole_beside_it(strategy) -> None:
    """All masks up to the end of the block stand in a canvas, also where the window is smaller."""
    model = tiny_pair(1, VOCAB)[0].model
    drafter = MaskedDiffusionDrafter(model, mask_token_id=MASK, logit_shift=0, attention="block", block_size=8)
    sampler = APDSampler(drafter, mixture_weight=1.0)
    rows = [[1, 2, 3], [4, 5, MASK, 6, MASK, MASK, 8, 9], [3, 1, 4, 1, 5, 9, 2, 6, 5]]
    settings = {"window_size": 2, "max_new_tokens": 5, "eos_token_id": None, "strategy": strategy}
    together = fill(sampler, rows, **settings)
    assert together == [fill(sampler, [row], **settings)[0] for row in rows]


class Known(OwnSession):
    """A drafter that knows the weight of every sequence of four tokens out of three, behind a first token."""

    vocab_size, mask_token_id, max_length, device = 4, 3, None, torch.device("cpu")

    def __init__(self, seed: int) -> None:
        noise = torch.randn(3, 3, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.weights = {ids: float(noise[ids].exp()) for ids in itertools.product(range(3), repeat=4)}

    def given(self, row: tuple[int, ...]) -> dict[tuple[int, ...], float]:
        """The distribution of the sequences that agree with a row; 3 is a mask."""
        fits = {ids: w for ids, w in self.weights.items() if all(a in (3, b) for a, b in zip(row, ids, strict=True))}
        return {ids: w / sum(fits.values()) for ids, w in fits.items()}

    @functools.cache  # noqa: B019
    def marginals(self, row: tuple[int, ...]) -> torch.Tensor:
        """log p of each token at each of the four positions: `4 4` float32."""
        found = torch.zeros(4, 4)
        for sequence, p in self.given(row).items():
            for place, token in enumerate(sequence):
                found[place, token] += p
        return found.log()

    def logits(self, state: DecodeState, window) -> torch.Tensor:
        rows = state.tokens.where(state.decided, 3)[:, -4:].tolist()
        of_rows = torch.stack([self.marginals(tuple(row)) for row in rows])
        places = (window.columns - (state.width - 4)).clamp(min=0)
        return of_rows.gather(1, places[..., None].expand(-1, -1, 4))

    def canvas_logits(self, state: DecodeState, window, rows) -> torch.Tensor:
        return self.logits(state, window)


@pytest.mark.parametrize("strategy", [LTR, "checked:proposer=drafter", "random:1"])
@pytest.mark.parametrize("hole", thinned([(0, 1, 3), (1,), (0, 2), (2, 3)], 2))
def test_holes_are_drawn_from_the_exact_conditional(strategy, hole) -> None:
    """χ² of 3,000 rows against enumeration; false alarm 1e-6 for each of the 12 settings."""
    drafter, count = Known(3), 3000
    row = [3 if i in hole else token for i, token in enumerate((1, 2, 0, 1))]
    prompts = torch.tensor([[0, *row]]).expand(count, -1)
    found = APDSampler(drafter).generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        strategy=strategy,
        seed=11,
        eos_token_id=None,
        pad_token_id=0,
    )
    expected = drafter.given(tuple(row))
    counts = Counter(map(tuple, found[:, 1:].tolist()))
    assert counts.keys() <= expected.keys()
    observed, wanted = zip(*((counts[ids], p * count) for ids, p in expected.items()), strict=True)
    assert stats.chisquare(observed, wanted).pvalue > 1e-6


def test_nothing_to_decode_is_the_prompt_without_a_forward() -> None:
    sampler = samplers(0)
    with pytest.warns(UserWarning, match="`max_new_tokens` is 0 and no prompt has a mask token"):
        output = sampler.generate(
            torch.tensor([[1, 2, 3]]), max_new_tokens=0, pad_token_id=0, return_dict_in_generate=True
        )
    assert output.sequences.tolist() == [[1, 2, 3]]
    assert output.drafter_forwards.tolist() == output.new_tokens.tolist() == [0]


def test_masks_at_the_end_of_a_prompt_are_appended_ones() -> None:
    sampler = samplers(1)
    appended = fill(sampler, [[1, 2, 3]], max_new_tokens=5, eos_token_id=STOP)
    assert fill(sampler, [[1, 2, 3, *[MASK] * 5]], eos_token_id=STOP) == appended
    assert fill(sampler, [[1, 2, 3, MASK]], max_new_tokens=4, eos_token_id=STOP) == appended


def test_stop_tokens_are_drawn_in_a_hole_on_request_only_and_end_nothing_there() -> None:
    rng, sampler = random.Random(5), samplers(2)
    rows = [row_with_holes(rng, 10) for _ in range(40)]
    settings = {"do_sample": True, "temperature": 5.0, "eos_token_id": list(range(20)), "seed": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for row, found in zip(rows, fill(sampler, rows, **settings), strict=True):
            end = max(i for i, token in enumerate(row) if token != MASK) + 1
            assert len(found) >= end
            assert all(found[i] >= 20 for i in range(end) if row[i] == MASK)
        allowed = fill(sampler, rows, allow_stop_in_holes=True, **settings)
    inside = [found[i] for row, found in zip(rows, allowed, strict=True) for i in range(end_of(row)) if row[i] == MASK]
    assert any(token < 20 for token in inside)
    assert all(len(found) >= end_of(row) for row, found in zip(rows, allowed, strict=True))
    with pytest.raises(TypeError, match="`allow_stop_in_holes` must be True or False, got 1"):
        fill(sampler, rows, allow_stop_in_holes=1)


def end_of(row: list[int]) -> int:
    """The column behind the last given token."""
    return max(i for i, token in enumerate(row) if token != MASK) + 1


@pytest.mark.parametrize(
    "strategy", ["left-to-right:2", "left-to-right:3", "confidence:2", "blocks:4/left-to-right:2"]
)
def test_a_step_over_the_end_of_a_hole_commits_its_drafts(strategy) -> None:
    """Greedy tokens of a step are the drafter's likeliest of one pass, wherever given tokens stand between them."""
    sampler = samplers(1)
    row = [1, 2, MASK, 4, 5, 6, MASK, 8, MASK, MASK, 3]
    output = sampler.generate(torch.tensor([row]), strategy=strategy, return_dict_in_generate=True, pad_token_id=0)
    trace = output.trace[0]
    assert trace.columns == [2, 6, 8, 9]
    assert all(
        trace.tokens[i] in trace.drafts[step] and p > 1e-6
        for i, (step, p) in enumerate(zip(trace.steps, trace.drafter_probs, strict=True))
    )


class Sure(OwnSession):
    """A drafter that knows the token of every column for certain."""

    vocab_size, mask_token_id, max_length, device = 8, 7, None, torch.device("cpu")

    def logits(self, state: DecodeState, window) -> torch.Tensor:
        return 20.0 * torch.nn.functional.one_hot(window.columns * 5 % 7, 8)

    def canvas_logits(self, state: DecodeState, window, rows) -> torch.Tensor:
        return self.logits(state, window)


@pytest.mark.parametrize("strategy", ["checked:proposer=drafter,K=4", "checked:proposer=drafter,K=4,c=0.9"])
def test_a_pass_checks_k_masks_however_many_given_tokens_stand_between_them(strategy) -> None:
    row = [7 if column % 3 == 2 else column * 5 % 7 for column in range(50)]
    ids = torch.tensor([row])
    call = {"attention_mask": torch.ones_like(ids), "eos_token_id": None, "return_dict_in_generate": True}
    output = APDSampler(Sure()).generate(ids, strategy=strategy, **call)
    assert output.sequences.tolist() == [[column * 5 % 7 for column in range(50)]]
    # The first pass knows nothing of the row yet; each further one commits K + 1 masks.
    assert output.committed_per_step == [[1, 5, 5, 5]]
