"""What the caller of `generate()` means: every argument resolved, checked once, or refused by name."""

from __future__ import annotations

import copy
import difflib
import inspect
import math
import numbers
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from apd.config import KNOBS, APDConfig
from apd.decoding.commit import Stopping
from apd.decoding.noise import SEED_MASK, mix_seed
from apd.decoding.processing import AllowedTokens, Processing, split_processors
from apd.decoding.request import Request
from apd.decoding.sampling import Sampling
from apd.decoding.strategy import Strategy
from apd.decoding.window import window_policy
from apd.generation.stop_strings import StopStrings
from apd.kinds import GENERATION, misfit

_COLDEST = 1e-5  # below it, scores divided by the temperature overflow, and the best token is drawn all the same
DEFAULT_NEW_TOKENS = 20  # transformers' own default
# Likewise: sampling means top-k 50 unless the caller says otherwise.
_DEFAULTS = {
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_RULES: dict[str, tuple[str, Callable[[float], bool], str]] = {
    "max_new_tokens": ("at least 1", lambda value: value >= 1, "Leave it out for the default"),
    "max_length": ("at least 1", lambda value: value >= 1, "Set `max_new_tokens` instead"),
    "min_new_tokens": ("at least 0", lambda value: value >= 0, "Use 0 for no minimum"),
    "min_length": ("at least 0", lambda value: value >= 0, "Use 0 for no minimum"),
    "max_time": ("at least 0 seconds", lambda value: value >= 0, "Leave it out for no limit"),
    "num_return_sequences": ("at least 1", lambda value: value >= 1, "Use 1 for one answer per prompt"),
    "temperature": ("at least 0 and finite", lambda value: 0 <= value < math.inf, "Use 0 for greedy decoding"),
    "top_k": ("at least 0", lambda value: value >= 0, "Use 0 to keep all tokens"),
    "top_p": ("in (0, 1]", lambda value: 0 < value <= 1, "Use 1 to keep all tokens"),
    "min_p": ("in [0, 1]", lambda value: 0 <= value <= 1, "Use 0 to keep all tokens"),
    "typical_p": ("in (0, 1]", lambda value: 0 < value <= 1, "Use 1 to keep all tokens"),
    "epsilon_cutoff": ("in [0, 1)", lambda value: 0 <= value < 1, "Use 0 to keep all tokens"),
    "eta_cutoff": ("in [0, 1)", lambda value: 0 <= value < 1, "Use 0 to keep all tokens"),
    "repetition_penalty": ("above 0 and finite", lambda value: 0 < value < math.inf, "Use 1 for no penalty"),
    "no_repeat_ngram_size": ("at least 0", lambda value: value >= 0, "Use 0 to allow repetitions"),
}

#: Arguments of `generate()` that work, knobs of `APDConfig` aside. `docs/generate.md` says how.
SUPPORTED = (
    "inputs",
    "input_ids",
    "attention_mask",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "streamer",
    "tokenizer",
    "seed",
    "strategy",
    "max_new_tokens",
    "max_length",
    "min_new_tokens",
    "min_length",
    "max_time",
    "stop_strings",
    "eos_token_id",
    "pad_token_id",
    "bos_token_id",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "sequence_bias",
    "suppress_tokens",
    "begin_suppress_tokens",
    "renormalize_logits",
    "num_return_sequences",
    "return_dict_in_generate",
    "output_scores",
    "output_logits",
)
_SAMPLING_ONLY = tuple(_DEFAULTS)
_LENGTHS = ("max_new_tokens", "max_length")

_ONE_DRAW = "APD draws one continuation at a time; use `num_return_sequences` for several"
_NO_ASSISTANT = "the diffusion model is what drafts"
_OWN_CACHE = "`kv_window` says what is cached"
_FOREIGN = "drafter and verifier are decoders without an encoder"
_OF_TRAINING = "its processor keeps a state or asks a model of its own about every position"
_EXCLUDED = "it forces a token whatever the models say, which leaves nothing to accept or reject"

#: Arguments of transformers' `generate()` that cannot be meant here, with the reason.
REFUSED = {
    "num_beams": _ONE_DRAW,
    "num_beam_groups": _ONE_DRAW,
    "early_stopping": _ONE_DRAW,
    "length_penalty": _ONE_DRAW,
    "diversity_penalty": _ONE_DRAW,
    "penalty_alpha": _ONE_DRAW,
    "dola_layers": _ONE_DRAW,
    "constraints": _ONE_DRAW,
    "force_words_ids": _ONE_DRAW,
    "low_memory": _ONE_DRAW,
    "top_h": "its warper is not in every supported transformers release; use `min_p`",
    "assistant_model": _NO_ASSISTANT,
    "assistant_tokenizer": _NO_ASSISTANT,
    "prompt_lookup_num_tokens": _NO_ASSISTANT,
    "max_matching_ngram_size": _NO_ASSISTANT,
    "assistant_early_exit": _NO_ASSISTANT,
    "assistant_ensemble_weight": _NO_ASSISTANT,
    "assistant_confidence_threshold": _NO_ASSISTANT,
    "assistant_lookbehind": _NO_ASSISTANT,
    "target_lookbehind": _NO_ASSISTANT,
    "num_assistant_tokens": _NO_ASSISTANT,
    "num_assistant_tokens_schedule": _NO_ASSISTANT,
    "speculation_type": _NO_ASSISTANT,
    "is_assistant": _NO_ASSISTANT,
    "use_mtp": _NO_ASSISTANT,
    "use_cache": _OWN_CACHE,
    "cache": _OWN_CACHE,
    "past_key_values": _OWN_CACHE,
    "cache_implementation": _OWN_CACHE,
    "cache_config": _OWN_CACHE,
    "max_cache_len": _OWN_CACHE,
    "prefill_chunk_size": _OWN_CACHE,
    "continuous_batching_config": "`generate_many` refills finished rows",
    "compile_config": "compiling belongs to the sampler: `sampler.compile()`",
    "disable_compile": "compiling belongs to the sampler: `sampler.compile()`",
    "custom_generate": "the sampler itself is what `custom_generate` takes",
    "synced_gpus": "every process decodes its own prompts",
    "inputs_embeds": "drafter and verifier share token ids, not embeddings",
    "token_type_ids": "decoders have none; leave it out of `tokenizer.model_input_names`",
    "position_ids": "positions are counted from the first real token of `attention_mask`",
    "encoder_repetition_penalty": _FOREIGN,
    "encoder_no_repeat_ngram_size": _FOREIGN,
    "decoder_start_token_id": _FOREIGN,
    "forced_bos_token_id": _EXCLUDED,
    "forced_eos_token_id": _EXCLUDED,
    "exponential_decay_length_penalty": "it depends on how long the row will be; use `max_new_tokens`",
    "guidance_scale": _OF_TRAINING,
    "negative_prompt_ids": _OF_TRAINING,
    "negative_prompt_attention_mask": _OF_TRAINING,
    "watermarking_config": _OF_TRAINING,
    "token_healing": "it changes the prompt; heal it before",
    "remove_invalid_values": "NaN logits are an error here, with the model and the step named",
    "output_attentions": "attention maps are not kept",
    "output_hidden_states": "hidden states are not kept",
    "steps": "the number of steps follows from what is accepted",
    "alg": "give a `strategy` instead",
}
# Values of refused arguments that ask for nothing, beside None, False, 0 and empty ones.
_NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "length_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "guidance_scale": 1.0,
}
# Transformers itself sets these in the configurations that it resolves: refused only as arguments.
_UNASKED = (
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "disable_compile",
    "early_stopping",
    "is_assistant",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "target_lookbehind",
    "use_cache",
)


