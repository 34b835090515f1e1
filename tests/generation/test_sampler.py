"""`generate()` as transformers' users know it: arguments, outputs, counts and the trace."""

import dataclasses
import threading

import numpy as np
import pytest
import torch
from pairs import STOP, left_padded, new_tokens, trace_prompts, trace_sampler
from transformers import GenerationConfig

from apd import APDConfig, APDOutput, APDSampler, Autoregressive, Confidence, LeftToRight, RandomOrder
from apd.decoding.acceptance import Coupling, Evidence, Judgement, Rejection
from apd.decoding.state import FIRST_COMMIT_RATE
from apd.decoding.window import AllMasks, AutoWindow, BlockWindow, FixedWindow

PROMPTS = left_padded(trace_prompts())

AUTO = AutoWindow()


def generate(**kwargs):
    """Overrides of the usual call; `...` leaves an argument out."""
    usual = {**PROMPTS, "max_new_tokens": 16, "eos_token_id": STOP, "return_dict_in_generate": True}
    return trace_sampler().generate(**{name: value for name, value in (usual | kwargs).items() if value is not ...})


def test_the_prompt_is_echoed_and_ids_are_returned_by_default():
    ids = generate(return_dict_in_generate=None)
    assert isinstance(ids, torch.Tensor)
    assert torch.equal(ids, generate().sequences)
    assert torch.equal(ids[:, : PROMPTS["input_ids"].shape[1]], PROMPTS["input_ids"])
    assert torch.equal(ids, trace_sampler().generate(PROMPTS["input_ids"], attention_mask=PROMPTS["attention_mask"], max_new_tokens=16, eos_token_id=STOP))  # fmt: skip


def test_output_counts_agree_with_each_other():
    output = generate(do_sample=True, seed=0)
    assert isinstance(output, APDOutput)
    rows = len(trace_prompts())
    for field in (output.new_tokens, output.drafter_forwards, output.verifier_forwards, output.tokens_per_forward):
        assert field.shape == (rows,)
    assert output.new_tokens.tolist() == [sum(row) for row in output.committed_per_step]
    assert output.drafter_forwards.tolist() == [len(row) for row in output.committed_per_step]
    assert output.verifier_forwards.tolist() == output.drafter_forwards.tolist()
    torch.testing.assert_close(output.tokens_per_forward, output.new_tokens / output.drafter_forwards)
    assert output.tokens_per_forward.max() > 1


def test_the_trace_tells_how_every_token_came_about():
    output = generate(do_sample=True, top_k=0, seed=0)
    for row, tokens, committed in zip(output.trace, new_tokens(output), output.committed_per_step, strict=True):
        assert row.tokens == tokens
        assert [row.steps.count(step) for step in range(len(committed))] == committed == row.committed
        assert row.starts == [sum(committed[:step]) for step in range(len(committed))]
        for start, draft, count in zip(row.starts, row.drafts, committed, strict=True):
            assert draft[:count] == tokens[start : start + count]
            assert len(draft) == 16 - start
        for probs in (row.target_probs, row.drafter_probs, row.verifier_probs):
            assert len(probs) == len(tokens)
            assert all(0 < p <= 1 for p in probs)


def test_the_trace_holds_the_models_own_probabilities():
    """The first token's p_D is the drafter's softmax without the mask token, p_AR the verifier's, p_T their mixture."""
    sampler, prompt = trace_sampler(), trace_prompts()[0]
    output = generate(**left_padded([prompt]), mixture_weight=0.3)
    trace = output.trace[0]
    with torch.no_grad():
        canvas = torch.tensor([prompt + [sampler.drafter.mask_token_id] * 16])
        drafted = sampler.drafter.model(canvas).logits[0, len(prompt) - 1]
        verified = sampler.verifier.model(torch.tensor([prompt])).logits[0, -1]
    drafted[sampler.drafter.mask_token_id] = verified[sampler.drafter.mask_token_id] = -torch.inf
    p_drafter, p_verifier = drafted.softmax(-1), verified.softmax(-1)
    product = p_drafter**0.3 * p_verifier**0.7
    token = trace.tokens[0]
    assert trace.drafter_probs[0] == pytest.approx(p_drafter[token].item(), rel=1e-4)
    assert trace.verifier_probs[0] == pytest.approx(p_verifier[token].item(), rel=1e-4)
    assert trace.target_probs[0] == pytest.approx((product / product.sum())[token].item(), rel=1e-4)


