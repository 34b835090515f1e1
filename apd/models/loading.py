"""Drafters and verifiers from checkpoints and from models in memory, with no modelling code of our own.

Remote code is never run and pickled weights are never read. A drafter loads completely or not at all: transformers
only logs unexpected and missing weights, and initialises missing ones at random.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from apd.decoding.protocols import Drafter, Verifier
from apd.kinds import GENERATION, ID, IDS, OBJECT, TEXT, Kind, misfit
from apd.models.attention import GROUPED, group_heads
from apd.models.checkpoint import HUB_ARGUMENTS as HUB_ARGUMENTS
from apd.models.checkpoint import TOKENIZER, Checkpoint
from apd.models.checks import (
    check_causal,
    check_complete,
    check_implementation,
    check_layers,
    need_mask,
    unwrapping,
)
from apd.models.drafter import MaskedDiffusionDrafter, check_mask_token
from apd.models.families import FAMILIES, ModelSpec, RawConfig, family_names, recognise, resolve_spec
from apd.models.masked_lm import (
    MaskedLMDrafter,
    check_masked_lm,
    is_masked_lm,
    masked_lm_class,
    special_ids,
    warn_if_untried,
)
from apd.models.verifier import CausalVerifier
from apd.models.ways import find_way

#: In place of a verifier: the drafter's own weights, read with a causal mask. A directory of this name is "./self".
SELF = "self"

#: Arguments that place a large model on several devices, as in transformers.
PLACING_ARGUMENTS = ("max_memory", "offload_folder", "offload_buffers")

#: Arguments that split or quantise a model, as in transformers. For the drafter only: a verifier is small.
SPLITTING_ARGUMENTS = ("tp_plan", "distributed_config", "quantization_config")

_SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Fields of any config.json that are read here; transformers checks the fields of its own config classes.
_CONFIG = {
    "model_type": TEXT,
    "architectures": Kind("a list of names", lambda names: isinstance(names, list)),
    "quantization_config": OBJECT,
    "rope_scaling": OBJECT,
    "rope_parameters": OBJECT,
    "mask_token_id": ID,
    "eos_token_id": IDS,
}


def drafter_config(
    path: str | Path,
    *,
    spec: str | ModelSpec | None = None,
    mask_token_id: int | None = None,
    block_size: int | None = None,
    **hub: Any,
) -> PreTrainedConfig:
    """The config of a drafter, its `mask_token_id` and `block_size` included, without its weights.

    Arguments and errors as in `load_drafter`.
    """
    return _plan_drafter(Checkpoint(path, hub), spec, mask_token_id, block_size)[1]


def drafter_family(path: str | Path, *, spec: str | ModelSpec | None = None, **hub: Any) -> ModelSpec:
    """The family of a drafter, without its weights. Arguments and errors as in `load_drafter`."""
    if spec is not None:
        return resolve_spec(spec)
    checkpoint = Checkpoint(path, hub)
    return recognise(_read_config(checkpoint), checkpoint.path)


def load_drafter(
    path: str | Path,
    *,
    spec: str | ModelSpec | None = None,
    mask_token_id: int | None = None,
    block_size: int | None = None,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    **hub: Any,
) -> MaskedDiffusionDrafter | MaskedLMDrafter:
    """Load a masked-diffusion drafter, or a masked LM as one, from a directory or the hub.

    transformers loads quantised weights, which needs the packages of their format.

    Args:
        path: a directory, or a model id of the hub.
        spec: a name in `FAMILIES` or a `ModelSpec`; by default the family that `config.json` identifies, or the masked LM of
            transformers that it names (`BertForMaskedLM`, …).
        mask_token_id: id of the mask token; by default from `config.json`, else from the tokenizer, else the family's.
        block_size: tokens per block, or that a causal or prefix model drafts at most; by default from `config.json`, else
            the family's. Not for models whose columns all see each other.
        dtype: dtype of the weights; by default float32 on a CPU and the stored dtype on other devices.
        device_map: as in transformers; `None` is the CPU.
        attn_implementation: "sdpa", "eager" or "grouped_sdpa"; by default "grouped_sdpa" if heads share keys, else "sdpa".
        **hub: `HUB_ARGUMENTS`, `PLACING_ARGUMENTS` and `SPLITTING_ARGUMENTS`, as in transformers.
    Raises:
        ValueError: an unknown family, no mask token, no or a wrong block size, weights that do not fit, unsupported
            attention, an adapter, pickled weights, or a damaged file.
        TypeError: an unknown argument, or a `mask_token_id` or `block_size` that is not an integer.
        OSError: no weights, or only pickled ones.
    """
    placing = _taken(hub, PLACING_ARGUMENTS + SPLITTING_ARGUMENTS)
    check_implementation(attn_implementation)
    checkpoint = Checkpoint(path, hub)
    spec, config, generation_config = _plan_drafter(checkpoint, spec, mask_token_id, block_size)
    model = _read_model(
        checkpoint,
        spec.model_class,
        # Checkpoints of masked LMs may hold poolers and heads of other tasks: unexpected keys.
        ("missing_keys", "mismatched_keys", *(() if spec.is_masked_lm else ("unexpected_keys",))),
        config=config,
        **({} if spec.is_masked_lm else {"generation_config": generation_config}),
        key_mapping=dict(spec.key_mapping) or None,
        dtype=dtype,
        device_map=device_map,
        attn_implementation=attn_implementation,
        **placing,
    )
    if spec.is_masked_lm:
        tokenizer = load_tokenizer(checkpoint.path, **checkpoint.hub)
        return _wrap_masked_lm(model, config.mask_token_id, tokenizer, generation_config, path)
    return _wrap(model, spec, config.mask_token_id, config.block_size)


def _plan_drafter(
    checkpoint: Checkpoint, spec: str | ModelSpec | None, mask_token_id: int | None, block_size: int | None
) -> tuple[ModelSpec, PreTrainedConfig, GenerationConfig]:
    """Family, config and generation config of a drafter, checked before its weights are read."""
    # Not AutoConfig: with `auto_map` it prompts on stdin to run the checkpoint's code, and without it the model
    # type is unknown. `Qwen2ForCausalLM.from_pretrained(path)` alone would silently load Dream as a causal model.
    raw = _read_config(checkpoint)
    spec = recognise(raw, checkpoint.path) if spec is None else resolve_spec(spec)
    load = partial(load_tokenizer, checkpoint.path, **checkpoint.hub)
    if complaint := misfit(raw, {spec.mask_field: ID}, " in config.json"):
        raise ValueError(complaint)
    if spec.is_masked_lm:
        spec.attention_of(raw, block_size)  # refuses a block size
        with _naming_config(checkpoint):
            config = (spec.config_class or spec.model_class.config_class).from_dict(raw)
        check_masked_lm(spec.model_class, config)
        config.mask_token_id = _mask_token_id(mask_token_id, raw.get(spec.mask_field), load, spec.mask_token_id)
        check_mask_token(config.mask_token_id, config.vocab_size)
        return spec, config, _generation_config(checkpoint, raw, config)
    # Special ids come from the checkpoint only: with LlamaConfig's defaults, LLaDA would stop at id 2.
    fields = {name: raw.get(name) for name in _SPECIAL_IDS} | spec.config_fields(raw)
    # These fields say how and where the weights are stored.
    fields |= {name: raw[name] for name in ("quantization_config", "transformers_weights") if raw.get(name)}
    with _naming_config(checkpoint):
        config = spec.config(fields)
    if spec.attention == "full":
        config.is_causal = False
    config.block_size = spec.attention_of(raw, block_size).block_size
    default = spec.mask_token_id if (spec.mask_token_id or 0) < config.vocab_size else None
    config.mask_token_id = _mask_token_id(mask_token_id, raw.get(spec.mask_field), load, default)
    check_mask_token(config.mask_token_id, config.vocab_size)
    check_layers(config)
    return spec, config, _generation_config(checkpoint, raw, config)


def _mask_token_id(
    given: int | None, of_config: int | None, load_tokenizer: Callable[[], Any], default: int | None = None
) -> int:
    """The mask id that is given, else the config's, else the tokenizer's, which is loaded only then, else the default."""
    found = of_config if given is None else given
    if found is None:
        found = getattr(load_tokenizer(), "mask_token_id", None)
    return need_mask(default if found is None else found)


def _read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of `config.json`. Refuses adapters."""
    checkpoint.refuse_adapter()
    raw = checkpoint.read_json("config.json", _CONFIG)
    if not raw:
        raise ValueError(
            f"No config.json found for {str(checkpoint.path)!r}. `path` must be a directory that holds one, or the id of "
            "a model on the hub that is reachable or already in the cache."
        )
    return raw