@dataclass(frozen=True)
class Limits:
    """What the models allow.

    Attributes:
        vocab_size: ids below it exist in both models.
        mask_token_id: of the drafter.
        max_lengths: tokens a row may have, per model; `None` for no limit.
        device: of the drafter.
    """

    vocab_size: int
    mask_token_id: int
    max_lengths: dict[str, int | None]
    device: torch.device


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
    limits: Limits,
    *,
    config: APDConfig,
    strategy: Strategy,
    seed: int | Sequence[int] | None = None,
    logits_processor: Iterable[LogitsProcessor] | None = None,
    stopping_criteria: Iterable[StoppingCriteria] | None = None,
    prefix_allowed_tokens_fn: AllowedTokens | None = None,
    tokenizer: Any = None,
) -> Request:
    """Check what `generate` was given against the models, and lay it out row by row.

    Args:
        generation: the effective configuration, see `effective_config`.
        limits: what the models allow.
        config: the knobs.
        strategy: which tokens a step commits.
        prompt, attention_mask, seed, …: as in `APDSampler.generate`.
    Raises:
        ValueError, TypeError: see `APDSampler.generate`.
    """
    prompt = _checked_ids(prompt)
    stop_token_ids = _stop_token_ids(generation, limits)
    _check_pad_token(generation.pad_token_id, limits, tokenizer)
    padding = _left_padding(prompt, attention_mask, generation.pad_token_id, stop_token_ids)
    _check_tokens(prompt, padding, limits)
    max_new_tokens = _max_new_tokens(generation, prompt.shape[1])
    _check_length(prompt.shape[1] - int(padding.min()), max_new_tokens, limits)

    copies = int(generation.num_return_sequences or 1)
    prompt, padding = prompt.to(limits.device), padding.to(limits.device)
    if copies > 1:
        prompt, padding = prompt.repeat_interleave(copies, 0), padding.repeat_interleave(copies, 0)
    pad_token_id = generation.pad_token_id
    if pad_token_id is None:
        pad_token_id = stop_token_ids[0] if stop_token_ids else 0
    stops = torch.tensor(stop_token_ids, dtype=torch.int64, device=limits.device)
    warpers, processors, constraint = split_processors(logits_processor or ())
    if constraint is not None and prefix_allowed_tokens_fn is not None:
        raise ValueError(
            "`prefix_allowed_tokens_fn` must be given once, got another one in `logits_processor`. Join the two."
        )
    sampling = _sampling(generation, warpers, redraw=config.noise == "step")
    are_drawn = strategy.is_random or not sampling.greedy
    return Request(
        prompt=prompt,
        padding=padding,
        max_new_tokens=max_new_tokens,
        seeds=torch.tensor(_row_seeds(seed, len(prompt), are_drawn=are_drawn), device=limits.device),
        pad_token_id=pad_token_id,
        stopping=Stopping(stops, _criteria(generation, stopping_criteria or (), tokenizer)),
        processing=Processing(
            stop_token_ids=stops,
            processors=LogitsProcessorList([*_processors(generation, stops), *processors]),
            allowed_tokens=prefix_allowed_tokens_fn or constraint,
            min_new_tokens=max(generation.min_new_tokens or 0, (generation.min_length or 0) - prompt.shape[1]),
            suppressed_first=tuple(generation.begin_suppress_tokens or ()),
        ),
        sampling=sampling,
        strategy=strategy,
        policy=window_policy(config.window_size),
        kv_window=config.kv_window,
        kv_refresh=config.kv_refresh,
        record_scores=bool(generation.output_scores),
        record_logits=bool(generation.output_logits),
        is_recorded=bool(generation.return_dict_in_generate),
    )


