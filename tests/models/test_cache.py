"""Rows of different widths: computed in passes of their own where that is cheaper, with the same results."""

import gc
import itertools
import random
import statistics

import pytest
import torch
from pairs import STOP, left_padded, new_tokens, trace_prompts, trace_sampler
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import apd.decoding.loop
from apd import KLASS, Confidence, LeftToRight
from apd.decoding.acceptance import Coupling
from apd.decoding.loop import DecodeLoop
from apd.decoding.step import APD
from apd.models.cache import ColumnCache
from apd.models.horizon import CAUSAL, FULL
from apd.models.span import PASS_OVERHEAD_COLUMNS, Span
from apd.models.transformer import EagerPasses


def test_prefill_and_decode_are_parted_only_where_it_pays() -> None:
    draw = random.Random(0)
    for _ in range(300):
        rows = draw.randint(1, 40)
        paddings = [draw.randint(0, 9) for _ in range(rows)]
        starts = [padding if draw.random() < 0.2 else padding + draw.randint(1, 99) for padding in paddings]
        ends = [start + draw.choice([1, 4, 8, 9, 60, 300]) for start in starts]
        span = Span.of_rows(starts, ends, paddings, torch.device("cpu"))
        widths = [end - start for start, end in zip(starts, ends, strict=True)]
        groups = span.groups()
        assert sorted(row for group in groups for row in group) == list(range(rows))
        computed = sum(len(group) * max(widths[row] for row in group) for group in groups)
        assert computed + PASS_OVERHEAD_COLUMNS * (len(groups) - 1) <= rows * max(widths)
        if len(groups) > 1:
            assert [{starts[row] == paddings[row] for row in group} for group in groups] == [{True}, {False}]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("is_cached", [False, True])
