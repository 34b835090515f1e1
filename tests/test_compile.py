"""Compiled passes: the plain path's tokens, in a few shapes, whoever comes and goes."""

import pytest
import torch
from pairs import STOP, left_padded, new_tokens, trace_prompts, trace_sampler

from apd import APDSampler, IdealListModel


class Counting:
    """A backend that runs the graph as it is and counts how often one was made."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph, example_inputs):
        self.count += 1
        return graph.forward


def compiled() -> tuple[APDSampler, Counting]:
    torch._dynamo.reset()
    backend = Counting()
    # Not the models that all tests share.
    return trace_sampler.__wrapped__().compile(backend=backend, fullgraph=True), backend


PROMPTS = [prompt[: 3 + 5 * i] for i, prompt in enumerate(trace_prompts())]


@pytest.mark.parametrize("knobs", [{"kv_window": 4}, {"kv_window": None}, {"kv_window": 1, "kv_refresh": 8}], ids=str)
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True, "top_k": 0}], ids=["greedy", "sampled"])
def test_compiled_passes_give_the_same_tokens(knobs, sampling) -> None:
    settings = {"max_new_tokens": 24, "eos_token_id": STOP, "window_size": 6} | knobs | sampling
    sampler, backend = compiled()

    def answers(sampler: APDSampler) -> list[list[int]]:
        batch = sampler.generate(
            **left_padded(PROMPTS), seed=list(range(len(PROMPTS))), return_dict_in_generate=True, **settings
        )
        many = sampler.generate_many(PROMPTS * 2, batch_size=3, seed=3, **settings)
        return new_tokens(batch) + [answer.tokens for answer in many]

    assert answers(sampler) == answers(trace_sampler())
    assert backend.count > 0


def test_a_second_call_compiles_nothing() -> None:
    """A graph is tied to the memory of its cache, which the next call takes over, and to shapes, which do not change."""
    sampler, backend = compiled()
    settings = {"max_new_tokens": 24, "eos_token_id": [], "window_size": 6, "kv_window": 4}
    for prompt in (PROMPTS[1], PROMPTS[2], PROMPTS[3]):
        sampler.generate(torch.tensor([prompt]), **settings)
        first, memory = backend.count, sampler.drafter.compiled.caches[-1].cache.layers[0].keys
        sampler.generate(torch.tensor([prompt]), **settings)
        assert backend.count == first
        assert sampler.drafter.compiled.caches[-1].cache.layers[0].keys is memory


def test_calls_beside_each_other_have_caches_of_their_own() -> None:
    sampler, _ = compiled()
    settings = {"max_new_tokens": 24, "eos_token_id": [], "window_size": 6, "kv_window": 4}
    prompts = [torch.tensor([prompt]) for prompt in PROMPTS[:2]]
    alone = [[c.tokens for c in trace_sampler().stream(prompt, **settings)] for prompt in prompts]
    streams = [sampler.stream(prompt, **settings) for prompt in prompts]
    together = [[], []]
    for pair in zip(*streams, strict=False):
        for tokens, chunk in zip(together, pair, strict=True):
            tokens.append(chunk.tokens)
    for tokens, expected in zip(together, alone, strict=True):
        assert tokens == expected[: len(tokens)] and len(tokens) > 1


def test_a_model_that_is_not_neural_is_refused() -> None:
    ideal = IdealListModel.shuffle(3)
    with pytest.raises(TypeError, match="`drafter` must be a transformers model"):
        APDSampler(ideal.drafter, ideal.verifier).compile()


def test_a_longer_prompt_that_joins_outgrows_the_cache() -> None:
    """Prompts that crossed 256 columns broke the run: the wider cache had no rows yet when it was filled."""
    sampler, _ = compiled()
    prompts = [PROMPTS[1], PROMPTS[2], (trace_prompts()[0] * 30)[:300], PROMPTS[3]]
    settings = {"batch_size": 2, "seed": 0, "kv_window": 4, "max_new_tokens": 12, "eos_token_id": [], "window_size": 6}
    answers = [
        [answer.tokens for answer in each.generate_many(prompts, **settings)] for each in (sampler, trace_sampler())
    ]
    assert answers[0] == answers[1]


def test_what_broke_one_call_does_not_break_the_next() -> None:
    """Memory that is used again held NaN, which a mask does not keep out of a product with 0."""
    sampler, _ = compiled()
    settings = {"kv_window": 4, "max_new_tokens": 12, "eos_token_id": [], "window_size": 6}
    short, long = torch.tensor([PROMPTS[1]]), torch.tensor([(trace_prompts()[0] * 30)[:200]])
    expected = sampler.generate(short, **settings)
    weight = sampler.drafter.model.model.layers[0].self_attn.v_proj.weight.data
    kept = weight.clone()
    weight.fill_(torch.nan)
    with pytest.raises(FloatingPointError):
        sampler.generate(long, **settings)
    weight.copy_(kept)
    assert sampler.generate(short, **settings).equal(expected)


def test_memory_that_is_used_again_suits_the_call() -> None:
    sampler, _ = compiled()
    settings = {"kv_window": 4, "max_new_tokens": 12, "eos_token_id": [], "window_size": 6}
    prompt = torch.tensor([PROMPTS[1]])
    with torch.inference_mode():
        first = sampler.generate(prompt, **settings)
    assert sampler.generate(prompt, **settings).equal(first)
    for model in (sampler.drafter.model, sampler.verifier.model):
        model.double()
    assert sampler.generate(prompt, **settings).equal(first)
