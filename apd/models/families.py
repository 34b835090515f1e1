"""Families of masked-diffusion models, and the one place that knows checkpoint names.

Every supported family is an ordinary transformers decoder that attends both ways: `config.is_causal = False` turns
`Qwen2ForCausalLM` into Dream and `LlamaForCausalLM` into LLaDA. A `ModelSpec` holds the remaining differences.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LlamaForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

from apd.kinds import REAL, WHOLE, misfit
from apd.models.horizon import Kind

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

_FRACTIONS = ("rms_norm_eps", "rope_theta")
_OPTIONAL = ("head_dim", "hidden_act", "attention_bias", "initializer_range", "tie_word_embeddings")


def decoder_fields(raw: RawConfig) -> dict[str, Any]:
    """Config fields of a checkpoint with transformers' field names: Dream, a2d, and models saved by `save_pretrained`.

    Args:
        raw: the content of `config.json`.
    Raises:
        ValueError: a field is missing or has a wrong type, or sliding-window or multimodal attention is on.
    """
    _demand(raw, use_sliding_window=False, use_mrope=False)
    _need(raw, *_NEEDED)
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", rope.get("rope_type", "default"))
    if "rope_theta" not in rope:
        _need(raw, "rope_theta")
        rope["rope_theta"] = raw["rope_theta"]
    fields = {name: raw[name] for name in _NEEDED + _OPTIONAL if raw.get(name) is not None}
    return fields | {"rope_parameters": rope}


def llada_fields(raw: RawConfig) -> dict[str, Any]:
    """Llama config fields of a LLaDA 1.0 or 1.5 checkpoint, which uses other field names.

    Args:
        raw: the content of `config.json`.
    Raises:
        ValueError: a field is missing or has a wrong type, or an option is on that no Llama computes. The weights alone
            would not show such an option.
    """
    _demand(
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
    _need(raw, "d_model", "mlp_hidden_size", "n_layers", "n_heads", "max_sequence_length", "rope_theta", "vocab_size")
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


@dataclass(frozen=True)
class ModelSpec:
    """Everything that distinguishes one family of masked-diffusion models from another.

    Args:
        name: the family's name, as in `spec="dream"`.
        model_class: the transformers class that computes the model when `config.is_causal` is False.
        logit_shift: 1 if row i-1 of the logits predicts the token at position i, as in models adapted from a causal one
            (Dream); 0 if row i does (LLaDA).
        config_fields: function from the content of `config.json` to the arguments of `model_class.config_class`.
        key_mapping: regular expressions over the checkpoint's weight names, and their replacements in `model_class`. Each
            may have one capture group at most: transformers leaves the weights of a pattern with two at random values.
        model_types, architectures: values in `config.json` that identify the family; both must match. If empty, the family
            is used only if `spec=` names it.
        attention: which columns see each other: "full", "causal", "prefix" or "block", see `apd.models.horizon`.
        block_size: length of the blocks, or of a causal or prefix model's draft, where `config.json` does not say it; `None`: it
            must be given, for "causal" and "prefix" there is no limit then.
        block_field: name of the block length in `config.json`; "" if it has none.
        anchored: for "prefix": blocks stand still until they are decided, see `apd.models.horizon`.
        mask_token_id: id of the mask token where neither `config.json` nor the tokenizer says it, as in families whose code has
            it as a default argument.
        where: further values of `config.json` that identify the family.
        reads_causally: True if the model was trained to predict the next token under a causal mask, too, so that it can verify
            its own draft (`verifier="self"`).

    Raises:
        ValueError: `logit_shift` is neither 0 nor 1, or an unknown kind of attention.

    Example:
        >>> mine = ModelSpec("mine", Qwen3ForCausalLM, logit_shift=1)
        >>> drafter = load_drafter("path/to/checkpoint", spec=mine, mask_token_id=151669)
    """

    name: str
    model_class: type[PreTrainedModel]
    logit_shift: int
    config_fields: Callable[[RawConfig], dict[str, Any]] = decoder_fields
    key_mapping: Mapping[str, str] = field(default_factory=dict)
    model_types: tuple[str, ...] = ()
    architectures: tuple[str, ...] = ()
    attention: Kind = "full"
    block_size: int | None = None
    block_field: str = ""
    anchored: bool = False
    mask_token_id: int | None = None
    where: Mapping[str, Any] = field(default_factory=dict)
    reads_causally: bool = False

    def __post_init__(self) -> None:
        if self.logit_shift not in (0, 1):
            raise ValueError(
                f"`logit_shift` must be 0 (token i predicted at row i) or 1 (at row i-1), got {self.logit_shift!r}."
            )

    def matches(self, raw: RawConfig) -> bool:
        """True if a checkpoint with this `config.json` belongs to the family."""
        named = raw.get("architectures") or ()
        fits = all(raw.get(name) == value for name, value in self.where.items())
        return fits and raw.get("model_type") in self.model_types and any(name in self.architectures for name in named)


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

#: Families that are recognised by their `config.json`. To add one, add a `ModelSpec` here or pass it as `spec=`.
FAMILIES: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        # Dream, Dream-Coder, DiffuCoder
        ModelSpec("dream", Qwen2ForCausalLM, 1, model_types=("Dream",), architectures=("DreamModel",)),
        # LLaDA 1.0 and 1.5. LLaDA-MoE has the same model_type but another architecture, which is no Llama.
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
    )
}


def _demand(raw: RawConfig, **supported: Any) -> None:
    for name, value in supported.items():
        if raw.get(name) not in (None, value):
            raise ValueError(
                f"`{name}` in config.json must be {value!r} for this family, got {raw[name]!r}: the transformers class "
                "it would be loaded as does not compute that. Write a `ModelSpec` with a class that does."
            )


def _need(raw: RawConfig, *names: str) -> None:
    if missing := [name for name in names if raw.get(name) is None]:
        raise ValueError(
            f"config.json lacks {', '.join(f'`{name}`' for name in missing)}. It does not describe a model of this "
            "family; choose another one by `spec=`, or write a `ModelSpec` with its own `config_fields`."
        )
    for name in names:
        kind = REAL if name in _FRACTIONS else WHOLE
        if complaint := misfit(raw, {name: kind}, " in config.json"):
            raise ValueError(complaint)
        if not raw[name] > 0:
            raise ValueError(f"`{name}` in config.json must be above 0, got {raw[name]!r}. Fetch the file again.")


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
    """The family of a checkpoint with this `config.json`; `path` is for the message.

    Raises:
        ValueError: no family matches.
    """
    for spec in FAMILIES.values():
        if spec.matches(raw):
            return spec
    raise ValueError(
        f"{str(path)!r} has model_type {raw.get('model_type')!r} and architectures {raw.get('architectures')!r}, "
        f"which is none of the families that work: {family_names()}. If a transformers decoder computes it once it "
        "attends both ways, describe it by an `apd.models.ModelSpec` and pass that as `spec=`."
    )


def family_names() -> str:
    """The names of all families, quoted, for error messages."""
    return ", ".join(map(repr, FAMILIES))
