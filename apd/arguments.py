"""What the caller of `generate()` means: every argument resolved, checked once, or refused by name."""

from __future__ import annotations

import copy
import difflib
import numbers
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from apd.config import KNOBS
from apd.probability import SEED_MASK, mix_seed
from apd.step import Sampling

DEFAULT_NEW_TOKENS = 20  # transformers' own default
DEFAULT_TOP_K = 50  # likewise: sampling means top-k 50 unless the caller says otherwise

SUPPORTED = (
    "inputs",
    "input_ids",
    "attention_mask",
    "generation_config",
    "seed",
    "strategy",
    "max_new_tokens",
    "max_length",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "eos_token_id",
    "pad_token_id",
    "num_return_sequences",
    "return_dict_in_generate",
)
_SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p")

_ONE_DRAW = "APD draws one continuation at a time; use `num_return_sequences` for several"
_NO_ASSISTANT = "the diffusion model is what drafts"
_LATER = "it is not implemented yet"
_REFUSED = {
    "num_beams": _ONE_DRAW,
    "num_beam_groups": _ONE_DRAW,
    "penalty_alpha": _ONE_DRAW,
    "dola_layers": _ONE_DRAW,
    "constraints": _ONE_DRAW,
    "force_words_ids": _ONE_DRAW,
    "assistant_model": _NO_ASSISTANT,
    "assistant_tokenizer": _NO_ASSISTANT,
    "prompt_lookup_num_tokens": _NO_ASSISTANT,
    "assistant_early_exit": _NO_ASSISTANT,
    "use_cache": "`kv_window` says what is cached",
    "past_key_values": "`kv_window` says what is cached",
    "cache_implementation": "`kv_window` says what is cached",
    "inputs_embeds": "drafter and verifier share token ids, not embeddings",
    "token_type_ids": "decoders have none; set `tokenizer.model_input_names` to input_ids and attention_mask",
    "position_ids": "positions are counted from the first real token of `attention_mask`",
    "output_attentions": "attention maps are not kept",
    "output_hidden_states": "hidden states are not kept",
    "steps": "the number of steps follows from what is accepted",
    "alg": "give a `strategy` instead",
} | dict.fromkeys(
    (
        "min_length",
        "min_new_tokens",
        "max_time",
        "stop_strings",
        "streamer",
        "stopping_criteria",
        "logits_processor",
        "prefix_allowed_tokens_fn",
        "repetition_penalty",
        "encoder_repetition_penalty",
        "encoder_no_repeat_ngram_size",
        "no_repeat_ngram_size",
        "bad_words_ids",
        "suppress_tokens",
        "begin_suppress_tokens",
        "sequence_bias",
        "typical_p",
        "top_h",
        "epsilon_cutoff",
        "eta_cutoff",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "exponential_decay_length_penalty",
        "guidance_scale",
        "watermarking_config",
        "token_healing",
        "output_scores",
        "output_logits",
    ),
    _LATER,
)
# Values that ask for nothing, beside None, False and empty ones.
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "guidance_scale": 1.0,
}


@dataclass(frozen=True)
class Request:
    """The checked arguments of one call, one row per prompt and returned sequence, on the drafter's device.

    Attributes:
        prompt: `b l` int64, padded on the left.
        padding: `b` int64, columns of left padding.
        max_new_tokens: masks behind each prompt.
        seeds: `b` int64, the row seeds.
        stop_token_ids: `s` int64.
        pad_token_id: what stands behind a stop token.
        sampling: how tokens are drawn.
        as_dict: whether the caller wants an `APDOutput`.
    """

    prompt: Tensor
    padding: Tensor
    max_new_tokens: int
    seeds: Tensor
    stop_token_ids: Tensor
    pad_token_id: int
    sampling: Sampling
    as_dict: bool


def refuse_unknown(names: Iterable[str], known: Iterable[str], where: str) -> None:
    """Raise for the first of `names` that is not `known`, with the nearest that is."""
    known = sorted(known)
    for name in names:
        if name in known:
            continue
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean `{nearest[0]}`?" if nearest else f"Known: {', '.join(known)}."
        raise TypeError(f"{where} has no argument `{name}`. {hint}")