def test_without_a_verifier_nothing_is_verified():
    alone = APDSampler(trace_sampler().drafter)
    output = alone.generate(
        **PROMPTS, max_new_tokens=8, mixture_weight=1, eos_token_id=STOP, return_dict_in_generate=True
    )
    assert output.verifier_forwards.sum() == 0
    assert output.trace[0].verifier_probs == []


def test_arguments_override_the_config_which_overrides_the_models():
    config = GenerationConfig(max_new_tokens=5, eos_token_id=[])
    assert generate(max_new_tokens=..., eos_token_id=..., generation_config=config).new_tokens.max() <= 5
    assert generate(max_new_tokens=3, generation_config=config).new_tokens.max() == 3
    width = PROMPTS["input_ids"].shape[1]
    assert generate(max_new_tokens=..., max_length=width + 2, eos_token_id=[]).sequences.shape[1] == width + 2
    assert config.max_new_tokens == 5


def test_the_models_own_stop_token_is_used():
    assert trace_sampler().drafter.generation_config.eos_token_id == STOP
    call = {"max_new_tokens": 32, "do_sample": True, "top_k": 0, "seed": 1}
    assert generate(eos_token_id=None, **call).new_tokens.min() == 32  # None stops nowhere, as there
    stopped = generate(eos_token_id=..., **call)
    assert stopped.new_tokens.min() < 32
    assert torch.equal(stopped.sequences, generate(eos_token_id=STOP, **call).sequences)


def test_sampling_means_top_k_50_unless_set():
    default = generate(do_sample=True, temperature=1.5, seed=4).sequences
    assert torch.equal(default, generate(do_sample=True, temperature=1.5, top_k=50, seed=4).sequences)
    assert not torch.equal(default, generate(do_sample=True, temperature=1.5, top_k=1, seed=4).sequences)
    greedy = generate().sequences
    assert torch.equal(generate(do_sample=True, top_k=1, seed=4).sequences, greedy)
    assert torch.equal(generate(do_sample=True, temperature=0.0).sequences, greedy)


def test_one_seed_gives_one_result_and_none_draws_from_torch():
    common = {"do_sample": True, "top_k": 0, "temperature": 1.5}
    assert torch.equal(generate(seed=1, **common).sequences, generate(seed=1, **common).sequences)
    assert not torch.equal(generate(seed=1, **common).sequences, generate(seed=2, **common).sequences)
    torch.manual_seed(3)
    first = generate(**common).sequences
    second = generate(**common).sequences
    torch.manual_seed(3)
    assert torch.equal(generate(**common).sequences, first)
    assert not torch.equal(first, second)


def test_greedy_and_seeded_decoding_leave_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(())
    torch.manual_seed(3)
    generate()
    generate(seed=0, do_sample=True)
    assert torch.rand(()) == expected


def test_a_random_order_needs_a_seed_without_sampling_too():
    first, second = (generate(strategy=RandomOrder()).trace[0].steps for _ in range(2))
    assert first != second


@pytest.mark.parametrize("stop", [np.int64(STOP), torch.tensor(STOP), torch.tensor([STOP, 61]), (STOP, 61), [STOP]])
def test_stop_tokens_may_be_any_integers(stop):
    generate(eos_token_id=stop)


