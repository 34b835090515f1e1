"""Families whose checkpoints are recorded in `fixtures/`: what loads, what is computed, and what is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pairs import left_padded
from parity import TOLERANCE
from paths import FIXTURES, ROOT
from transformers import Qwen2Config, Qwen2ForCausalLM

from apd import APDSampler, load_drafter
from apd.models.families import FAMILIES, ModelSpec
from apd.models.horizon import CAUSAL, FULL, Attention
from apd.models.loading import as_drafter, drafter_config, load_verifier
from benchmarks.families.logits import LAYOUTS, MASKS, NEWER, compare, decoded

pytestmark = pytest.mark.compat

#: Folder, family, attention, block size, logit shift, mask token, and whether its models read causally.
FACTS = [
    ("parity_sdar", "sdar", "block", 4, 0, 125, False),
    ("parity_sdar_moe", "sdar-moe", "block", 4, 0, 125, False),
    ("parity_fast_dllm_v2", "fast-dllm-v2", "block", 32, 1, 122, True),
    ("parity_wedlm", "wedlm", "causal", 32, 0, 122, True),
    ("parity_wedlm_qwen3", "wedlm-qwen3", "causal", 32, 0, 122, True),
    ("decode_llada2_moe", "llada2", "block", 32, 0, 126, False),
    ("parity_llada2_moe", "llada2", "block", 32, 0, 60, False),
    ("parity_llada_moe", "llada-moe", "full", None, 0, 60, False),
    ("parity_sdlm", "sdlm", "prefix", 4, 1, 126, True),
    ("parity_nemotron", "nemotron", "prefix", 32, 0, 100, True),
]


def supported(folder: str) -> Path:
    if folder in NEWER:
        pytest.skip("needs transformers 5.24")
    return FIXTURES / folder


def without_weights(source: str, to: Path, **changes: object) -> Path:
    """A config.json with other values, `None` removing one, alone: what it makes fail fails before weights are read."""
    to.mkdir()
    raw = json.loads((FIXTURES / source / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({name: value for name, value in raw.items() if value is not None}))
    return to


@pytest.mark.parametrize(
    "implementation", ["grouped_sdpa", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sdpa", "eager"))]
)
@pytest.mark.parametrize("folder", LAYOUTS)
def test_every_recorded_layout_is_computed_as_published(folder: str, implementation: str) -> None:
    supported(folder)
    found = list(compare(folder, implementation))
    assert found
    for each in found:
        print(f"{folder} {each.layout}, {each.way}: {each.gap:.1e} of {each.largest:.1f}")
        assert each.computed.shape == each.recorded.shape and len(each.recorded)
        assert each.gap <= TOLERANCE * each.largest, (each.layout, each.way)


@pytest.mark.parametrize("folder", LAYOUTS)
def test_another_attention_computes_something_else(folder: str) -> None:
    """So that the comparison above can fail."""
    supported(folder)
    wrong = CAUSAL if folder == "parity_llada_moe" else FULL
    assert next(each.gap for each in compare(folder, attention=wrong) if each.way == "decode") > 0.1


# The experts of mixtures have no float64 kernel.
@pytest.mark.parametrize("folder", [folder for folder in LAYOUTS if "moe" not in folder])
def test_windows_and_caches_compute_the_logits_of_the_whole_canvas_to_rounding_in_float64(folder: str) -> None:
    """The class itself, on the whole canvas under the mask that the kind's definition gives, is the reference."""
    drafter = load_drafter(
        supported(folder), mask_token_id=MASKS.get(folder), dtype=torch.float64, attn_implementation="sdpa"
    )
    frontier, end, kind, size = 40, 64, drafter.attention.kind, drafter.attention.block_size
    if kind == "prefix":  # the last decided token and the masks see each other
        end = frontier - 1 + size
    column = torch.arange(end)
    horizon = {
        "causal": column,
        "block": column // size * size + size - 1,
        "prefix": torch.where(column >= frontier - 1, end, column),
    }[kind]
    # Where rows predict the next column, the last one predicts a column behind all that is seen.
    ids = torch.randint(
        3, 50, (1, end + drafter.logit_shift * (kind == "prefix")), generator=torch.Generator().manual_seed(3)
    )
    ids[:, frontier:] = drafter.mask_token_id
    seen = (column <= horizon[:, None])[None, None]
    with torch.no_grad():
        whole = drafter.model(ids[:, :end], attention_mask=seen, position_ids=column[None]).logits
    for earlier in ([], [33], [5, 35]):
        computed, expected = decoded(drafter, ids, whole, earlier=earlier)
        assert computed.dtype == torch.float64 and len(computed) > 1
        assert float((computed - expected).abs().max()) <= 1e-12 * float(whole.abs().max()), earlier