def effective_config(
    given: GenerationConfig | None, defaults: Sequence[dict[str, Any]], kwargs: dict[str, Any]
) -> GenerationConfig:
    """The configuration that counts: single arguments, then the given configuration, then `defaults`, first ones first.

    As in transformers, an argument given as `None` overrides what stands behind it: `eos_token_id=None` stops nowhere.

    Raises:
        TypeError: an unknown argument; the nearest is named. Or a value of another type.
        ValueError: a value outside its range, or an argument that cannot be meant here; the reason is named.
    """
    if given is not None and not isinstance(given, GenerationConfig):
        raise TypeError(f"`generation_config` must be a GenerationConfig, got {type(given).__name__}.")
    if given is not None:
        of_transformers = vars(GenerationConfig())
        added = [name for name in vars(given) if name not in of_transformers and name[0] != "_"]
        refuse_unknown(added, of_transformers, "GenerationConfig")
    _refuse(kwargs, unless=())  # before transformers looks at them
    for source in (kwargs, vars(given) if given is not None else {}):
        if complaint := misfit(source, GENERATION):
            raise TypeError(complaint)
    for default in defaults:
        if complaint := misfit(default, GENERATION, " of the drafter's generation config or tokenizer"):
            raise TypeError(complaint)
    config = copy.deepcopy(given) if given is not None else GenerationConfig()
    # One update, since each validates everything.
    known = [{name: value for name, value in default.items() if value is not None} for default in defaults]
    if any(source.get(name) is not None for source in (kwargs, vars(config)) for name in _LENGTHS):
        # Two names of one limit: a stored `max_new_tokens` does not take precedence over the caller's `max_length`.
        known = [{name: value for name, value in default.items() if name not in _LENGTHS} for default in known]
    config.update(**dict(ChainMap(*known)), defaults_only=True)
    unused = config.update(**kwargs)
    refuse_unknown([name for name in unused if name not in REFUSED], [*SUPPORTED, *KNOBS], "generate()")
    _refuse(vars(config), unless=_UNASKED)
    _refuse_new(config)
    for name, (rule, holds, remedy) in _RULES.items():
        if (value := getattr(config, name)) is not None and not holds(value):
            raise ValueError(f"`{name}` must be {rule}, got {value}. {remedy}.")
    for name in _SAMPLING_ONLY:
        if kwargs.get(name) is not None and not config.do_sample:
            warn(f"`{name}` has no effect without `do_sample=True`.")
    return config


