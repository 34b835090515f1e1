"""Compiled passes: the eager path's tokens, in a few shapes, as rows leave and join.

Tracing takes seconds. By default the functions that are given to torch.compile run as they are (`untraced`): fixed
shapes, slots and reused caches, without graphs. What needs graphs is marked `slow`, except for one pair of tiny models.
"""

import gc
import logging
import statistics
from collections.abc import Iterator

import pytest
import torch
from compiling import compiled
from pairs import STOP, left_padded, new_tokens, trace_prompts, trace_sampler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy import tiny_pair
from transformers import LogitsProcessor, Qwen2Config, Qwen2ForCausalLM, StoppingCriteria, TemperatureLogitsWarper

from apd import KLASS, WINO, APDSampler, IdealListModel, LeftToRight, MaskedDiffusionDrafter, Threshold
from apd.models.graphs import FixedCache, forward_slots
from apd.models.horizon import CAUSAL, FULL


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["untraced", "traced"])
def is_traced(request: pytest.FixtureRequest) -> Iterator[bool]:
    with torch.compiler.set_stance("default" if request.param else "force_eager"):
        yield request.param


PROMPTS = [prompt[: 3 + 5 * i] for i, prompt in enumerate(trace_prompts())]


KNOBS = [
    {"kv_window": 4},
    {"kv_window": 4, "do_sample": True, "top_k": 0},
    {"kv_window": None, "do_sample": True, "top_k": 0},
    {"kv_window": 1, "kv_refresh": 8},
]


@pytest.mark.parametrize(
    ("is_traced", "knobs"),
    [(False, knobs) for knobs in KNOBS[1:]]
    + [
        pytest.param(*each, marks=pytest.mark.slow)
        for each in [(False, KNOBS[0]), *((True, each) for each in KNOBS[2:])]
    ],
    indirect=["is_traced"],
    ids=str,
)
def test_compiled_passes_give_the_same_tokens(is_traced, knobs) -> None:
    settings = {"max_new_tokens": 16, "eos_token_id": STOP, "window_size": 6} | knobs
    sampler, backend = compiled()

    def answers(sampler: APDSampler) -> list[list[int]]:
        batch = sampler.generate(
            **left_padded(PROMPTS), seed=list(range(len(PROMPTS))), return_dict_in_generate=True, **settings
        )
        many = sampler.generate_many(PROMPTS + PROMPTS[:2], batch_size=3, seed=3, **settings)
        return new_tokens(batch) + [answer.tokens for answer in many]

    assert answers(sampler) == answers(trace_sampler())
    assert (backend.count > 0) is is_traced


@pytest.mark.parametrize(
    "call",
    [
        {"correction": True},
        {"correction": True, "first": "judge", "mixture_weight": 0.0},
        {"acceptance": "rejection", "do_sample": True, "top_k": 5},
        {"mixture_weight": 1.0, "window_size": None},
        {"noise": "step", "do_sample": True, "num_return_sequences": 2},
        {"window_size": "auto"},
        {"strategy": LeftToRight(1)},
        {"strategy": KLASS(0.2, 0.5, 1), "kv_window": None},
        {"strategy": WINO(0.2, 0.9, 5), "kv_window": None},
    ],
    ids=str,
)
def test_fixed_passes_serve_every_rule_and_strategy(untraced, call) -> None:
    settings = {"max_new_tokens": 16, "eos_token_id": STOP, "window_size": 5, "kv_window": 4, "seed": 7} | call
    expected, found = (
        sampler.generate(**left_padded(PROMPTS[:3]), return_dict_in_generate=True, **settings)
        for sampler in (trace_sampler(), compiled()[0])
    )
    assert found.sequences.equal(expected.sequences)
    assert found.drafter_forwards.equal(expected.drafter_forwards)
    assert [row.steps for row in found.trace] == [row.steps for row in expected.trace]


