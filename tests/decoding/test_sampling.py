"""Warped scores are those of transformers' warpers, a draw is their argmax with noise, at any size of vocabulary."""

import pytest
import torch
from pairs import STOP, left_padded, trace_prompts, trace_sampler
from thinned import thinned
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from apd.decoding.noise import Noise, keyed_gumbel
from apd.decoding.sampling import Sampling, Scores


class Twisted(TopKLogitsWarper):
    """A caller's own, which does more than its base: it looks at ids."""

    def __call__(self, input_ids, scores):
        scores = super().__call__(input_ids, scores)
        return scores + (torch.arange(scores.shape[-1]) % 3 == 0)


CHAINS = {
    "top-k": [TopKLogitsWarper(20)],
    "temperature, top-k": [TemperatureLogitsWarper(0.7), TopKLogitsWarper(20)],
    "top-k, temperature": [TopKLogitsWarper(20), TemperatureLogitsWarper(0.7)],
    "top-k, top-p": [TopKLogitsWarper(50), TopPLogitsWarper(0.8)],
    "top-p": [TopPLogitsWarper(0.5)],
    "top-p close to 1": [TopPLogitsWarper(0.999)],
    "temperature, top-p, min-p": [TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
    "top-p, top-k": [TopPLogitsWarper(0.9), TopKLogitsWarper(5)],
    "top-p, at least 100": [TopPLogitsWarper(0.2, min_tokens_to_keep=100)],
    "top-p, soft": [TopPLogitsWarper(0.9, filter_value=-3.0)],
    "top-k, typical, epsilon, eta": [
        TopKLogitsWarper(50),
        TypicalLogitsWarper(0.9),
        EpsilonLogitsWarper(1e-3),
        EtaLogitsWarper(1e-3),
    ],
    "a caller's own": [Twisted(30)],
    "min-p": [MinPLogitsWarper(0.1)],
}


def noise_of(rows: int, width: int, stream: int = 0) -> Noise:
    return Noise(torch.arange(rows), torch.arange(width).expand(rows, -1), torch.zeros(rows).long(), stream)


def full_noise(noise: Noise, size: int) -> torch.Tensor:
    return keyed_gumbel(noise.seeds, noise.columns, noise.stream, torch.arange(size))


@pytest.mark.parametrize("size", [1000, 10_007])
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_scores_are_those_of_transformers_warpers_and_a_draw_is_their_argmax(chain, scale, size) -> None:
    logits = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(0)) * scale
    logits[..., 7] = -torch.inf
    logits[1, 1, 9:] = -torch.inf  # fewer tokens than top-k keeps
    logprobs = logits.log_softmax(-1)
    sampling = Sampling(LogitsProcessorList(chain), greedy=False)
    expected = sampling.warpers(None, logprobs.flatten(0, 1)).view_as(logprobs)
    scores, noise = sampling.warp(logprobs), noise_of(2, 3)
    drawn = sampling.sample(scores, noise)  # before the scores are read, which may be computed then
    torch.testing.assert_close(scores.dense(size), expected)
    best, tokens = (expected + full_noise(noise, size)).max(-1)
    assert drawn.tokens.equal(tokens)
    torch.testing.assert_close(drawn.best, best)


LARGE = 40_000