def _refuse(arguments: dict[str, Any], *, unless: tuple[str, ...]) -> None:
    for name, value in arguments.items():
        if name in REFUSED and name not in unless and _asks(value, _NEUTRAL.get(name)):
            raise ValueError(f"`{name}` is not supported, got {value!r}: {REFUSED[name]}.")


def _asks(value: Any, *neutral: Any) -> bool:
    if value is None or value is False:
        return False
    return isinstance(value, Tensor) or value not in ([], {}, 0, *neutral)


def _refuse_new(config: GenerationConfig) -> None:
    """Refuse a field that a later transformers has added, unless it has the value that it has by default there."""
    unset, resolved = vars(GenerationConfig()), _resolved_defaults()
    for name in unset.keys() - {*SUPPORTED, *REFUSED, "transformers_version"}:
        value = getattr(config, name)
        if name[0] != "_" and _asks(value, unset[name], resolved.get(name)):
            raise ValueError(
                f"`{name}` is not supported, got {value!r}: it is newer than this version of apd. Leave it out, or update "
                "apd."
            )


def _resolved_defaults() -> dict[str, Any]:
    """What transformers puts in the fields that are still `None` when it resolves a configuration."""
    return getattr(GenerationConfig, "_get_default_generation_params", dict)()


_BETWEEN = ("apd", "torch", "tqdm", "transformers")


def warn(message: str) -> None:
    """A warning that points at the caller's own line, whatever stands between."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def fresh_seed() -> int:
    """63 bits from torch's default generator."""
    return int(torch.randint(SEED_MASK, (), device="cpu"))


# Of the forward pass: transformers prepares them whether or not the caller gave them.
_ALWAYS_PREPARED = ("cache", "past_key_values", "position_ids", "use_cache")


