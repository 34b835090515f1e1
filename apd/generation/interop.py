"""`model.generate(..., custom_generate=sampler)`: turns prepared inputs back into arguments of `APDSampler.generate`."""

from __future__ import annotations

import copy
import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessor,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    SuppressTokensAtBeginLogitsProcessor,
)

from apd.config import KNOBS
from apd.generation.arguments import WARPERS
from apd.generation.support import refuse, warn

F = TypeVar("F", bound=Callable[..., Any])

# Arguments of the model's passes: transformers prepares them whether or not the caller gave them.
_ALWAYS_PREPARED = ("cache", "past_key_values", "position_ids", "use_cache")

# Options that became objects, each with a value that switches it off. Not None: that would fall back to the model's own
# configuration a second time.
_BECAME_OBJECTS = {
    **{name: neutral for name, neutral, _ in WARPERS},
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": [],
    "sequence_bias": {},
    "suppress_tokens": [],
    "max_time": math.inf,
    "stop_strings": [],
    "eos_token_id": [],
}
# Objects that count columns of the padded batch, or whose value the decode loop needs.
_BECOME_OPTIONS = {
    MinLengthLogitsProcessor: "min_length",
    MinNewTokensLengthLogitsProcessor: "min_new_tokens",
    SuppressTokensAtBeginLogitsProcessor: "begin_suppress_tokens",
    EosTokenCriteria: "eos_token_id",
    MaxLengthCriteria: "max_length",
}


def naming_knobs(function: F) -> F:
    """Name every knob in the signature of a function that takes them as `**kwargs`.

    transformers hands a `custom_generate` only the keyword arguments that its signature names.
    """
    signature = inspect.signature(function)
    *own, rest = signature.parameters.values()
    knobs = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in KNOBS]
    function.__signature__ = signature.replace(parameters=[*own, *knobs, rest])  # type: ignore[attr-defined]
    return function


def unprepared(
    model: PreTrainedModel,
    input_ids: Tensor,
    processors: Iterable[LogitsProcessor] | None,
    criteria: Iterable[StoppingCriteria] | None,
    config: GenerationConfig | None,
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Arguments for `generate` equivalent to transformers' prepared inputs, each option given once.

    Options that became objects are switched off: the objects count, since a caller's own replaces transformers'. Objects
    that count columns of the padded batch become options again: rows are processed without padding here.

    Args:
        model: the drafter's.
        input_ids: `b l` int64, the prompts, expanded to `num_return_sequences`.
        processors, criteria, config: as transformers hands them over.
        arguments: all further arguments; those prepared for the model's passes are dropped.

    Raises:
        TypeError: an argument is nearly one of the sampler's.
        ValueError: an argument is not supported; the message has the reason.
    """
    given = {name: arguments.pop(name) for name in KNOBS if name in arguments}
    attention_mask = arguments.pop("attention_mask", None)
    _check_rest(model, arguments)
    config = copy.deepcopy(config) if config is not None else GenerationConfig()
    # transformers copies unknown fields of the model's configuration.
    for name in vars(model.generation_config).keys() & vars(config).keys() - vars(GenerationConfig()).keys():
        delattr(config, name)
    of_sampling = [name for name, _, _ in WARPERS]
    for option, neutral in _BECAME_OBJECTS.items():
        if config.do_sample or option not in of_sampling:
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
        config.max_new_tokens, config.max_length = config.max_length - input_ids.shape[1], None
    config.num_return_sequences = 1  # the rows are expanded already
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    return {"inputs": input_ids, "attention_mask": mask, "generation_config": config, **kept, **given}


def _check_rest(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """Refuse misspelt and unsupported arguments among the prepared ones."""
    of_model = (model.forward, model.prepare_inputs_for_generation)
    expected = {name for method in of_model for name in inspect.signature(method).parameters}
    for name, value in arguments.items():
        if name in expected or value is None:
            continue
        if nearest := difflib.get_close_matches(name, [*KNOBS, "seed", "strategy"], n=1, cutoff=0.8):
            raise TypeError(f"custom_generate has no argument `{name}`. Did you mean `{nearest[0]}`?")
        warn(f"`{name}` has no effect with `custom_generate`.")
    refuse(arguments, unless=_ALWAYS_PREPARED)
