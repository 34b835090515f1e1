"""The library on a GPU that is not there: the answers of the CPU, with every device's rules kept. See `pretend.py`."""

from __future__ import annotations

import functools
import itertools
import statistics
from typing import Any

import pytest
import torch
from pairs import STOP, left_padded, new_tokens, trace_prompts, trace_sampler
from pretend import GPU, PretendGPU, move
from thinned import thinned
from torch import Tensor
from toy import toy
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from apd import EXAMPLE_PROMPTS, APDOutput, APDSampler, IdealListModel, strategies
from apd.decoding.step import decode_step
from apd.decoding.strategy import Strategy


def moved(sampler: APDSampler) -> APDSampler:
    move(sampler.drafter.model)
    move(sampler.verifier.model)
    return sampler


@functools.cache
def on_gpu() -> APDSampler:
    return moved(trace_sampler.__wrapped__())


@functools.cache
def included() -> APDSampler:
    return APDSampler.from_included()


@functools.cache
def included_on_gpu() -> APDSampler:
    return moved(APDSampler.from_included())


PROMPTS = [prompt[: 4 + 5 * i] for i, prompt in enumerate(trace_prompts()[:3])]
BATCH = left_padded(PROMPTS)
KNOBS = {"max_new_tokens": 6, "window_size": 4, "eos_token_id": STOP, "seed": 3}


def to(device: Any, value: Any) -> Any:
    """A call's tensors there."""
    return {name: v.to(device) if isinstance(v, Tensor) else v for name, v in value.items()}


def at_home(output: APDOutput) -> dict[str, Any]:
    """All that a call returned, on the CPU, in forms that can be compared."""
    scores = {name: torch.stack(output[name]).cpu() for name in ("scores", "logits") if name in output}
    trace = [vars(row) for row in output.trace]
    return {name: v.cpu() for name, v in output.items() if isinstance(v, Tensor)} | scores | {"trace": trace}


class LongerThan(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] > self.length, device=input_ids.device)


SAMPLED = {"do_sample": True, "top_k": 0}
CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {**SAMPLED, "temperature": 0.7},
    "top_k": {**SAMPLED, "top_k": 5},
    "top_p": {**SAMPLED, "top_p": 0.8},
    "wide top_p": {**SAMPLED, "top_p": 0.999, "temperature": 3.0},
    "min_p": {**SAMPLED, "min_p": 0.05},
    "typical_p": {**SAMPLED, "typical_p": 0.9},
    "cutoffs": {**SAMPLED, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3},
    "noise by step": {**SAMPLED, "noise": "step"},
    "correction": {**SAMPLED, "correction": True},
    "rejection": {**SAMPLED, "acceptance": "rejection"},
    "first token judged": {**SAMPLED, "correction": True, "first": "judge", "mixture_weight": 0.0},
    "rejection with top_k": {**SAMPLED, "top_k": 5, "acceptance": "rejection"},
    "threshold": {"acceptance_threshold": 0.3},
    "the drafter alone": {"mixture_weight": 1.0},
    "kv_window": {"kv_window": 4},
    "kv_refresh": {"kv_window": 1, "kv_refresh": 4},
    "auto": {"window_size": "auto", "max_new_tokens": 18},
    "whole window": {"window_size": None, "kv_window": 2},
    "scores": {"output_scores": True, "output_logits": True},
    "copies": {**SAMPLED, "num_return_sequences": 2},
    "seeds": {**SAMPLED, "seed": [5, 6, 7]},
    "several stops": {"eos_token_id": [STOP, 3, 17, 40]},
    "no stop": {"eos_token_id": []},
    "processors": {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "bad_words_ids": [[3], [4, 5]],
        "sequence_bias": [[[7], 1.0]],
    },
    "processors without history": {"suppress_tokens": [3, 4], "begin_suppress_tokens": [9, 10], "min_new_tokens": 4},
    "grammar": {"prefix_allowed_tokens_fn": lambda row, ids: list(range(int(ids[-1]) % 2, 60, 2))},
    "criteria": {"stopping_criteria": [LongerThan(14)]},
    "out of time": {"max_time": 1e-9},
}
STRATEGIES = [
    strategies.LeftToRight(2),
    strategies.RandomOrder(2),
    strategies.Confidence([2, 3]),
    strategies.Margin(2),
    strategies.Entropy(2),
    strategies.Threshold(0.2),
    strategies.Factor(),
    strategies.EntropyBound(2.0),
    strategies.OneStep(),
    strategies.Blocks(strategies.Threshold(0.3), 4),
    strategies.ConfidentPrefix(0.2),
    strategies.EntropyThreshold(2.0),
    strategies.Seeded(strategies.Threshold(0.3), 3, by="verifier"),
    strategies.Autoregressive(),
    strategies.KLASS(threshold=0.2, kl_threshold=0.5, history=1),
    strategies.WINO(threshold=0.2, revoke_below=0.9, length=5),
]
CALLS |= {type(strategy).__name__: {"strategy": strategy} for strategy in STRATEGIES}
# What differs in a number or in a function of transformers only from a call that is not here.
ALIKE = {"temperature", "top_k", "min_p", "typical_p", "cutoffs", "correction", "rejection", "threshold"}
ALIKE |= {"the drafter alone", "kv_refresh", "seeds", "several stops", "no stop"}
ALIKE |= {"Confidence", "Margin", "Entropy", "OneStep"}