def rows_of_all_kinds() -> torch.Tensor:
    """`1 8 v`: flat, peaked and in between, ties as of bfloat16, one token alone, and values that repeat with the id."""
    rows = torch.randn(8, LARGE, generator=torch.Generator().manual_seed(1))
    rows *= torch.tensor([0.1, 1.0, 3.0, 8.0, 1.0, 1.0, 1.0, 0.0])[:, None]
    rows[4] = rows[4].bfloat16()
    rows[5] = -torch.inf
    rows[5, 123] = 0.5
    rows[6] += torch.arange(LARGE) % (LARGE // 4096) != 0  # a sample of every so many ids sees other scores
    return rows[None]


def test_a_draw_from_a_large_vocabulary_is_the_first_of_the_best_scores_with_noise() -> None:
    values, sampling, noise = rows_of_all_kinds(), Sampling(LogitsProcessorList(), greedy=False), noise_of(1, 8)
    for scale in (1.0, 1e-3, 1e4):  # at 1e4 noise is rounded away, and scores tie
        sums = values * scale + full_noise(noise, LARGE)
        drawn = sampling.sample(Scores(values * scale), noise)
        assert drawn.tokens.equal((sums == sums.amax(-1, keepdim=True)).long().argmax(-1))
        assert drawn.best.equal(sums.amax(-1))


@pytest.mark.parametrize(("temperature", "size"), [(0.0, 30), (0.7, 30), (1.0, 20_000)])
def test_a_token_is_drawn_until_log_p_changes_by_more_than_its_margin(temperature, size) -> None:
    chain = [TemperatureLogitsWarper(temperature)] if temperature else []
    sampling = Sampling(LogitsProcessorList(chain), greedy=not temperature)
    logits = torch.randn(4, 5, size, generator=torch.Generator().manual_seed(0))
    noise = Noise(torch.arange(4), torch.arange(20).view(4, 5), torch.zeros(4, dtype=torch.int64), 0)
    tokens = sampling.sample(sampling.warp(logits), noise).tokens
    margin = sampling.margin(logits, tokens, noise)
    assert margin.min() > 0
    for factor, same in ((0.99, True), (1.01, False)):
        less = torch.zeros_like(logits).scatter_(-1, tokens[..., None], -factor * margin[..., None])
        drawn = sampling.sample(sampling.warp(logits + less), noise).tokens
        assert ((drawn == tokens) == same).all()
        assert ((sampling.margin(logits + less, tokens, noise) > 0) == same).all()


def test_an_invalid_row_of_a_large_vocabulary_is_reported_and_changes_no_other() -> None:
    values, noise = rows_of_all_kinds(), noise_of(1, 8)
    for warpers in ([], [TopPLogitsWarper(0.9)]):
        sampling = Sampling(LogitsProcessorList(warpers), greedy=False)
        expected = sampling.sample(sampling.warp(values), noise)
        broken = values.clone()
        broken[0, 1], broken[0, 3, 5], broken[0, 6, 77] = -torch.inf, torch.inf, torch.nan
        scores = sampling.warp(broken)
        found = sampling.sample(scores, noise)
        assert (~found.best.isfinite()).nonzero()[:, 1].tolist() == [1, 3, 6]
        assert (~scores.largest[0].isfinite()).nonzero()[:, 1].tolist() == [1, 3, 6]
        rest = [0, 2, 4, 5, 7]
        assert found.tokens[:, rest].equal(expected.tokens[:, rest]) and found.best[:, rest].equal(
            expected.best[:, rest]
        )


@pytest.mark.parametrize("size", [500, LARGE], ids=["short rows", "long rows"])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.95, 0.999])
def test_a_nucleus_is_that_of_transformers_but_for_the_choice_among_ties(top_p, size) -> None:
    """Of tokens that tie for the last place transformers keeps those that its sort, which is not stable, puts last."""
    logits = rows_of_all_kinds()[..., :size]
    found = Sampling(LogitsProcessorList([TopPLogitsWarper(top_p)]), greedy=False).warp(logits).dense(size)[0]
    expected = TopPLogitsWarper(top_p)(None, logits[0])
    for row, ours, theirs in zip(logits[0], found, expected, strict=True):
        kept, least = ours.isfinite(), theirs[theirs.isfinite()].min()
        assert ours[kept].equal(row[kept]) and ours[kept].min() == least
        assert kept[row > least].all()
        tied = row == least
        if tied.sum() == 1:
            assert ours.equal(theirs)
        # The mass of many ties is summed in another order: one token more or less.
        assert abs(int(kept.sum() - theirs.isfinite().sum())) <= (size == LARGE)
        assert (kept[tied].int().diff() >= 0).all()  # the highest ids


RECORDED = [
    (10_007, 3.0, [], [8915, 5168, 2323, 5817, 6135, 5230]),
    (10_007, 3.0, [TopPLogitsWarper(0.9)], [8915, 5168, 2323, 5817, 8833, 5230]),
    (40_000, 12.0, [TemperatureLogitsWarper(0.7)], [35073, 31630, 2323, 23579, 15192, 33938]),
    (40_000, 12.0, [TemperatureLogitsWarper(0.5), TopPLogitsWarper(0.8)], [35073, 7130, 35022, 23579, 15192, 33938]),
]


