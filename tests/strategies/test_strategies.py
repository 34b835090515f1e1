"""Rival strategies: recorded runs of the published samplers, and each definition on hand-made numbers."""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from pairs import STOP, TRACES, left_padded, new_tokens, trace_prompts, trace_sampler
from states import state_of
from thinned import thinned
from transformers import LogitsProcessorList

from apd import (
    KLASS,
    WINO,
    APDSampler,
    Autoregressive,
    Blocks,
    Confidence,
    ConfidentPrefix,
    Entropy,
    EntropyBound,
    EntropyThreshold,
    Factor,
    LeftToRight,
    Margin,
    OneStep,
    RandomOrder,
    Seeded,
    Threshold,
    load_drafter,
)
from apd.decoding.noise import DRAFT, Noise
from apd.decoding.pair import Draft
from apd.decoding.sampling import Sampling, Scores
from apd.decoding.window import Window

ANY_ORDER = [
    RandomOrder(2),
    Confidence(2),
    Margin(2),
    Entropy(2),
    Threshold(0.6),
    Factor(0.8),
    EntropyBound(0.5),
    Blocks(Confidence(2), 8),
    Blocks(Threshold(0.6), 5),
    EntropyThreshold(1.0),
    Seeded(Threshold(0.6, at_least=2), 5, aligned=True),
    KLASS(0.5, 0.5, 1),
    WINO(0.3, 0.9),
]


def runs(name):
    return json.loads((TRACES / name).read_text())["runs"]


def decode(sampler, run, strategy, length):
    prompt = trace_prompts()[run["prompt"]]
    return sampler.generate(
        torch.tensor([prompt]),
        max_new_tokens=length,
        eos_token_id=None,
        strategy=strategy,
        return_dict_in_generate=True,
    )


@pytest.fixture(scope="module")
def llada():
    return APDSampler(load_drafter(TRACES / "models/llada"), mixture_weight=1.0)


# --- recorded runs of the published samplers


def dream_schedule(length: int, steps: int) -> tuple[int, ...]:
    """Masks that Dream's sampler fills per step: int(masks · (1 − s/t)), t from 1 to eps, all float32; then the rest."""
    times = torch.linspace(1, 1e-3, steps + 1)
    left, counts = length, []
    for i in range(steps):
        count = int(left * (1 - times[i + 1] / times[i])) if i < steps - 1 else left
        counts.append(count)
        left -= count
    return tuple(counts)


@pytest.mark.parametrize(
    "run", runs("dream_sample_runs.json"), ids=lambda run: f"{run['alg']}-{run['steps']}-{run['top_k']}"
)
def test_dreams_sampler_is_reproduced(run):
    """Its first step may fill nothing, since the schedule truncates; such a step commits no token and is not made here."""
    strategy = {"entropy": Entropy, "maskgit_plus": Confidence, "topk_margin": Margin}[run["alg"]]
    counts = [count for count in dream_schedule(run["max_new_tokens"], run["steps"]) if count]
    if run["top_k"]:
        pytest.skip("ranks by probabilities after top-k; here they are untempered and untruncated")
    output = decode(trace_sampler(), run, strategy(tuple(counts)), run["max_new_tokens"])
    assert new_tokens(output)[0] == run["sequence"][-run["max_new_tokens"] :]
    skipped = run["steps"] - len(counts)
    assert output.drafter_forwards[0] == run["num_forward_evals"] - skipped


