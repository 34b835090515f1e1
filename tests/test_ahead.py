"""Steps that are launched before the host knows where the last one left the rows: the same answers, and no waiting."""

from __future__ import annotations

import functools
import itertools
import statistics
from functools import partial
from typing import Any

import pytest
import torch
from pairs import STOP, left_padded, trace_prompts, trace_sampler
from pretend import GPU, PretendGPU, move

import apd.decoding.loop
from apd import APDSampler, strategies
from apd.decoding.loop import Call, lay_out
from apd.decoding.state import COLUMNS, DecodeState, Reach, Window
from apd.decoding.step import Strategy
from apd.generation.output import Recorder, RowTrace
from apd.models.transformer import run_seated

PROMPTS = [prompt[: 9 + 5 * i] for i, prompt in enumerate(trace_prompts()[:3])]
KNOBS: dict[str, Any] = {"max_new_tokens": 24, "window_size": 5, "kv_window": 4, "eos_token_id": STOP, "seed": 7}


def compiled(sampler: APDSampler) -> APDSampler:
    """Passes in fixed shapes with every row in a seat, and the next step ahead, but nothing is traced."""
    sampler.compile()
    for model in (sampler.drafter, sampler.verifier):
        model.compiled.run = partial(run_seated, model.model, model.causal)
    sampler.fused = lambda function: function
    return sampler


@functools.cache
def on_cpu() -> APDSampler:
    sampler = compiled(trace_sampler.__wrapped__())
    assert not sampler.goes_ahead  # the host is the device
    sampler.goes_ahead = True
    return sampler


@functools.cache
def on_gpu() -> APDSampler:
    sampler = trace_sampler.__wrapped__()
    move(sampler.drafter.model)
    move(sampler.verifier.model)
    return compiled(sampler)


class Watched:
    """Counts the steps that are made, and those of them that are ahead, and looks at these."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = self.ahead = 0
        self.done: set[int] = set()  # rows that were done before the last step
        self.step = apd.decoding.loop.decode_step
        monkeypatch.setattr(apd.decoding.loop, "decode_step", self)

    def __call__(self, state: DecodeState, *, ahead: Window | None = None, **kwargs: Any) -> Any:
        self.made += 1
        done = {row for row, is_done in zip(state.rows.tolist(), state.done.tolist(), strict=True) if is_done}
        assert not done & self.done  # a row rides along once
        self.done = done
        result = self.step(state, ahead=ahead, **kwargs)
        if ahead is not None:
            self.ahead += 1
            width = ahead.columns.shape[1]
            assert width % COLUMNS == 0 or width in (kwargs["window_size"], state.width)
            assert [*ahead.starts] == state.frontier.tolist()
            assert [*ahead.ends] == (state.frontier + ahead.inside.sum(1)).tolist()
        return result


CALLS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"do_sample": True, "top_k": 0},
    "noise by step": {"do_sample": True, "top_k": 0, "noise": "step"},
    "top_p": {"do_sample": True, "top_k": 0, "top_p": 0.8},
    "correction": {"correction": True},
    "rejection": {"do_sample": True, "top_k": 5, "acceptance": "rejection"},
    "the drafter alone": {"mixture_weight": 1.0},
    "no cache": {"kv_window": None},
    "whole window": {"window_size": None},
    "whole window, no cache": {"window_size": None, "kv_window": None},
    "no stop": {"eos_token_id": []},
    "several stops": {"eos_token_id": [STOP, 3, 17, 40]},
    "copies": {"do_sample": True, "top_k": 0, "num_return_sequences": 2},
    "one per step": {"strategy": strategies.LeftToRight(1)},
}
ANY_ORDER: list[Strategy] = [
    strategies.Threshold(0.2),
    strategies.Confidence(2),
    strategies.RandomOrder(2),
    strategies.Blocks(strategies.Threshold(0.3), 4),
    strategies.KLASS(threshold=0.2, kl_threshold=0.5, history=1),
    strategies.WINO(threshold=0.2, revoke_below=0.9, length=5),
]
CALLS |= {type(each).__name__: {"strategy": each, "kv_window": None, "window_size": None} for each in ANY_ORDER}


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("call", CALLS)
def test_answers_are_the_same(monkeypatch: pytest.MonkeyPatch, call: str, rows: int) -> None:
    inputs, settings = left_padded(PROMPTS[:rows]), KNOBS | CALLS[call]
    expected = trace_sampler().generate(**inputs, **settings)
    watched = Watched(monkeypatch)
    assert on_cpu().generate(**inputs, **settings).equal(expected)
    assert watched.ahead > 0


def test_all_steps_but_the_first_are_ahead_and_one_is_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, settings = left_padded(PROMPTS[:1]), KNOBS | {"eos_token_id": []}
    steps = len(trace_sampler().generate(**inputs, **settings, return_dict_in_generate=True).committed_per_step[0])
    watched = Watched(monkeypatch)
    on_cpu().generate(**inputs, **settings)
    assert steps > 5 and (watched.made, watched.ahead) == (steps + 1, steps)


@pytest.mark.parametrize("call", ["greedy", "sampled", "correction", "the drafter alone", "no cache", "one per step"])
def test_nothing_is_waited_for_before_the_next_launch(monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Where a step has left the rows is waited for once, behind the launch of the next step."""
    inputs, settings = left_padded(PROMPTS), KNOBS | {"eos_token_id": []} | CALLS[call]
    expected = trace_sampler().generate(**inputs, **settings)
    counts: list[tuple[int, int]] = []

    def step(*args: Any, ahead: Any = None, **kwargs: Any) -> Any:
        before = gpu.waits.total()
        result = made(*args, ahead=ahead, **kwargs)
        if ahead is not None:
            counts.append((before, gpu.waits.total()))
        return result

    made = apd.decoding.loop.decode_step
    monkeypatch.setattr(apd.decoding.loop, "decode_step", step)
    sampler = on_gpu()
    with PretendGPU() as gpu:
        found = sampler.generate(**{name: value.to(GPU) for name, value in inputs.items()}, **settings)
        assert found.cpu().equal(expected)
    assert len(counts) >= 5 and all(before == behind for before, behind in counts)
    # A row that leaves is rare and may cost more.
    assert statistics.mode(later - behind for (_, behind), (later, _) in itertools.pairwise(counts)) == 1


