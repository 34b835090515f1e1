"""Loading drafters and verifiers, with no modelling code of our own.

Every masked-diffusion model that is supported here is an ordinary transformers decoder that attends both ways:
`config.is_causal = False` turns `Qwen2ForCausalLM` into Dream and `LlamaForCausalLM` into LLaDA. What is left to say
of a family fits in a `ModelSpec`. This is the only file that knows checkpoint names.

Remote code is never run and pickled weights are never read. A drafter loads completely or not at all: transformers
only logs a weight that found no place, and keeps random numbers where one is missing.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen3ForCausalLM,
)
from transformers.cache_utils import DynamicLayer

from apd.decoding.protocols import Drafter, Verifier
from apd.kinds import GENERATION, ID, IDS, OBJECT, REAL, TEXT, WHOLE, Kind, misfit
from apd.models.attention import GROUPED, group_heads
from apd.models.checkpoint import TOKENIZER, Checkpoint
from apd.models.drafter import MaskedDiffusionDrafter, check_mask_token
from apd.models.span import Span
from apd.models.transformer import EagerPasses, attention_mask, input_device
from apd.models.verifier import CausalVerifier

__all__ = [
    "FAMILIES",
    "HUB_ARGUMENTS",
    "PLACING_ARGUMENTS",
    "SPLITTING_ARGUMENTS",
    "ModelSpec",
    "as_drafter",
    "as_verifier",
    "check_vocabularies",
    "drafter_config",
    "load_drafter",
    "load_tokenizer",
    "load_verifier",
    "verifier_config",
]

RawConfig = Mapping[str, Any]

#: How a checkpoint is fetched, as in transformers.
HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
#: How a large model is spread over devices, as in transformers.
PLACING_ARGUMENTS = ("max_memory", "offload_folder", "offload_buffers")
#: Likewise, for the drafter only: a verifier is small.
SPLITTING_ARGUMENTS = ("tp_plan", "distributed_config", "quantization_config")

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
_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Of any config.json, whatever the model; transformers checks the fields of its own classes.
_CONFIG = {
    "model_type": TEXT,
    "architectures": Kind("a list of names", lambda names: isinstance(names, list)),
    "quantization_config": OBJECT,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "mask_token_id": ID,
    "eos_token_id": IDS,
}
_FRACTIONS = ("rms_norm_eps", "rope_theta")
_OPTIONAL = ("head_dim", "hidden_act", "attention_bias", "initializer_range", "tie_word_embeddings")


def decoder_fields(raw: RawConfig) -> dict[str, Any]:
    """The config of a checkpoint that uses transformers' own names: Dream, a2d, and whatever `save_pretrained` wrote.

    Raises:
        ValueError: a size is missing, or the checkpoint asks for attention that its family never had.
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
    """The config of LLaDA 1.0 and 1.5, which have names of their own for what is a Llama.

    Raises:
        ValueError: a size is missing, or an option is on that no weight would betray and no Llama computes.
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
    """A family of masked-diffusion models: everything that differs between one and the next.

    Args:
        name: what users call it, as in `spec="dream"`.
        model_class: the transformers class that computes it once `config.is_causal` is False.
        logit_shift: 1 if the token of position i is predicted at row i-1, as in models adapted from a causal one
            (Dream); 0 if at row i (LLaDA).
        config_fields: from the raw `config.json` to the arguments of `model_class.config_class`.
        key_mapping: patterns over the checkpoint's weight names, and what they become in `model_class`. At most one
            capture group each: transformers leaves the weights of a pattern with two random.
        model_types, architectures: the values in `config.json` by which a checkpoint is recognised; both must match.
            Left empty, the family is used only where it is asked for by `spec=`.

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

    def __post_init__(self) -> None:
        if self.logit_shift not in (0, 1):
            raise ValueError(
                f"`logit_shift` must be 0 (token i predicted at row i) or 1 (at row i-1), got {self.logit_shift!r}."
            )

    def matches(self, raw: RawConfig) -> bool:
        """Whether a checkpoint with this `config.json` belongs to the family."""
        named = raw.get("architectures") or ()
        return raw.get("model_type") in self.model_types and any(name in self.architectures for name in named)


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

