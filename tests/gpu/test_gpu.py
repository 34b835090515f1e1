"""Compiled decoding on a GPU: the tokens of eager decoding, nothing compiled twice, and shorter steps.

What does not measure time runs on the CPU too (marked `slow`), with the traced graphs as they are.
"""

import statistics
import time

import pytest
import torch
from pairs import STOP, left_padded, new_tokens, trace_prompts, trace_sampler
from toy import tiny_pair

from apd import APDSampler

CPU = pytest.param("cpu", marks=pytest.mark.slow)
CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
OPTIONS = {"cpu": {"backend": "eager"}, "cuda": {}}  # on a GPU the default, which records CUDA graphs
PROMPTS = [prompt[: 3 + 5 * i] for i, prompt in enumerate(trace_prompts())]
SETTINGS = {"max_new_tokens": 24, "eos_token_id": STOP, "window_size": 6, "return_dict_in_generate": True}


def on(device: str, sampler: APDSampler) -> APDSampler:
    for model in (sampler.drafter.model, sampler.verifier.model):
        model.to(device)
    return sampler


def traced_pair(device: str, *, is_compiled: bool) -> APDSampler:
    """The lightly trained pair, in float32: rounding tips no decision."""
    sampler = on(device, trace_sampler.__wrapped__())
    return sampler.compile(**OPTIONS[device]) if is_compiled else sampler


def deep_pair(device: str, *, is_compiled: bool) -> APDSampler:
    """Small matrices in many layers: launching a kernel takes longer than running it."""
    sampler = on(device, APDSampler(*tiny_pair(num_layers=12)))
    return sampler.compile(**OPTIONS[device]) if is_compiled else sampler


def batch(device: str, num_rows: int = 3) -> dict[str, torch.Tensor]:
    return {name: value.to(device) for name, value in left_padded(PROMPTS[:num_rows]).items()}


def seconds_per_step(sampler: APDSampler) -> float:
    prompt = torch.tensor([[3, 14, 15]], device=sampler.drafter.device)
    start = time.perf_counter()
    output = sampler.generate(
        prompt, max_new_tokens=64, eos_token_id=[], window_size=8, kv_window=4, return_dict_in_generate=True
    )
    output.sequences.tolist()  # waits for the device
    return (time.perf_counter() - start) / len(output.committed_per_step[0])


@pytest.fixture(autouse=True)
def no_earlier_graphs() -> None:
    """Dynamo compiles a function a limited number of times per process."""
    torch._dynamo.reset()


@pytest.mark.parametrize("device", [CPU, CUDA])
@pytest.mark.parametrize(
    "knobs",
    [{"kv_window": 4}, {"kv_window": None}, {"kv_window": 4, "do_sample": True, "top_k": 0, "seed": 0}],
    ids=str,
)
def test_compiled_tokens_equal_eager_ones(device, knobs) -> None:
    eager, compiled = (
        traced_pair(device, is_compiled=is_compiled).generate(**batch(device), **SETTINGS, **knobs)
        for is_compiled in (False, True)
    )
    assert new_tokens(compiled) == new_tokens(eager)
    assert compiled.committed_per_step == eager.committed_per_step


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_a_second_call_recompiles_nothing(device) -> None:
    sampler = traced_pair(device, is_compiled=True)
    first = sampler.generate(**batch(device), **SETTINGS, kv_window=4)
    with torch.compiler.set_stance("fail_on_recompile"):
        second = sampler.generate(**batch(device), **SETTINGS, kv_window=4)
        with pytest.raises(RuntimeError, match="recompil"):  # another batch size needs another graph
            sampler.generate(**batch(device, 2), **SETTINGS, kv_window=4)
    assert new_tokens(second) == new_tokens(first)


@pytest.mark.gpu
def test_a_compiled_step_is_faster_than_an_eager_one() -> None:
    eager, compiled = (deep_pair("cuda", is_compiled=is_compiled) for is_compiled in (False, True))
    for _ in range(3):  # compiles, warms up and records
        seconds_per_step(eager), seconds_per_step(compiled)
    seconds = [(seconds_per_step(eager), seconds_per_step(compiled)) for _ in range(9)]
    of_eager, of_compiled = map(statistics.median, zip(*seconds, strict=True))
    assert of_compiled < of_eager
