"""Heads that share keys attend as one: what "sdpa" computes, and no copy of the keys."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import apd.models.attention
from apd import ModelSpec, load_drafter, load_verifier
from apd.models.attention import GROUPED, grouped_sdpa
from apd.models.graphs import FixedCache, forward_slots
from apd.models.horizon import CAUSAL, FULL
from apd.models.loading import as_drafter, as_verifier
from apd.models.span import Span
from apd.models.transformer import EagerPasses

pytestmark = pytest.mark.compat
ROWS, QUERIES, KEYS, SIZE = 3, 5, 19, 8
# Of outputs of unit scale: some ten times the rounding of their type.
TOLERANCES = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 4e-2, torch.float16: 5e-3}


class Layer(nn.Module):
    """What an attention function asks of an attention layer."""

    is_causal = True

    def __init__(self, group: int) -> None:
        super().__init__()
        self.num_key_value_groups = group


def inputs(group: int, dtype: torch.dtype = torch.float32, shared: int = 2) -> dict[str, Any]:
    """Query, key and value, laid out as models and caches lay them out, and the layer."""
    generator = torch.Generator().manual_seed(group)
    heads = group * shared
    query = torch.randn(ROWS, QUERIES, heads, SIZE, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
    key, value = torch.randn(2, ROWS, shared, KEYS + 4, SIZE, generator=generator, dtype=torch.float64).to(dtype)
    return {"module": Layer(group), "query": query, "key": key[:, :, :KEYS], "value": value[:, :, :KEYS]}


def ragged() -> Tensor:
    """Rows padded on the left, each query up to another key; fillers see nothing, as where a row has ended."""
    ends = torch.tensor([[9, 10, 11, 12, 13], [3, 4, 5, 6, 7], [17, 18, 19, 0, 0]])
    keys = torch.arange(KEYS)
    return ((keys < ends[..., None]) & (keys >= torch.tensor([4, 0, 1])[:, None, None]))[:, None]


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask with scores, not only 0 and −∞."""
    slopes = torch.linspace(-2, 2, mask.numel(), dtype=dtype).view(mask.shape)
    return slopes.masked_fill(~mask, torch.finfo(dtype).min)


