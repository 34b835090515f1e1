"""Checks of loaded models and of a pair's vocabularies. Each raises an error that names the remedy."""

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from apd.kinds import ID, misfit
from apd.models.attention import GROUPED
from apd.models.span import Span
from apd.models.transformer import EagerPasses, attention_mask, input_device

__all__ = [
    "check_causal",
    "check_complete",
    "check_decoder",
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
    """Refuse layers whose cache cannot be rewound: sliding windows and recurrent states.

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
    """Refuse a model with bidirectional attention.

    Raises:
        ValueError: the config or an attention module has `is_causal=False`.
    """
    # Encoders with a causal head, such as BERT, have `is_causal=False` on their attention modules only.
    is_causal = getattr(model.config, "is_causal", True) and all(
        getattr(module, "is_causal", True) for module in model.modules()
    )
    if not is_causal:
        raise ValueError(
            f"The verifier must be a causal model, but this {type(model).__name__} attends both ways. Give a causal "
            "model with the drafter's tokenizer, the drafter's own model, or none with mixture_weight=1."
        )


def check_decoder(model: PreTrainedModel) -> None:
    """Refuse a verifier whose cache cannot be rewound, or that scores ragged rows otherwise than each row alone.

    Runs the model on 8 tokens.

    Raises:
        ValueError: the model has a recurrent state, sliding windows, an unsupported attention implementation, no
            `position_ids`, or logits that its base model and output layer do not give.
    """
    if getattr(model, "_is_stateful", False):
        raise ValueError(
            f"The verifier's cache must be rewindable, but {type(model).__name__} keeps a recurrent state. Choose a "
            "model that has attention only."
        )
    check_implementation(model.config._attn_implementation)
    check_layers(model.config)
    _check_computation(model)


@torch.no_grad()
def _check_computation(model: PreTrainedModel) -> None:
    """Compare cached passes over ragged rows, followed by the output layer, with the model's logits for each row alone.

    Some models change the output layer's logits (Gemma 2 caps them, Cohere scales them), others build their own causal
    mask (GPT-Neo, ALiBi). No common config field says so; only a forward pass shows it.
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
        mask = None  # a causal model builds its own mask
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