@pytest.mark.parametrize(
    ("size", "scale", "chain", "tokens"), RECORDED, ids=["all", "top-p", "all, cold", "top-p, cold"]
)
def test_recorded_draws_from_large_vocabularies_are_drawn_again(size, scale, chain, tokens) -> None:
    """Recorded when every token was hashed and every nucleus sorted."""
    ids, row = torch.arange(size), torch.arange(6)[:, None]
    values = (ids * (7919 + 2 * row) + 31 * row) % 65521 / 65521 * scale
    noise = Noise(torch.tensor([11]), torch.arange(3, 9)[None], torch.tensor([0]), 0)
    sampling = Sampling(LogitsProcessorList(chain), greedy=False)
    assert sampling.sample(sampling.warp(values[None]), noise).tokens.tolist() == [tokens]


def test_a_draw_from_a_large_vocabulary_is_traced_whole() -> None:
    sampling, values = Sampling(LogitsProcessorList([TopPLogitsWarper(0.9)]), greedy=False), rows_of_all_kinds()

    @torch.compile(backend="eager", fullgraph=True)
    def draw(values: torch.Tensor, seeds: torch.Tensor, columns: torch.Tensor, padding: torch.Tensor):
        return sampling.sample(sampling.warp(values), Noise(seeds, columns, padding, 0))

    noise = noise_of(1, 8)
    drawn = draw(values, noise.seeds, noise.columns, noise.padding)
    assert drawn.tokens.equal(sampling.sample(sampling.warp(values), noise).tokens)


def test_noise_is_hashed_for_the_shortlist_alone() -> None:
    sampling = Sampling(LogitsProcessorList([TopKLogitsWarper(50)]), greedy=False)
    scores = sampling.warp(torch.randn(1, 2, 32_000))
    assert scores.values.shape == (1, 2, 50)
    noise = Noise(torch.tensor([5]), torch.tensor([[3, 4]]), torch.tensor([0]), 0)
    everything = noise.for_scores(Scores(torch.zeros(1, 2, 32_000)))
    assert noise.for_scores(scores).equal(everything.gather(-1, scores.ids))


@pytest.mark.parametrize("entries", [1, 1500])
@pytest.mark.parametrize(
    "knobs",
    thinned(
        [
            {"correction": True, "acceptance_threshold": 0.2},
            {},
            {"mixture_weight": 0.0, "kv_window": 3, "window_size": 7},
            {"mixture_weight": 1.0},
            {"do_sample": True, "acceptance": "rejection", "top_k": 20},
            {"do_sample": True, "top_k": 0},
        ],
        2,
    ),
    ids=str,
)
def test_a_window_judged_in_parts_gives_the_same_judgement(monkeypatch, knobs, entries) -> None:
    """A tensor over the vocabulary is bounded; a window that would be larger is judged part by part."""
    prompts = left_padded([prompt[: 3 + 5 * i] for i, prompt in enumerate(trace_prompts()[:3])])
    settings = {"max_new_tokens": 16, "eos_token_id": STOP, "seed": 3, "return_dict_in_generate": True} | knobs
    whole = trace_sampler().generate(**prompts, **settings)
    monkeypatch.setattr("apd.decoding.pair.MAX_LOGIT_ENTRIES", entries)
    parts = trace_sampler().generate(**prompts, **settings)
    assert parts.sequences.equal(whole.sequences)
    for ours, theirs in zip(parts.trace, whole.trace, strict=True):
        assert (ours.committed, ours.drafts, ours.steps) == (theirs.committed, theirs.drafts, theirs.steps)
        for name in ("target_probs", "drafter_probs", "verifier_probs"):
            assert getattr(ours, name) == pytest.approx(getattr(theirs, name), abs=1e-5)


@pytest.mark.parametrize("entries", [1, 1500])
def test_no_tensor_over_the_vocabulary_is_larger_than_the_bound(monkeypatch, entries) -> None:
    sizes = []
    head = trace_sampler().drafter.model.lm_head, trace_sampler().verifier.model.lm_head
    hooks = [layer.register_forward_hook(lambda _, __, out: sizes.append(out.numel())) for layer in head]
    prompts = left_padded(trace_prompts()[:3])
    monkeypatch.setattr("apd.decoding.pair.MAX_LOGIT_ENTRIES", entries)
    try:
        trace_sampler().generate(**prompts, max_new_tokens=20, eos_token_id=[])
    finally:
        for hook in hooks:
            hook.remove()
    assert max(sizes) <= max(entries, 3 * trace_sampler().drafter.vocab_size)