def test_recording_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited twice per step for the numbers of that step."""
    inputs, settings = left_padded(PROMPTS), KNOBS | {"eos_token_id": []}
    sampler = on_gpu()
    with PretendGPU() as gpu:
        inputs = {name: value.to(GPU) for name, value in inputs.items()}
        waits = []
        for is_recorded in (False, True):
            before = gpu.waits.total()
            sampler.generate(**inputs, **settings, return_dict_in_generate=is_recorded)
            waits.append(gpu.waits.total() - before)
    # Each row's prompt is asked for once, in two numbers and its ids, and at the end there is more to be put together.
    assert waits[1] - waits[0] <= 3 * len(PROMPTS) + 2


def counts(row: RowTrace) -> dict[str, Any]:
    """All of a trace but probabilities, which are rounded."""
    return {name: value for name, value in vars(row).items() if not name.endswith("probs")}


def test_rows_that_join_and_leave_do_not_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [prompt[: 6 + 3 * i] for i, prompt in enumerate(trace_prompts() * 2)]
    settings = KNOBS | {"do_sample": True, "top_k": 0, "temperature": 0.7}
    expected = list(trace_sampler().generate_many(prompts, batch_size=3, **settings))
    watched = Watched(monkeypatch)
    found = list(on_cpu().generate_many(prompts, batch_size=3, **settings))
    for answer, of_plain in zip(found, expected, strict=True):
        assert (answer.index, answer.finish, counts(answer.trace)) == (
            of_plain.index,
            of_plain.finish,
            counts(of_plain.trace),
        )
    assert len(prompts) > 6 and watched.ahead > watched.made / 3


def call_of(sampler: APDSampler, inputs: dict[str, torch.Tensor], settings: dict[str, Any]) -> Call:
    """The arguments of `generate`, checked."""
    knobs = {name: value for name, value in settings.items() if name != "seed"}
    return sampler._call(
        sampler._settings(None, None, knobs),
        inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        seed=settings.get("seed", 0),
        tokenizer=None,
    )


def test_a_row_joins_while_a_step_is_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waited until another row was done, however many steps that took."""
    sampler, settings = on_cpu(), KNOBS | {"eos_token_id": []}
    alone = [sampler.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() for prompt in PROMPTS[:2]]
    calls = [call_of(sampler, left_padded([prompt]), settings) for prompt in PROMPTS[:2]]
    decoding, recorder = sampler._open(calls[0]), Recorder()
    with torch.no_grad():
        for number, (info, after) in enumerate(decoding.steps()):
            recorder.record(info, after)
            if number == 1:
                assert decoding.upcoming is not None
                decoding.join(calls[1].request, torch.tensor([1]))
            if number == 3:
                assert len(after.rows) == 2
    assert [recorder.trace(row).tokens for row in (0, 1)] == alone


