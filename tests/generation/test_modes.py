"""What the caller's surroundings may be: the models' mode, gradients, autocast, the default device, copies, the end."""

import copy
import dataclasses
import pickle
import subprocess
import sys

import pytest
import torch
from pairs import left_padded, trace_prompts, trace_sampler
from toy import tiny_pair
from transformers import GenerationConfig, LogitsProcessorList, Qwen2Config, Qwen2ForCausalLM, StoppingCriteriaList
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from apd import KLASS, WINO, APDSampler, Autoregressive, LeftToRight
from apd.decoding.acceptance import Coupling
from apd.decoding.step import APD, PLAIN
from apd.integrations.scoring import sequential_logprobs
from apd.models.loading import as_drafter, as_verifier

PROMPTS = trace_prompts()[:3]
SETTINGS = {"max_new_tokens": 12, "eos_token_id": [], "window_size": 4, "kv_window": 4}


#: Few shapes to compile.
FEW = {"max_new_tokens": 3, "eos_token_id": [], "window_size": 1, "kv_window": 2, "mixture_weight": 1.0}


def own_sampler() -> APDSampler:
    """A pair that no other test shares."""
    return APDSampler(*tiny_pair())


# --- training mode

TINY_PROMPT = torch.tensor([[1, 2, 3]])
CALLS = {
    "generate": lambda s: s.generate(TINY_PROMPT, max_new_tokens=4),
    "stream": lambda s: list(s.stream(TINY_PROMPT, max_new_tokens=4)),
    "generate_many": lambda s: list(s.generate_many([[1, 2, 3]], max_new_tokens=4, on_error=lambda *_: None)),
    "wino": lambda s: s.generate(TINY_PROMPT, max_new_tokens=4, strategy=WINO()),
    "compiled": lambda s: s.compile(backend="eager").generate(TINY_PROMPT, max_new_tokens=4),
    "custom_generate": lambda s: s(s.drafter.model, TINY_PROMPT, generation_config=GenerationConfig(max_new_tokens=4)),
    "loglikelihood": lambda s: list(sequential_logprobs(s.drafter, [([1], [2])], vocab_size=31, batch_size=1)),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_drafter_in_training_is_refused(call) -> None:
    sampler = own_sampler()
    dropout = sampler.drafter.model.model.layers[1].mlp  # one module is enough, as with an adapter that is fresh
    dropout.train()
    with pytest.raises(ValueError, match=r"drafter must be in evaluation mode, got its module `model.layers.1.mlp`.*`model\.eval\(\)`"):  # fmt: skip
        CALLS[call](sampler)
    assert dropout.training and not sampler.drafter.model.training


@pytest.mark.parametrize("strategy", [None, Autoregressive()])
def test_a_verifier_in_training_is_refused_where_it_runs(strategy) -> None:
    sampler = own_sampler()
    sampler.verifier.model.train()
    with pytest.raises(ValueError, match=r"verifier must be in evaluation mode, got the Qwen2ForCausalLM"):
        sampler.generate(TINY_PROMPT, max_new_tokens=4, strategy=strategy)
    with pytest.raises(ValueError, match=r"verifier must be in evaluation mode"):
        as_verifier(sampler.verifier.model)
    sampler.generate(TINY_PROMPT, max_new_tokens=4, strategy=LeftToRight())


@pytest.mark.parametrize("strategy", [LeftToRight(), WINO(length=2)])
def test_training_while_an_iterator_is_suspended_is_noticed(strategy) -> None:
    sampler = own_sampler()
    chunks = sampler.stream(TINY_PROMPT, max_new_tokens=6, strategy=strategy)
    next(chunks)
    sampler.drafter.model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        list(chunks)


# --- rope whose angles depend on the batch


def tiny_with_rope(rope_type: str) -> Qwen2ForCausalLM:
    """64 positions; a rope that scales was trained on 16."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [8.0] * 4, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = {"rope_type": rope_type, "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
    _, verifier = tiny_pair()
    fields = verifier.model.config.to_dict() | {"max_position_embeddings": 64, "rope_parameters": rope | factors}
    return Qwen2ForCausalLM(Qwen2Config(**fields)).eval()


@pytest.mark.parametrize("rope_type", ["default", *ROPE_INIT_FUNCTIONS])
def test_a_position_has_its_angle_whatever_else_is_in_the_batch(rope_type) -> None:
    """Up to the length that rows may have. A rope type of a later transformers that breaks this is to be looked at."""
    model = tiny_with_rope(rope_type)
    model.config.is_causal = False
    limit = as_drafter(model, "dream", mask_token_id=31).max_length
    assert limit == (16 if rope_type == "longrope" else 64)
    rotary, one = model.model.rotary_emb, torch.ones(1)
    short = torch.arange(8)[None]
    before = [each.clone() for each in rotary(one, short)]
    whole = rotary(one, torch.arange(limit)[None])
    for alone, beside, again in zip(before, whole, rotary(one, short), strict=True):
        assert alone.equal(beside[:, :8]) and alone.equal(again)


def test_rows_end_where_the_angles_of_others_would_change() -> None:
    torch.manual_seed(0)
    model = tiny_with_rope("longrope")
    drafter = tiny_pair()[0]
    sampler = APDSampler(drafter, as_verifier(model))
    batch = sampler.generate(
        **left_padded([[1, 2, 3, 4, 5, 6, 7, 8], [3, 1]], pad=0), max_new_tokens=8, eos_token_id=[]
    )
    alone = sampler.generate(torch.tensor([[3, 1]]), max_new_tokens=8, eos_token_id=[])
    assert batch[1, 6:].equal(alone[0])
    with pytest.raises(ValueError, match="the verifier's 16 positions"):
        sampler.generate(torch.tensor([[1] * 9]), max_new_tokens=8)


# --- another default device

DEVICE_CALLS = {
    "sampled": {"do_sample": True, "seed": 1, "top_p": 0.9, "kv_window": 4},
    "penalties": {"repetition_penalty": 1.2, "bad_words_ids": [[5], [6, 7]], "begin_suppress_tokens": [9], "sequence_bias": [[[4], -2.0]]},
    "wino": {"strategy": WINO()},
    "recorded": {"return_dict_in_generate": True, "output_scores": True, "window_size": "auto"},
}  # fmt: skip


@pytest.mark.parametrize("call", DEVICE_CALLS)
def test_another_default_device_changes_nothing(call) -> None:
    """Tensors that are made on the meta device by mistake have no values."""
    settings = {**left_padded(PROMPTS), "max_new_tokens": 6} | DEVICE_CALLS[call]
    results = []
    for device in ("cpu", "meta"):
        with torch.device(device):
            results.append(trace_sampler().generate(**settings))
    ids = [getattr(result, "sequences", result) for result in results]
    assert ids[0].equal(ids[1])


def test_another_default_device_changes_no_iterator() -> None:
    sampler = trace_sampler()
    prompts = left_padded(PROMPTS)
    with torch.device("meta"):
        many = [answer.tokens for answer in sampler.generate_many(PROMPTS, seed=1, **SETTINGS)]
        streamed = [chunk.tokens for chunk in sampler.stream(**prompts, **SETTINGS)]
        scored = list(sequential_logprobs(sampler.drafter, [([1], [2, 3])], vocab_size=100, batch_size=2))
        sampler.generate(torch.ones(1, 1, dtype=torch.int64, device="cpu"), max_new_tokens=2, do_sample=True)
        as_verifier(sampler.verifier.model)
    assert many == [answer.tokens for answer in sampler.generate_many(PROMPTS, seed=1, **SETTINGS)]
    assert any(streamed) and len(scored) == 1


# --- autocast and gradients


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_calls_inside_and_outside_of_autocast_do_not_mix(is_compiled) -> None:
    sampler = APDSampler(*tiny_pair(num_layers=1))
    if is_compiled:
        sampler.compile(backend="eager")
        sampler.kernels = PLAIN

    def run(is_on: bool) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            return sampler.generate(TINY_PROMPT, **FEW)

    first, _, again = run(False), run(True), run(False)
    assert first.equal(again)


@pytest.mark.parametrize("mode", [torch.inference_mode, lambda: torch.autocast("cpu", dtype=torch.bfloat16)])
def test_an_iterator_may_be_resumed_in_another_mode(mode) -> None:
    """What it holds was made in one mode and is written to in the other."""
    sampler = own_sampler()
    answers = sampler.generate_many([[1, 2], [3], [4, 5]], batch_size=2, **SETTINGS)
    remembers = KLASS(threshold=1.0)  # what it saw of every column
    chunks = sampler.stream(TINY_PROMPT, max_new_tokens=4, eos_token_id=[], strategy=remembers)
    with mode():
        next(answers)
        next(chunks)
    assert len(list(answers)) == 2
    assert list(chunks)[-1].done


def test_an_iterator_leaves_no_mode_to_its_caller() -> None:
    sampler = own_sampler()
    iterators = [
        sampler.stream(TINY_PROMPT, **SETTINGS),
        sampler.generate_many([[1], [2]], batch_size=1, **SETTINGS),
        sequential_logprobs(sampler.drafter, [([1], [2, 3])], vocab_size=31, batch_size=1),
    ]
    for iterator in iterators:
        next(iterator)
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert torch.ones(1, requires_grad=True).mul(2).requires_grad


def test_nothing_that_is_recorded_holds_a_graph() -> None:
    sampler = own_sampler()
    for model in (sampler.drafter.model, sampler.verifier.model):
        model.requires_grad_(True)
    output = sampler.generate(TINY_PROMPT, return_dict_in_generate=True, output_logits=True, **SETTINGS)
    assert not any(logits.requires_grad for logits in output.logits)


def tensors_in(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list | dict):
        return [each for part in (value.values() if isinstance(value, dict) else value) for each in tensors_in(part)]
    return tensors_in(vars(value)) if dataclasses.is_dataclass(value) else []


@pytest.mark.parametrize("kv_window", [None, 4])
def test_callbacks_and_the_caller_get_ordinary_tensors(kv_window) -> None:
    """The forward passes run in inference mode, whose tensors no later step, training or hook could write to."""
    seen = []

    def rule(evidence):
        seen.append(evidence)
        return Coupling()(evidence)

    def processor(ids, scores):
        seen.extend((ids, scores))
        return scores

    def criterion(ids, scores, **_):
        seen.append(ids)
        return False

    output = own_sampler().generate(
        TINY_PROMPT,
        **SETTINGS | {"kv_window": kv_window},
        strategy=APD(0.5, rule),
        do_sample=True,
        logits_processor=LogitsProcessorList([processor]),
        stopping_criteria=StoppingCriteriaList([criterion]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    given = tensors_in([*seen, dict(output)])
    assert len(given) > 50 and not any(tensor.is_inference() for tensor in given)


def test_a_model_trains_after_it_has_decoded() -> None:
    sampler = own_sampler()
    model = sampler.drafter.model.requires_grad_(True)
    before = sampler.generate(TINY_PROMPT, **SETTINGS)
    model.train()(TINY_PROMPT).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert sampler.drafter.model.eval() and sampler.generate(TINY_PROMPT, **SETTINGS).equal(before)
    assert not any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))


# --- copies and the end


@pytest.mark.parametrize(
    "copied",
    [pytest.param(copy.deepcopy, marks=pytest.mark.slow), lambda sampler: pickle.loads(pickle.dumps(sampler))],
)
def test_a_compiled_sampler_can_be_copied(copied) -> None:
    sampler = own_sampler().compile(backend="eager")
    expected = sampler.generate(TINY_PROMPT, **FEW)
    twin = copied(sampler)
    assert twin.drafter.model is not sampler.drafter.model
    assert twin.generate(TINY_PROMPT, **FEW).equal(expected)
    for parameter in sampler.drafter.model.parameters():
        parameter.data.zero_()
    assert twin.generate(TINY_PROMPT, **FEW).equal(expected)  # its graphs have weights of their own


@pytest.mark.slow
def test_iterators_that_are_alive_at_the_end_are_quiet() -> None:
    code = """
import torch, apd
from apd.integrations.scoring import sequential_logprobs
sampler = apd.APDSampler.from_included()
answers = sampler.generate_many(apd.EXAMPLE_PROMPTS[:3], max_new_tokens=8, batch_size=1)
chunks = sampler.stream(torch.ones(1, 2, dtype=torch.int64), max_new_tokens=8)
scores = sequential_logprobs(sampler.drafter, [([5], [6, 7])], vocab_size=9, batch_size=1)
print(all(next(each) for each in (answers, chunks, scores)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "True\n"
    assert "Exception ignored" not in result.stderr
