"""The laws of decoding that need no exact model. Names follow the design: law 1 to 5, 8 and 10."""

import itertools
import json

import pytest
import torch
from pairs import STOP, TRACES, left_padded, new_tokens, trace_prompts, trace_sampler
from reference import reference_generate
from thinned import thinned

from apd import LeftToRight

SAMPLED = {"do_sample": True, "top_k": 0}


def generate(prompts, *, width=None, max_new_tokens=24, eos_token_id=STOP, **kwargs):
    return trace_sampler().generate(
        **left_padded(prompts, width),
        max_new_tokens=max_new_tokens,
        eos_token_id=eos_token_id,
        return_dict_in_generate=True,
        **kwargs,
    )


@pytest.mark.parametrize(
    "sampling", [{}, SAMPLED | {"temperature": 0.7}, SAMPLED | {"temperature": 1.5, "top_p": 0.8}]
)
@pytest.mark.parametrize("window_size", [None, 5])
def test_law_1_weight_one_accepts_the_whole_window(sampling, window_size):
    for seed in range(3):
        output = generate(
            trace_prompts(), mixture_weight=1.0, window_size=window_size, eos_token_id=[], seed=seed, **sampling
        )
        expected = [24] if window_size is None else [5, 5, 5, 5, 4]
        assert output.committed_per_step == [expected] * len(trace_prompts())
        assert output.verifier_forwards.tolist() == [0] * len(trace_prompts())


def test_law_1_a_window_that_is_always_accepted_grows_to_what_is_left():
    output = generate(
        trace_prompts(), max_new_tokens=90, mixture_weight=1.0, window_size="auto", eos_token_id=[], **SAMPLED
    )
    assert output.committed_per_step == [[16, 40, 34]] * len(trace_prompts())  # a pace of 8, then of (8 + 2·16) / 2


def test_law_1_the_target_is_the_draft_bit_for_bit():
    output = generate(trace_prompts(), max_new_tokens=8, mixture_weight=1.0)
    assert all(row.target_probs == row.drafter_probs for row in output.trace)


@pytest.mark.parametrize("correction", [False, True])
@pytest.mark.parametrize("sampling", [{}, SAMPLED | {"temperature": 1.0}])
def test_law_2_raising_the_threshold_never_lengthens_a_step(correction, sampling):
    """Compared on the same state: the first step of many prompts and seeds."""
    thresholds = [0.0, 0.1, 0.3, 0.6, 0.9, 1.0]
    longest_first_steps = []
    for threshold in thresholds:
        chunks = trace_sampler().stream(
            **left_padded(trace_prompts() * 5),
            max_new_tokens=24,
            acceptance_threshold=threshold,
            correction=correction,
            seed=3,
            eos_token_id=[],
            **sampling,
        )
        longest_first_steps.append([len(chunk.tokens) for chunk in itertools.islice(chunks, 30)])
    for lower, higher in itertools.pairwise(longest_first_steps):
        assert all(h <= low for low, h in zip(lower, higher, strict=True))
    assert longest_first_steps[0] != longest_first_steps[-1]


@pytest.mark.parametrize("correction", [False, True])
def test_law_2_threshold_one_is_one_token_per_step(correction):
    output = generate(
        trace_prompts(), acceptance_threshold=1.0, correction=correction, eos_token_id=[], seed=0, **SAMPLED
    )
    assert output.committed_per_step == [[1] * 24] * len(trace_prompts())
    sequential = generate(trace_prompts(), strategy=LeftToRight(1), eos_token_id=[], seed=0, **SAMPLED)
    assert torch.equal(output.sequences, sequential.sequences)


@pytest.mark.parametrize("correction", [False, True])
def test_law_2_every_token_beyond_the_first_reaches_the_threshold(correction):
    output = generate(trace_prompts(), acceptance_threshold=0.4, correction=correction, seed=0, **SAMPLED)
    beyond = [
        p
        for row in output.trace
        for p, step, before in zip(row.target_probs[1:], row.steps[1:], row.steps, strict=False)
        if step == before
    ]
    assert beyond
    assert min(beyond) >= 0.4


