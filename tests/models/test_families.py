"""Every family end to end: ragged batches, caches and counts on checkpoints in exactly the published formats."""

import pytest
import torch
from pairs import TRACES, left_padded, new_tokens, trace_prompts, trace_sampler
from reference import reference_generate
from transformers import GPT2Config, GPT2LMHeadModel

from apd import APDSampler

FIXTURES = TRACES.parent
DRAFTERS = {
    "dream": TRACES / "models/dream",
    "llada": TRACES / "models/llada",
    "a2d-qwen3": FIXTURES / "parity_a2d_qwen3",
}


@pytest.fixture(scope="module", params=DRAFTERS)
def sampler(request):
    mask_token_id = 60 if request.param == "a2d-qwen3" else None  # dllm takes it from the tokenizer
    return APDSampler.from_pretrained(
        str(DRAFTERS[request.param]), str(TRACES / "models/verifier"), mask_token_id=mask_token_id
    )


def prompts_of(sampler):
    """The recorded prompts, kept below the smaller vocabularies."""
    return [[token % 59 for token in prompt] for prompt in trace_prompts()]


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
@pytest.mark.parametrize("knobs", [{}, {"window_size": 5, "correction": True}])
def test_a_ragged_batch_equals_the_slow_reference(sampler, temperature, knobs):
    prompts, seeds = prompts_of(sampler)[::2], [7, 9, 11]
    stop = sampler.drafter.generation_config.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {}
    output = sampler.generate(
        **left_padded(prompts), max_new_tokens=20, seed=seeds, return_dict_in_generate=True, **sampling, **knobs
    )
    for prompt, seed, tokens, counts in zip(
        prompts, seeds, new_tokens(output), output.committed_per_step, strict=True
    ):
        expected = reference_generate(
            sampler.drafter,
            sampler.verifier,
            prompt,
            max_new_tokens=20,
            mixture_weight=0.5,
            temperature=temperature,
            seed=seed,
            stop=stop,
            **knobs,
        )
        assert (tokens, counts) == expected


def test_a_wide_kv_window_is_exact(sampler):
    common = {**left_padded(prompts_of(sampler)), "max_new_tokens": 20, "window_size": 6}
    assert torch.equal(sampler.generate(**common), sampler.generate(**common, kv_window=64))


def test_a_narrow_kv_window_feeds_what_it_says(sampler):
    fed = []
    embeddings = sampler.drafter.model.get_input_embeddings()
    hook = embeddings.register_forward_hook(lambda _, args, __: fed.append(args[0].shape[1]))
    try:
        output = sampler.generate(
            torch.tensor([prompts_of(sampler)[2]]), max_new_tokens=20, window_size=4, kv_window=2, eos_token_id=[],
            return_dict_in_generate=True,
        )  # fmt: skip
    finally:
        hook.remove()
    counts = output.committed_per_step[0]
    assert len(fed) == len(counts) > 1
    assert all(span <= 4 + count + 1 for span, count in zip(fed[1:], counts, strict=False))


def test_a_verifier_with_learned_positions_decodes_to_its_last_one():
    """The fillers of a ragged batch need positions that a table of learned positions has."""
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=160, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    sampler = APDSampler(trace_sampler().drafter, gpt2)
    batch = sampler.generate(
        **left_padded(trace_prompts()), max_new_tokens=8, eos_token_id=None, return_dict_in_generate=True
    )
    for i, prompt in enumerate(trace_prompts()):
        alone = sampler.generate(
            torch.tensor([prompt]), max_new_tokens=8, eos_token_id=None, return_dict_in_generate=True
        )
        assert new_tokens(batch)[i] == new_tokens(alone)[0]


def test_bfloat16_decodes_and_mostly_agrees():
    """Rounding may tip a decision; the agreement with float32 is reported, and must not be accidental."""
    half = APDSampler.from_pretrained(
        str(TRACES / "models/dream"), str(TRACES / "models/verifier"), dtype=torch.bfloat16
    )
    assert half.drafter.model.dtype == torch.bfloat16
    common = {**left_padded(trace_prompts()), "max_new_tokens": 16, "eos_token_id": [], "kv_window": 4}
    full = trace_sampler().generate(**common)
    same = (half.generate(**common) == full)[:, -16:].float().mean().item()
    print(f"tokens that agree between bfloat16 and float32: {same:.0%}")
    assert same > 0.5