def resolve(
    prompt: Any,
    attention_mask: Tensor | None,
    generation: GenerationConfig,
    seed: int | Sequence[int] | None,
    *,
    vocab_size: int,
    mask_token_id: int,
    max_lengths: dict[str, int | None],
    device: torch.device,
    redraw: bool,
) -> Request:
    """Check what `generate` was given against the models, and lay it out row by row.

    Args:
        prompt, attention_mask, seed: as in `APDSampler.generate`.
        generation: the effective configuration, see `generation_config`.
        vocab_size: ids that the models share are below it.
        mask_token_id: of the drafter.
        max_lengths: tokens a row may have, per model.
        device: of the drafter.
        redraw: noise changes with the row's step.
    Raises:
        ValueError, TypeError: see `APDSampler.generate`.
    """
    prompt = _checked_ids(prompt)
    stop_token_ids = _as_list(generation.eos_token_id)
    for stop in stop_token_ids:
        if not 0 <= stop < vocab_size or stop == mask_token_id:
            raise ValueError(
                f"`eos_token_id` must be an id that can be decoded, below {vocab_size} and not the mask token, "
                f"got {stop}."
            )
    padding = _left_padding(prompt, attention_mask, generation.pad_token_id, stop_token_ids)
    _check_tokens(prompt, padding, vocab_size, mask_token_id)

    max_new_tokens = _max_new_tokens(generation, prompt.shape[1])
    tokens = prompt.shape[1] - int(padding.min()) + max_new_tokens
    for model, limit in max_lengths.items():
        if limit is not None and tokens > limit:
            raise ValueError(
                f"Prompt and new tokens must fit the {model}'s {limit} positions, got {tokens} tokens. "
                f"Lower `max_new_tokens` ({max_new_tokens}) or shorten the prompt."
            )

    copies = _count("num_return_sequences", generation.num_return_sequences or 1)
    prompt, padding = (values.to(device).repeat_interleave(copies, 0) for values in (prompt, padding))
    pad_token_id = generation.pad_token_id
    if pad_token_id is None:
        pad_token_id = stop_token_ids[0] if stop_token_ids else 0
    return Request(
        prompt=prompt,
        padding=padding,
        max_new_tokens=max_new_tokens,
        seeds=torch.tensor(_row_seeds(seed, len(prompt)), device=device),
        stop_token_ids=torch.tensor(stop_token_ids, dtype=torch.int64, device=device),
        pad_token_id=pad_token_id,
        sampling=_sampling(generation, redraw),
        as_dict=bool(generation.return_dict_in_generate),
    )


def generation_config(
    given: GenerationConfig | None, defaults: Sequence[dict[str, Any]], kwargs: dict[str, Any]
) -> GenerationConfig:
    """The configuration that counts: single arguments, then the given configuration, then `defaults`, first ones first.

    As in transformers, an argument given as `None` overrides what stands behind it: `eos_token_id=None` stops nowhere.

    Raises:
        TypeError: an unknown argument; the nearest is named.
        ValueError: an argument that cannot be meant here; the reason is named.
    """
    config = copy.deepcopy(given) if given is not None else GenerationConfig()
    for default in defaults:
        config.update(**default, defaults_only=True)
    unused = config.update(**kwargs)
    for name, value in [*unused.items(), *config.to_dict().items()]:
        asks_for_nothing = value is None or value is False or value in ([], {}, 0, _NEUTRAL.get(name))
        if name in _REFUSED and not asks_for_nothing and (name != "use_cache" or name in kwargs):
            raise ValueError(f"`{name}` is not supported, got {value!r}: {_REFUSED[name]}.")
    refuse_unknown([name for name in unused if name not in _REFUSED], [*SUPPORTED, *KNOBS], "generate()")
    for name in _SAMPLING_ONLY:
        if kwargs.get(name) is not None and not config.do_sample:
            warnings.warn(f"`{name}` has no effect without `do_sample=True`.", UserWarning, stacklevel=4)
    return config


def one_prompt(inputs: Any, kwargs: dict[str, Any]) -> Any:
    """The prompt, given as `inputs` or as `input_ids`, which is taken out of `kwargs`."""
    if inputs is not None and kwargs.get("input_ids") is not None:
        raise ValueError("The prompt must be given once, got both `inputs` and `input_ids`.")
    input_ids = kwargs.pop("input_ids", None)
    if inputs is None and input_ids is None:
        raise ValueError("`input_ids` must hold at least one prompt token, got none. Start with a BOS or a prompt.")
    return input_ids if inputs is None else inputs


def _checked_ids(prompt: Any) -> Tensor:
    if not isinstance(prompt, Tensor):
        raise TypeError(
            f"`input_ids` must be a tensor of shape [rows, tokens], got {type(prompt).__name__}. Encode text with "
            'the tokenizer: `tokenizer(text, return_tensors="pt")`.'
        )
    if prompt.is_floating_point() or prompt.dtype == torch.bool:
        raise TypeError(f"`input_ids` must hold integers, got {prompt.dtype}.")
    if prompt.dim() != 2:
        raise ValueError(f"`input_ids` must have two dimensions [rows, tokens], got shape {list(prompt.shape)}.")
    if prompt.shape[0] == 0 or prompt.shape[1] == 0:
        raise ValueError(
            f"`input_ids` must hold at least one prompt token, got shape {list(prompt.shape)}. The drafter's first "
            "prediction needs a token before it; start with a BOS or a prompt."
        )
    return prompt.long()