MASKS = {
    "ragged": lambda dtype: ragged(),
    "added": lambda dtype: added(ragged(), dtype),
    "alike in every row": lambda dtype: ragged()[:1],
    "alike for every query": lambda dtype: ragged()[:, :, :1],
    "as padding gives it": lambda dtype: ragged()[:, :, :1].expand(-1, -1, QUERIES, -1),
}


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Query, key and value of every attention that was computed for a whole group."""
    calls = []

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append((query, key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)

    monkeypatch.setattr(apd.models.attention, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(("group", "shared"), [(1, 2), (2, 1), (2, 2), (3, 2), (7, 4)])
def test_it_is_sdpa(group: int, shared: int, dtype: torch.dtype, mask: str, packed: list) -> None:
    call = inputs(group, dtype, shared) | {"attention_mask": MASKS[mask](dtype), "scaling": 0.3}
    found, weights = grouped_sdpa(**call)
    assert weights is None and found.dtype == dtype and found.is_contiguous()
    assert found.shape == (ROWS, QUERIES, group * shared, SIZE) and found.isfinite().all()
    expected, _ = sdpa_attention_forward(**call)
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCES[dtype])
    assert len(packed) == (group > 1)


def test_one_query_is_enough(packed: list) -> None:
    call = inputs(3) | {"attention_mask": ragged()[:, :, :1]}
    call["query"] = call["query"][:, :, :1]
    torch.testing.assert_close(grouped_sdpa(**call)[0], sdpa_attention_forward(**call)[0], rtol=0, atol=2e-6)
    assert len(packed) == 1


def test_keys_are_read_where_they_are(packed: list) -> None:
    call = inputs(7, shared=4) | {"attention_mask": ragged()}
    grouped_sdpa(**call)
    [(query, key, value)] = packed
    assert key is call["key"] and value is call["value"] and query.shape == (ROWS, 4, 7 * QUERIES, SIZE)


FOR_SDPA = {
    "no mask": {"attention_mask": None},
    "a mask per head": {"attention_mask": ragged().expand(-1, 6, -1, -1)},
    "dropout": {"dropout": 0.5},
    "something new": {"position_bias": torch.zeros(1, 6, QUERIES, KEYS)},
    "capped scores": {"softcap": 30.0},
    "weights": {"output_attentions": True},
}


@pytest.mark.parametrize("case", FOR_SDPA)
def test_what_it_does_not_compute_goes_to_sdpa_as_it_came(case: str, monkeypatch, packed: list) -> None:
    call = inputs(3) | {"attention_mask": ragged(), "dropout": 0.0, "scaling": None} | FOR_SDPA[case]
    asked = []
    monkeypatch.setattr(
        apd.models.attention, "sdpa_attention_forward", lambda *args, **more: asked.append((args, more))
    )
    grouped_sdpa(**call)
    [(positional, more)] = asked
    given = dict(zip(("module", "query", "key", "value", "attention_mask"), positional, strict=True)) | more
    assert not packed and given.keys() == call.keys() and all(given[name] is call[name] for name in call)


def test_a_wide_pass_goes_to_sdpa(packed: list) -> None:
    """A mask of its own for every head of a group would be larger than the copies of the keys."""
    call = inputs(3)
    for width, num_packed in ((2 * SIZE, 1), (2 * SIZE + 1, 0)):
        packed.clear()
        call |= {"query": torch.randn(ROWS, 6, width, SIZE), "attention_mask": ragged()[:, :, :1]}
        torch.testing.assert_close(grouped_sdpa(**call)[0], sdpa_attention_forward(**call)[0], rtol=0, atol=2e-6)
        assert len(packed) == num_packed


# Whole models

SIZES = {
    "vocab_size": 32,
    "hidden_size": 128,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM), (LlamaConfig, LlamaForCausalLM)]


def model_of(config: Any = Qwen2Config, kind: Any = Qwen2ForCausalLM, causal: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    model = kind(config(**SIZES)).eval().requires_grad_(False)
    model.config.is_causal = causal
    return model


TOKENS = torch.randint(0, 32, (3, 30), generator=torch.Generator().manual_seed(0))
PADDINGS = [0, 7, 2]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family[1].__name__)
def test_a_model_computes_the_same_and_repeats_no_keys(family, is_cached, causal, packed: list) -> None:
    """In ragged rows, whose second pass reads what the first has left in the cache."""
    model = model_of(*family, causal)
    spans = [Span.of_rows(PADDINGS, [20, 12, 17], PADDINGS, TOKENS.device)]
    spans.append(Span.of_rows([18, 12, 11] if is_cached else PADDINGS, [26, 15, 30], PADDINGS, TOKENS.device))

    def hidden_states(implementation: str) -> list[Tensor]:
        model.set_attn_implementation(implementation)
        passes = EagerPasses(model, attention=CAUSAL if causal else FULL, cache_shape=(3, 30) if is_cached else None)
        states = [passes(TOKENS, span)[span.real] for span in spans]
        assert bool(packed) == (implementation == GROUPED)
        if passes.cache is not None:
            memory = {layer.keys.untyped_storage().data_ptr() for layer in passes.cache.layers}
            read = {key.untyped_storage().data_ptr() for _, key, _ in packed}
            assert read == (memory if packed else set())
        return states

    expected = {name: hidden_states(name) for name in ("sdpa", "eager")}
    found = hidden_states(GROUPED)
    assert len(packed) == 4 and all(key.shape[1] == 2 for _, key, _ in packed)  # two layers, twice
    for states in expected.values():
        torch.testing.assert_close(found, states, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
def test_a_compiled_pass_is_one_graph(causal: bool, packed: list) -> None:
    model, graphs = model_of(causal=causal), []
    starts, ends, rows = [18, 7, 11], [26, 15, 30], [0, 1, 2]
    edges, slots, tokens = (
        torch.tensor([starts, ends, PADDINGS]),
        torch.tensor([rows] * 2),
        torch.randint(0, 32, (3, 256)),
    )

    def backend(module: torch.fx.GraphModule, _: object) -> Any:
        graphs.append(module)
        return module.forward

    def hidden_states(implementation: str, run: Any) -> Tensor:
        model.set_attn_implementation(implementation)
        cache = FixedCache(model, 3, 256)
        for layer in cache.layers:
            layer.lazy_initialization(*[torch.empty(3, 2, 1, 32)] * 2)
        hidden = run(tokens, edges, slots, 64, cache)
        return torch.cat([row[: end - start] for row, start, end in zip(hidden, starts, ends, strict=True)])

    plain = partial(forward_slots, model, CAUSAL if causal else FULL)
    expected = hidden_states("sdpa", plain)
    torch._dynamo.reset()
    compiled = hidden_states(GROUPED, torch.compile(plain, backend=backend, fullgraph=True, dynamic=False))
    torch.testing.assert_close(compiled, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden_states(GROUPED, plain), expected, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1 and len(packed) > 0


def test_generate_of_a_loaded_model_gives_the_same_tokens(tmp_path, packed: list) -> None:
    """transformers' own: it makes a mask of the padding by the name of the attention, or none if it knows no such."""
    model_of().save_pretrained(tmp_path)
    model = load_verifier(tmp_path).model
    mask = (torch.arange(12) >= torch.tensor(PADDINGS)[:, None]).long()

    def generated() -> Tensor:
        return model.generate(
            TOKENS[:, :12], attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
        )

    found = generated()
    assert packed
    model.set_attn_implementation("sdpa")
    assert found.equal(generated())