#: The families that are recognised by their `config.json`. To add one, put a `ModelSpec` here, or pass it as `spec=`.
FAMILIES: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        # Dream, Dream-Coder, DiffuCoder
        ModelSpec("dream", Qwen2ForCausalLM, 1, model_types=("Dream",), architectures=("DreamModel",)),
        # LLaDA 1.0 and 1.5. LLaDA-MoE has the same model_type and other architectures: it is no Llama.
        ModelSpec(
            "llada",
            LlamaForCausalLM,
            0,
            config_fields=llada_fields,
            key_mapping=_LLADA_KEYS,
            model_types=("llada",),
            architectures=("LLaDAModelLM",),
        ),
        # Qwen3 made bidirectional by dllm (a2d)
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


def _resolve_spec(spec: str | ModelSpec) -> ModelSpec:
    if isinstance(spec, ModelSpec):
        return spec
    if spec not in FAMILIES:
        raise ValueError(f"`spec` must be a `ModelSpec` or one of {_families()}, got {spec!r}.")
    return FAMILIES[spec]


def _recognise(raw: RawConfig, path: str | Path) -> ModelSpec:
    for spec in FAMILIES.values():
        if spec.matches(raw):
            return spec
    raise ValueError(
        f"{str(path)!r} has model_type {raw.get('model_type')!r} and architectures {raw.get('architectures')!r}, "
        f"which is none of the families that work: {_families()}. If a transformers decoder computes it once it "
        "attends both ways, describe it by an `apd.models.ModelSpec` and pass that as `spec=`."
    )


def _families() -> str:
    return ", ".join(map(repr, FAMILIES))


def drafter_config(
    path: str | Path, *, spec: str | ModelSpec | None = None, mask_token_id: int | None = None, **hub: Any
) -> PreTrainedConfig:
    """The config that a drafter will have, its `mask_token_id` included. Arguments and errors as in `load_drafter`."""
    _check_hub_arguments(hub)
    return _plan_drafter(Checkpoint(path, hub), spec, mask_token_id)[1]


def load_drafter(
    path: str | Path,
    *,
    spec: str | ModelSpec | None = None,
    mask_token_id: int | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    **hub: Any,
) -> MaskedDiffusionDrafter:
    """A masked-diffusion model from a directory or the hub, ready to draft.

    Weights that are stored quantised are loaded as transformers loads them, with what that needs installed.

    Args:
        path: a directory, or a model id of the hub.
        spec: the family, if `config.json` does not say it or says it wrongly: a name in `FAMILIES`, or a `ModelSpec`.
        mask_token_id: id of `[MASK]`; by default that of `config.json`, else that of the tokenizer.
        dtype: by default float32 on a CPU and the stored dtype elsewhere.
        device_map: as in transformers; `None` is the CPU.
        attn_implementation: "sdpa", "eager" or "grouped_sdpa", the default where heads share keys; see `apd.models.attention`.
        **hub: `HUB_ARGUMENTS`, as in transformers; also `PLACING_ARGUMENTS` and `SPLITTING_ARGUMENTS`.
    Raises:
        ValueError: unknown family, no mask token, weights that do not fit, unsupported attention, an adapter, pickled
            weights, a damaged file.
        OSError: no weights, or only pickled ones.
    """
    placing = _taken(hub, PLACING_ARGUMENTS + SPLITTING_ARGUMENTS)
    _check_hub_arguments(hub)
    _check_implementation(attn_implementation)
    checkpoint = Checkpoint(path, hub)
    spec, config, generation_config = _plan_drafter(checkpoint, spec, mask_token_id)
    with checkpoint.reading_weights():
        model, report = spec.model_class.from_pretrained(
            path,
            config=config,
            generation_config=generation_config,
            key_mapping=dict(spec.key_mapping) or None,
            dtype=_default_dtype(device_map) if dtype is None else dtype,
            device_map=device_map,
            attn_implementation="sdpa" if attn_implementation in (None, GROUPED) else attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that they are reported, and refused below, with the others
            output_loading_info=True,
            **placing,
            **hub,
        )
    _check_complete(path, model, report, "missing_keys", "mismatched_keys", "unexpected_keys")
    group_heads(model, attn_implementation)
    return _wrap(model, spec, config.mask_token_id)