@contextmanager
def _naming_config(checkpoint: Checkpoint) -> Iterator[None]:
    """Name the file if transformers fails to build a config inside this context; its error names the field only."""
    try:
        yield
    except StrictDataclassError as error:
        raise ValueError(f"{checkpoint.find('config.json')} is no config of a model: {error}") from error


def verifier_config(path: str | Path, **hub: Any) -> PreTrainedConfig:
    """The config of a verifier, without its weights. Arguments and errors as in `load_verifier`."""
    return _plan_verifier(Checkpoint(path, hub))


def load_verifier(
    path: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device_map: Any = None,
    attn_implementation: str | None = None,
    **hub: Any,
) -> CausalVerifier:
    """Load a causal verifier from a directory or the hub.

    Any causal LM that transformers supports, in the fastest way that is exact for it (`apd.models.ways`). One whose cache
    cannot go back is run without a cache, and a warning says what that costs. Arguments are as in `load_drafter`, without
    `SPLITTING_ARGUMENTS`.

    Raises:
        ValueError: a diffusion model, a model that transformers does not support, unsupported attention, a model that is not
            causal or needs more than token ids, an adapter, pickled weights, or a damaged file.
        TypeError: an unknown argument.
        OSError: no weights, or only pickled ones.
    """
    placing = _taken(hub, PLACING_ARGUMENTS)
    check_implementation(attn_implementation)
    checkpoint = Checkpoint(path, hub)
    model = _read_model(
        checkpoint,
        AutoModelForCausalLM,
        ("missing_keys", "mismatched_keys"),  # checkpoints of causal models may hold unused heads: unexpected keys
        config=_plan_verifier(checkpoint),
        trust_remote_code=False,
        dtype=dtype,
        device_map=device_map,
        attn_implementation=attn_implementation,
        **placing,
    )
    return _wrap_verifier(model)


