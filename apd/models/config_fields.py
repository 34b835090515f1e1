"""From the `config.json` of a diffusion LM to the config of the transformers class that computes it.

A reader refuses by name whatever the class does not compute: the weights alone would not show it. Fields that say how a
model is run, such as `attn_implementation`, are never obeyed.
"""

from collections.abc import Mapping
from typing import Any

import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from apd.kinds import REAL, WHOLE, misfit

RawConfig = Mapping[str, Any]

_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_OPTIONAL = ("head_dim", "hidden_act", "attention_bias", "initializer_range", "tie_word_embeddings")
_EXPERTS = ("num_experts_per_tok", "moe_intermediate_size")
_FRACTIONS = ("rms_norm_eps", "rope_theta", "partial_rotary_factor", "routed_scaling_factor", "llama_4_scaling_beta")

#: The config class whose conversion reads the weights of LLaDA2; `None` before transformers 5.24.
LLADA2_CONFIG = getattr(transformers, "SarvamMoEConfig", None)


def decoder_fields(raw: RawConfig) -> dict[str, Any]:
    """Config fields of a checkpoint with transformers' field names: Dream, SDAR, and models saved by `save_pretrained`.

    Args:
        raw: the content of `config.json`.
    Raises:
        ValueError: a field is missing or has a wrong type, sliding-window or multimodal attention is on, or only a part of a
            head is rotated.
    """
    demand(raw, use_sliding_window=False, use_mrope=False, partial_rotary_factor=1)
    _demand_each(raw, "layer_types", "full_attention")
    need(raw, *_NEEDED)
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    known = sorted({"default", *ROPE_INIT_FUNCTIONS})
    if rope["rope_type"] not in known:
        raise ValueError(
            f"`rope_type` in config.json must be one of {', '.join(known)}, got {rope['rope_type']!r}: this transformers "
            "version computes no other."
        )
    if "rope_theta" not in rope:
        need(raw, "rope_theta")
        rope["rope_theta"] = raw["rope_theta"]
    return _present(raw, *_NEEDED, *_OPTIONAL) | {"rope_parameters": rope}


def llada_fields(raw: RawConfig) -> dict[str, Any]:
    """Llama config fields of a LLaDA 1.0 or 1.5 checkpoint, which uses other field names.

    Args:
        raw: the content of `config.json`.
    Raises:
        ValueError: a field is missing or has a wrong type, or an option is on that no Llama computes.
    """
    demand(
        raw,
        activation_type="silu",
        alibi=False,
        block_type="llama",
        clip_qkv=None,
        input_emb_norm=False,
        layer_norm_type="rms",
        rope=True,
        scale_logits=False,
    )
    need(raw, "d_model", "mlp_hidden_size", "n_layers", "n_heads", "max_sequence_length", "rope_theta", "vocab_size")
    return {
        "vocab_size": raw.get("embedding_size") or raw["vocab_size"],
        "hidden_size": raw["d_model"],
        "intermediate_size": raw["mlp_hidden_size"],
        "num_hidden_layers": raw["n_layers"],
        "num_attention_heads": raw["n_heads"],
        "num_key_value_heads": raw.get("n_kv_heads") or raw["n_heads"],
        "max_position_embeddings": raw["max_sequence_length"],
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-5),
        "rope_parameters": {"rope_type": "default", "rope_theta": raw["rope_theta"]},
        "tie_word_embeddings": raw.get("weight_tying", False),
    }


def wedlm_fields(raw: RawConfig) -> dict[str, Any]:
    """Config fields of WeDLM: a Qwen3 where `qk_norm` is True, else a Qwen2, whose queries, keys and values have biases.

    Arguments and errors as in `decoder_fields`.
    """
    demand(raw, attention_bias=not raw.get("qk_norm"))
    return decoder_fields(raw)


def sdlm_fields(raw: RawConfig) -> dict[str, Any]:
    """Config fields of SDLM, whose window sees both ways. Arguments and errors as in `decoder_fields`."""
    demand(raw, causal_attn=False)
    return decoder_fields(raw)


def nemotron_fields(raw: RawConfig) -> dict[str, Any]:
    """Ministral3 config fields of a Nemotron-Labs-Diffusion checkpoint. Arguments and errors as in `decoder_fields`."""
    demand(raw, attention_bias=False, mlp_bias=False, sliding_window=None, dlm_paradigm="bidirectional")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    # Queries are scaled with the position: without these the class fails in its first pass.
    need(rope, "original_max_position_embeddings")
    need(rope, "llama_4_scaling_beta", or_zero=True)
    return decoder_fields(raw)


def qwen3_moe_fields(raw: RawConfig) -> dict[str, Any]:
    """Config fields of a mixture of experts with Qwen3-MoE's names. Arguments and errors as in `decoder_fields`."""
    need(raw, "num_experts", *_EXPERTS)
    routing = ("norm_topk_prob", "decoder_sparse_step", "mlp_only_layers")
    return decoder_fields(raw) | _present(raw, "num_experts", *_EXPERTS, *routing)