@pytest.mark.parametrize(("folder", "family", "kind", "size", "shift", "mask", "reads"), FACTS)
def test_a_checkpoint_is_recognised(folder, family, kind, size, shift, mask, reads) -> None:
    drafter = load_drafter(supported(folder), mask_token_id=MASKS.get(folder))
    assert isinstance(drafter.model, FAMILIES[family].model_class)
    assert drafter.attention == Attention(kind, size)
    assert (drafter.logit_shift, drafter.mask_token_id, drafter.reads_causally) == (shift, mask, reads)
    assert drafter.model.config._attn_implementation in ("sdpa", "grouped_sdpa")  # whatever config.json says
    with pytest.raises(ValueError, match=r"verifier must be a causal model, but .* is a diffusion model"):
        load_verifier(FIXTURES / folder)


def test_a_sampler_decodes_blocks_of_the_size_that_it_is_given() -> None:
    sampler = APDSampler.from_pretrained(str(FIXTURES / "parity_sdar"), block_size=8, mixture_weight=1.0)
    output = sampler.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=29, eos_token_id=None, do_sample=False, return_dict_in_generate=True
    )
    assert output.committed_per_step[0] == [5, 8, 8, 8]  # at R = 1 a whole window, which ends with its block


@pytest.mark.parametrize("do_sample", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("folder", [folder for folder, *_ in FACTS])
def test_a_ragged_batch_equals_rows_alone(folder: str, do_sample: bool) -> None:
    sampler = APDSampler.from_pretrained(
        str(supported(folder)), mask_token_id=MASKS.get(folder), mixture_weight=1.0, window_size=3
    )
    prompts = [[1, 2, 3, 4, 5, 6, 7], [8, 9], [11]]
    settings = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "do_sample": do_sample}
    alone = [
        sampler.generate(torch.tensor([prompt]), seed=[seed], **settings)[0].tolist()[len(prompt) :]
        for seed, prompt in enumerate(prompts)
    ]
    batch = sampler.generate(**left_padded(prompts, pad=0), seed=[0, 1, 2], **settings)
    assert batch[:, 7:].tolist() == alone


def test_the_block_size_comes_from_the_argument_then_the_config_then_the_family(tmp_path) -> None:
    config = FIXTURES / "parity_fast_dllm_v2"
    assert drafter_config(config).block_size == 32
    assert drafter_config(config, block_size=8).block_size == 8
    lacks = without_weights("parity_sdar", tmp_path / "lacks", block_size=None)
    assert drafter_config(lacks).block_size == 4
    assert drafter_config(without_weights("parity_sdar", tmp_path / "has", block_size=16)).block_size == 16


@pytest.mark.parametrize(
    ("folder", "changes", "block_size", "error", "message"),
    [
        ("parity_sdar", {}, 0, ValueError, "`block_size` must be at least 1, got 0"),
        ("parity_sdar", {}, "4", TypeError, "`block_size` must be a whole number"),
        ("parity_sdar", {"block_size": 0}, None, ValueError, "`block_size` in config.json must be above 0, got 0"),
        (
            "parity_fast_dllm_v2",
            {"bd_size": "32"},
            None,
            ValueError,
            "`bd_size` in config.json must be a whole number",
        ),
        ("parity_llada_moe", {}, 8, ValueError, "`block_size` must be None with attention='full', got 8"),
        ("parity_dream", {}, 8, ValueError, "`block_size` must be None with attention='full', got 8"),
    ],
)
def test_a_wrong_block_size_is_refused_before_the_weights(
    folder, changes, block_size, error, message, tmp_path
) -> None:
    with pytest.raises(error, match=message):
        load_drafter(without_weights(folder, tmp_path / "odd", **changes), block_size=block_size)