@pytest.mark.parametrize("seed", [np.int64(5), torch.tensor(5)])
def test_seeds_may_be_any_integer(seed):
    expected = generate(seed=5, do_sample=True).sequences
    assert torch.equal(generate(seed=seed, do_sample=True).sequences, expected)
    rows = [np.int64(i) for i in range(6)]
    expected = generate(seed=list(range(6)), do_sample=True).sequences
    for many in (rows, np.arange(6), torch.arange(6), range(6)):
        assert torch.equal(generate(seed=many, do_sample=True).sequences, expected)


def test_a_tiny_temperature_is_greedy():
    """Scores divided by 1e-39 are all −∞, and the argmax of these is id 0."""
    assert torch.equal(generate(do_sample=True, temperature=1e-39).sequences, generate().sequences)


def test_limits_of_a_model_that_never_runs_do_not_count():
    pair = trace_sampler()
    verifier = type(pair.verifier)(pair.verifier.model)
    verifier.max_length = 6
    sampler = APDSampler(pair.drafter, verifier)
    sampler.generate(**PROMPTS, max_new_tokens=4, mixture_weight=1.0)
    sampler.generate(**PROMPTS, max_new_tokens=4, strategy=LeftToRight())
    with pytest.raises(ValueError, match="the verifier's 6 positions"):
        sampler.generate(**PROMPTS, max_new_tokens=4)


def test_num_return_sequences_expands_rows_as_transformers_does():
    output = generate(do_sample=True, temperature=1.5, num_return_sequences=3, seed=0)
    assert len(output.sequences) == 3 * len(trace_prompts())
    width = PROMPTS["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :width], PROMPTS["input_ids"].repeat_interleave(3, 0))
    assert not torch.equal(output.sequences[0], output.sequences[1])


@pytest.mark.parametrize("rule", [{"acceptance": "coupling"}, {"acceptance": "rejection"}])
def test_greedy_rules_accept_the_same_drafts(rule):
    """Rejection always commits the residual's token too, as coupling does with the correction."""
    coupling = generate(correction=True)
    assert torch.equal(coupling.sequences, generate(**rule, correction=rule["acceptance"] == "coupling").sequences)
    assert coupling.committed_per_step == generate(acceptance="rejection").committed_per_step


def test_the_correction_never_costs_a_step():
    plain, corrected = generate(mixture_weight=0.0), generate(mixture_weight=0.0, correction=True)
    assert corrected.drafter_forwards.sum() < plain.drafter_forwards.sum()


def test_any_order_decoding_fills_the_most_confident_masks():
    output = generate(strategy=Confidence(2), eos_token_id=[])
    assert output.committed_per_step == [[2] * 8] * len(trace_prompts())
    orders = [row.steps for row in output.trace]
    assert any(order != sorted(order) for order in orders)
    assert (output.sequences != trace_sampler().drafter.mask_token_id).all()


def test_any_order_rows_end_at_their_first_stop_token():
    free = new_tokens(generate(strategy=Confidence(1), eos_token_id=[]))
    for row, tokens in enumerate(free):
        stop = tokens[7]
        output = generate(strategy=Confidence(1), eos_token_id=[stop])
        assert new_tokens(output)[row] == tokens[: tokens.index(stop) + 1]
        assert output.trace[row].tokens == new_tokens(output)[row]
        assert sum(output.committed_per_step[row]) == output.new_tokens[row]


def test_left_to_right_commits_k_tokens_per_step():
    output = generate(strategy=LeftToRight(3), eos_token_id=[])
    assert output.committed_per_step == [[3, 3, 3, 3, 3, 1]] * len(trace_prompts())


def test_calls_may_run_beside_each_other():
    expected = {seed: generate(do_sample=True, seed=seed, kv_window=4).sequences for seed in range(4)}
    results = {}
    threads = [
        threading.Thread(
            target=lambda seed=seed: results.update({seed: generate(do_sample=True, seed=seed, kv_window=4).sequences})
        )
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[seed], expected[seed]) for seed in range(4))