# Which models attend so


def test_grouped_attention_is_the_default_of_loaded_models(tmp_path) -> None:
    model_of().save_pretrained(tmp_path)
    spec = ModelSpec("mine", Qwen2ForCausalLM, logit_shift=1)
    for load in (load_verifier, partial(load_drafter, spec=spec, mask_token_id=31)):
        for asked, given in {None: GROUPED, GROUPED: GROUPED, "sdpa": "sdpa", "eager": "eager"}.items():
            assert load(tmp_path, attn_implementation=asked).model.config._attn_implementation == given


def test_where_no_heads_share_keys_there_is_nothing_to_group(tmp_path) -> None:
    Qwen2ForCausalLM(Qwen2Config(**SIZES | {"num_key_value_heads": 4})).save_pretrained(tmp_path)
    for asked, given in {None: "sdpa", GROUPED: GROUPED}.items():
        assert load_verifier(tmp_path, attn_implementation=asked).model.config._attn_implementation == given


def test_models_of_others_stay_as_they_are() -> None:
    for name in ("sdpa", "eager", GROUPED):
        drafter, verifier = model_of(causal=False), model_of()
        drafter.set_attn_implementation(name)
        verifier.set_attn_implementation(name)
        as_drafter(drafter, "dream", 31)
        as_verifier(verifier)
        assert drafter.config._attn_implementation == verifier.config._attn_implementation == name


def test_a_model_with_attention_of_its_own_keeps_it(tmp_path) -> None:
    """Falcon asks whether the name is "sdpa" and would not know ours."""
    more = {"num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False}
    FalconForCausalLM(FalconConfig(**SIZES, **more)).save_pretrained(tmp_path)
    for asked in (None, GROUPED):
        assert load_verifier(tmp_path, attn_implementation=asked).model.config._attn_implementation == "sdpa"


def test_the_name_is_not_saved(tmp_path) -> None:
    """It means nothing where this package is not imported."""
    model_of().save_pretrained(tmp_path / "first")
    load_verifier(tmp_path / "first").model.save_pretrained(tmp_path / "second")
    assert GROUPED not in (tmp_path / "second" / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "second").config._attn_implementation == "sdpa"