@pytest.mark.parametrize("call", CALLS)
def test_what_is_recorded_is_the_same(call: str) -> None:
    inputs, settings = left_padded(PROMPTS), KNOBS | CALLS[call] | {"return_dict_in_generate": True}
    found, expected = (each.generate(**inputs, **settings) for each in (on_cpu(), trace_sampler()))
    assert found.sequences.equal(expected.sequences) and found.drafter_forwards.equal(expected.drafter_forwards)
    assert [counts(row) for row in found.trace] == [counts(row) for row in expected.trace]


WIDE = {"max_new_tokens": 90, "window_size": 40, "eos_token_id": []}


@pytest.mark.parametrize(
    ("rows", "call", "is_ahead"),
    [
        (1, WIDE, True),  # 3 + 40 to 3 + 80 columns, in a pass of 128
        (3, WIDE, False),  # which would be 384 for three rows, and can be 192
        (3, WIDE | {"window_size": 30}, True),
        (1, {"kv_refresh": 8}, False),
        (1, {"window_size": "auto"}, False),
        (1, {"repetition_penalty": 1.2}, False),
        (1, {"strategy": strategies.Autoregressive()}, False),
        (1, {"max_new_tokens": 1}, False),
    ],
)
def test_it_waits_where_it_must_or_where_that_is_cheaper(
    monkeypatch: pytest.MonkeyPatch, rows: int, call: dict[str, Any], is_ahead: bool
) -> None:
    inputs, settings = left_padded(PROMPTS[:rows]), KNOBS | call
    expected = trace_sampler().generate(**inputs, **settings)
    watched = Watched(monkeypatch)
    found = on_cpu().generate(**inputs, **settings)
    assert getattr(found, "sequences", found).equal(getattr(expected, "sequences", expected))
    # Near the end of its row a window is as narrow as it can be.
    assert watched.ahead > watched.made / 2 if is_ahead else watched.ahead < max(watched.made / 2, 1)


def test_a_broken_model_is_told_of_the_step_that_broke(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step behind it is launched before anybody knows, and must not be the one that is blamed."""
    inputs, settings = left_padded(PROMPTS), KNOBS | {"eos_token_id": []}
    messages = []
    for sampler in (trace_sampler(), on_cpu()):
        watched = Watched(monkeypatch)

        def broken(_: Any, __: Any, logits: torch.Tensor, watched: Watched = watched) -> torch.Tensor:
            return logits.fill_(torch.nan) if watched.made > 3 else logits

        handle = sampler.verifier.model.get_output_embeddings().register_forward_hook(broken)
        with pytest.raises(FloatingPointError) as error:
            sampler.generate(**inputs, **settings)
        handle.remove()
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "at step 3" in messages[0]


def test_an_empty_seat_is_no_cheaper_than_a_row() -> None:
    """Three of four rows have left, and one pass is as wide as four: it took twice the columns where one may take all."""
    drafter = on_cpu().drafter
    settings = {"max_new_tokens": 200, "window_size": 40, "kv_window": 4}
    state = lay_out(call_of(on_cpu(), left_padded([PROMPTS[0]] * 4), settings).request, drafter.mask_token_id)
    session = drafter.open(state, 4, None)
    session.span(state, Window.at_frontier(state, 40))
    one = torch.tensor([0])
    session.select(one)
    assert not session.fits(Reach.of(state.select(one).layout, 40))