def llada_moe_fields(raw: RawConfig) -> dict[str, Any]:
    """Qwen3-MoE config fields of a LLaDA-MoE checkpoint. Arguments and errors as in `decoder_fields`."""
    demand(
        raw,
        attention_bias=False,
        clip_qkv=None,
        moe_router_enable_expert_bias=False,
        moe_router_score_function="softmax",
        norm_topk_prob=False,
        qk_layernorm=True,
        routed_scaling_factor=1,
        router_num_group=None,
        router_topk_group=None,
        shared_expert_intermediate_size=None,
    )
    need(raw, "num_hidden_layers", "expert_intermediate_size")
    has_experts = raw.get("moe_layer_freq") or 1
    if not isinstance(has_experts, list):
        demand(raw, moe_layer_freq=1)
        has_experts = [1] * raw["num_hidden_layers"]
    if len(has_experts) != raw["num_hidden_layers"] or not set(has_experts) <= {0, 1}:
        raise ValueError(
            f"`moe_layer_freq` in config.json must be 1, or 0 or 1 for each of the {raw['num_hidden_layers']} layers, got "
            f"{has_experts!r}. Fetch the file again."
        )
    dense = [layer for layer, has in enumerate(has_experts) if not has]
    if dense:
        need(raw, "dense_intermediate_size")
    renamed = {
        "intermediate_size": raw.get("dense_intermediate_size") or raw["expert_intermediate_size"],
        "moe_intermediate_size": raw["expert_intermediate_size"],
        "mlp_only_layers": dense,
        "norm_topk_prob": False,
    }
    return qwen3_moe_fields({**raw, **renamed})


def llada2_fields(raw: RawConfig) -> dict[str, Any]:
    """Sarvam-MoE config fields of a LLaDA 2.0 or 2.1 checkpoint. Arguments and errors as in `decoder_fields`.

    Raises:
        ValueError: transformers is older than 5.24, which is the first to convert these weights.
    """
    if LLADA2_CONFIG is None:
        raise ValueError(
            f"LLaDA2 needs transformers 5.24 or newer, got {transformers.__version__}: older versions cannot split the "
            "fused queries, keys and values of its weights."
        )
    demand(
        raw,
        moe_router_enable_expert_bias=True,
        norm_topk_prob=True,
        num_nextn_predict_layers=0,
        router_dtype="fp32",
        score_function="sigmoid",
        use_bias=False,
        use_qk_norm=True,
        use_qkv_bias=False,
        use_rmsnorm=True,
    )
    routing = ("n_group", "topk_group", "routed_scaling_factor", "num_experts", "num_shared_experts")
    need(raw, "head_dim", "partial_rotary_factor", *_EXPERTS, *routing)
    need(raw, "first_k_dense_replace", or_zero=True)
    demand(raw, rotary_dim=int(raw["head_dim"] * raw["partial_rotary_factor"]))
    fields = decoder_fields({**raw, "partial_rotary_factor": None})
    fields["rope_parameters"]["partial_rotary_factor"] = raw["partial_rotary_factor"]
    fields |= {"n_routed_experts": raw["num_experts"], "n_shared_experts": raw["num_shared_experts"]}
    return fields | _present(raw, *_EXPERTS, "n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace")


def _present(raw: RawConfig, *names: str) -> dict[str, Any]:
    return {name: raw[name] for name in names if raw.get(name) is not None}


def demand(raw: RawConfig, **supported: Any) -> None:
    """Refuse a config in which one of these fields has another value. A field may be missing or null.

    Raises:
        ValueError: one of them has another value.
    """
    for name, value in supported.items():
        if raw.get(name) not in (None, value):
            raise ValueError(
                f"`{name}` in config.json must be {value!r} for this family, got {raw[name]!r}: the transformers class "
                "it would be loaded as does not compute that. Write a `ModelSpec` with a class that does."
            )


def _demand_each(raw: RawConfig, name: str, value: Any) -> None:
    for each in raw.get(name) or ():
        demand({name: each}, **{name: value})


def need(raw: RawConfig, *names: str, or_zero: bool = False) -> None:
    """Refuse a config that lacks one of these numbers.

    Args:
        raw: the content of `config.json`.
        names: of the fields.
        or_zero: they may be 0.

    Raises:
        ValueError: one is missing, no number, or not above 0.
    """
    if missing := [name for name in names if raw.get(name) is None]:
        raise ValueError(
            f"config.json lacks {', '.join(f'`{name}`' for name in missing)}. It does not describe a model of this "
            "family; choose another one by `spec=`, or write a `ModelSpec` with its own `config_fields`."
        )
    for name in names:
        kind = REAL if name in _FRACTIONS else WHOLE
        if complaint := misfit(raw, {name: kind}, " in config.json"):
            raise ValueError(complaint)
        if not (raw[name] > 0 or (or_zero and raw[name] == 0)):
            least = "at least" if or_zero else "above"
            raise ValueError(f"`{name}` in config.json must be {least} 0, got {raw[name]!r}. Fetch the file again.")