def test_knobs_of_the_sampler_are_defaults_of_its_calls():
    pair = trace_sampler()
    sampler = APDSampler(pair.drafter, pair.verifier, config=APDConfig(window_size=4), mixture_weight=1.0)
    common = {**PROMPTS, "max_new_tokens": 8, "eos_token_id": [], "return_dict_in_generate": True}
    assert sampler.generate(**common).committed_per_step[0] == [4, 4]
    assert sampler.generate(**common, window_size=8).committed_per_step[0] == [8]
    assert sampler.config == APDConfig(mixture_weight=1.0, window_size=4)


def test_the_paper_setting_has_the_papers_values():
    assert APDConfig.paper() == APDConfig(mixture_weight=0.7, window_size=100, kv_window=16, noise="step")
    assert APDConfig.paper(noise="keyed").noise == "keyed"


def test_eager_attention_gives_the_same_tokens():
    """Eager attention adds its mask: a boolean one would be added as 0 and 1, silently."""
    from pairs import TRACES

    eager = APDSampler.from_pretrained(
        str(TRACES / "models/dream"), str(TRACES / "models/verifier"), attn_implementation="eager"
    )
    for kv_window in (None, 3):
        common = {**PROMPTS, "max_new_tokens": 16, "eos_token_id": STOP, "kv_window": kv_window}
        assert torch.equal(eager.generate(**common), trace_sampler().generate(**common))


def test_the_verifier_reads_only_what_it_has_not_read():
    """Its cache keeps what was committed: after the first pass it is fed one window, from the last committed token."""
    pair, fed = trace_sampler(), []
    hook = pair.verifier.model.model.embed_tokens.register_forward_hook(
        lambda _, args, __: fed.append(args[0].shape[1])
    )
    try:
        output = generate(**left_padded([trace_prompts()[0]]), mixture_weight=0.0, correction=True, window_size=6)
    finally:
        hook.remove()
    counts = output.committed_per_step[0]
    left = [min(6, 16 - sum(counts[:i])) for i in range(len(counts))]
    assert fed == [len(trace_prompts()[0]) + left[0] - 1, *left[1:]]


def test_the_drafter_recomputes_the_window_and_what_was_just_committed():
    pair, fed = trace_sampler(), []
    hook = pair.drafter.model.model.embed_tokens.register_forward_hook(
        lambda _, args, __: fed.append(args[0].shape[1])
    )
    try:
        prompt = trace_prompts()[0]
        output = generate(**left_padded([prompt]), kv_window=3, window_size=5, eos_token_id=[])
    finally:
        hook.remove()
    counts = output.committed_per_step[0]
    frontiers = [len(prompt) + sum(counts[:i]) for i in range(len(counts))]
    ends = [min(t + 5, len(prompt) + 16) for t in frontiers]
    starts = [0] + [max(t - 3 + 1, 0) for t in frontiers[:-1]]
    assert fed == [end - start for start, end in zip(starts, ends, strict=True)]