@pytest.mark.slow
def test_a_second_call_compiles_nothing(caplog) -> None:
    """A graph is tied to the memory of its cache, which the next call takes over, and to shapes, which do not change."""
    caplog.set_level(logging.CRITICAL, "torch.__trace")  # its records hold frames, and these the borrower of the cache
    sampler, backend = compiled()
    settings = {"max_new_tokens": 24, "eos_token_id": [], "window_size": 6, "kv_window": 4}
    for prompt in (PROMPTS[1], PROMPTS[2], PROMPTS[3]):
        sampler.generate(torch.tensor([prompt]), **settings)
        first, memory = backend.count, sampler.drafter.compiled.loans[-1].cache.layers[0].keys
        gc.collect()  # so may exceptions of the compiler, in cycles
        sampler.generate(torch.tensor([prompt]), **settings)
        assert backend.count == first
        assert sampler.drafter.compiled.loans[-1].cache.layers[0].keys is memory


def test_concurrent_calls_have_their_own_caches(is_traced) -> None:
    sampler, backend = compiled(between=False)
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
    assert backend.count == 2 * is_traced  # of drafter and verifier: a graph is not compiled again for another cache


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        {"correction": True, "acceptance_threshold": 0.3},
        {"correction": True, "first": "judge", "mixture_weight": 0.0, "output_scores": True},
        {"acceptance": "rejection", "do_sample": True, "top_k": 5},
        {"mixture_weight": 1.0, "window_size": None},
        {"window_size": "auto"},
        {"strategy": Threshold(0.2)},
        {"do_sample": True, "top_k": 0, "top_p": 0.8},
        {"output_scores": True, "output_logits": True},
    ],
    ids=str,
)
def test_compiled_kernels_give_the_same_results(call) -> None:
    sampler, backend = compiled()
    for model in (sampler.drafter, sampler.verifier):
        model.compiled = None
    settings = {"max_new_tokens": 24, "eos_token_id": STOP, "window_size": 6, "seed": 0} | call
    settings["return_dict_in_generate"] = True
    outputs = [each.generate(**left_padded(PROMPTS), **settings) for each in (sampler, trace_sampler())]
    assert backend.count > 0
    assert outputs[0].sequences.equal(outputs[1].sequences)
    for row, expected in zip(*(output.trace for output in outputs), strict=True):
        assert (row.steps, row.committed) == (expected.steps, expected.committed)
        assert row.target_probs == pytest.approx(expected.target_probs, rel=1e-4)
    for name in {"scores", "logits"} & outputs[1].keys():
        torch.testing.assert_close(outputs[0][name], outputs[1][name], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_changed_numbers_need_no_more_graphs() -> None:
    """One graph of each function for the first call, another when a number changes, and none for all further ones."""
    sampler, backend = compiled()
    for model in (sampler.drafter, sampler.verifier):
        model.compiled = None

    def made(**call) -> int:
        before = backend.count
        sampler.generate(
            torch.tensor([PROMPTS[2]]), eos_token_id=[], **{"max_new_tokens": 24, "window_size": 6} | call
        )
        return backend.count - before

    assert made() == 3  # to draw, to judge, to commit
    assert made() == 0
    for calls in (
        [{"do_sample": True, "top_k": 0, "temperature": t, "seed": 0} for t in (0.7, 0.8, 0.9, 1.1)],
        [{"mixture_weight": weight} for weight in (0.4, 0.6, 0.7, 0.8)],
        [{"acceptance_threshold": threshold} for threshold in (0.1, 0.2, 0.3, 0.4)],
        [{"max_new_tokens": n} for n in (20, 22, 26, 28)],
        [{"window_size": m} for m in (7, 8, 9, 10)],
    ):
        counts = [made(**call) for call in calls]
        assert max(counts) <= 3 and counts[2:] == [0, 0]


class Processor(LogitsProcessor):
    history_free, count = True, 0

    def __call__(self, ids, scores):
        self.count += 1
        return scores


class Warper(TemperatureLogitsWarper):
    __init__ = object.__init__
    count, __call__ = 0, Processor.__call__


class Criterion(StoppingCriteria):
    count = 0

    def __call__(self, ids, scores, **_):
        self.count += 1
        return torch.zeros(1, dtype=torch.bool)


class Allowed:
    count = 0

    def __call__(self, row, ids) -> list[int]:
        self.count += 1
        return [3, 4, 5]


@pytest.mark.parametrize(
    "role, asked",
    [
        ("prefix_allowed_tokens_fn", Allowed()),
        ("logits_processor", Processor()),
        ("logits_processor", Warper()),
        ("stopping_criteria", Criterion()),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_hooks_of_the_caller_are_not_traced(role, asked) -> None:
    sampler, backend = compiled()
    for model in (sampler.drafter, sampler.verifier):
        model.compiled = None
    settings = {"max_new_tokens": 6, "eos_token_id": [], "window_size": 3, "do_sample": True, "top_k": 0, "seed": 0}
    call = {role: asked if role == "prefix_allowed_tokens_fn" else [asked]}
    sampler.generate(torch.tensor([PROMPTS[1]]), **settings, **call)
    assert asked.count and backend.count == 0


def test_a_model_that_is_not_neural_is_refused() -> None:
    ideal = IdealListModel.shuffle(3)
    with pytest.raises(TypeError, match="`drafter` must be a transformers decoder"):
        APDSampler(ideal.drafter, ideal.verifier).compile()
    drafter = trace_sampler.__wrapped__().drafter
    verifier = IdealListModel(torch.tensor([[drafter.vocab_size - 2]])).verifier
    with pytest.raises(TypeError, match="`verifier` must be a transformers decoder"):
        APDSampler(drafter, verifier).compile()
    assert drafter.compiled is None


def test_a_longer_prompt_that_joins_outgrows_the_cache(untraced) -> None:
    """A prompt beyond 256 columns needs a wider cache, which takes over the rows of the narrower one."""
    sampler, _ = compiled()
    prompts = [PROMPTS[1], PROMPTS[2], (trace_prompts()[0] * 30)[:300], PROMPTS[3]]
    settings = {"batch_size": 2, "seed": 0, "kv_window": 4, "max_new_tokens": 12, "eos_token_id": [], "window_size": 6}
    answers = [
        [answer.tokens for answer in each.generate_many(prompts, **settings)] for each in (sampler, trace_sampler())
    ]
    assert answers[0] == answers[1]


def test_a_failed_call_does_not_break_the_next(untraced) -> None:
    """Reused memory may hold NaN, and NaN times a masked weight of 0 is NaN."""
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


def test_reused_cache_memory_suits_the_call(untraced) -> None:
    sampler, _ = compiled()
    settings = {"kv_window": 4, "max_new_tokens": 12, "eos_token_id": [], "window_size": 6}
    prompt = torch.tensor([PROMPTS[1]])
    with torch.inference_mode():
        first = sampler.generate(prompt, **settings)
    assert sampler.generate(prompt, **settings).equal(first)
    for model in (sampler.drafter.model, sampler.verifier.model):
        model.double()
    assert sampler.generate(prompt, **settings).equal(first)


@pytest.mark.slow
@pytest.mark.parametrize("kv_window", [None, 4])
def test_only_the_tokens_and_their_slots_are_copied_into_a_graph(kv_window) -> None:
    """Cache and weights are read where they are, and nothing but the hidden states comes out."""
    sampler, backend = compiled(between=False)
    sampler.generate(**left_padded(PROMPTS[:3]), max_new_tokens=12, eos_token_id=[], kv_window=kv_window)
    for graph in backend.graphs:
        inputs = [node.meta for node in graph.nodes if node.op == "placeholder"]
        copied = [of["example_value"] for of in inputs if "_dynamo_static_input_type" not in of["tensor_dict"]]
        assert sorted(value.shape for value in copied) == [(2, 3), (3, 3), (3, 256)]
        assert len(graph.output_node().args[0]) == 1
    for model in (sampler.drafter, sampler.verifier):
        for loan in model.compiled.loans:
            assert loan.cache.target.rows is loan.cache.target.slots is None


class Watching(TorchDispatchMode):
    """Counts operations, and holds what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.devices: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += 1
        self.devices |= {each.device.type for each in (result,) if isinstance(each, torch.Tensor)}
        return result


@pytest.mark.parametrize("kv_window", [None, 4])
def test_little_is_launched_between_the_layout_and_the_drafter(kv_window) -> None:
    """The device idles from the host sync until the graph is launched."""
    sampler, _ = compiled()
    passes, waited, between = sampler.drafter.compiled, [0], []

    class Waiting(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if getattr(function, "__name__", "") == "tolist":
                waited.append(watching.count)
            return result

    def run(*args):
        between.append(watching.count - waited[-1])
        return forward_slots(passes.model, FULL, *args)

    passes.forward_slots = run
    with Watching() as watching, Waiting():
        settings = {"kv_window": kv_window, "window_size": 4, "mixture_weight": 1.0}
        sampler.generate(**left_padded(PROMPTS[:3]), max_new_tokens=24, eos_token_id=[], **settings)
    assert len(between) > 3 and statistics.median(between) <= 17


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["grouped_sdpa", "sdpa", "eager"])
def test_a_graph_is_on_one_device(is_cached, causal, implementation) -> None:
    """Inductor makes no CUDA graph of a function that touches a CPU tensor. The meta device takes the place of the GPU."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=8, intermediate_size=8, **sizes)
    config.num_key_value_heads, config._attn_implementation, config.is_causal = 1, implementation, causal
    with torch.device("meta"), torch.no_grad():
        model = Qwen2ForCausalLM(config)
        cache = FixedCache(model, 3, 256) if is_cached else None
        if cache is not None:
            cache.layers[0].lazy_initialization(*[torch.empty(3, 1, 1, 64)] * 2)
        tokens, edges, slots = (torch.empty(n, of, dtype=torch.int64) for n, of in ((3, 256), (3, 3), (2, 3)))
    with Watching() as watching, torch.no_grad():
        assert forward_slots(model, CAUSAL if causal else FULL, tokens, edges, slots, 64, cache).shape == (3, 64, 128)
    assert watching.devices == {"meta"}


@pytest.mark.slow
def test_inductor_gives_the_same_tokens() -> None:
    torch._dynamo.reset()
    sampler = trace_sampler.__wrapped__().compile(mode="reduce-overhead", fullgraph=True)
    settings = left_padded(PROMPTS[:3]) | {"max_new_tokens": 24, "eos_token_id": [], "window_size": 6, "kv_window": 4}
    settings |= {"do_sample": True, "top_k": 0, "seed": 0}
    expected = trace_sampler().generate(**settings)
    assert sampler.generate(**settings).equal(expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert sampler.generate(**settings).equal(expected)


@pytest.mark.slow
def test_both_models_are_traced_with_the_same_options() -> None:
    """torch.compile took the filter out of the options that both models were given, so that one had none."""
    torch._dynamo.reset()
    plain, asked = APDSampler(*tiny_pair(num_layers=1)), []

    def keep_all(guards):
        asked.append(len(guards))
        return [True] * len(guards)

    sampler = APDSampler(*tiny_pair(num_layers=1)).compile(
        backend=lambda module, _, **__: module.forward, options={"guard_filter_fn": keep_all}
    )
    call = {"max_new_tokens": 8, "eos_token_id": [], "window_size": 4, "kv_window": 2}
    assert sampler.generate(torch.tensor([[3, 14, 15]]), **call).equal(
        plain.generate(torch.tensor([[3, 14, 15]]), **call)
    )
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("kind", "size", "shift", "strategy"),
    [("causal", None, 0, "threshold:0.2"), ("prefix", 4, 0, None), ("prefix", 4, 1, None), ("block", 3, 1, None)],
)
def test_compiled_passes_know_every_attention(kind, size, shift, strategy, is_traced) -> None:
    answers = []
    for is_compiled in (False, True):
        drafter = MaskedDiffusionDrafter(
            _tiny(0), mask_token_id=23, logit_shift=shift, attention=kind, block_size=size
        )
        sampler = APDSampler(drafter, _tiny(1))
        if is_compiled:
            sampler.compile(backend="eager")
        prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [3]]
        more = {"seed": 1, "do_sample": True, "pad_token_id": 0, "strategy": strategy}
        found = sampler.generate_many(prompts, batch_size=2, max_new_tokens=9, **more)
        answers.append([answer.tokens for answer in found])
    assert answers[0] == answers[1]


def _tiny(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "initializer_range": 0.6}
    config = Qwen2Config(vocab_size=24, num_attention_heads=2, num_key_value_heads=1, **sizes)
    return Qwen2ForCausalLM(config).eval()