@pytest.mark.parametrize("run", runs("llada_baseline_runs.json"), ids=lambda run: f"{run['function'].split('::')[1]}")
def test_lladas_samplers_are_reproduced(llada, run):
    length = run["gen_length"]
    if "tokens_per_step" in run:
        strategy = LeftToRight(run["tokens_per_step"])
    else:
        strategy = Blocks(Confidence(length // run["steps"]), run["block_length"])
    output = decode(llada, run, strategy, length)
    assert new_tokens(output)[0] == run["sequence"][-length:]
    assert output.drafter_forwards[0] == run["num_forward_evals"]
    assert output.trace[0].steps == run["reveal_step"]


@pytest.mark.parametrize(
    "run",
    [run for run in runs("fast_dllm_runs.json") if run["function"] == "generate"],
    ids=lambda run: f"{run['threshold']}-{run['block_length']}",
)
def test_fast_dllms_threshold_decoding_is_reproduced(llada, run):
    """The runs without a cache. Its prefix and dual caches freeze keys by block, which no cache here does."""
    length = run["gen_length"]
    inner = Confidence(length // run["steps"]) if run["threshold"] is None else Threshold(run["threshold"])
    output = decode(llada, run, Blocks(inner, run["block_length"]), length)
    assert new_tokens(output)[0] == run["sequence"][-length:]
    assert output.drafter_forwards[0] == run["num_forward_evals"]


LEFT_TO_RIGHT = [run for run in runs("apd_runs.json") if run["settings"]["R"] is None and run["settings"]["W"] != 0]


@pytest.mark.parametrize("run", thinned(LEFT_TO_RIGHT, 2), ids=lambda run: run["id"])
def test_left_to_right_runs_of_the_published_code_are_reproduced(run):
    settings, width = run["settings"], run["prompt_len"]
    output = trace_sampler().generate(
        torch.tensor([run["sequence"][:width]]),
        max_new_tokens=settings["max_new_tokens"],
        window_size=settings["M"],
        kv_window=settings["W"],
        strategy=LeftToRight(settings["K"]),
        eos_token_id=STOP,
        return_dict_in_generate=True,
    )
    expected = run["sequence"][width:]
    if STOP in expected:
        expected = expected[: expected.index(STOP) + 1]
    assert new_tokens(output)[0] == expected


# --- each definition on hand-made numbers


def choose(strategy, rows, *, decided=None, width=None):
    """Chosen positions of one row whose masks have these distributions over three tokens."""
    logprobs = torch.tensor(rows).log()[None]
    m = logprobs.shape[1]
    zeros = torch.zeros(1, dtype=torch.int64)
    tokens = torch.zeros(1, m + 1, dtype=torch.int64)
    state = state_of(tokens, torch.tensor([[True] + (decided or [False] * m)]), prompt_end=1, seeds=zeros + 7)
    state = dataclasses.replace(state, frontier=zeros + 1)
    columns = torch.arange(1, m + 1)[None]
    window = Window(columns, torch.ones(1, m, dtype=torch.bool), [1], [m + 1])
    candidate = ~state.decided[:, 1:]
    noise = Noise(zeros, columns, zeros, DRAFT)
    draft = Draft(logprobs.argmax(-1), torch.zeros_like(columns).bool(), logprobs, Scores(logprobs), noise)
    sampling = Sampling(LogitsProcessorList(), greedy=True)
    chosen = strategy.choose(strategy.measure(draft, window), candidate, state, window, sampling) & candidate
    return chosen[0].nonzero().flatten().tolist()


SURE, LIKELY, SPLIT, OPEN = [0.98, 0.01, 0.01], [0.7, 0.15, 0.15], [0.55, 0.44, 0.01], [0.4, 0.3, 0.3]
ROWS = [OPEN, SURE, SPLIT, LIKELY]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        (LeftToRight(2), [0, 1]),
        (Confidence(1), [1]),
        (Confidence(3), [1, 2, 3]),
        (Confidence(9), [0, 1, 2, 3]),
        (Margin(2), [1, 3]),
        (Margin(3), [1, 2, 3]),  # SPLIT leads by .11, OPEN by .10
        (Entropy(3), [1, 2, 3]),
        (Threshold(0.6), [1, 3]),
        (Threshold(0.99), [1]),  # always the most confident
        (Threshold(0.0), [0, 1, 2, 3]),
        (Threshold(0.99, at_least=2), [1, 3]),
        (Threshold(0.5, at_least=2), [1, 2, 3]),  # more than two reach it
        (Threshold(0.99, at_least=9), [0, 1, 2, 3]),
        (ConfidentPrefix(0.99), [0]),  # always the first
        (ConfidentPrefix(0.5), [0]),  # the others are confident, but it is not
        (ConfidentPrefix(0.3), [0, 1, 2, 3]),
        (OneStep(), [0, 1, 2, 3]),
        (Factor(0.05), [1]),  # 2·.02 < .05, 3·.30 ≥ .05
        (Factor(1.0), [1, 3]),  # 3·.30 < 1, 4·.45 ≥ 1
        (Factor(0.01), [1]),  # at least one
        (Factor(3.1), [0, 1, 2, 3]),  # 5·.60 < 3.1
        (EntropyBound(0.0), [1]),
        (EntropyBound(0.2), [1, 2]),  # Σ − max over SURE, SPLIT = H(SURE) = .112
        (EntropyBound(1.0), [1, 2, 3]),  # H(SURE) + H(SPLIT) = .85
        (EntropyBound(9.0), [0, 1, 2, 3]),
        (EntropyThreshold(0.1), [1]),  # always the lowest: H(SURE) + .02
        (EntropyThreshold(0.75), [1]),  # H(SPLIT) + 2·.02 = .776
        (EntropyThreshold(0.75, 0.0), [1, 2]),
        (EntropyThreshold(2.0, 0.5), [0, 1, 2]),  # H(LIKELY) + 3·.5 = 2.32
        (EntropyThreshold(0.0, 1.0), [0]),  # H(OPEN) = 1.09 < H(SURE) + 1
        (Blocks(Confidence(1), 2), [1]),
        (Blocks(OneStep(), 3), [0, 1, 2]),
        (Blocks(Threshold(0.99), 1), [0]),
        (Blocks(Confidence(1), 2, aligned=True), [0]),  # the prompt's token and the first mask are a block
        (Blocks(OneStep(), 3, aligned=True), [0, 1]),
        (Seeded(OneStep(), 3), [0]),
        (Seeded(Threshold(0.6), 3), [0]),  # however sure the others are
        (Seeded(OneStep(), 3, aligned=True), [0, 1]),  # within a block
        (Seeded(Threshold(0.6), 5, aligned=True), [1, 3]),
    ],
)
def test_definitions_on_hand_made_numbers(strategy, expected):
    assert choose(strategy, ROWS) == expected


def test_entropies_of_the_hand_made_numbers():
    """That the table above is right about the budget: in nats."""
    values = [-sum(p * math.log(p) for p in row) for row in ROWS]
    assert values[1] == pytest.approx(0.112, abs=1e-3)
    assert values[1] + values[2] == pytest.approx(0.848, abs=1e-3)
    assert values == pytest.approx([1.089, 0.112, 0.736, 0.819], abs=1e-3)


def test_a_confident_prefix_ends_at_the_first_doubt():
    assert choose(ConfidentPrefix(0.6), [SURE, LIKELY, OPEN, SURE]) == [0, 1]
    assert choose(ConfidentPrefix(0.9), [SURE, LIKELY, SURE, SURE]) == [0]
    assert choose(ConfidentPrefix(0.6), [SURE, LIKELY, SURE, SURE]) == [0, 1, 2, 3]


def test_among_certain_tokens_the_leftmost_comes_first():
    """The tail of stop tokens, surer still in the last bits, was decided before the answer."""
    rows = [[0.6, 0.4, 0.0], [1 - 5e-7, 5e-7, 0.0], [1.0, 0.0, 0.0]]
    assert choose(Confidence(1), rows) == [1]
    assert choose(Margin(1), rows) == [1]
    assert choose(Threshold(1.0), rows[:2]) == [1]
    assert choose(Confidence(1), [rows[0], [1 - 1e-4, 1e-4, 0.0], rows[2]]) == [2]


def test_decided_positions_are_no_candidates():
    decided = [False, True, False, False]
    assert choose(Confidence(1), ROWS, decided=decided) == [3]
    assert choose(Threshold(0.99), ROWS, decided=decided) == [3]
    assert choose(Factor(0.01), ROWS, decided=decided) == [3]
    assert choose(EntropyBound(0.0), ROWS, decided=decided) == [2]
    assert choose(Blocks(OneStep(), 2), ROWS, decided=decided) == [0]


@pytest.mark.parametrize("strategy", thinned(ANY_ORDER, 2), ids=repr)
@pytest.mark.parametrize("sampling", thinned([{"do_sample": True, "top_k": 0}, {}], 2))
def test_rows_do_not_depend_on_their_batch(strategy, sampling):
    common = {"max_new_tokens": 16, "strategy": strategy, "return_dict_in_generate": True, "eos_token_id": [STOP, 61]}
    seeds = list(range(6))
    batch = trace_sampler().generate(**left_padded(trace_prompts()), seed=seeds, **common, **sampling)
    for i in (1, 4):
        alone = trace_sampler().generate(torch.tensor([trace_prompts()[i]]), seed=[i], **common, **sampling)
        assert new_tokens(batch)[i] == new_tokens(alone)[0]
        assert batch.drafter_forwards[i] == alone.drafter_forwards[0]


def seeded_by_hand(prompt, length, seeded):
    """One row, plain Python: tokens, tokens per step, and which model decided each step."""
    sampler = trace_sampler()
    mask = sampler.drafter.mask_token_id
    tokens, counts, models = list(prompt) + [mask] * length, [], []
    while mask in tokens:
        at = tokens.index(mask)
        offset = at - (0 if seeded.aligned else len(prompt))
        is_first = offset % seeded.length == 0
        by = seeded.by if is_first else "drafter"
        with torch.no_grad():
            if by == "verifier":
                logits = sampler.verifier.model(torch.tensor([tokens[:at]])).logits[0, -1:].clone()
            else:
                logits = sampler.drafter.model(torch.tensor([tokens])).logits[0, at - 1 : -1].clone()
        logits[:, mask] = -torch.inf
        p = logits[:, : sampler.verifier.vocab_size].softmax(-1)
        chosen = [at]
        if not is_first:
            block = range(at, min(at + seeded.length - offset % seeded.length, len(tokens)))
            masks = [i for i in block if tokens[i] == mask]
            best = max(masks, key=lambda i: float(p[i - at].max()))
            chosen = [i for i in masks if i == best or p[i - at].max() >= seeded.strategy.threshold]
        for i in chosen:
            tokens[i] = int(p[i - at].argmax())
        counts.append(len(chosen))
        models.append(by)
    return tokens[len(prompt) :], counts, models


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("by", ["drafter", "verifier"])
def test_the_first_token_of_a_block_is_decided_alone(by, aligned):
    """Rows that stand at the beginning of a block beside rows that do not."""
    seeded = Seeded(Threshold(0.4), 4, aligned=aligned, by=by)
    prompts = trace_prompts()
    expected = [seeded_by_hand(prompt, 14, seeded) for prompt in prompts]
    common = {"max_new_tokens": 14, "eos_token_id": None, "strategy": seeded, "return_dict_in_generate": True}
    output = trace_sampler().generate(**left_padded(prompts), **common)
    found = zip(new_tokens(output), output.committed_per_step, strict=True)
    assert list(found) == [(tokens, counts) for tokens, counts, _ in expected]
    steps = [set(models) for models in itertools.zip_longest(*(models for *_, models in expected))]
    assert max(map(max, output.committed_per_step)) > 1
    if by == "verifier":
        assert any({"drafter", "verifier"} <= models for models in steps), "rows are never at different places"
    for i, (_, counts, models) in enumerate(expected):
        during = steps[: len(counts)]
        assert output.drafter_forwards[i] == sum("drafter" in models for models in during)
        assert output.verifier_forwards[i] == sum("verifier" in models for models in during)
        alone = trace_sampler().generate(torch.tensor([prompts[i]]), **common)
        assert alone.drafter_forwards[0] == models.count("drafter")
        assert alone.verifier_forwards[0] == models.count("verifier")


def klass_by_hand(prompt, length, klass):
    """One row, plain Python: the definition once more."""
    drafter = trace_sampler().drafter
    tokens, before, calm = list(prompt) + [drafter.mask_token_id] * length, None, [0] * length
    counts = []
    while drafter.mask_token_id in tokens:
        with torch.no_grad():
            logits = drafter.model(torch.tensor([tokens])).logits[0, len(prompt) - 1 : -1].clone()
        logits[:, drafter.mask_token_id] = -torch.inf
        p = logits.softmax(-1)
        open_positions = [i for i in range(length) if tokens[len(prompt) + i] == drafter.mask_token_id]
        for i in range(length):
            if i < open_positions[0]:
                continue
            kl = math.inf
            if before is not None:
                kl = sum(
                    float(a * (a / b).log()) for a, b in zip(p[i].double(), before[i].double(), strict=True) if a > 0
                )
            calm[i] = calm[i] + 1 if kl < klass.kl_threshold else 0
        before = p
        stable = [i for i in open_positions if p[i].max() > klass.threshold and calm[i] >= klass.history]
        chosen = stable or [max(open_positions, key=lambda i: float(p[i].max()))]
        for i in chosen:
            tokens[len(prompt) + i] = int(p[i].argmax())
        counts.append(len(chosen))
    return tokens[len(prompt) :], counts


@pytest.mark.parametrize("klass", [KLASS(0.6, 0.05, 1), KLASS(0.4, 0.5, 2), KLASS(0.0, 9.0, 3)])
def test_klass_commits_confident_and_stable_tokens(klass):
    prompts = trace_prompts()[::2]
    output = trace_sampler().generate(
        **left_padded(prompts),
        max_new_tokens=14,
        strategy=klass,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    for prompt, tokens, counts in zip(prompts, new_tokens(output), output.committed_per_step, strict=True):
        assert (tokens, counts) == klass_by_hand(prompt, 14, klass)
    assert max(map(max, output.committed_per_step)) > 1


def test_random_order_is_uniform_and_follows_the_seed():
    """First committed position of 4 in 4000 rows: chi-square with 3 degrees of freedom; 40 has probability 1e-8."""
    rows = torch.tensor(trace_prompts()[0][:2])[None].repeat(4000, 1)
    output = trace_sampler().generate(
        rows, max_new_tokens=4, strategy=RandomOrder(), eos_token_id=None, seed=0, return_dict_in_generate=True
    )
    first = torch.tensor([trace.steps.index(0) for trace in output.trace])
    counts = torch.bincount(first, minlength=4).double()
    assert ((counts - 1000) ** 2 / 1000).sum() < 40


def test_one_step_equals_trusting_the_drafter_alone():
    common = {**left_padded(trace_prompts()), "max_new_tokens": 16, "seed": 3, "do_sample": True}
    assert torch.equal(
        trace_sampler().generate(**common, strategy=OneStep()), trace_sampler().generate(**common, mixture_weight=1.0)
    )


@pytest.mark.parametrize("temperature", [None, 0.8])
def test_autoregressive_is_the_verifier_alone(temperature):
    """Greedy, the very text of transformers' own generate(); the drafter never runs."""
    sampler = trace_sampler()
    sampling = {"do_sample": True, "top_k": 0, "temperature": temperature} if temperature else {}
    output = sampler.generate(
        **left_padded(trace_prompts()),
        max_new_tokens=16,
        strategy=Autoregressive(),
        seed=0,
        return_dict_in_generate=True,
        suppress_tokens=[sampler.drafter.mask_token_id],
        **sampling,
    )
    assert output.drafter_forwards.tolist() == [0] * 6
    assert output.verifier_forwards.tolist() == output.new_tokens.tolist()
    assert output.tokens_per_forward.tolist() == [1.0] * 6
    assert output.trace[0].drafter_probs == []
    if not temperature:
        expected = sampler.verifier.model.generate(
            **left_padded(trace_prompts()),
            max_new_tokens=16,
            eos_token_id=STOP,
            pad_token_id=STOP,
            do_sample=False,
            suppress_tokens=[sampler.drafter.mask_token_id],
        )
        assert torch.equal(output.sequences, expected)


def test_a_sampler_may_have_a_strategy_of_its_own():
    pair = trace_sampler()
    sampler = APDSampler(pair.drafter, pair.verifier, strategy=LeftToRight(4))
    common = {
        **left_padded(trace_prompts()),
        "max_new_tokens": 8,
        "eos_token_id": None,
        "return_dict_in_generate": True,
    }
    assert sampler.generate(**common).committed_per_step == [[4, 4]] * 6
    assert sampler.generate(**common, strategy=LeftToRight(8)).committed_per_step == [[8]] * 6


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Confidence(0), "`tokens_per_step` must be at least 1, got 0"),
        (lambda: Entropy((2, 0)), "`tokens_per_step` must be at least 1"),
        (lambda: Threshold(1.1), r"`threshold` must be in \[0, 1\], got 1.1"),
        (lambda: Factor(0), "`factor` must be above 0"),
        (lambda: EntropyBound(-1), "`bound` must be at least 0 nats"),
        (lambda: Threshold(0.9, at_least=0), "`at_least` must be at least 1, got 0"),
        (lambda: ConfidentPrefix(-0.1), r"`threshold` must be in \[0, 1\], got -0.1"),
        (lambda: EntropyThreshold(-1), "`threshold` must be at least 0 nats"),
        (lambda: EntropyThreshold(penalty=-1), "`penalty` must be at least 0 nats"),
        (lambda: Blocks(Confidence(), 0), "`length` must be at least 1"),
        (lambda: Seeded(Confidence(), 0), "`length` must be at least 1"),
        (lambda: Seeded(Confidence(), by="both"), "`by` must be 'drafter' or 'verifier', got 'both'"),
        (lambda: KLASS(1.5), r"`threshold` must be in \[0, 1\]"),
        (lambda: KLASS(kl_threshold=0), "`kl_threshold` must be above 0"),
        (lambda: KLASS(history=0), "`history` must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("around", [Blocks, Seeded])
@pytest.mark.parametrize("inner", [KLASS(), Autoregressive(), "threshold:0.9"])
def test_blocks_are_around_strategies_that_pick_by_the_state_alone(around, inner):
    with pytest.raises(TypeError, match="`strategy` must pick within a block by the state alone"):
        around(inner, 4)