@pytest.mark.parametrize("count", [2, 3])
def test_a_row_is_recomputed_as_a_whole_after_so_many_tokens(count):
    pair, fed = trace_sampler(), []
    hook = pair.drafter.model.model.embed_tokens.register_forward_hook(
        lambda _, args, __: fed.append(args[0].shape[1])
    )
    knobs = {"kv_window": 2, "kv_refresh": 4, "window_size": 5, "max_new_tokens": 20, "eos_token_id": []}
    try:
        prompt = trace_prompts()[0]
        generate(**left_padded([prompt]), strategy=LeftToRight(count), **knobs)
    finally:
        hook.remove()
    every = -(-4 // count)  # steps until 4 tokens or more are new
    new = range(0, 20, count)
    whole = [len(prompt) + min(t + 5, 20) for t in new]
    partial = [min(t + 5, 20) - (t - count) + 1 for t in new]
    assert fed == [whole[i] if i % every == 0 else partial[i] for i in range(len(new))]


@pytest.mark.parametrize("knobs", [{"mixture_weight": 0.2}, {"correction": True, "kv_window": 2}])
def test_the_window_follows_what_its_own_row_commits(knobs):
    output = generate(window_size="auto", max_new_tokens=60, eos_token_id=[], **knobs)
    widths = set()
    for row in output.trace:
        pace = FIRST_COMMIT_RATE
        for start, draft, committed in zip(row.starts, row.drafts, row.committed, strict=True):
            assert len(draft) == min(max(AUTO.least, -(-pace * AUTO.headroom // 1)), 60 - start)
            widths.add(len(draft))
            pace = (pace + (committed if committed < len(draft) else 2 * committed)) / 2
    assert len(widths) > 5


@dataclasses.dataclass(frozen=True)
class Measured(LeftToRight):
    """Left to right; it writes down how wide its windows are."""

    widths: list[int] = dataclasses.field(default_factory=list)

    def propose(self, state, window, pair, sampling):
        self.widths.append(window.columns.shape[1])
        return super().propose(state, window, pair, sampling)


def test_a_strategy_that_counts_its_tokens_gets_a_window_for_them():
    for strategy, first, last in ((Measured(1), 16, AUTO.least), (Measured(12), 16, 24)):
        settings = {"window_size": "auto", "max_new_tokens": 9 * last, "eos_token_id": []}
        output = generate(**left_padded(trace_prompts()[:1]), strategy=strategy, **settings)
        widths = strategy.widths
        assert widths[0] == first
        assert widths[8] == last  # twice the count, at least eight
        assert output.committed_per_step[0][8] == strategy.tokens_per_step
    alone = {"strategy": Autoregressive(), "max_new_tokens": 8}
    assert torch.equal(generate(window_size="auto", **alone).sequences, generate(**alone).sequences)


@dataclasses.dataclass(frozen=True)
class Wary:
    """An acceptance rule: the drafted token if either model gives it at least `bound`."""

    bound: float

    def __call__(self, evidence: Evidence) -> Judgement:
        models = [model for model in (evidence.drafter, evidence.verifier) if model is not None]
        return Judgement(torch.stack([model.logprob(evidence.draft).exp() >= self.bound for model in models]).any(0))


def test_a_rule_object_is_an_acceptance():
    """`Coupling()` and `Rejection()` decode as their names; a rule of one's own is between its extremes."""
    for settings in ({}, {"do_sample": True, "temperature": 1.3, "seed": 3}):
        for name, rule in (("coupling", Coupling()), ("rejection", Rejection())):
            named, given = generate(acceptance=name, **settings), generate(acceptance=rule, **settings)
            assert torch.equal(named.sequences, given.sequences)
            assert named.committed_per_step == given.committed_per_step
        strict = generate(acceptance=Coupling(0.6, True), **settings)
        knobs = {"acceptance_threshold": 0.6, "correction": True}
        assert torch.equal(strict.sequences, generate(**knobs, **settings).sequences)
    counts = [generate(acceptance=Wary(bound), eos_token_id=[]).drafter_forwards.sum() for bound in (0.0, 0.5, 1.1)]
    assert counts[0] < counts[1] < counts[2]


@pytest.mark.parametrize(
    ("size", "policy"), [(None, AllMasks()), (3, FixedWindow(3)), ("auto", AutoWindow()), (1, BlockWindow(1))]
)
def test_a_policy_object_is_a_window_size(size, policy):
    named, given = generate(window_size=size, kv_window=2), generate(window_size=policy, kv_window=2)
    assert torch.equal(named.sequences, given.sequences)
    assert [row.drafts for row in named.trace] == [row.drafts for row in given.trace]


def test_configurations_with_objects_are_compared_and_hashed():
    one, other = (APDConfig(window_size=BlockWindow(4), acceptance=Wary(0.5)) for _ in range(2))
    assert one == other and hash(one) == hash(other) and one != one.replace(window_size=BlockWindow(5))