def _plan_drafter(
    checkpoint: Checkpoint, spec: str | ModelSpec | None, mask_token_id: int | None
) -> tuple[ModelSpec, PreTrainedConfig, GenerationConfig]:
    """All that is known of a drafter, and checked, before its weights are read."""
    checkpoint.refuse_adapter()
    # Never AutoConfig: with `auto_map` it asks on stdin whether to run the checkpoint's code, and without it the model
    # type is unknown. `Qwen2ForCausalLM.from_pretrained(path)` alone would load Dream as a causal model, silently.
    raw = checkpoint.read_json("config.json", _CONFIG) or _no_config(checkpoint.path)
    spec = _recognise(raw, checkpoint.path) if spec is None else _resolve_spec(spec)
    if mask_token_id is None:
        mask_token_id = raw.get("mask_token_id")
    if mask_token_id is None:
        mask_token_id = getattr(load_tokenizer(checkpoint.path, **checkpoint.hub), "mask_token_id", None)
    # Special ids come from the checkpoint or not at all: left to LlamaConfig, a LLaDA would stop at id 2.
    fields = {name: raw.get(name) for name in _SPECIAL_IDS} | spec.config_fields(raw)
    # How and where the weights are stored.
    fields |= {name: raw[name] for name in ("quantization_config", "transformers_weights") if raw.get(name)}
    with _reading_config(checkpoint):
        config = spec.model_class.config_class(**fields)
    config.is_causal = False
    config.mask_token_id = mask_token_id = _need_mask(mask_token_id)
    check_mask_token(mask_token_id, config.vocab_size)
    _check_layers(config)
    return spec, config, _generation_config(checkpoint, raw, config)


@contextmanager
def _reading_config(checkpoint: Checkpoint) -> Iterator[None]:
    """While transformers builds a config: it says which field is wrong, and this in which file."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"{checkpoint.find('config.json')} is no config of a model: {error}") from error


def verifier_config(path: str | Path, **hub: Any) -> PreTrainedConfig:
    """The config that a verifier will have. Arguments and errors as in `load_verifier`."""
    _check_hub_arguments(hub)
    return _plan_verifier(Checkpoint(path, hub))


def load_verifier(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    **hub: Any,
) -> CausalVerifier:
    """A causal language model from a directory or the hub, ready to score drafts.

    Arguments are those of `load_drafter`, `SPLITTING_ARGUMENTS` aside. Any causal model of transformers will do whose layers all attend to
    everything before them.

    Raises:
        ValueError: a diffusion model, a model that transformers knows no code for, unsupported attention, an adapter,
            pickled weights, a damaged file.
        OSError: no weights, or only pickled ones.
    """
    placing = _taken(hub, PLACING_ARGUMENTS)
    _check_hub_arguments(hub)
    _check_implementation(attn_implementation)
    checkpoint = Checkpoint(path, hub)
    config = _plan_verifier(checkpoint)
    with checkpoint.reading_weights():
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=_default_dtype(device_map) if dtype is None else dtype,
            device_map=device_map,
            attn_implementation="sdpa" if attn_implementation == GROUPED else attn_implementation,
            trust_remote_code=False,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **placing,
            **hub,
        )
    # Weights without a place are tolerated here: checkpoints of causal models come with heads nobody asked for.
    _check_complete(path, model, report, "missing_keys", "mismatched_keys")
    group_heads(model, attn_implementation)
    _check_causal(model)
    _check_decoder(model)
    return CausalVerifier(model)


def _plan_verifier(checkpoint: Checkpoint) -> PreTrainedConfig:
    """All that is known of a verifier, and checked, before its weights are read."""
    checkpoint.refuse_adapter()
    raw = checkpoint.read_json("config.json", _CONFIG) or _no_config(checkpoint.path)
    path, model_type = str(checkpoint.path), raw.get("model_type")
    if raw.get("is_causal") is False or any(model_type in spec.model_types for spec in FAMILIES.values()):
        raise ValueError(
            f"The verifier must be a causal model, but {path!r} (model_type {model_type!r}) attends both ways. "
            "Give it as the drafter, and as the verifier a causal model with the same tokenizer."
        )
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers has no code for model_type {model_type!r} of {path!r}, and code that comes with a "
            "checkpoint is never run. Choose a verifier that this transformers version knows."
        )
    with _reading_config(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, **checkpoint.hub)
    _check_layers(config)
    checkpoint.read_json(
        "generation_config.json", GENERATION
    )  # transformers reads it, and names neither file nor field
    return config


def load_tokenizer(path: str | Path, **hub: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, padding on the left; `None` if it has none.

    `tokenizer.json` is a whole tokenizer and is taken as it stands. Dream has `vocab.json` and `merges.txt` instead,
    and a class of its own that is Qwen2's. Anything else is left to transformers.

    Args:
        path: a directory, or a model id of the hub.
        **hub: as in `load_drafter`.
    """
    _check_hub_arguments(hub)
    checkpoint = Checkpoint(path, hub)
    settings = checkpoint.read_json("tokenizer_config.json", TOKENIZER)
    # Without `model_input_names` some tokenizers add token_type_ids, which no model here takes.
    more: dict[str, Any] = {"model_input_names": ["input_ids", "attention_mask"]}
    if checkpoint.find("tokenizer.json"):
        # PreTrainedTokenizerFast reads no config.json, so a model_type that transformers does not know does no harm.
        tokenizer_class: Any = PreTrainedTokenizerFast
    elif settings is None:
        return None
    elif settings.get("tokenizer_class") in ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"):
        tokenizer_class = Qwen2Tokenizer
    else:
        tokenizer_class, more = AutoTokenizer, {"trust_remote_code": False}
    with checkpoint.reading_tokenizer():
        return tokenizer_class.from_pretrained(path, padding_side="left", **more, **hub)


