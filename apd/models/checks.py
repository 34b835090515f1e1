"""Checks of loaded models and of a pair's vocabularies. Each raises an error that names the remedy."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from apd.kinds import ID, misfit
from apd.models.attention import GROUPED

__all__ = [
    "check_causal",
    "check_complete",
    "check_implementation",
    "check_layers",
    "check_vocabularies",
    "need_mask",
    "unwrapping",
]


def check_complete(path: str | Path, model: PreTrainedModel, report: Mapping[str, Any], kinds: Iterable[str]) -> None:
    """Refuse a model whose weights were not loaded completely.

    Args:
        path: the checkpoint, for the message.
        model: the loaded model.
        report: transformers' loading info.
        kinds: entries of `report` that must be empty, such as "missing_keys".
    Raises:
        ValueError: one of them is not empty.
    """
    quantisation = getattr(model.config, "quantization_config", None)
    for kind in kinds:
        if keys := sorted(map(str, report[kind])):
            stored_as = "" if quantisation is None else f" They are loaded as quantised: {quantisation}."
            raise ValueError(
                f"The weights of {str(path)!r} do not fit {type(model).__name__}: {len(keys)} "
                f"{kind.replace('_', ' ')}, such as {', '.join(keys[:3])}.{stored_as} Check `spec=`, its `key_mapping` (at "
                "most one capture group per pattern) and its `config_fields`."
            )


# Wrappers around models: an attribute that identifies the wrapper, and the remedy.
_WRAPPERS = (
    ("merge_and_unload", "an adapter around a model: pass `model.merge_and_unload()`"),
    ("get_base_model", "an adapter around a model that cannot be merged: pass a model that was trained without one"),
    ("_orig_mod", "what torch.compile gives: pass `model._orig_mod`, and compile by `sampler.compile()`"),
    ("summon_full_params", "a part of a sharded model: save its full state dict, and load that by `load_drafter`"),
    ("reshard", "a part of a sharded model: save its full state dict, and load that by `load_drafter`"),
    ("module", "a wrapper around a model, for several devices: pass `model.module`"),
    ("pretrained_model", "a wrapper around a model, for training: pass `model.pretrained_model`"),
)


def unwrapping(model: Any) -> str:
    """A sentence that says how to unwrap this wrapper around a transformers model; empty for other objects."""
    if isinstance(model, (str, Path)):
        return " `APDSampler.from_pretrained` loads models by their names."
    for name, remedy in _WRAPPERS:
        if hasattr(model, name):
            return f" That is {remedy}."
    return ""


def need_mask(mask_token_id: int | None) -> int:
    """The id of the mask token.

    Raises:
        ValueError: it is `None`.
        TypeError: it is not an id.
    """
    if mask_token_id is None:
        raise ValueError(
            "`mask_token_id` must be given: neither the config nor the tokenizer of the drafter names a mask token."
        )
    if complaint := misfit({"mask_token_id": mask_token_id}, {"mask_token_id": ID}):
        raise TypeError(complaint)
    return mask_token_id


def check_implementation(name: str | None) -> None:
    """Refuse attention implementations that take no mask per row and query.

    Raises:
        ValueError: another implementation than "grouped_sdpa", "sdpa" or "eager".
    """
    if name not in (None, GROUPED, "sdpa", "eager"):
        raise ValueError(
            f"`attn_implementation` must be {GROUPED!r}, 'sdpa' or 'eager', got {name!r}. Rows of a batch are at different "
            "positions, so attention needs a mask per row and query; flash attention takes none."
        )


def check_layers(config: PreTrainedConfig) -> None:
    """Refuse a drafter with layers that do not attend to the whole sequence: sliding windows and recurrent states.

    Raises:
        ValueError: a layer does not attend to the whole sequence.
    """
    odd = sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers} - {DynamicLayer.__name__})
    if odd:
        raise ValueError(
            f"Every layer must attend to the whole sequence, but this {config.model_type!r} has layers cached as "
            f"{', '.join(odd)}. Choose a model without sliding windows and recurrent states."
        )


def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model with bidirectional attention. Towers for images or sound do not count.

    Raises:
        ValueError: the config or an attention module of the decoder has `is_causal=False`, or the model has an encoder.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"The verifier must be a causal model, but this {type(model).__name__} has an encoder, whose text it continues. "
            "Give a causal model with the drafter's tokenizer."
        )
    # Encoders with a causal head, such as BERT, have `is_causal=False` on their attention modules only.
    is_causal = getattr(model.config, "is_causal", True) and all(
        getattr(module, "is_causal", True) for module in (model.get_decoder() or model).modules()
    )
    if not is_causal:
        raise ValueError(
            f"The verifier must be a causal model, but this {type(model).__name__} attends both ways. Give a causal "
            "model with the drafter's tokenizer, the drafter's own model, or none with mixture_weight=1."
        )


#: Largest difference in embedding rows that is taken for padding to a round size.
_MOST_PADDING_ROWS = 256


def check_vocabularies(
    drafter_vocab_size: int,
    verifier_vocab_size: int,
    drafter_tokenizer: PreTrainedTokenizerBase | None = None,
    verifier_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    mask_token_id: int | None = None,
) -> int:
    """The number of ids that the two models share, counted from 0. The mixture covers these ids only.

    Sizes may differ in rows that no tokenizer uses: Dream has 152,064, Qwen2.5 has 151,936, their tokenizer has fewer.
    Without both tokenizers, a difference of at most 256 rows is taken for padding. The mask token is not compared.

    Args:
        drafter_vocab_size, verifier_vocab_size: rows of the output layers.
        drafter_tokenizer, verifier_tokenizer: compared id by id if both are given.
        mask_token_id: the drafter's mask token; by default its tokenizer's.
    Raises:
        ValueError: an id has different tokens in the two models, or only one model has it.
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