def check_prepared(model: PreTrainedModel, prepared: dict[str, Any], own: Iterable[str]) -> None:
    """Look for what the caller meant among the arguments that transformers hands to a `custom_generate`.

    What is prepared for the model's passes is not needed here, and changes from release to release: it is passed over,
    whatever its name. `generate` itself refuses a misspelt argument that the model does not take.

    Args:
        model: the drafter's.
        prepared: what is left once the sampler has taken its own arguments.
        own: names of these.
    Raises:
        TypeError: nearly an argument of the sampler.
        ValueError: an argument of `forward` that cannot be meant here; the reason is named.
    """
    of_model = (model.forward, model.prepare_inputs_for_generation)
    expected = {name for method in of_model for name in inspect.signature(method).parameters}
    own = sorted(own)
    for name, value in prepared.items():
        if name in expected or value is None:
            continue
        if nearest := difflib.get_close_matches(name, own, n=1, cutoff=0.8):
            raise TypeError(f"custom_generate has no argument `{name}`. Did you mean `{nearest[0]}`?")
        warn(f"`{name}` has no effect with `custom_generate`.")
    _refuse(prepared, unless=_ALWAYS_PREPARED)


def unprepared(
    model: PreTrainedModel,
    prepared: GenerationConfig | None,
    processors: Iterable[LogitsProcessor] | None,
    criteria: Iterable[StoppingCriteria] | None,
    prompt_width: int,
) -> dict[str, Any]:
    """Arguments for `generate` that mean what transformers prepared for a `custom_generate`, nothing of it twice.

    Options that became objects are switched off: the objects count, since a caller's own replaces transformers'. Those
    that count columns of the padded batch become options again: rows are processed without padding here.
    """
    config = copy.deepcopy(prepared) if prepared is not None else GenerationConfig()
    # transformers takes over what the model's configuration holds, though it knows no such option.
    for name in vars(model.generation_config).keys() & vars(config).keys() - vars(GenerationConfig()).keys():
        delattr(config, name)
    for option, neutral in _BECAME_OBJECTS.items():
        if config.do_sample or option not in _SAMPLING_ONLY:
            setattr(config, option, neutral)
    kept: dict[str, list[Any]] = {"logits_processor": [], "stopping_criteria": []}
    for name, objects in (("logits_processor", processors), ("stopping_criteria", criteria)):
        for each in objects or ():
            if type(each) in _BECOME_OPTIONS:
                option = _BECOME_OPTIONS[type(each)]
                value = getattr(each, option)
                setattr(config, option, value.flatten().tolist() if isinstance(value, Tensor) else value)
            elif isinstance(getattr(each, "prompt_ignore_length", None), Tensor):  # one entry per row of the batch
                kept[name].append(RepetitionPenaltyLogitsProcessor(each.penalty))
            else:
                kept[name].append(each)
    if config.max_length is not None:
        config.max_new_tokens, config.max_length = config.max_length - prompt_width, None
    config.num_return_sequences = 1  # the rows are expanded already
    return {"generation_config": config, **kept}


# None of them is None, for which the model's own configuration would be looked up a second time.
_BECAME_OBJECTS = {
    **_DEFAULTS,
    "top_k": 0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "sequence_bias": {},
    "suppress_tokens": [],
    "max_time": math.inf,
    "stop_strings": [],
    "eos_token_id": [],
}
_BECOME_OPTIONS = {
    MinLengthLogitsProcessor: "min_length",
    MinNewTokensLengthLogitsProcessor: "min_new_tokens",
    SuppressTokensAtBeginLogitsProcessor: "begin_suppress_tokens",
    EosTokenCriteria: "eos_token_id",
    MaxLengthCriteria: "max_length",
}


def refuse_for(where: str, kwargs: dict[str, Any], *names: str) -> None:
    """Refuse arguments of `generate()` that cannot be meant in one of its sisters."""
    for name in names:
        if kwargs.get(name) is not None:
            raise ValueError(f"`{name}` cannot be meant in {where}, got {kwargs[name]!r}. Use generate().")


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
    elif not isinstance(attention_mask, Tensor):
        raise TypeError(f"`attention_mask` must be a tensor like `input_ids`, got {type(attention_mask).__name__}.")
    elif attention_mask.shape != prompt.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {list(prompt.shape)}, got "
            f"{list(attention_mask.shape)}."
        )
    else:
        real = attention_mask.to(prompt.device) != 0
    if real.all():
        return torch.zeros(len(prompt), dtype=torch.int64, device=prompt.device)
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
        warn(
            "`attention_mask` cannot be inferred, since the pad token is a stop token too; nothing is taken for "
            "padding. Pass `attention_mask`.",
        )
        return torch.ones_like(prompt, dtype=torch.bool)
    return prompt != pad_token_id


