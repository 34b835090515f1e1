"""Families of diffusion LMs, and the one place that knows checkpoint names.

Every supported family is an ordinary transformers decoder, run with the masks that the family was trained with:
`Qwen2ForCausalLM` is Dream if its columns see each other, and WeDLM if they see what is left of them. A `ModelSpec`
holds the remaining differences.
"""

from pathlib import Path

from transformers import (
    Glm4MoeForCausalLM,
    LlamaForCausalLM,
    Ministral3ForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeForCausalLM,
)

from apd.models.config_fields import (
    LLADA2_CONFIG,
    RawConfig,
    llada2_fields,
    llada_fields,
    llada_moe_fields,
    nemotron_fields,
    qwen3_moe_fields,
    sdlm_fields,
    wedlm_fields,
)
from apd.models.config_fields import decoder_fields as decoder_fields
from apd.models.masked_lm import masked_lm_class
from apd.models.spec import ModelSpec

_LLADA_BLOCK = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}

_LLADA_KEYS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    **{
        rf"^model\.transformer\.blocks\.(\d+)\.{theirs}\.": rf"model.layers.\1.{ours}."
        for theirs, ours in _LLADA_BLOCK.items()
    },
}

#: Families by name. To add one, add a `ModelSpec` here or pass it as `spec=`.
FAMILIES: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        # Dream, Dream-Coder, DiffuCoder
        ModelSpec("dream", Qwen2ForCausalLM, 1, model_types=("Dream",), architectures=("DreamModel",)),
        # LLaDA 1.0 and 1.5
        ModelSpec(
            "llada",
            LlamaForCausalLM,
            0,
            config_fields=llada_fields,
            key_mapping=_LLADA_KEYS,
            model_types=("llada",),
            architectures=("LLaDAModelLM",),
        ),
        # Qwen3, adapted to bidirectional attention by dllm (a2d)
        ModelSpec(
            "a2d-qwen3", Qwen3ForCausalLM, 0, model_types=("a2d-qwen3",), architectures=("A2DQwen3LMHeadModel",)
        ),
        # LLaDA-MoE has LLaDA's model type and another architecture.
        ModelSpec(
            "llada-moe",
            Qwen3MoeForCausalLM,
            0,
            config_fields=llada_moe_fields,
            mask_token_id=156895,
            model_types=("llada",),
            architectures=("LLaDAMoEModelLM",),
        ),
        # LLaDA 2.0 and 2.1. Their mask token is a default argument of their code. LLaDA 2.1 may edit tokens that it has
        # decided; here decided tokens stand, which is that model with editing off.
        ModelSpec(
            "llada2",
            Glm4MoeForCausalLM,
            0,
            config_fields=llada2_fields,
            config_class=LLADA2_CONFIG,
            attention="block",
            block_size=32,
            mask_token_id=156895,
            model_types=("llada2_moe",),
            architectures=("LLaDA2MoeModelLM",),
        ),
        # SDAR and what was trained from it (TraDo). One published config lacks block size and mask token.
        ModelSpec(
            "sdar",
            Qwen3ForCausalLM,
            0,
            attention="block",
            block_size=4,
            block_field="block_size",
            mask_token_id=151669,
            model_types=("sdar",),
            architectures=("SDARForCausalLM",),
        ),
        ModelSpec(
            "sdar-moe",
            Qwen3MoeForCausalLM,
            0,
            config_fields=qwen3_moe_fields,
            attention="block",
            block_size=4,
            block_field="block_size",
            mask_token_id=151669,
            model_types=("sdar_moe",),
            architectures=("SDARMoeForCausalLM",),
        ),
        ModelSpec(
            "fast-dllm-v2",
            Qwen2ForCausalLM,
            1,
            attention="block",
            block_size=32,
            block_field="bd_size",
            mask_token_id=151665,
            reads_causally=True,
            model_types=("Fast_dLLM_Qwen",),
            architectures=("Fast_dLLM_QwenForCausalLM",),
        ),
        # WeDLM names one architecture for two. It was trained to draft 32 tokens at once.
        ModelSpec(
            "wedlm",
            Qwen2ForCausalLM,
            0,
            config_fields=wedlm_fields,
            attention="causal",
            block_size=32,
            reads_causally=True,
            model_types=("wedlm",),
            architectures=("WeDLMForCausalLM",),
            where={"qk_norm": False},
        ),
        ModelSpec(
            "wedlm-qwen3",
            Qwen3ForCausalLM,
            0,
            config_fields=wedlm_fields,
            attention="causal",
            block_size=32,
            reads_causally=True,
            model_types=("wedlm",),
            architectures=("WeDLMForCausalLM",),
            where={"qk_norm": True},
        ),
        ModelSpec(
            "sdlm",
            Qwen2ForCausalLM,
            1,
            config_fields=sdlm_fields,
            attention="prefix",
            block_field="block_size",
            mask_field="text_mask_token_id",
            reads_causally=True,
            model_types=("sdlm_qwen2_5",),
            architectures=("Qwen2ForCausalLM",),
        ),
        # Nemotron-Labs-Diffusion. Its canvas slides with the last decided token, as in its own speculative decoding.
        # Its other decoder finishes blocks: `replace(FAMILIES["nemotron"], anchored=True)`, with the strategy `Seeded`.
        ModelSpec(
            "nemotron",
            Ministral3ForCausalLM,
            0,
            config_fields=nemotron_fields,
            key_mapping={r"^encoder\.": "model.", r"^diffusion_head\.": "lm_head."},
            attention="prefix",
            block_size=32,
            block_field="block_size",
            mask_token_id=100,
            reads_causally=True,
            model_types=("nemotron_labs_diffusion",),
            architectures=("NemotronLabsDiffusionModel",),
        ),
        # Open-dCoder is a Qwen2 to its config.json, and I-DLM an SDAR: only `spec=` says what they are.
        ModelSpec("open-dcoder", Qwen2ForCausalLM, 1),
        ModelSpec("i-dlm", Qwen3ForCausalLM, 1, attention="causal", block_size=4, reads_causally=True),
    )
}


