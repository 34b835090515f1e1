"""The arguments of `generate()`: checked once and resolved into a `Request`."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import ChainMap
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
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
from apd.decoding.protocols import Drafter, LimitingDrafter, Verifier
from apd.decoding.request import Request
from apd.decoding.sampling import Sampling
from apd.decoding.strategy import Strategy
from apd.decoding.window import AutoWindow, LimitedWindow, WindowPolicy, window_policy
from apd.generation.elsewhere import refuse_unknown
from apd.generation.prompts import check_tokens, checked_ids, left_padding, warn_of_unknown_prompts
from apd.generation.stop_strings import StopStrings
from apd.generation.support import REFUSED, SUPPORTED, refuse, refuse_in_config, warn
from apd.kinds import FLAG, GENERATION, WHOLE, misfit

DEFAULT_NEW_TOKENS = 20  # transformers' own default
_DEFAULT_TOP_K = 50  # transformers' own default with `do_sample`
_COLDEST = 1e-5  # below it, scores / temperature overflow, and sampling always draws the best token

#: Warpers in transformers' order: the argument, the value that leaves the warper out, and its class.
WARPERS: tuple[tuple[str, float, Callable[[Any], LogitsProcessor]], ...] = (
    ("temperature", 1.0, TemperatureLogitsWarper),
    ("top_k", 0, TopKLogitsWarper),
    ("top_p", 1.0, TopPLogitsWarper),
    ("min_p", 0.0, MinPLogitsWarper),
    ("typical_p", 1.0, TypicalLogitsWarper),
    ("epsilon_cutoff", 0.0, EpsilonLogitsWarper),
    ("eta_cutoff", 0.0, EtaLogitsWarper),
)
_RULES: dict[str, tuple[str, Callable[[float], bool], str]] = {
    "max_new_tokens": ("at least 1", lambda value: value >= 1, "Leave it out for the default; 0 fills holes only"),
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

_LENGTHS = ("max_new_tokens", "max_length")


class Models(Protocol):
    """The models and the tokenizer that arguments are checked against; `APDSampler` implements it.

    Attributes:
        drafter, verifier: the models.
        proposer: what guesses text where the two have different vocabularies; else `None`.
        tokenizer: finds stop strings; its stop and pad ids count where the drafter's generation config has none.
        vocab_size: ids below it exist in both models.
    """

    drafter: Drafter
    verifier: Verifier | None
    proposer: Any
    tokenizer: Any
    vocab_size: int


class Resolver:
    """Checks all arguments of a call except the prompt; called with a prompt, it returns the `Request`.

    Args:
        models: the drafter, the verifier and their tokenizer.
        strategy: which tokens a step commits.
        config: the knobs.
        generation_config, …, **kwargs: as in `APDSampler.generate`.

    Attributes:
        generation: the effective generation configuration.
        max_lengths: by model, most tokens of a row; `None` for no limit.

    Raises:
        ValueError, TypeError: see `APDSampler.generate`.
    """

    def __init__(
        self,
        models: Models,
        strategy: Strategy,
        config: APDConfig,
        /,
        *,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[LogitsProcessor] | None = None,
        stopping_criteria: Iterable[StoppingCriteria] | None = None,
        prefix_allowed_tokens_fn: AllowedTokens | None = None,
        tokenizer: Any = None,
        allow_stop_in_holes: bool = False,
        **kwargs: Any,
    ) -> None:
        if not FLAG.fits(allow_stop_in_holes):
            raise TypeError(f"`allow_stop_in_holes` must be True or False, got {allow_stop_in_holes!r}.")
        self.models, self.strategy, self.config = models, strategy, config
        #: No masks are appended: `max_new_tokens=0`. transformers takes no 0.
        self.fills_only = kwargs.get("max_new_tokens") == 0 and not isinstance(kwargs.get("max_new_tokens"), bool)
        if self.fills_only:
            kwargs = {name: value for name, value in kwargs.items() if name != "max_new_tokens"}
        self.has_length = any(kwargs.get(name) is not None for name in _LENGTHS)
        self.tokenizer = models.tokenizer if tokenizer is None else tokenizer
        self.generation = generation = effective_config(generation_config, _defaults(models), kwargs)
        if strategy.needs_verifier and models.proposer is not None:
            raise ValueError(
                f"`strategy` must be `Checked`, or run the drafter alone, where drafter and verifier have different "
                f"vocabularies, got {strategy!r}: APD's mixture, and every strategy that reads the verifier's probabilities, "
                "needs a shared one. Leave `strategy` out, or choose a verifier with the drafter's tokenizer."
            )
        if strategy.needs_verifier and models.verifier is None:
            raise ValueError(
                f"`verifier` must be given with {strategy!r}, got None. Name a causal LM with the drafter's tokenizer; "
                "mixture_weight=1 needs none."
            )
        self.max_lengths = {"drafter": models.drafter.max_length}
        if strategy.needs_verifier and models.verifier is not None:
            self.max_lengths["verifier"] = models.verifier.max_length
        self.stop_token_ids = _stop_token_ids(generation, models)
        _check_pad_token(generation.pad_token_id, models, self.tokenizer)
        stops = torch.tensor(self.stop_token_ids, dtype=torch.int64, device=models.drafter.device)
        warpers, processors, constraint = split_processors(logits_processor or ())
        if constraint is not None and prefix_allowed_tokens_fn is not None:
            raise ValueError(
                "`prefix_allowed_tokens_fn` must be given once, got another one in `logits_processor`. Join the two."
            )
        self.sampling = _sampling(generation, warpers, redraw=config.noise == "step")
        self.stopping = Stopping(stops, _criteria(generation, stopping_criteria or (), self.tokenizer))
        self.processing = Processing(
            stop_token_ids=stops,
            processors=LogitsProcessorList([*_processors(generation, stops), *processors]),
            allowed_tokens=prefix_allowed_tokens_fn or constraint,
            min_new_tokens=generation.min_new_tokens or 0,
            suppressed_first=tuple(generation.begin_suppress_tokens or ()),
            stops_in_holes=allow_stop_in_holes,
        )
        check_order(strategy, config)
        check_attention(strategy, config, models.drafter)
        self.policy = window_policy(config.window_size)
        if isinstance(models.drafter, LimitingDrafter):
            self.policy = LimitedWindow(self.policy, models.drafter.window_ends)
        if not strategy.left_to_right and self.processing.needs_history:
            raise ValueError(
                f"`logits_processor` must not look at earlier tokens with {strategy!r}, which commits in any order. "
                "Decode from left to right (APD, LeftToRight), or mark a processor that ignores ids `history_free`."
            )

    def __call__(
        self, prompt: Any, attention_mask: Tensor | None = None, seed: int | Sequence[int] | None = None
    ) -> Request:
        """The request for a prompt or a batch of prompts, on the drafter's device.

        Args:
            prompt, attention_mask, seed: as in `APDSampler.generate`.

        Raises:
            ValueError, TypeError: see `APDSampler.generate`.
        """
        generation, device = self.generation, self.models.drafter.device
        prompt = checked_ids(prompt)
        width = prompt.shape[1]
        padding = left_padding(prompt, attention_mask, generation.pad_token_id, self.stop_token_ids)
        check_tokens(
            prompt, padding, vocab_size=self.models.vocab_size, mask_token_id=self.models.drafter.mask_token_id
        )
        holes = prompt == self.models.drafter.mask_token_id
        has_holes = bool(holes.any())
        if has_holes:
            holes &= torch.arange(width, device=prompt.device) >= padding[:, None]  # the mask may be the pad token
            has_holes = bool(holes.any())
        if has_holes:
            check_holes(holes, padding, self.strategy, self.models.drafter)
        fills_only = self.fills_only or (has_holes and not self.has_length)
        if fills_only and not has_holes:
            warn("`max_new_tokens` is 0 and no prompt has a mask token: there is nothing to decode.")
        max_new_tokens = 0 if fills_only else _max_new_tokens(generation, width)
        _check_length(width - int(padding.min()), max_new_tokens, self.max_lengths)
        copies = int(generation.num_return_sequences or 1)
        prompt, padding = (each.to(device) for each in (prompt, padding))
        if copies > 1:
            prompt, padding = (each.repeat_interleave(copies, 0) for each in (prompt, padding))
        are_drawn = self.strategy.is_random or not self.sampling.greedy
        seeds = torch.tensor(_row_seeds(seed, len(prompt), are_drawn=are_drawn), device=device)
        warn_of_unknown_prompts(prompt, self.models.tokenizer)
        at_least = max(self.processing.min_new_tokens, (generation.min_length or 0) - width)
        pad_token_id = generation.pad_token_id
        if pad_token_id is None:
            pad_token_id = self.stop_token_ids[0] if self.stop_token_ids else 0
        return Request(
            prompt=prompt,
            padding=padding,
            max_new_tokens=max_new_tokens,
            seeds=seeds,
            pad_token_id=pad_token_id,
            stopping=dataclasses.replace(self.stopping, has_holes=has_holes),
            processing=dataclasses.replace(self.processing, min_new_tokens=at_least, has_holes=has_holes),
            sampling=self.sampling,
            strategy=self.strategy,
            policy=self.policy,
            kv_window=self.config.kv_window,
            kv_refresh=self.config.kv_refresh,
            record_scores=bool(generation.output_scores),
            record_logits=bool(generation.output_logits),
            is_recorded=bool(generation.return_dict_in_generate),
        )


def check_order(strategy: Strategy, config: APDConfig) -> None:
    """Refuse knobs that need left-to-right order if the strategy commits in another order.

    Raises:
        ValueError: `window_size` is "auto" or `kv_window` is set.
    """
    policy = window_policy(config.window_size)
    if not getattr(strategy, "adapts_window", True) and type(policy).update is not WindowPolicy.update:
        raise ValueError(
            f"`window_size` must be a number or None with {strategy!r}, got {config.window_size!r}: a window that follows the "
            "last step is not known for the steps that are guessed."
        )
    if strategy.left_to_right:
        return
    if isinstance(policy, AutoWindow):
        raise ValueError(
            f"`window_size` must be a number or None with {strategy!r}, got {config.window_size!r}: the window follows how "
            "far a step gets from the left, and would decide here what may be committed."
        )
    if config.kv_window is not None:
        raise ValueError(
            f"`kv_window` must be None with {strategy!r}, got {config.kv_window}: frozen keys presume that tokens are "
            "committed from left to right."
        )


def check_attention(strategy: Strategy, config: APDConfig, drafter: Any) -> None:
    """Refuse knobs and strategies that mean nothing for the drafter's attention.

    Args:
        drafter: the drafter, or its family; exact drafters, which have no attention, take everything.

    Raises:
        ValueError: `kv_window` with keys that are final or not kept, decided tokens predicted by a drafter that cannot, or an order that the drafter cannot decode in.
    """
    attention = getattr(drafter, "attention", "full")
    kind = getattr(attention, "kind", attention)
    if not getattr(drafter, "keeps_keys", True):
        if config.kv_window is not None:
            raise ValueError(
                f"`kv_window` must be None with a masked LM, got {config.kv_window}: its class keeps no keys and values from one "
                "pass to the next. Leave out `kv_window` and `kv_refresh`."
            )
        if getattr(strategy, "reads_decided", False):
            raise ValueError(
                f"`strategy` must not predict decided tokens with a masked LM, got {strategy!r}: its class takes no mask per "
                "column. Use a strategy that revokes nothing."
            )
    if kind == "full":
        return
    if config.kv_window is not None:
        raise ValueError(
            f"`kv_window` must be None with a drafter of attention={kind!r}, got {config.kv_window}: keys of committed tokens "
            "are final there, so its cache is exact, always on, and needs no setting. Leave out `kv_window` and `kv_refresh`."
        )
    if getattr(strategy, "reads_decided", False):
        raise ValueError(
            f"`strategy` must not predict decided tokens with a drafter of attention={kind!r}, got {strategy!r}: that needs a "
            "drafter whose columns all see each other. Use a strategy that revokes nothing."
        )
    if kind == "causal" and drafter.logit_shift and not strategy.left_to_right:
        raise ValueError(
            f"`strategy` must decode from left to right with a causal drafter whose logits are shifted, got {strategy!r}: its row "
            "before a mask sees nothing behind it. Use APD, `LeftToRight` or `Checked`."
        )


def check_holes(holes: Tensor, padding: Tensor, strategy: Strategy, drafter: Any) -> None:
    """Refuse holes whose right side the drafter would not see.

    Args:
        holes: `b l` bool, the mask tokens of the prompts.
        padding: `b` int64.

    Raises:
        ValueError: the strategy runs no drafter or revokes tokens, or the drafter's attention does not reach the right side.
    """
    width = holes.shape[1]
    columns = torch.arange(width, device=holes.device)
    given = ~holes & (columns >= padding[:, None])
    last_given, first_hole = (columns * given).amax(1), torch.where(holes, columns, width).amin(1)
    reads_before = strategy.needs_verifier or bool(getattr(drafter, "logit_shift", 0))
    if reads_before and (first_hole == padding).any():
        raise ValueError(
            "The first token of a prompt must not be the mask token where a model predicts each token from the one before it, got "
            f"one in row {int((first_hole == padding).long().argmax())}. Start with a BOS or a word."
        )
    if not (first_hole < last_given).any():
        return  # all masks stand at the end, as appended ones do
    if not strategy.needs_drafter:
        raise ValueError(
            f"A hole needs a strategy that runs the drafter, got {strategy!r}: a causal model sees nothing of what is behind the "
            "hole. Use APD, a threshold or `Checked`."
        )
    if getattr(strategy, "reads_decided", False):
        raise ValueError(
            f"A hole needs a strategy that revokes nothing, got {strategy!r}. Use APD, a threshold or `Checked`."
        )
    attention = getattr(drafter, "attention", None)
    kind = getattr(attention, "kind", "full")
    hides = kind == "prefix" or (kind == "causal" and drafter.logit_shift == 1)
    if attention is not None and kind == "block":
        same = (last_given - padding) // attention.block_size == (first_hole - padding) // attention.block_size
        hides = not bool((same | (first_hole > last_given)).all())
    if hides:
        raise ValueError(
            f"A hole needs a drafter that sees what is behind it, but with attention={kind!r} a given token behind the hole "
            "is invisible there. Put hole and right side into one block, or use a drafter with attention='full'."
        )


def check_row_by_row(generation: GenerationConfig, num_return_sequences: int = 1) -> None:
    """Refuse fields that concern a whole batch, for prompts that are decoded one by one.

    Args:
        num_return_sequences: answers per prompt, which are rows of their own.

    Raises:
        ValueError: a field is set.
    """
    if num_return_sequences > 1 and not generation.do_sample:
        raise ValueError(
            f"`num_return_sequences` must be 1 without `do_sample=True`, got {num_return_sequences}: greedy answers would all be "
            "equal."
        )
    for name, neutral in (("num_return_sequences", 1), ("min_length", 0), ("max_time", None)):
        if (value := getattr(generation, name)) not in (None, neutral):
            raise ValueError(
                f"`{name}` cannot be meant in generate_many(), where prompts come and go, got {value!r}. Use "
                "`min_new_tokens`, a prompt several times, or generate()."
            )


def _defaults(models: Models) -> list[dict[str, Any]]:
    """Defaults for open fields: from the drafter's generation config, then from the tokenizer."""
    stored = getattr(models.drafter, "generation_config", None)
    of_model = {name: value for name, value in vars(stored).items() if name[0] != "_"} if stored else {}
    return [of_model, {name: getattr(models.tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")}]


def effective_config(
    given: GenerationConfig | None, defaults: Sequence[dict[str, Any]], kwargs: dict[str, Any]
) -> GenerationConfig:
    """The effective configuration: single arguments override `given`, which overrides `defaults` (the first ones first).

    As in transformers, an argument given as `None` overrides the rest too: `eos_token_id=None` stops nowhere.

    Raises:
        TypeError: an argument is unknown (the message names the nearest) or of the wrong type.
        ValueError: a value is out of its range, or an argument is not supported; the message has the reason.
    """
    if not isinstance(given, GenerationConfig | None):
        raise TypeError(f"`generation_config` must be a GenerationConfig, got {type(given).__name__}.")
    unset = GenerationConfig()
    config = copy.deepcopy(given) if given is not None else unset
    added = [name for name in vars(config) if name not in vars(unset) and name[0] != "_"]
    refuse_unknown(added, vars(unset), "GenerationConfig")
    refuse(kwargs)  # before transformers looks at them
    where_stored = " of the drafter's generation config or tokenizer"
    for source, where in ((kwargs, ""), (vars(config), ""), *((default, where_stored) for default in defaults)):
        if complaint := misfit(source, GENERATION, where):
            raise TypeError(complaint)
    # One update, since each validates everything.
    known = [{name: value for name, value in default.items() if value is not None} for default in defaults]
    if any(source.get(name) is not None for source in (kwargs, vars(config)) for name in _LENGTHS):
        # Two names of one limit: a stored `max_new_tokens` does not take precedence over the caller's `max_length`.
        known = [{name: value for name, value in default.items() if name not in _LENGTHS} for default in known]
    config.update(**dict(ChainMap(*known)), defaults_only=True)
    idle = {} if kwargs.get("do_sample", config.do_sample) else {name: kwargs.get(name) for name, _, _ in WARPERS}
    idle = {name: value for name, value in idle.items() if value is not None}
    unused = config.update(**{name: value for name, value in kwargs.items() if name not in idle})
    for name, value in idle.items():
        setattr(config, name, value)  # behind transformers' back, which would warn too, and not say whose line it is
        warn(f"`{name}` has no effect without `do_sample=True`.")
    rest = {name: value for name, value in unused.items() if name not in REFUSED}
    refuse_unknown(rest, [*SUPPORTED, *KNOBS], "generate()")
    refuse_in_config(config)
    for name, (rule, holds, remedy) in _RULES.items():
        if (value := getattr(config, name)) is not None and not holds(value):
            raise ValueError(f"`{name}` must be {rule}, got {value}. {remedy}.")
    return config


def _stop_token_ids(generation: GenerationConfig, models: Models) -> list[int]:
    ids = generation.eos_token_id
    stop_token_ids: list[int] = [] if ids is None else torch.as_tensor(ids, device="cpu").flatten().long().tolist()
    for stop in stop_token_ids:
        if not 0 <= stop < models.vocab_size or stop == models.drafter.mask_token_id:
            raise ValueError(
                f"`eos_token_id` must be an id that can be decoded, below {models.vocab_size} and not the mask token, "
                f"got {stop}."
            )
    return stop_token_ids


def _check_pad_token(pad_token_id: int | None, models: Models, tokenizer: Any) -> None:
    """Refuse an id that neither the models nor the tokenizer have: no model reads padding."""
    known = max(models.vocab_size, tokenizer.__len__() if hasattr(tokenizer, "__len__") else 0)
    if pad_token_id is not None and not 0 <= pad_token_id < known:
        raise ValueError(
            f"`pad_token_id` must be an id that can be decoded, 0 to {known - 1}, got {pad_token_id}. Pass another one, "
            "such as the stop token's, or correct the generation_config.json that it comes from."
        )


def _check_length(prompt_tokens: int, max_new_tokens: int, max_lengths: dict[str, int | None]) -> None:
    tokens = prompt_tokens + max_new_tokens
    for model, limit in max_lengths.items():
        if limit is not None and tokens > limit:
            shorter = f"Lower `max_new_tokens` ({max_new_tokens}) or shorten the prompt."
            raise ValueError(
                f"Prompt and new tokens must fit the {model}'s {limit} positions, got {tokens} tokens. "
                + (shorter if max_new_tokens else "Shorten the text or its holes.")
            )


def _max_new_tokens(generation: GenerationConfig, prompt_width: int) -> int:
    if generation.max_new_tokens is not None:
        if generation.max_length is not None:
            warn("`max_new_tokens` takes precedence over `max_length`.")
        return int(generation.max_new_tokens)
    if generation.max_length is None:
        warn(f"Neither `max_new_tokens` nor `max_length` is set: {DEFAULT_NEW_TOKENS} new tokens at most.")
        return DEFAULT_NEW_TOKENS
    if generation.max_length <= prompt_width:
        raise ValueError(
            f"`max_length` must exceed the prompt's {prompt_width} columns, padding included, got "
            f"{generation.max_length}. Set `max_new_tokens` instead."
        )
    return generation.max_length - prompt_width


def fresh_seed() -> int:
    """A 63-bit seed from torch's default generator."""
    return int(torch.randint(SEED_MASK, (), device="cpu"))


def whole_seed(seed: Any) -> int:
    """The seed of a run as an `int`.

    Raises:
        TypeError: not an integer.
    """
    seed = seed.item() if hasattr(seed, "item") else seed
    if not WHOLE.fits(seed):
        raise TypeError(f"`seed` must be one integer for the run, got {seed!r}.")
    return int(seed)


def _row_seeds(seed: Any, rows: int, *, are_drawn: bool) -> list[int]:
    if seed is None:
        seed = fresh_seed() if are_drawn else 0  # greedy decoding leaves torch's generator alone
    entries = seed.tolist() if hasattr(seed, "tolist") else seed  # tensors and numpy's numbers
    entries = list(entries) if isinstance(entries, (list, tuple, range)) else entries
    whole = entries if isinstance(entries, list) else [entries]
    if not all(map(WHOLE.fits, whole)):
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
    """Transformers' own warpers in transformers' own order, then the caller's."""
    if not generation.do_sample:
        return Sampling(given, greedy=True)
    warpers = LogitsProcessorList()
    for name, neutral, warper in WARPERS:
        value = getattr(generation, name)
        if value is None:
            value = _DEFAULT_TOP_K if name == "top_k" else neutral
        if name == "temperature" and value < _COLDEST:
            return Sampling(given, greedy=True)
        if value != neutral:
            warpers.append(warper(type(neutral)(value)))
    warpers.extend(given)
    return Sampling(warpers, greedy=False, redraw=redraw)
