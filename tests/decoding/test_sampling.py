"""Shortlists of tokens are what transformers' warpers leave, and parts of a window are judged as the whole is."""

import pytest
import torch
from pairs import STOP, left_padded, trace_prompts, trace_sampler
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

from apd.decoding.noise import Noise
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


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_a_shortlist_is_what_transformers_warpers_leave(chain, scale) -> None:
    logits = torch.randn(2, 3, 1000, generator=torch.Generator().manual_seed(0)) * scale
    logits[..., 7] = -torch.inf
    logits[1, 1, 9:] = -torch.inf  # fewer tokens than top-k wants
    logprobs = logits.log_softmax(-1)
    sampling = Sampling(LogitsProcessorList(chain), greedy=False)
    expected = sampling.warpers(None, logprobs.flatten(0, 1)).view_as(logprobs)
    scores = sampling.warp(logprobs)
    torch.testing.assert_close(scores.dense(1000), expected)
    noise = [Noise(torch.arange(2), torch.arange(3).expand(2, -1), torch.zeros(2).long(), 0) for _ in range(2)]
    assert sampling.sample(scores, noise[0]).tokens.equal(sampling.sample(Scores(expected), noise[1]).tokens)


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
    [
        {},
        {"correction": True, "acceptance_threshold": 0.2},
        {"mixture_weight": 1.0},
        {"mixture_weight": 0.0, "kv_window": 3, "window_size": 7},
        {"do_sample": True, "top_k": 0},
        {"do_sample": True, "acceptance": "rejection", "top_k": 20},
    ],
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