def test_a_family_of_blocks_needs_their_size(tmp_path) -> None:
    mine = ModelSpec("mine", FAMILIES["sdar"].model_class, 0, attention="block")
    lacks = without_weights("parity_sdar", tmp_path / "lacks", block_size=None)
    with pytest.raises(ValueError, match="`block_size` must be given with attention='block'"):
        load_drafter(lacks, spec=mine)
    assert drafter_config(lacks, spec=mine, block_size=8).block_size == 8
    with pytest.raises(ValueError, match="`attention` must be one of"):
        ModelSpec("x", Qwen2ForCausalLM, 0, attention="sideways")
    with pytest.raises(ValueError, match="`block_size` must be None with attention='full'"):
        ModelSpec("x", Qwen2ForCausalLM, 0, block_size=8)


def test_the_mask_token_comes_from_the_family_if_the_vocabulary_has_it(tmp_path) -> None:
    large = without_weights("parity_sdar", tmp_path / "large", mask_token_id=None, vocab_size=151936)
    assert drafter_config(large).mask_token_id == 151669
    assert drafter_config(large, mask_token_id=3).mask_token_id == 3
    with pytest.raises(ValueError, match="`mask_token_id` must be given"):
        load_drafter(without_weights("parity_sdar", tmp_path / "small", mask_token_id=None))
    with pytest.raises(ValueError, match=r"`text_mask_token_id` in config.json must be a token id"):
        load_drafter(without_weights("parity_sdlm", tmp_path / "text", text_mask_token_id="<mask>"))


@pytest.mark.parametrize("family", ["open-dcoder", "i-dlm"])
def test_some_families_are_used_only_if_named(family: str) -> None:
    spec = FAMILIES[family]
    assert not spec.model_types
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = spec.model_class.config_class(vocab_size=24, num_key_value_heads=1, head_dim=8, **sizes)
    config.is_causal = False
    drafter = as_drafter(spec.model_class(config).eval(), family, mask_token_id=23)
    assert drafter.attention.kind == spec.attention and drafter.logit_shift == 1


def test_a_model_in_memory_says_its_block_size() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=24, num_key_value_heads=1, **sizes)).eval()
    assert as_drafter(model, "fast-dllm-v2", mask_token_id=23).attention.block_size == 32
    model.config.block_size = 8
    assert as_drafter(model, "fast-dllm-v2", mask_token_id=23).attention.block_size == 8
    with pytest.raises(ValueError, match="`block_size` must be None with attention='full'"):
        model.config.is_causal = False
        as_drafter(model, "dream", mask_token_id=23)


def test_the_page_about_models_says_what_the_families_are() -> None:
    page = (ROOT / "docs" / "models.md").read_text("utf-8")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.splitlines() if row.startswith("| `")]
    del rows[0]  # the heads of the columns
    assert {row[0].strip("`") for row in rows} == FAMILIES.keys()
    for name, _, attention, shift, block, *_ in rows:
        spec = FAMILIES[name.strip("`")]
        assert (attention, int(shift)) == (spec.attention, spec.logit_shift)
        assert block == str(spec.block_size or ("config" if spec.block_field else "–"))