def _stop_token_ids(generation: GenerationConfig, limits: Limits) -> list[int]:
    ids = generation.eos_token_id
    stop_token_ids: list[int] = [] if ids is None else torch.as_tensor(ids, device="cpu").flatten().long().tolist()
    for stop in stop_token_ids:
        if not 0 <= stop < limits.vocab_size or stop == limits.mask_token_id:
            raise ValueError(
                f"`eos_token_id` must be an id that can be decoded, below {limits.vocab_size} and not the mask token, "
                f"got {stop}."
            )
    return stop_token_ids


def _check_pad_token(pad_token_id: int | None, limits: Limits, tokenizer: Any) -> None:
    """No model reads padding, so that an id will do that the tokenizer alone knows."""
    known = max(limits.vocab_size, len(tokenizer) if hasattr(tokenizer, "__len__") else 0)
    if pad_token_id is not None and not 0 <= pad_token_id < known:
        raise ValueError(
            f"`pad_token_id` must be an id that can be decoded, 0 to {known - 1}, got {pad_token_id}. Pass another one, "
            "such as the stop token's, or correct the generation_config.json that it comes from."
        )


def _check_tokens(prompt: Tensor, padding: Tensor, limits: Limits) -> None:
    real = torch.arange(prompt.shape[1], device=prompt.device) >= padding[:, None]
    if (real & (prompt == limits.mask_token_id)).any():
        raise ValueError(
            f"The prompt must not hold the mask token, got id {limits.mask_token_id}: masks are appended behind the prompt. "
            "Infilling is not supported."
        )
    foreign = real & ((prompt < 0) | (prompt >= limits.vocab_size))
    if foreign.any():
        raise ValueError(
            f"`input_ids` must be below {limits.vocab_size}, the vocabulary that the models share, got "
            f"{int(prompt[foreign][0])}. Was the prompt encoded with another tokenizer?"
        )