def _taken(arguments: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """These arguments, removed from the others."""
    return {name: arguments.pop(name) for name in names if name in arguments}


def _check_hub_arguments(hub: Mapping[str, Any]) -> None:
    for name in hub:
        if name not in HUB_ARGUMENTS:
            raise TypeError(
                f"Unknown argument `{name}`. Besides the named ones, loading takes {', '.join(HUB_ARGUMENTS)}."
            )


def _no_config(path: str | Path) -> NoReturn:
    raise ValueError(
        f"No config.json found for {str(path)!r}. `path` must be a directory that holds one, or the id of a model on "
        "the hub that is reachable or already in the cache."
    )


def _default_dtype(device_map: Any) -> torch.dtype | str:
    """float32 on a CPU, where half precision is slow and its ties cost exactness; elsewhere the stored dtype."""
    if device_map is None:
        return torch.float32 if torch.get_default_device().type == "cpu" else "auto"
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "auto" if torch.accelerator.is_available() else torch.float32
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return torch.float32 if all(str(device) == "cpu" for device in devices) else "auto"


def _generation_config(checkpoint: Checkpoint, raw: RawConfig, config: PreTrainedConfig) -> GenerationConfig:
    """The checkpoint's generation config as far as transformers knows it; stop and padding ids default to the model's.

    Without a generation_config.json the fields in config.json count, as in transformers. Dream's holds options of its
    own sampler, and a temperature of 0 that is not for `do_sample=True`, with which it would mean greedy decoding.
    """
    file = "generation_config.json"
    stored: RawConfig | None = checkpoint.read_json(file)
    if stored is None:
        file, stored = "config.json", raw
    if complaint := misfit(stored, GENERATION, f" in {file} of {str(checkpoint.path)!r}"):
        raise ValueError(complaint)
    fields: dict[str, Any] = {name: getattr(config, name, None) for name in _SPECIAL_IDS}
    known = vars(GenerationConfig()).keys() - {"transformers_version"}
    fields |= {
        name: value
        for name, value in stored.items()
        if name in known and not name.startswith("_") and value is not None
    }
    if fields.get("temperature") == 0 and not fields.get("do_sample"):
        del fields["temperature"]
    try:
        return GenerationConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{file} of {str(checkpoint.path)!r} is no generation config: {error}") from error


def _check_complete(path: str | Path, model: PreTrainedModel, report: Mapping[str, Any], *kinds: str) -> None:
    quantisation = getattr(model.config, "quantization_config", None)
    for kind in kinds:
        if keys := sorted(map(str, report[kind])):
            stored_as = "" if quantisation is None else f" They are loaded as quantised: {quantisation}."
            raise ValueError(
                f"The weights of {str(path)!r} do not fit {type(model).__name__}: {len(keys)} "
                f"{kind.replace('_', ' ')}, such as {', '.join(keys[:3])}.{stored_as} Check `spec=`, its `key_mapping` (at "
                "most one capture group per pattern) and its `config_fields`."
            )


# What models are wrapped in, and how to come at the model: an attribute of the wrapper, and the remedy.
_WRAPPERS = (
    ("merge_and_unload", "an adapter around a model: pass `model.merge_and_unload()`"),
    ("get_base_model", "an adapter around a model that cannot be merged: pass a model that was trained without one"),
    ("_orig_mod", "what torch.compile gives: pass `model._orig_mod`, and compile by `sampler.compile()`"),
    ("summon_full_params", "a part of a sharded model: save its full state dict, and load that by `load_drafter`"),
    ("module", "a wrapper around a model, for several devices: pass `model.module`"),
    ("pretrained_model", "a wrapper around a model, for training: pass `model.pretrained_model`"),
)


def _unwrapping(model: Any) -> str:
    """What a wrapper around a transformers model is and how to unwrap it; empty for anything else."""
    if isinstance(model, (str, Path)):
        return " `APDSampler.from_pretrained` loads models by their names."
    for name, remedy in _WRAPPERS:
        if hasattr(model, name):
            return f" That is {remedy}."
    return ""


def as_drafter(
    model: PreTrainedModel | Drafter,
    spec: str | ModelSpec | None = None,
    mask_token_id: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Drafter:
    """A drafter from a transformers model, or the drafter itself if it already is one.

    Args:
        model: a transformers model that attends both ways, or whatever implements `apd.models.drafter.Drafter`.
        spec: the model's family. A model in memory does not say it: a Dream is just a `Qwen2ForCausalLM`.
        mask_token_id: id of `[MASK]`; by default `model.config.mask_token_id`, else that of the tokenizer.
        tokenizer: the model's.
    Raises:
        ValueError: no family, no mask token, or a model that attends one way only.
    """
    if not isinstance(model, PreTrainedModel):
        if not callable(getattr(model, "open", None)):
            raise TypeError(
                f"`drafter` must be a transformers model or an `apd.Drafter`, got {type(model).__name__}."
                + _unwrapping(model)
            )
        if spec is not None or mask_token_id is not None:
            raise ValueError(
                f"`spec` and `mask_token_id` describe a transformers model, but a {type(model).__name__} knows its "
                "own. Leave them out."
            )
        return model
    if spec is None:
        raise ValueError(
            f"`spec` must be given with a model in memory: {type(model).__name__} alone does not say at which row it "
            f"predicts a token. Pass one of {_families()}, or a `ModelSpec`; or use `apd.models.load_drafter`."
        )
    if mask_token_id is None:
        mask_token_id = getattr(model.config, "mask_token_id", None)
    if mask_token_id is None:
        mask_token_id = getattr(tokenizer, "mask_token_id", None)
    return _wrap(model, _resolve_spec(spec), _need_mask(mask_token_id))


def _wrap(model: PreTrainedModel, spec: ModelSpec, mask_token_id: int) -> MaskedDiffusionDrafter:
    if not isinstance(model, spec.model_class):
        raise ValueError(
            f"`spec` {spec.name!r} is computed by {spec.model_class.__name__}, but the model is a "
            f"{type(model).__name__}. Pass a `ModelSpec` with that class and your model's `logit_shift`."
        )
    if getattr(model.config, "is_causal", None) is not False:
        raise ValueError(
            "The drafter must attend both ways, but `model.config.is_causal` is not False. If it was trained that "
            "way, set `model.config.is_causal = False`; setting it on the attention modules is not enough."
        )
    _check_implementation(model.config._attn_implementation)
    _check_layers(model.config)
    return MaskedDiffusionDrafter(model, mask_token_id=mask_token_id, logit_shift=spec.logit_shift)


def as_verifier(model: PreTrainedModel | Verifier, drafter: Drafter | None = None) -> Verifier:
    """A verifier from a transformers causal model, or the verifier itself if it already is one.

    Args:
        model: a causal model, the drafter's own model, or whatever implements `apd.Verifier`.
        drafter: its model attends both ways, and may be the verifier too: the verifier's passes state causal attention by
            their mask.

    Raises:
        ValueError: another model that attends both ways, or one that does not attend to everything before a token.
    """
    if isinstance(model, PreTrainedModel):
        if model is not getattr(drafter, "model", None):
            _check_causal(model)
        _check_decoder(model)
        return CausalVerifier(model)
    if not callable(getattr(model, "open", None)):
        raise TypeError(
            f"`verifier` must be a transformers model or an `apd.Verifier`, got {type(model).__name__}."
            + _unwrapping(model)
        )
    return model


def _need_mask(mask_token_id: int | None) -> int:
    if mask_token_id is None:
        raise ValueError(
            "`mask_token_id` must be given: neither the config nor the tokenizer of the drafter names a mask token."
        )
    if complaint := misfit({"mask_token_id": mask_token_id}, {"mask_token_id": ID}):
        raise TypeError(complaint)
    return mask_token_id


def _check_implementation(name: str | None) -> None:
    if name not in (None, GROUPED, "sdpa", "eager"):
        raise ValueError(
            f"`attn_implementation` must be {GROUPED!r}, 'sdpa' or 'eager', got {name!r}. Rows of a batch stand at different "
            "positions, which takes a mask per row and query; flash attention takes none."
        )


def _check_layers(config: PreTrainedConfig) -> None:
    """Both models rewind their caches, and a window or a recurrent state cannot be rewound."""
    odd = sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers} - {DynamicLayer.__name__})
    if odd:
        raise ValueError(
            f"Every layer must attend to the whole sequence, but this {config.model_type!r} has layers cached as "
            f"{', '.join(odd)}. Choose a model without sliding windows and recurrent states."
        )