@pytest.mark.parametrize(
    "call",
    [
        *thinned([call for call in CALLS if call not in ALIKE], 2),
        *(pytest.param(call, marks=pytest.mark.slow) for call in CALLS if call in ALIKE),
    ],
)
def test_a_gpu_gives_the_answers_of_the_cpu(call: str) -> None:
    """Everything that a call returns; ids that come on the device stay there."""
    settings, sampler = KNOBS | CALLS[call], on_gpu()
    expected = trace_sampler().generate(**BATCH, **settings, return_dict_in_generate=True)
    with PretendGPU():
        output = sampler.generate(**to(GPU, BATCH), **settings, return_dict_in_generate=True)
        assert output.sequences.device == output.new_tokens.device == GPU
        found = at_home(output)
    torch.testing.assert_close(found, at_home(expected), rtol=1e-3, atol=1e-5)


WAITING_ONCE = ["kv_window", "wide top_p", "correction", "rejection", "Threshold", "Blocks", "KLASS", "Autoregressive"]
WAITING_ONCE += ["LeftToRight", "Confidence"]  # `tokens_per_step` was copied, and waited for, at every step
WAITING_ONCE += ["processors without history"]  # and the tokens that these remove


@pytest.mark.parametrize("call", thinned(WAITING_ONCE, 2))
def test_a_step_waits_for_the_gpu_once(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """For the layout of its rows; blocking copies to the GPU count too."""
    sampler, counts = on_gpu(), []
    long = {"max_new_tokens": 9, "window_size": 3, "eos_token_id": []}

    def step(*args: Any, **kwargs: Any) -> Any:
        counts.append(gpu.waits.total())
        return decode_step(*args, **kwargs)

    monkeypatch.setattr("apd.decoding.loop.decode_step", step)
    with PretendGPU() as gpu:
        sampler.generate(**to(GPU, BATCH), **KNOBS | CALLS[call] | long)
    # A row that leaves is rare and may cost more.
    assert statistics.mode(after - before for before, after in itertools.pairwise(counts)) == 1


def test_recording_waits_twice_per_step() -> None:
    """For the numbers and for the probabilities of a step."""
    sampler, settings = on_gpu(), KNOBS | {"max_new_tokens": 9, "eos_token_id": []}
    with PretendGPU() as gpu:
        inputs, waits = to(GPU, BATCH), []
        for is_recorded in (False, True):
            before = gpu.waits.total()
            output = sampler.generate(**inputs, **settings, return_dict_in_generate=is_recorded)
            waits.append(gpu.waits.total() - before)
        steps = int(output.drafter_forwards.max())
    # Each row's prompt is read once, in two numbers and its ids, and the end puts more together.
    assert waits[1] - waits[0] <= 2 * steps + 3 * len(PROMPTS) + 2


@pytest.mark.parametrize("which", ["drafter", "verifier"])
@pytest.mark.parametrize("call", [{}, {"kv_window": 2, **SAMPLED}], ids=str)
@pytest.mark.slow
def test_one_model_may_stay_on_the_cpu(which: str, call: dict[str, Any]) -> None:
    sampler = trace_sampler.__wrapped__()
    move(getattr(sampler, which).model)
    expected = trace_sampler().generate(**BATCH, **KNOBS | call)
    with PretendGPU():
        assert sampler.generate(**to(GPU, BATCH), **KNOBS | call).tolist() == expected.tolist()


@pytest.mark.parametrize("strategy", [None, STRATEGIES[-1]], ids=str)
def test_exact_models_run_where_their_answers_are(strategy: Strategy | None) -> None:
    def answers(device: Any) -> list[list[int]]:
        model = IdealListModel(toy().answers.to(device), toy().weights.to(device))
        sampler = APDSampler(model.drafter, model.verifier, strategy=strategy)
        return sampler.generate(
            torch.tensor([[0, 1], [2, 0]]).to(device), max_new_tokens=4, seed=3, **SAMPLED
        ).tolist()

    with PretendGPU():
        assert answers(GPU) == answers("cpu")


def test_the_pretended_gpu_keeps_the_rules_of_a_real_one() -> None:
    with PretendGPU() as gpu:
        x = torch.arange(6, device="cuda").view(2, 3)
        assert x.device == x[1:].device == torch.zeros_like(x).device == (x + torch.tensor(1)).device == GPU
        assert (x[1] * 2).tolist() == x.cpu()[1].mul(2).tolist() == [6, 8, 10]
        for refused in (
            lambda: x + torch.arange(3),
            lambda: x.gather(1, torch.tensor([[0]])),
            lambda: torch.cat([x.cpu(), x]),
            lambda: torch.arange(6)[x],
            lambda: torch.isin(x, torch.tensor([1, 2])),
        ):
            with pytest.raises(RuntimeError, match="cuda:0 and cpu"):
                refused()
        with pytest.raises(TypeError, match="cpu"):
            x.numpy()
        for work, waits in (
            (lambda: x.sum() > 3, 0),
            (lambda: torch.tensor([1]).to(GPU, non_blocking=True), 0),
            (lambda: bool(x.sum() > 3), 1),
            (lambda: torch.tensor([1], device=GPU), 1),
            (lambda: x[x > 3], 1),
            (lambda: x[torch.tensor([1])], 1),
            (lambda: x[[1, 0]], 1),
            (lambda: x.tolist(), 1),
        ):
            before = gpu.waits.total()
            work()
            assert gpu.waits.total() - before == waits


@pytest.mark.parametrize("call", [{}, {"do_sample": True, "kv_window": 4}], ids=str)
@pytest.mark.slow
def test_prompts_may_come_on_the_cpu(call: dict[str, Any]) -> None:
    """Ids, mask and seeds; the answer is on the models' device."""
    sampler, seeds = on_gpu(), torch.tensor([5, 6, 7])
    expected = trace_sampler().generate(**BATCH, **KNOBS | call | {"seed": seeds})
    with PretendGPU():
        answer = sampler.generate(**BATCH, **KNOBS | call | {"seed": seeds})
        assert answer.device == GPU
        assert answer.tolist() == expected.tolist()
        answer = sampler.generate(BATCH["input_ids"], attention_mask=BATCH["attention_mask"].to(GPU), **KNOBS)
        assert answer.device == GPU


@pytest.mark.parametrize(
    "call",
    thinned(
        [{"kv_window": 4, **SAMPLED}, {}, {"window_size": "auto"}, *({"strategy": s} for s in STRATEGIES[-2:])], 2
    ),
    ids=str,
)
@pytest.mark.slow
def test_prompts_come_and_go(call: dict[str, Any]) -> None:
    sampler = on_gpu()

    def answers(sampler: APDSampler, prompts: list[Any]) -> list[list[int]]:
        settings = KNOBS | {"batch_size": 2} | call
        return [answer.tokens for answer in sampler.generate_many(prompts, **settings)]

    expected = answers(trace_sampler(), PROMPTS)
    with PretendGPU():
        # However they come.
        assert answers(sampler, [PROMPTS[0], *(torch.tensor(prompt).to(GPU) for prompt in PROMPTS[1:])]) == expected


def test_text_streams() -> None:
    here, there = included(), included_on_gpu()
    inputs = here.tokenizer(EXAMPLE_PROMPTS[:2], return_tensors="pt", padding=True)
    expected = list(here.stream(**inputs, max_new_tokens=16))
    with PretendGPU():
        assert list(there.stream(**to(GPU, inputs), max_new_tokens=16)) == expected


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.all: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.all.append(value.numpy().tolist())

    put_draft = put

    def end(self) -> None:
        self.all.append("end")


def test_streamers_hear_tokens_on_the_cpu() -> None:
    """Those of transformers make lists or arrays of them."""
    sampler, here, there = on_gpu(), Heard(), Heard()
    prompt = torch.tensor(PROMPTS[:1])
    trace_sampler().generate(prompt, **KNOBS, streamer=here)
    with PretendGPU():
        sampler.generate(prompt.to(GPU), **KNOBS, streamer=there)
    assert there.all == here.all


@pytest.mark.parametrize("stop", [["."], ["a", " t"]], ids=str)
def test_stop_strings(stop: list[str]) -> None:
    here, there = included(), included_on_gpu()
    inputs = here.tokenizer(EXAMPLE_PROMPTS[:3], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 24, "stop_strings": stop}
    expected = here.generate(**inputs, **settings)
    with PretendGPU():
        assert there.generate(**to(GPU, inputs), **settings).tolist() == expected.tolist()


def test_generate_of_transformers() -> None:
    """Its own arguments come prepared, on the device, or as it makes them."""
    here, there = included(), included_on_gpu()
    inputs = here.tokenizer(EXAMPLE_PROMPTS[:2], return_tensors="pt", padding=True)
    settings = {"max_new_tokens": 12, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "min_new_tokens": 2}
    expected = here.drafter.model.generate(**inputs, **settings, custom_generate=here)
    with PretendGPU():
        model = there.drafter.model
        assert model.generate(**to(GPU, inputs), **settings, custom_generate=there).tolist() == expected.tolist()


@pytest.mark.parametrize(
    "knobs", thinned([{"kv_window": 4}, {"kv_window": None}, {"kv_window": 1, "kv_refresh": 8}]), ids=str
)
@pytest.mark.slow
def test_compiled_passes(knobs: dict[str, Any]) -> None:
    """Everything around the graphs, which are not made here: a mode of dispatch is no part of one."""
    sampler = moved(trace_sampler.__wrapped__())
    settings = KNOBS | knobs

    def answers(sampler: APDSampler, batch: dict[str, Tensor]) -> list[list[int]]:
        whole = sampler.generate(**batch, **settings, return_dict_in_generate=True)
        return new_tokens(whole) + [
            answer.tokens for answer in sampler.generate_many(PROMPTS, **settings, batch_size=2)
        ]

    expected = answers(trace_sampler(), BATCH)
    with PretendGPU(), torch.compiler.set_stance("force_eager"):
        assert answers(sampler.compile(), to(GPU, BATCH)) == expected