def warn_of_unknown_words(request: Request, tokenizer: Any) -> None:
    """Say so when a prompt has words that its tokenizer does not know: models answer anything to these."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None or unknown in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        return  # some tokenizers name a token that stands for other things too
    if (request.prompt == unknown).any():
        warn(
            "The prompt has words that the tokenizer does not know; they became its unknown token. The models cannot "
            "read them."
        )


def _check_length(prompt_tokens: int, max_new_tokens: int, limits: Limits) -> None:
    tokens = prompt_tokens + max_new_tokens
    for model, limit in limits.max_lengths.items():
        if limit is not None and tokens > limit:
            raise ValueError(
                f"Prompt and new tokens must fit the {model}'s {limit} positions, got {tokens} tokens. "
                f"Lower `max_new_tokens` ({max_new_tokens}) or shorten the prompt."
            )


def _max_new_tokens(generation: GenerationConfig, prompt_width: int) -> int:
    if generation.max_new_tokens is not None:
        if generation.max_length is not None:
            warn("`max_new_tokens` takes precedence over `max_length`.")
        return int(generation.max_new_tokens)
    if generation.max_length is None:
        warn(
            f"Neither `max_new_tokens` nor `max_length` is set: {DEFAULT_NEW_TOKENS} new tokens at most.",
        )
        return DEFAULT_NEW_TOKENS
    if generation.max_length <= prompt_width:
        raise ValueError(
            f"`max_length` must exceed the prompt's {prompt_width} columns, padding included, got "
            f"{generation.max_length}. Set `max_new_tokens` instead."
        )
    return generation.max_length - prompt_width


def whole_seed(seed: Any) -> int:
    """One seed for a run of any number of rows.

    Raises:
        TypeError: not an integer.
    """
    seed = seed.item() if hasattr(seed, "item") else seed
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral):
        raise TypeError(f"`seed` must be one integer for the run, got {seed!r}.")
    return int(seed)


def _row_seeds(seed: Any, rows: int, *, are_drawn: bool) -> list[int]:
    if seed is None:
        seed = fresh_seed() if are_drawn else 0  # greedy decoding leaves torch's generator alone
    entries = seed.tolist() if hasattr(seed, "tolist") else seed  # tensors and numpy's numbers
    entries = list(entries) if isinstance(entries, (list, tuple, range)) else entries
    whole = entries if isinstance(entries, list) else [entries]
    if not all(isinstance(entry, numbers.Integral) and not isinstance(entry, bool) for entry in whole):
        raise TypeError(f"`seed` must be an integer or a list with one integer per row, got {seed!r}.")
    if not isinstance(entries, list):
        return [mix_seed(int(entries), row) for row in range(rows)]
    if len(entries) != rows:
        raise ValueError(
            f"`seed` must have one entry per row, {rows} (prompts times num_return_sequences), got {len(entries)}."
        )
    return [int(entry) & SEED_MASK for entry in entries]


def _processors(generation: GenerationConfig, stops: Tensor) -> list[LogitsProcessor]:
    """Transformers' own processors, in transformers' own order."""
    processors: list[LogitsProcessor] = []
    if generation.sequence_bias:
        processors.append(SequenceBiasLogitsProcessor(generation.sequence_bias))
    if generation.repetition_penalty not in (None, 1.0):
        processors.append(RepetitionPenaltyLogitsProcessor(float(generation.repetition_penalty)))
    if generation.no_repeat_ngram_size:
        processors.append(NoRepeatNGramLogitsProcessor(generation.no_repeat_ngram_size))
    if generation.bad_words_ids:
        processors.append(
            NoBadWordsLogitsProcessor(generation.bad_words_ids, eos_token_id=stops if len(stops) else None)
        )
    if generation.suppress_tokens:
        processors.append(SuppressTokensLogitsProcessor(generation.suppress_tokens, device=stops.device))
    return processors


def _criteria(generation: GenerationConfig, given: Iterable[StoppingCriteria], tokenizer: Any) -> StoppingCriteriaList:
    criteria = StoppingCriteriaList()
    if generation.max_time not in (None, math.inf):
        criteria.append(MaxTimeCriteria(max_time=generation.max_time))
    if generation.stop_strings:
        if tokenizer is None:
            raise ValueError(
                f"`tokenizer` must be given with `stop_strings`, got None with {generation.stop_strings!r}: they are "
                "found in the text. Pass `tokenizer=`, or give the sampler one."
            )
        criteria.append(StopStrings(generation.stop_strings, tokenizer))
    criteria.extend(given)
    return criteria


def _sampling(generation: GenerationConfig, given: LogitsProcessorList, redraw: bool) -> Sampling:
    """Transformers' own warpers in transformers' own order, the caller's behind them."""
    values = {name: getattr(generation, name) for name in _SAMPLING_ONLY}
    setting = {name: _DEFAULTS[name] if value is None else value for name, value in values.items()}
    warpers = LogitsProcessorList()
    if not generation.do_sample or setting["temperature"] < _COLDEST:
        return Sampling(given, greedy=True)
    if setting["temperature"] != 1:
        warpers.append(TemperatureLogitsWarper(float(setting["temperature"])))
    if setting["top_k"] > 0:
        warpers.append(TopKLogitsWarper(int(setting["top_k"])))
    if setting["top_p"] < 1:
        warpers.append(TopPLogitsWarper(float(setting["top_p"])))
    if setting["min_p"] > 0:
        warpers.append(MinPLogitsWarper(float(setting["min_p"])))
    if setting["typical_p"] < 1:
        warpers.append(TypicalLogitsWarper(float(setting["typical_p"])))
    if setting["epsilon_cutoff"] > 0:
        warpers.append(EpsilonLogitsWarper(float(setting["epsilon_cutoff"])))
    if setting["eta_cutoff"] > 0:
        warpers.append(EtaLogitsWarper(float(setting["eta_cutoff"])))
    warpers.extend(given)
    return Sampling(warpers, greedy=False, redraw=redraw)