def resolve_spec(spec: str | ModelSpec) -> ModelSpec:
    """The spec itself, or the family of this name.

    Raises:
        ValueError: no family has this name.
    """
    if isinstance(spec, ModelSpec):
        return spec
    if spec not in FAMILIES:
        raise ValueError(f"`spec` must be a `ModelSpec` or one of {family_names()}, got {spec!r}.")
    return FAMILIES[spec]


def recognise(raw: RawConfig, path: str | Path) -> ModelSpec:
    """The family of a checkpoint with this `config.json`; a masked LM of transformers has one of its own, named as its class.

    Args:
        raw: the content of `config.json`.
        path: the checkpoint, for the message.

    Raises:
        ValueError: no family matches.
    """
    for spec in FAMILIES.values():
        if spec.matches(raw):
            return spec
    masked_lm = masked_lm_class(raw.get("model_type"))
    if masked_lm is not None and masked_lm.__name__ in (raw.get("architectures") or ()):
        return ModelSpec(masked_lm.__name__, masked_lm, 0)
    near = [f"{spec.name!r} where {dict(spec.where)}" for spec in FAMILIES.values() if spec.is_named(raw)]
    raise ValueError(
        f"{str(path)!r} has model_type {raw.get('model_type')!r} and architectures {raw.get('architectures')!r}, "
        f"which is none of the families that work: {family_names()}, and no masked LM of transformers. "
        + (f"It would be {' or '.join(near)}; name the family by `spec=`. " if near else "")
        + (f"A masked LM of that model type is a {masked_lm.__name__}. " if masked_lm is not None else "")
        + "If a transformers decoder computes it, describe it by an `apd.models.ModelSpec` and pass that as `spec=`."
    )


def family_names() -> str:
    """The names of all families, quoted, for error messages."""
    return ", ".join(map(repr, FAMILIES))