def _plan_verifier(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The config of a verifier, checked before its weights are read."""
    raw = _read_config(checkpoint)
    path, model_type = str(checkpoint.path), raw.get("model_type")
    if raw.get("is_causal") is False or any(model_type in spec.model_types for spec in FAMILIES.values()):
        raise ValueError(
            f"The verifier must be a causal model, but {path!r} (model_type {model_type!r}) is a diffusion model. "
            "Give it as the drafter, and as the verifier a causal model with the same tokenizer, or 'self' if it reads causally."
        )
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers has no code for model_type {model_type!r} of {path!r}, and code that comes with a "
            "checkpoint is never run. Choose a verifier that this transformers version knows."
        )
    with _naming_config(checkpoint):
        config = AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False, **checkpoint.hub)
    # transformers reads this file with the weights, and its errors name neither file nor field.
    checkpoint.read_json("generation_config.json", GENERATION)
    return config


def _read_model(
    checkpoint: Checkpoint,
    model_class: Any,
    refused: Sequence[str],
    *,
    dtype: torch.dtype | str | None,
    device_map: Any,
    attn_implementation: str | None,
    **more: Any,
) -> PreTrainedModel:
    """A model with its weights.

    Args:
        model_class: a model class or auto class of transformers.
        refused: entries of the loading report that must be empty.
        dtype, device_map, attn_implementation: as in `load_drafter`.
        **more: further arguments of `from_pretrained`.
    """
    with checkpoint.reading_weights():
        model, report = model_class.from_pretrained(
            checkpoint.path,
            dtype=_default_dtype(device_map) if dtype is None else dtype,
            device_map=device_map,
            attn_implementation="sdpa" if attn_implementation == GROUPED else attn_implementation,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported, and refused below with the other misfits
            output_loading_info=True,
            **more,
            **checkpoint.hub,
        )
    check_complete(checkpoint.path, model, report, refused)
    group_heads(model, attn_implementation)
    return model


def load_tokenizer(path: str | Path, **hub: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a checkpoint, padding on the left; `None` if it has none.

    `tokenizer.json` is a complete tokenizer and is used directly, unless it is a masked LM's and no file names its mask token,
    as in older checkpoints, where only the tokenizer's class knows it. Dream has `vocab.json` and `merges.txt`, and its own
    class equals Qwen2's. Other tokenizers are left to `AutoTokenizer`.

    Args:
        path: a directory, or a model id of the hub.
        **hub: `HUB_ARGUMENTS`, as in transformers.
    Raises:
        ValueError: a file is damaged, or the files do not make a tokenizer.
        TypeError: an unknown argument.
    """
    checkpoint = Checkpoint(path, hub)
    settings = checkpoint.read_json("tokenizer_config.json", TOKENIZER)
    # Without `model_input_names` some tokenizers return token_type_ids, which the supported models do not take.
    more: dict[str, Any] = {"model_input_names": ["input_ids", "attention_mask"]}
    tokenizer_class: Any
    if "mask_token" not in (settings or {}) and _has_masked_lm(checkpoint):
        tokenizer_class, more = AutoTokenizer, more | {"trust_remote_code": False}
    elif checkpoint.find("tokenizer.json"):
        # Unlike AutoTokenizer, this class does not read config.json, whose model_type transformers may not know.
        tokenizer_class = PreTrainedTokenizerFast
    elif settings is None:
        return None
    elif settings.get("tokenizer_class") in ("DreamTokenizer", "Qwen2Tokenizer", "Qwen2TokenizerFast"):
        tokenizer_class = Qwen2Tokenizer
    else:
        tokenizer_class, more = AutoTokenizer, {"trust_remote_code": False}
    with checkpoint.reading_tokenizer():
        return tokenizer_class.from_pretrained(path, padding_side="left", **more, **hub)


def _has_masked_lm(checkpoint: Checkpoint) -> bool:
    """True if the checkpoint is a masked LM with files of a tokenizer."""
    raw = checkpoint.read_json("config.json", _CONFIG) or {}
    model_class = masked_lm_class(raw.get("model_type"))
    is_one = model_class is not None and model_class.__name__ in (raw.get("architectures") or ())
    return is_one and any(map(checkpoint.find, ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json")))


def _taken(arguments: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Remove these arguments from `arguments` and return them."""
    return {name: arguments.pop(name) for name in names if name in arguments}


def _default_dtype(device_map: Any) -> torch.dtype | str:
    """float32 on a CPU, where half precision is slow and rounds different logits to ties; else "auto", the stored dtype."""
    if device_map is None:
        return torch.float32 if torch.get_default_device().type == "cpu" else "auto"
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        return "auto" if torch.accelerator.is_available() else torch.float32
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    return torch.float32 if all(str(device) == "cpu" for device in devices) else "auto"


def _generation_config(checkpoint: Checkpoint, raw: RawConfig, config: PreTrainedConfig) -> GenerationConfig:
    """The checkpoint's generation config, without options that transformers does not know. Special ids default to `config`'s.

    Without a generation_config.json, the fields of config.json are used, as in transformers. Dream's generation config
    holds options of Dream's sampler, and a temperature of 0 without `do_sample=True`, which is ignored: a later
    `do_sample=True` would otherwise decode greedily.
    """
    file = "generation_config.json"
    stored: RawConfig | None = checkpoint.read_json(file)
    if stored is None:
        file, stored = "config.json", raw
    if complaint := misfit(stored, GENERATION, f" in {file} of {str(checkpoint.path)!r}"):
        raise ValueError(complaint)
    fields: dict[str, Any] = {name: getattr(config, name, None) for name in _SPECIAL_IDS}
    known = vars(GenerationConfig()).keys() - {"transformers_version"}
    fields |= {name: stored[name] for name in stored if name in known and name[:1] != "_" and stored[name] is not None}
    if fields.get("temperature") == 0 and not fields.get("do_sample"):
        del fields["temperature"]
    try:
        return GenerationConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{file} of {str(checkpoint.path)!r} is no generation config: {error}") from error


def as_drafter(
    model: PreTrainedModel | Drafter,
    spec: str | ModelSpec | None = None,
    mask_token_id: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Drafter:
    """Wrap a transformers model as a drafter. A `Drafter` is returned unchanged.

    Args:
        model: a transformers model, with `config.is_causal=False` for "full" attention, or an `apd.Drafter`.
        spec: the model's family, required for a transformers decoder: a Dream in memory is a plain `Qwen2ForCausalLM`. A
            masked LM (`AutoModelForMaskedLM`) needs none. Its block size is `model.config.block_size`, else the family's.
        mask_token_id: id of the mask token; by default `model.config.mask_token_id`, else the tokenizer's.
        tokenizer: the model's tokenizer.
    Raises:
        ValueError: no family, no mask token, causal attention, or unsupported layers or attention.
        TypeError: `model` is neither a transformers model nor a `Drafter`.
    """
    if not isinstance(model, PreTrainedModel) or _is_sharded(model):
        _check_protocol(model, "drafter")
        if spec is not None or mask_token_id is not None:
            raise ValueError(
                f"`spec` and `mask_token_id` describe a transformers model, but a {type(model).__name__} knows its "
                "own. Leave them out."
            )
        return model
    if spec is None and is_masked_lm(type(model)):
        spec = ModelSpec(type(model).__name__, type(model), 0)
    if spec is None:
        raise ValueError(
            f"`spec` must be given with a model in memory: {type(model).__name__} alone does not say at which row it "
            f"predicts a token. Pass one of {family_names()}, or a `ModelSpec`; or use `apd.models.load_drafter`."
        )
    spec = resolve_spec(spec)
    mask_token_id = _mask_token_id(mask_token_id, getattr(model.config, "mask_token_id", None), lambda: tokenizer)
    if spec.is_masked_lm:
        _check_class(model, spec)
        return _wrap_masked_lm(model, mask_token_id, tokenizer)
    block_size = getattr(model.config, "block_size", None)
    return _wrap(model, spec, mask_token_id, spec.block_size if block_size is None else block_size)


def _wrap(
    model: PreTrainedModel, spec: ModelSpec, mask_token_id: int, block_size: int | None
) -> MaskedDiffusionDrafter:
    _check_class(model, spec)
    if spec.attention == "full" and getattr(model.config, "is_causal", None) is not False:
        raise ValueError(
            "The drafter must attend both ways, but `model.config.is_causal` is not False. If it was trained that "
            "way, set `model.config.is_causal = False`; setting it on the attention modules is not enough."
        )
    check_implementation(model.config._attn_implementation)
    check_layers(model.config)
    return MaskedDiffusionDrafter(
        model,
        mask_token_id=mask_token_id,
        logit_shift=spec.logit_shift,
        attention=spec.attention,
        block_size=block_size,
        anchored=spec.anchored,
        reads_causally=spec.reads_causally,
    )


def _check_class(model: PreTrainedModel, spec: ModelSpec) -> None:
    if not isinstance(model, spec.model_class):
        raise ValueError(
            f"`spec` {spec.name!r} is computed by {spec.model_class.__name__}, but the model is a "
            f"{type(model).__name__}. Pass a `ModelSpec` with that class and your model's `logit_shift`."
        )


def _wrap_masked_lm(
    model: PreTrainedModel,
    mask_token_id: int,
    tokenizer: PreTrainedTokenizerBase | None,
    generation_config: GenerationConfig | None = None,
    path: str | Path = "PATH",
) -> MaskedLMDrafter:
    check_implementation(model.config._attn_implementation)
    drafter = MaskedLMDrafter(
        model,
        mask_token_id=mask_token_id,
        never_drawn=special_ids(model.config, tokenizer),
        generation_config=generation_config,
    )
    warn_if_untried(model.config.model_type, type(model).__name__, path)
    return drafter


def as_verifier(model: PreTrainedModel | Verifier | str, drafter: Drafter | None = None) -> Verifier:
    """Wrap a transformers model as a verifier. A `Verifier` is returned unchanged.

    Args:
        model: a causal model, the drafter's own model, `"self"` for the latter where it was trained for that, or an
            `apd.Verifier`.
        drafter: the drafter. Its bidirectional model may be the verifier too, because the verifier's passes get a causal
            mask.
    Raises:
        ValueError: another bidirectional model, one that needs more than token ids, or unsupported attention; `"self"` with
            a drafter that was not trained to predict the next token.
        TypeError: `model` is neither a transformers model nor a `Verifier`.
    """
    if isinstance(model, str) and model == SELF:
        check_reads_causally(getattr(drafter, "reads_causally", False), "this drafter")
        return as_verifier(getattr(drafter, "model", None), drafter)
    if isinstance(model, PreTrainedModel) and not _is_sharded(model):
        is_drafter = model is getattr(drafter, "model", None) and not isinstance(drafter, MaskedLMDrafter)
        return _wrap_verifier(model, is_drafter=is_drafter)
    _check_protocol(model, "verifier")
    return model  # type: ignore[return-value]  # no string has passed the check


def check_reads_causally(reads_causally: bool, name: str) -> None:
    """Refuse a drafter as its own verifier that was not trained to predict the next token under a causal mask.

    Args:
        name: what it is called in the message.
    Raises:
        ValueError: `reads_causally` is False.
    """
    if not reads_causally:
        raise ValueError(
            f"`verifier` must be a causal model with the drafter's tokenizer, got {SELF!r}, but {name} was never trained to "
            "predict the next token under a causal mask. Give a small causal model of the same tokenizer (a directory of that "
            "name as './self'), or pass a `ModelSpec` with `reads_causally=True` if yours was trained that way."
        )


def _wrap_verifier(model: PreTrainedModel, *, is_drafter: bool = False) -> CausalVerifier:
    """A verifier from a model.

    Args:
        is_drafter: whether the model is the drafter's own, which need not be causal.
    """
    if not is_drafter:
        check_causal(model)
    check_implementation(model.config._attn_implementation)
    return CausalVerifier(model, find_way(model))


def _is_sharded(model: PreTrainedModel) -> bool:
    """True after torch's `fully_shard`, which changes the class of the model; its weights are DTensors then."""
    return hasattr(model, "reshard")


def _check_protocol(model: Any, role: str) -> None:
    if not callable(getattr(model, "open", None)):
        raise TypeError(
            f"`{role}` must be a transformers model or an `apd.{role.title()}`, got {type(model).__name__}."
            + unwrapping(model)
        )