def test_parted_rows_have_the_same_hidden_states(monkeypatch, causal, is_cached) -> None:
    pair = trace_sampler()
    model = (pair.verifier if causal else pair.drafter).model
    tokens = torch.randint(0, 100, (4, 40), generator=torch.Generator().manual_seed(0))
    paddings = [0, 12, 3, 0]
    first = (paddings, [20, 20, 21, 30])
    second = ([18, 12, 20, 0] if is_cached else paddings, [22, 33, 24, 40])

    def hidden_states(cost: int) -> list[torch.Tensor]:
        monkeypatch.setattr("apd.models.span.PASS_OVERHEAD_COLUMNS", cost)
        passes = EagerPasses(model, attention=CAUSAL if causal else FULL, cache_shape=(4, 40) if is_cached else None)
        spans = [Span.of_rows(*edges, paddings, tokens.device) for edges in (first, second)]
        assert [len(span.groups()) > 1 for span in spans] == [False, cost == 0 and is_cached]
        return [passes(tokens, s)[s.real] for s in spans]

    for parted, together in zip(hidden_states(0), hidden_states(10**6), strict=True):
        torch.testing.assert_close(parted, together, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kv_window", "is_sampled"), [(None, True), (1, True), (4, False)])
def test_a_row_does_not_notice_in_which_pass_it_is(monkeypatch, kv_window, is_sampled) -> None:
    prompts = [prompt[: 3 + 5 * i] for i, prompt in enumerate(trace_prompts())]
    knobs = {"kv_window": kv_window, "max_new_tokens": 16, "eos_token_id": STOP, "window_size": 6}
    knobs |= {"do_sample": is_sampled, "top_k": 0 if is_sampled else None}

    def answers(cost: int) -> list[list[int]]:
        monkeypatch.setattr("apd.models.span.PASS_OVERHEAD_COLUMNS", cost)
        many = trace_sampler().generate_many(prompts + prompts[:3], batch_size=4, seed=3, **knobs)
        batch = trace_sampler().generate(
            **left_padded(prompts), seed=list(range(len(prompts))), return_dict_in_generate=True, **knobs
        )
        return [answer.tokens for answer in many] + new_tokens(batch)

    assert answers(0) == answers(10**6)


def test_a_newcomer_does_not_widen_the_others(monkeypatch) -> None:
    """A prompt that joins is read in a pass of its own; the batch was as wide as it, for drafter and verifier."""
    monkeypatch.setattr("apd.models.span.PASS_OVERHEAD_COLUMNS", 0)
    pair, fed = trace_sampler(), []
    knobs = {"kv_window": 2, "window_size": 4, "mixture_weight": 1.0, "max_new_tokens": 8, "seed": 0}
    short, long = [prompt[:8] for prompt in trace_prompts()[:3]], trace_prompts()[0] * 4
    free = [answer.tokens for answer in pair.generate_many(short, eos_token_id=[], **knobs)]
    (stop, *_) = set(free[0][:4]) - set(free[1] + free[2])  # the first prompt leaves after one step
    hook = pair.drafter.model.model.embed_tokens.register_forward_hook(
        lambda _, args, __: fed.append(tuple(args[0].shape))
    )
    try:
        list(pair.generate_many([*short, long], batch_size=3, eos_token_id=[stop], **knobs))
    finally:
        hook.remove()
    assert fed[:3] == [(3, 8 + 4), (1, len(long) + 4), (2, 1 + 8)]


def test_columns_that_no_row_needs_any_more_are_dropped(monkeypatch) -> None:
    widths = []
    narrow = DecodeLoop.step

    def step(self):
        info, after = narrow(self)
        widths.append(after.width)
        return info, after

    monkeypatch.setattr(DecodeLoop, "step", step)
    long, short = trace_prompts()[0] * 4, trace_prompts()[1][:5]
    knobs = {"kv_window": 2, "eos_token_id": [], "acceptance_threshold": 1.0, "max_new_tokens": 6, "seed": 0}
    answers = list(trace_sampler().generate_many([short, long, short, short], batch_size=2, **knobs))
    assert widths[0] == len(long) + 6
    assert widths[-2] == len(short) + 6
    alone = [next(iter(trace_sampler().generate_many([p], **knobs))) for p in (short, long)]
    assert [answer.tokens for answer in answers] == [alone[0].tokens, alone[1].tokens] + [alone[0].tokens] * 2


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("implementation", ["grouped_sdpa", "sdpa", "eager"])
def test_level_rows_need_no_mask(monkeypatch, causal, implementation) -> None:
    """Rows that have the same columns are computed from slices and without a mask: the same as row by row with one."""
    pair = trace_sampler()
    model = (pair.verifier if causal else pair.drafter).model
    monkeypatch.setattr(model.config, "_attn_implementation", implementation)  # other tests share the model
    tokens = torch.randint(0, 100, (3, 40), generator=torch.Generator().manual_seed(0))

    def hidden_states(is_level: bool) -> list[torch.Tensor]:
        passes = EagerPasses(model, attention=CAUSAL if causal else FULL, cache_shape=(3, 40))
        spans = [
            Span.of_rows([start] * 3, [end] * 3, [0] * 3, tokens.device) for start, end in ((0, 20), (17, 25), (5, 40))
        ]
        for span in spans:
            assert span.is_level
            span.__dict__["is_level"] = is_level
        return [passes(tokens, span) for span in spans]

    for level, ragged in zip(hidden_states(True), hidden_states(False), strict=True):
        torch.testing.assert_close(level, ragged, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", [KLASS(threshold=0.2, kl_threshold=0.5, history=1), Confidence(2)])
def test_strategies_do_not_notice_that_columns_are_dropped(strategy) -> None:
    """KLASS remembers columns; those of a long row go when it leaves, and others come with the next."""
    long, short = trace_prompts()[0] * 4, trace_prompts()[1][:5]
    prompts = [short, long, short, trace_prompts()[2], long, short]
    knobs = {"eos_token_id": [], "max_new_tokens": 10, "strategy": strategy}
    many = trace_sampler().generate_many(prompts, batch_size=2, seed=0, **knobs)
    alone = [trace_sampler().generate_many([prompt], seed=0, **knobs) for prompt in prompts]
    assert [answer.tokens for answer in many] == [next(iter(answers)).tokens for answers in alone]


def test_a_call_leaves_no_keys_behind() -> None:
    """Cache and layers pointed at each other, so that the memory of every call waited for the garbage collector."""

    def caches() -> int:
        return sum(type(each) is ColumnCache for each in gc.get_objects())

    prompt = torch.tensor([trace_prompts()[0]])
    gc.collect()
    gc.disable()
    try:
        before = caches()
        for _ in range(3):
            trace_sampler().generate(prompt, max_new_tokens=8, kv_window=4)
        assert caches() == before
    finally:
        gc.enable()


class Waiting(TorchFunctionMode):
    """Counts what makes the host wait for a device: values that become Python's, and shapes that depend on values."""

    names = (
        "tolist",
        "item",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "nonzero",
        "cpu",
        "numpy",
        "masked_select",
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += getattr(function, "__name__", "") in self.names
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kv_window", [None, 4])
@pytest.mark.parametrize("knobs", [{}, {"correction": True}, {"do_sample": True}, {"mixture_weight": 1.0}], ids=str)
def test_a_step_waits_for_the_device_once(kv_window, knobs) -> None:
    """It asked four times for shapes, and eight times more where the step was recorded."""
    steps = []

    class Watching(APD):
        def propose(self, *args):
            steps.append(waiting.count)
            return super().propose(*args)

    drawn = {name: knobs[name] for name in knobs if name == "do_sample"}
    strategy = Watching(knobs.get("mixture_weight", 0.5), Coupling(correction=knobs.get("correction", False)))
    settings = {
        "max_new_tokens": 24,
        "window_size": 3,
        "eos_token_id": STOP,
        "kv_window": kv_window,
        "seed": 0,
    } | drawn
    waiting = Waiting()
    with waiting:
        trace_sampler().generate(**left_padded(trace_prompts()[:3]), strategy=strategy, **settings)
    # A row that leaves is rare and may cost more.
    each = [after - before for before, after in itertools.pairwise(steps)]
    assert len(each) > 5 and statistics.mode(each) == 1 and min(each) == 1


class Operations(TorchDispatchMode):
    """Counts what is done outside of some modules."""

    def __init__(self, *modules: torch.nn.Module) -> None:
        super().__init__()
        self.count, self.inside, self.modules = 0, 0, modules

    def __enter__(self):
        self.handles = [module.register_forward_pre_hook(lambda *_: self.enter(1)) for module in self.modules]
        self.handles += [module.register_forward_hook(lambda *_: self.enter(-1)) for module in self.modules]
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for handle in self.handles:
            handle.remove()

    def enter(self, by: int) -> None:
        self.inside += by

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not self.inside
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(("strategy", "most"), [(APD(0.5, Coupling()), 89), (LeftToRight(1), 65)], ids=["apd", "one"])
def test_a_step_does_little_beside_its_forwards(monkeypatch, strategy, most) -> None:
    """On a CPU their number is what a small model's step costs beside its forwards."""
    sampler, counts = trace_sampler(), []

    def counted(*args, **kwargs):
        before = operations.count
        result = step(*args, **kwargs)
        counts.append(operations.count - before)
        return result

    step = apd.decoding.loop.decode_step
    monkeypatch.setattr(apd.decoding.loop, "decode_step", counted)
    models = [each.model for each in (sampler.drafter, sampler.verifier)]
    with Operations(*[part for m in models for part in (m.base_model, m.get_output_embeddings())]) as operations:
        sampler.generate(torch.tensor([trace_prompts()[0]]), strategy=strategy, max_new_tokens=24, window_size=3)
    assert len(counts) > 5 and statistics.mode(counts) <= most


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kv_window", [None, 4])
def test_the_output_layer_is_one_product(rows, kv_window) -> None:
    """Positions of a single row were a slice with a gap behind it, and a batch of products where no weight has gradients.

    A CPU pays for it in bfloat16 most.
    """
    sampler, products = trace_sampler.__wrapped__(), []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            products.append(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    class Head(torch.nn.Module):
        def __init__(self, head: torch.nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            with Products():
                return self.head(hidden)

    for each in (sampler.drafter, sampler.verifier):
        each.model.requires_grad_(False)
        each.model.set_output_embeddings(Head(each.model.get_output_embeddings()).eval())
    prompt = torch.tensor([trace_prompts()[0]] * rows)
    sampler.generate(prompt, max_new_tokens=12, window_size=3, kv_window=kv_window, eos_token_id=[])
    assert "mm" in products and "bmm" not in products