def _left_padding(
    prompt: Tensor, attention_mask: Tensor | None, pad_token_id: int | None, stop_token_ids: list[int]
) -> Tensor:
    """Columns of left padding per row, `b` int64."""
    if attention_mask is None:
        real = _inferred_mask(prompt, pad_token_id, stop_token_ids)
    elif attention_mask.shape != prompt.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {list(prompt.shape)}, got "
            f"{list(attention_mask.shape)}."
        )
    else:
        real = attention_mask.to(prompt.device) != 0
    empty = ~real.any(1)
    if empty.any():
        raise ValueError(f"Every prompt must hold a token, row {int(empty.long().argmax())} is all padding.")
    padding = real.long().argmax(1)
    right = (real != (torch.arange(prompt.shape[1], device=prompt.device) >= padding[:, None])).any(1)
    if right.any():
        raise ValueError(
            f"Prompts must be padded on the left only, row {int(right.long().argmax())} has padding behind a token. "
            'Set `tokenizer.padding_side = "left"`.'
        )
    return padding


def _inferred_mask(prompt: Tensor, pad_token_id: int | None, stop_token_ids: list[int]) -> Tensor:
    """Real columns as far as the pad token tells, as transformers infers them."""
    if pad_token_id is None or not (prompt == pad_token_id).any():
        return torch.ones_like(prompt, dtype=torch.bool)
    if pad_token_id in stop_token_ids:
        warnings.warn(
            "`attention_mask` cannot be inferred, since the pad token is a stop token too; nothing is taken for "
            "padding. Pass `attention_mask`.",
            UserWarning,
            stacklevel=6,
        )
        return torch.ones_like(prompt, dtype=torch.bool)
    return prompt != pad_token_id


def _check_tokens(prompt: Tensor, padding: Tensor, vocab_size: int, mask_token_id: int) -> None:
    real = torch.arange(prompt.shape[1], device=prompt.device) >= padding[:, None]
    if (real & (prompt == mask_token_id)).any():
        raise ValueError(
            f"The prompt must not hold the mask token, got id {mask_token_id}: masks are appended behind the prompt. "
            "Infilling is not supported."
        )
    foreign = real & ((prompt < 0) | (prompt >= vocab_size))
    if foreign.any():
        raise ValueError(
            f"`input_ids` must be below {vocab_size}, the vocabulary that the models share, got "
            f"{int(prompt[foreign][0])}. Was the prompt encoded with another tokenizer?"
        )


def _max_new_tokens(generation: GenerationConfig, prompt_width: int) -> int:
    if generation.max_new_tokens is not None:
        if generation.max_length is not None:
            warnings.warn("`max_new_tokens` takes precedence over `max_length`.", UserWarning, stacklevel=5)
        return _count("max_new_tokens", generation.max_new_tokens)
    if generation.max_length is None:
        warnings.warn(
            f"Neither `max_new_tokens` nor `max_length` is set: {DEFAULT_NEW_TOKENS} new tokens at most.",
            UserWarning,
            stacklevel=5,
        )
        return DEFAULT_NEW_TOKENS
    if generation.max_length <= prompt_width:
        raise ValueError(
            f"`max_length` must exceed the prompt's {prompt_width} columns, padding included, got "
            f"{generation.max_length}. Set `max_new_tokens` instead."
        )
    return generation.max_length - prompt_width


def _row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    if seed is None:
        seed = int(torch.randint(SEED_MASK, ()))
    if isinstance(seed, int) and not isinstance(seed, bool):
        return [mix_seed(seed, row) for row in range(rows)]
    if not isinstance(seed, (list, tuple)) or not all(isinstance(entry, int) for entry in seed):
        raise TypeError(f"`seed` must be an integer or a list with one integer per row, got {seed!r}.")
    if len(seed) != rows:
        raise ValueError(
            f"`seed` must have one entry per row, {rows} (prompts times num_return_sequences), got {len(seed)}."
        )
    return [entry & SEED_MASK for entry in seed]


def _sampling(generation: GenerationConfig, redraw: bool) -> Sampling:
    """Transformers' own warpers in transformers' own order."""
    temperature = 1.0 if generation.temperature is None else generation.temperature
    top_k = DEFAULT_TOP_K if generation.top_k is None else generation.top_k
    top_p = 1.0 if generation.top_p is None else generation.top_p
    min_p = 0.0 if generation.min_p is None else generation.min_p
    warpers = LogitsProcessorList()
    if not generation.do_sample:
        return Sampling(warpers, greedy=True)
    if temperature < 0:
        raise ValueError(f"`temperature` must be at least 0, got {temperature}. Use 0 for greedy decoding.")
    if top_k < 0:
        raise ValueError(f"`top_k` must be at least 0, got {top_k}. Use 0 to keep all tokens.")
    if not 0 < top_p <= 1:
        raise ValueError(f"`top_p` must be in (0, 1], got {top_p}. Use 1 to keep all tokens.")
    if not 0 <= min_p <= 1:
        raise ValueError(f"`min_p` must be in [0, 1], got {min_p}. Use 0 to keep all tokens.")
    if temperature == 0:
        return Sampling(warpers, greedy=True)
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(temperature)))
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(float(top_p)))
    if min_p > 0:
        warpers.append(MinPLogitsWarper(float(min_p)))
    return Sampling(warpers, greedy=False, redraw=redraw)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be a whole number, got {value!r}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
    return int(value)


def _as_list(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else [int(i) for i in ids]