@pytest.mark.parametrize("mixture_weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_law_3_window_one_asks_for_one_mask_at_a_time(mixture_weight, sampling):
    common = {"window_size": 1, "max_new_tokens": 12, "seed": 1} | sampling
    output = generate(trace_prompts(), mixture_weight=mixture_weight, **common)
    alone = generate(trace_prompts(), strategy=LeftToRight(1), **common)
    assert torch.equal(output.sequences, alone.sequences)
    assert all(count == 1 for row in output.committed_per_step for count in row)


@pytest.mark.parametrize("knobs", [{}, {"window_size": 6}, {"correction": True, "mixture_weight": 0.3}])
@pytest.mark.parametrize("sampling", thinned([SAMPLED, {}], 2))
def test_law_4_a_window_over_the_whole_row_is_exact(knobs, sampling):
    exact = generate(trace_prompts(), seed=5, **knobs, **sampling)
    windowed = generate(trace_prompts(), seed=5, kv_window=24 + 24, **knobs, **sampling)
    assert torch.equal(exact.sequences, windowed.sequences)
    assert exact.committed_per_step == windowed.committed_per_step


@pytest.mark.parametrize("sampling", thinned([SAMPLED, {}], 2))
@pytest.mark.parametrize("knobs", [{}, {"window_size": 6, "mixture_weight": 0.2}, {"strategy": LeftToRight(2)}])
def test_law_4_a_row_that_is_always_refreshed_is_exact(knobs, sampling):
    common = {"max_new_tokens": 16, "seed": 5} | knobs | sampling
    exact = generate(trace_prompts(), **common)
    for kv_window in (1, 4):
        refreshed = generate(trace_prompts(), kv_window=kv_window, kv_refresh=1, **common)
        assert torch.equal(exact.sequences, refreshed.sequences)
        assert exact.committed_per_step == refreshed.committed_per_step


@pytest.mark.parametrize("kv_window", [1, 4])
def test_law_4_a_refresh_that_never_comes_changes_nothing(kv_window):
    """The last of 24 tokens is committed by a step that comes too late to be refreshed."""
    never = generate(trace_prompts(), seed=5, kv_window=kv_window, **SAMPLED)
    late = generate(trace_prompts(), seed=5, kv_window=kv_window, kv_refresh=24, **SAMPLED)
    soon = generate(trace_prompts(), seed=5, kv_window=kv_window, kv_refresh=3, **SAMPLED)
    assert torch.equal(never.sequences, late.sequences)
    assert not torch.equal(never.sequences, soon.sequences)


CACHES = [{}, {"kv_window": 1}, {"kv_window": 4}, {"kv_window": 1, "kv_refresh": 5}]
SAMPLINGS = [{}, SAMPLED, SAMPLED | {"temperature": 0.5, "top_p": 0.9}]
RULES = [{}, {"acceptance": "rejection"}, {"noise": "step", "window_size": 7}, {"window_size": "auto"}]


# By default each cache and each rule, twice.
@pytest.mark.parametrize(
    ("cache", "rule"),
    [
        pytest.param(cache, rule, marks=() if (cache + rule) % 2 == 0 else pytest.mark.slow)
        for cache, rule in itertools.product(range(4), range(4))
    ],
)
def test_law_5_a_row_does_not_depend_on_its_batch(cache, rule):
    """Batch mates, their number, their order, padding: none of it shows in a row's tokens.

    Every pair of settings occurs: of cache and rule, cache and sampling, rule and sampling.
    """
    common = CACHES[cache] | RULES[rule] | SAMPLINGS[(cache + rule) % 3] | {"max_new_tokens": 16}
    prompts, seeds = trace_prompts(), [100 + i for i in range(6)]
    batch = new_tokens(generate(prompts, seed=seeds, **common))
    for i in (0, 3, 5):
        assert new_tokens(generate([prompts[i]], seed=[seeds[i]], **common)) == [batch[i]]
    order = [5, 4, 3, 2, 1, 0, 2, 3]
    others = generate([prompts[i] for i in order], seed=[seeds[i] for i in order], width=40, **common)
    assert new_tokens(others) == [batch[i] for i in order]


def test_law_5_num_return_sequences_are_rows_of_their_own():
    output = generate(trace_prompts()[:2], num_return_sequences=3, seed=list(range(6)), **SAMPLED)
    for row in range(6):
        alone = generate([trace_prompts()[row // 3]], seed=[row], **SAMPLED)
        assert new_tokens(output)[row] == new_tokens(alone)[0]


@pytest.mark.parametrize("sampling", [{}, SAMPLED])
def test_law_8_nothing_behind_a_stop_token_is_counted_or_returned(sampling):
    """The stop token is the token in the middle of a row that is generated without one."""
    free = generate(trace_prompts(), seed=2, eos_token_id=[], **sampling)
    stops = [row[12] for row in new_tokens(free)[:3]]
    for i, stop in enumerate(stops):
        output = generate(trace_prompts(), seed=2, eos_token_id=[stop, STOP], pad_token_id=7, **sampling)
        for row, expected in zip(new_tokens(output), new_tokens(free), strict=True):
            end = next((k + 1 for k, token in enumerate(expected) if token in (stop, STOP)), len(expected))
            assert row == expected[:end]
        assert new_tokens(output)[i][-1] in (stop, STOP)
        width = output.sequences.shape[1] - int(output.new_tokens.max())
        for row, count in zip(output.sequences, output.new_tokens, strict=True):
            assert (row[width + count :] == 7).all()
        assert [sum(row) for row in output.committed_per_step] == output.new_tokens.tolist()
        assert [len(row) for row in output.committed_per_step] == output.drafter_forwards.tolist()


def test_law_8_a_stop_token_in_the_prompt_does_not_stop():
    prompt = trace_prompts()[1]
    output = generate([prompt], eos_token_id=[prompt[3]])
    assert len(output.committed_per_step[0]) >= 1
    assert output.new_tokens[0] > 1 or new_tokens(output)[0] == [prompt[3]]


def recorded_runs():
    """The recorded APD runs with W ≥ 1 and R ≤ 1; left-to-right runs have no R."""
    runs = json.loads((TRACES / "apd_runs.json").read_text())["runs"]
    settings = [run["settings"] for run in runs]
    matched = [s["R"] is not None and s["R"] <= 1 and s["W"] != 0 for s in settings]
    return [pytest.param(run, id=run["id"]) for run, is_matched in zip(runs, matched, strict=True) if is_matched]


def test_law_10_there_are_66_recorded_runs():
    assert len(recorded_runs()) == 66


@pytest.mark.parametrize("run", recorded_runs())
def test_law_10_greedy_decoding_reproduces_the_recorded_runs(run):
    """Sequence to the stop token, and accepted counts per step, the last one cut at the stop token."""
    settings, width = run["settings"], run["prompt_len"]
    output = generate(
        [run["sequence"][:width]],
        max_new_tokens=settings["max_new_tokens"],
        mixture_weight=settings["R"],
        window_size=settings["M"],
        kv_window=settings["W"],
    )
    expected = run["sequence"][width:]
    if STOP in expected:
        expected = expected[: expected.index(STOP) + 1]
    left, counts = len(expected), []
    for count in run["acceptance_counts"]:
        counts.append(min(count, left))
        left -= counts[-1]
    assert new_tokens(output)[0] == expected
    assert output.committed_per_step[0] == [count for count in counts if count]


@pytest.mark.parametrize("temperature", [0.0, pytest.param(0.6, marks=pytest.mark.slow), 1.2])
@pytest.mark.parametrize(
    "knobs",
    thinned(
        [
            {"mixture_weight": 0.5},
            {"mixture_weight": 0.0, "correction": True},
            {"mixture_weight": 0.3, "window_size": 6},
            {"mixture_weight": 0.7, "acceptance_threshold": 0.4, "correction": True},
            {"mixture_weight": 0.0, "correction": True, "first": "judge"},
            {"mixture_weight": 0.3, "correction": True, "first": "judge", "window_size": 6},
        ],
        2,
    ),
)
def test_the_step_equals_the_slow_reference(temperature, knobs):
    sampler = trace_sampler()
    prompts, seeds = trace_prompts()[::2], [40, 42, 44]
    sampling = {"do_sample": True, "top_k": 0, "temperature": temperature} if temperature else {}
    output = generate(prompts, seed=seeds, **knobs, **sampling)
    for prompt, seed, tokens, counts in zip(
        prompts, seeds, new_tokens(output), output.committed_per_step, strict=True
    ):
        expected = reference_generate(
            sampler.drafter,
            sampler.verifier,
            prompt,
            max_new_tokens=24,
            temperature=temperature,
            seed=seed,
            stop=STOP,
            **knobs,
        )
        assert (tokens, counts) == expected