def _check_causal(model: PreTrainedModel) -> None:
    # Encoders behind a causal head, such as BERT, say on their attention modules that they look both ways.
    is_causal = getattr(model.config, "is_causal", True) and all(
        getattr(module, "is_causal", True) for module in model.modules()
    )
    if not is_causal:
        raise ValueError(
            f"The verifier must be a causal model, but this {type(model).__name__} attends both ways. Give a causal "
            "model with the drafter's tokenizer, the drafter's own model, or none with mixture_weight=1."
        )


def _check_decoder(model: PreTrainedModel) -> None:
    if getattr(model, "_is_stateful", False):
        raise ValueError(
            f"The verifier's cache must be rewindable, but {type(model).__name__} keeps a recurrent state. Choose a "
            "model that has attention only."
        )
    _check_implementation(model.config._attn_implementation)
    _check_layers(model.config)
    _check_computation(model)


@torch.no_grad()
def _check_computation(model: PreTrainedModel) -> None:
    """Ragged rows, a cache and a bare output layer must give what the model gives for each row alone.

    Some models change their logits afterwards (Gemma 2 caps, Cohere scales them), some build a causal mask of their
    own (GPT-Neo, ALiBi): each does so in its own code, so the model is asked, not its config.
    """
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise ValueError(
            f"The verifier must take `position_ids`, which {type(model).__name__} does not. Choose a model with "
            "rotary or learned positions."
        )
    rows = [[1, 0, 1, 1, 0], [0, 1, 0]]
    tokens = torch.tensor([[0] * (5 - len(row)) + row for row in rows], device="cpu")
    paddings = [5 - len(row) for row in rows]
    passes = EagerPasses(model, block_size=1, cache_shape=(len(rows), 5), role="verifier")
    parts = []
    for starts, ends in ((paddings, [4, 3]), ([4, 3], [5, 5])):
        span = Span.of_rows(starts, ends, paddings, tokens.device)
        hidden = passes(tokens, span)
        parts.append((span.real.expand(len(rows), -1), model.get_output_embeddings()(hidden)))
    for i, row in enumerate(rows):
        ours = torch.cat([logits[i][real[i].to(logits.device)] for real, logits in parts])
        ids = torch.tensor([row], device=input_device(model))
        mask = None  # a causal model has one, perhaps of its own kind
        if getattr(model.config, "is_causal", True) is False:
            causal = torch.ones(1, 1, len(row), len(row), dtype=torch.bool, device=ids.device).tril_()
            mask = attention_mask(causal, model)
        alone = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        if (ours.to(alone.device) - alone).abs().max() > 2e-2 * alone.abs().max():
            raise ValueError(
                f"The verifier must score rows of different lengths in one batch as it scores each alone, which "
                f"{type(model).__name__} does not: it scales its logits, or has a mask or positions of its own. Choose "
                "another model, such as a Qwen or Llama with the drafter's tokenizer."
            )