LLADA_MOE = {
    "attention_bias": True,
    "clip_qkv": 8.0,
    "moe_router_enable_expert_bias": True,
    "moe_router_score_function": "sigmoid",
    "norm_topk_prob": True,
    "partial_rotary_factor": 0.5,
    "qk_layernorm": False,
    "routed_scaling_factor": 2.5,
    "router_num_group": 4,
    "router_topk_group": 2,
    "shared_expert_intermediate_size": 8,
    "moe_layer_freq": 2,
}
LLADA2 = {
    "moe_router_enable_expert_bias": False,
    "norm_topk_prob": False,
    "num_nextn_predict_layers": 1,
    "rotary_dim": 8,
    "router_dtype": "bf16",
    "score_function": "softmax",
    "use_bias": True,
    "use_qk_norm": False,
    "use_qkv_bias": True,
    "use_rmsnorm": False,
}
NEMOTRON = {"attention_bias": True, "mlp_bias": True, "sliding_window": 64, "dlm_paradigm": "block_diff"}
REFUSED = [
    *(("parity_llada_moe", {name: value}, name) for name, value in LLADA_MOE.items()),
    *(("decode_llada2_moe", {name: value}, name) for name, value in LLADA2.items()),
    *(("parity_nemotron", {name: value}, name) for name, value in NEMOTRON.items()),
    *((f"parity_{name}", {"use_sliding_window": True}, "use_sliding_window") for name in ("sdar", "sdlm", "wedlm")),
    ("parity_sdar", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("parity_sdar", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("parity_sdar", {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "rope_type"),
    ("parity_sdar", {"head_dim": None, "hidden_size": None}, "hidden_size"),
    ("parity_sdar_moe", {"num_experts": None}, "num_experts"),
    ("parity_sdar_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size"),
    ("parity_sdlm", {"causal_attn": True}, "causal_attn"),
    ("parity_wedlm", {"attention_bias": False}, "attention_bias"),
    ("parity_wedlm_qwen3", {"attention_bias": True}, "attention_bias"),
    ("parity_nemotron", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, "original_max_position"),
    ("parity_llada_moe", {"moe_layer_freq": [1]}, "moe_layer_freq"),
    ("parity_llada_moe", {"dense_intermediate_size": None}, "dense_intermediate_size"),
    ("decode_llada2_moe", {"num_shared_experts": None}, "num_shared_experts"),
    ("decode_llada2_moe", {"first_k_dense_replace": None}, "first_k_dense_replace"),
]


@pytest.mark.parametrize(("folder", "changes", "name"), REFUSED)
def test_what_the_class_does_not_compute_is_refused_by_name(folder, changes, name, tmp_path) -> None:
    supported(folder)
    with pytest.raises(ValueError, match=f"(`{name}.*in config.json must be|lacks .*`{name})"):
        drafter_config(without_weights(folder, tmp_path / "odd", **changes), mask_token_id=5)


def test_a_config_between_two_families_names_what_decides(tmp_path) -> None:
    unclear = without_weights("parity_wedlm", tmp_path / "unclear", qk_norm=None)
    with pytest.raises(ValueError, match=r"'wedlm' where .*'qk_norm': False.* or 'wedlm-qwen3' where"):
        load_drafter(unclear)
    assert drafter_config(unclear, spec="wedlm").model_type == "qwen2"


@pytest.mark.skipif(not NEWER, reason="this transformers has the class")
def test_llada2_names_the_transformers_that_it_needs() -> None:
    with pytest.raises(ValueError, match=r"LLaDA2 needs transformers 5\.24 or newer, got 5\."):
        load_drafter(FIXTURES / "decode_llada2_moe", mask_token_id=126)


def test_a_published_factor_below_one_is_read(tmp_path) -> None:
    """A third party gives this for Nemotron's 3B base model."""
    raw = json.loads((FIXTURES / "parity_nemotron" / "config.json").read_text())
    shutil.copytree(FIXTURES / "parity_nemotron", tmp_path / "base")
    raw |= {"rope_parameters": raw["rope_parameters"] | {"factor": 0.25}, "max_position_embeddings": 4096}
    (tmp_path / "base" / "config.json").write_text(json.dumps(raw))
    assert load_drafter(tmp_path / "base").max_length == 4096
