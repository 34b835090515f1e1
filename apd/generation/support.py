"""Arguments of transformers' `generate()`: the supported ones, and the refused ones with the reason."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from apd.kinds import GENERATION

#: Arguments that work, knobs of `APDConfig` aside. `docs/generate.md` says how.
SUPPORTED = (
    *("inputs", "input_ids", "attention_mask", "generation_config", "logits_processor", "stopping_criteria"),
    *(
        "prefix_allowed_tokens_fn",
        "streamer",
        "tokenizer",
        "seed",
        "strategy",
        "allow_stop_in_holes",
        "bad_words_ids",
        "sequence_bias",
    ),
    *GENERATION,
)

_REASONS = {
    "APD draws one continuation at a time; use `num_return_sequences` for several": """
        num_beams num_beam_groups early_stopping length_penalty diversity_penalty penalty_alpha dola_layers constraints
        force_words_ids low_memory""",
    "its warper is not in every supported transformers release; use `min_p`": "top_h",
    "the diffusion model is what drafts": """
        assistant_model assistant_tokenizer prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit
        assistant_ensemble_weight assistant_confidence_threshold assistant_lookbehind target_lookbehind
        num_assistant_tokens num_assistant_tokens_schedule speculation_type is_assistant use_mtp""",
    "`kv_window` says what is cached": """
        use_cache cache past_key_values cache_implementation cache_config max_cache_len prefill_chunk_size""",
    "`generate_many` refills finished rows": "continuous_batching_config",
    "compiling belongs to the sampler: `sampler.compile()`": "compile_config disable_compile",
    "the sampler itself is what `custom_generate` takes": "custom_generate",
    "every process decodes its own prompts": "synced_gpus",
    "drafter and verifier share token ids, not embeddings": "inputs_embeds",
    "decoders have none; leave it out of `tokenizer.model_input_names`": "token_type_ids",
    "positions are counted from the first real token of `attention_mask`": "position_ids",
    "drafter and verifier are decoders without an encoder": """
        encoder_repetition_penalty encoder_no_repeat_ngram_size decoder_start_token_id""",
    "it forces a token whatever the models say, which leaves nothing to accept or reject": """
        forced_bos_token_id forced_eos_token_id""",
    "it depends on how long the row will be; use `max_new_tokens`": "exponential_decay_length_penalty",
    "its processor keeps a state or asks a model of its own about every position": """
        guidance_scale negative_prompt_ids negative_prompt_attention_mask watermarking_config""",
    "it changes the prompt; heal it before": "token_healing",
    "NaN logits are an error here, with the model and the step named": "remove_invalid_values",
    "attention maps are not kept": "output_attentions",
    "hidden states are not kept": "output_hidden_states",
}
#: Refused arguments with the reason.
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names.split()}

# Factors and counts of which 1 changes nothing.
_NEUTRAL_AT_ONE = ("num_beams", "num_beam_groups", "length_penalty", "encoder_repetition_penalty", "guidance_scale")
# Fields of a configuration without an effect of their own; transformers sets some of them when it resolves one.
_INERT = (
    *("assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind", "is_assistant"),
    *("num_assistant_tokens", "num_assistant_tokens_schedule", "disable_compile", "early_stopping", "use_cache"),
)


def refuse(arguments: Mapping[str, Any], *, unless: Iterable[str] = ()) -> None:
    """Refuse unsupported arguments, unless their value has no effect.

    Raises:
        ValueError: the message has the reason.
    """
    for name, value in arguments.items():
        if name not in REFUSED or name in unless:
            continue
        if _has_effect(value, 1 if name in _NEUTRAL_AT_ONE else 0):
            raise ValueError(f"`{name}` is not supported, got {value!r}: {REFUSED[name]}.")


def refuse_in_config(config: GenerationConfig) -> None:
    """Refuse unsupported fields of a configuration that have an effect.

    A field that a later transformers has added must have its default value.

    Raises:
        ValueError: the message has the reason.
    """
    refuse(vars(config), unless=_INERT)
    unset = vars(GenerationConfig())
    resolved: dict[str, Any] = getattr(GenerationConfig, "_get_default_generation_params", dict)()
    for name in unset.keys() - {*SUPPORTED, *REFUSED, "transformers_version"}:
        value = getattr(config, name)
        if name[0] != "_" and _has_effect(value, unset[name], resolved.get(name)):
            raise ValueError(
                f"`{name}` is not supported, got {value!r}: it is newer than this version of apd. Leave it out, or update "
                "apd."
            )


def _has_effect(value: Any, *neutral: Any) -> bool:
    if value is None or value is False:
        return False
    return isinstance(value, Tensor) or value not in ([], {}, 0, *neutral)


def refuse_for(where: str, kwargs: Mapping[str, Any], *names: str) -> None:
    """Refuse arguments of `generate()` that `where` does not support.

    Raises:
        ValueError: the first of `names` that is given.
    """
    for name in names:
        if kwargs.get(name) is not None:
            raise ValueError(f"`{name}` cannot be meant in {where}, got {kwargs[name]!r}. Use generate().")


_BETWEEN = ("apd", "torch", "tqdm", "transformers")


def warn(message: str) -> None:
    """Warn at the caller's own line, across frames of apd, torch, tqdm and transformers."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