#: Embedding tables are padded to a round number of rows; more than this is no padding.
_MOST_PADDING_ROWS = 256


def check_vocabularies(
    drafter_vocab_size: int,
    verifier_vocab_size: int,
    drafter_tokenizer: PreTrainedTokenizerBase | None = None,
    verifier_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    mask_token_id: int | None = None,
) -> int:
    """How many ids the two models share, counted from 0; the mixture knows no others.

    Sizes may differ in rows that no tokenizer uses: Dream has 152,064, Qwen2.5 151,936, their tokenizer fewer. Without
    both tokenizers a difference of up to 256 rows is taken for padding. The mask token is the drafter's own.

    Args:
        drafter_vocab_size, verifier_vocab_size: rows of the output layers.
        drafter_tokenizer, verifier_tokenizer: compared id by id if both are given.
        mask_token_id: by default that of the drafter's tokenizer.
    Raises:
        ValueError: an id means different things to the two models, or only one of them has it.
    """
    shared = min(drafter_vocab_size, verifier_vocab_size)
    if drafter_tokenizer is None or verifier_tokenizer is None:
        if abs(drafter_vocab_size - verifier_vocab_size) > _MOST_PADDING_ROWS:
            raise ValueError(
                f"Without both tokenizers the vocabulary sizes may differ by at most {_MOST_PADDING_ROWS} rows, got "
                f"{drafter_vocab_size} (drafter) and {verifier_vocab_size} (verifier). Choose a verifier with the "
                "drafter's vocabulary, and pass both tokenizers if only padding differs."
            )
        return shared
    if mask_token_id is None:
        mask_token_id = drafter_tokenizer.mask_token_id
    drafter_words = {id: word for word, id in drafter_tokenizer.get_vocab().items() if id != mask_token_id}
    verifier_words = {id: word for word, id in verifier_tokenizer.get_vocab().items() if id != mask_token_id}
    for id in sorted(drafter_words.keys() & verifier_words.keys()):
        if drafter_words[id] != verifier_words[id]:
            raise ValueError(
                f"Drafter and verifier must share a vocabulary, but id {id} is {drafter_words[id]!r} to the drafter "
                f"and {verifier_words[id]!r} to the verifier. Choose a verifier with the drafter's tokenizer."
            )
    for role, words in ("drafter", drafter_words), ("verifier", verifier_words):
        if (last := max(words, default=0)) >= shared:
            raise ValueError(
                f"Drafter and verifier must share a vocabulary, but the {role}'s tokenizer uses id {last} "
                f"({words[last]!r}) and the models share only {shared} ids ({drafter_vocab_size} and "
                f"{verifier_vocab_size}). Choose a verifier with the drafter's tokenizer."
            )
    return shared
