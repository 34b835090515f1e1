"""`APDSampler`: a drop-in for `generate()` that decodes adaptively in parallel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from apd.config import KNOBS, APDConfig, check_count
from apd.decoding.acceptance import Coupling, Rejection
from apd.decoding.loop import DecodeLoop
from apd.decoding.noise import mix_seed
from apd.decoding.processing import AllowedTokens
from apd.decoding.protocols import Drafter, Verifier
from apd.decoding.request import Request
from apd.decoding.step import APD, PLAIN
from apd.decoding.strategy import Strategy, check_strategy
from apd.generation.arguments import (
    Limits,
    check_prepared,
    effective_config,
    fresh_seed,
    one_prompt,
    refuse_for,
    refuse_unknown,
    resolve,
    unprepared,
    warn_of_unknown_words,
    whole_seed,
)
from apd.generation.many import Generated, Prompt, Queue, answers, check_prompts, encode, in_order
from apd.generation.output import APDOutput, Recorder, Sequences
from apd.generation.streaming import Chunk, chunks, feed
from apd.models.loading import (
    HUB_ARGUMENTS,
    PLACING_ARGUMENTS,
    SPLITTING_ARGUMENTS,
    ModelSpec,
    as_drafter,
    as_verifier,
    check_vocabularies,
    drafter_config,
    load_drafter,
    load_tokenizer,
    load_verifier,
    verifier_config,
)


class APDSampler:
    """Decodes a diffusion LM left to right, many tokens per step where a small verifier agrees.

    The sampler holds models and defaults and nothing of a running call, so calls may run beside each other. Once compiled
    it keeps the memory of finished calls for the next.

    Args:
        drafter: a `Drafter`, or a transformers model together with `spec`.
        verifier: a `Verifier`, or a transformers causal LM; `None` only where it is never asked (R = 1).
        tokenizer: kept as `.tokenizer` for the caller; compared with the verifier's, and asked for stop and pad ids
            that the drafter's generation config does not name.
        config: the knobs; `APDConfig()` when not given.
        spec: family of a drafter given as a transformers model: `"dream"`, `"llada"`, … or a `ModelSpec`.
        mask_token_id: of a drafter given as a transformers model; by default its config's, else the tokenizer's.
        verifier_tokenizer: compared with `tokenizer`, token by token, when both are given.
        strategy: decode with this instead of APD unless a call says otherwise.
        **knobs: single knobs that override `config`.

    Raises:
        ValueError: models or vocabularies do not fit each other, or a knob is out of range.
        TypeError: an unknown argument.

    Example:
        >>> sampler = APDSampler.from_embedded()
        >>> inputs = sampler.tokenizer(apd.EXAMPLE_PROMPTS[:4], return_tensors="pt", padding=True)
        >>> output = sampler.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True)
        >>> output.tokens_per_forward.shape
        torch.Size([4])
    """

    def __init__(
        self,
        drafter: Drafter | PreTrainedModel,
        verifier: Verifier | PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: APDConfig | None = None,
        *,
        spec: ModelSpec | str | None = None,
        mask_token_id: int | None = None,
        verifier_tokenizer: PreTrainedTokenizerBase | None = None,
        strategy: Strategy | None = None,
        **knobs: Any,
    ) -> None:
        refuse_unknown(knobs, KNOBS, "APDSampler()")
        if strategy is not None:
            check_strategy(strategy)
        self.config = (config or APDConfig()).replace(**knobs)
        self.drafter: Drafter = as_drafter(drafter, spec, mask_token_id, tokenizer)
        self.verifier: Verifier | None = None if verifier is None else as_verifier(verifier)
        self.tokenizer: Any = tokenizer
        self.strategy = strategy
        self.kernels = PLAIN
        self.vocab_size = self.drafter.vocab_size
        if self.verifier is not None:
            self.vocab_size = check_vocabularies(
                self.drafter.vocab_size,
                self.verifier.vocab_size,
                tokenizer,
                verifier_tokenizer,
                mask_token_id=self.drafter.mask_token_id,
            )

    @classmethod
    def from_pretrained(
        cls,
        drafter: str,
        verifier: str | None = None,
        *,
        config: APDConfig | None = None,
        spec: ModelSpec | str | None = None,
        mask_token_id: int | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        verifier_revision: str | None = None,
        **knobs_or_loading: Any,
    ) -> APDSampler:
        """Load drafter, verifier and tokenizers from directories or hub ids; never remote code, never pickles.

        Args:
            drafter: a diffusion LM of a supported family (`apd.FAMILIES`).
            verifier: a causal LM with the same tokenizer.
            config: the knobs.
            spec: overrides the family that `config.json` names.
            mask_token_id: overrides the mask id of config and tokenizer.
            dtype: of both models; `None`: float32 on a CPU, else as stored.
            device_map: as in transformers, for both models.
            attn_implementation: `"sdpa"`, `"eager"` or `"grouped_sdpa"`, the default where heads share keys.
            revision: of the drafter.
            verifier_revision: of the verifier.
            **knobs_or_loading: single knobs that override `config`; and as in transformers `token`, `cache_dir`,
                `local_files_only`, `force_download`, for both models `max_memory`, `offload_folder`, `offload_buffers`,
                for the drafter alone `tp_plan` or `distributed_config` (under torchrun; give every process the same `seed`) and
                `quantization_config`.

        Raises:
            ValueError: models do not fit each other, a file is damaged, or what `load_drafter` and `load_verifier` refuse.
            OSError: no weights in safetensors.
            TypeError: an unknown argument.
        """
        own = ("config", "spec", "mask_token_id", "dtype", "device_map", "attn_implementation", "verifier_revision")
        known = [*KNOBS, *HUB_ARGUMENTS, *PLACING_ARGUMENTS, *SPLITTING_ARGUMENTS, *own]
        refuse_unknown(knobs_or_loading, known, "from_pretrained()")
        hub, placing, splitting = (
            {name: knobs_or_loading.pop(name) for name in names if name in knobs_or_loading}
            for names in (HUB_ARGUMENTS, PLACING_ARGUMENTS, SPLITTING_ARGUMENTS)
        )
        shared = {"dtype": dtype, "attn_implementation": attn_implementation, **placing}
        of_drafter, of_verifier = hub | {"revision": revision}, hub | {"revision": verifier_revision}
        # All that can be wrong with small files is found before the weights are read.
        config_of_drafter = drafter_config(drafter, spec=spec, mask_token_id=mask_token_id, **of_drafter)
        tokenizer, verifier_tokenizer = load_tokenizer(drafter, **of_drafter), None
        if verifier is not None:
            config_of_verifier = verifier_config(verifier, **of_verifier).get_text_config(decoder=True)
            verifier_tokenizer = load_tokenizer(verifier, **of_verifier)
            check_vocabularies(
                config_of_drafter.vocab_size,
                config_of_verifier.vocab_size,
                tokenizer,
                verifier_tokenizer,
                mask_token_id=config_of_drafter.mask_token_id,
            )
        loaded = load_drafter(
            drafter, spec=spec, mask_token_id=mask_token_id, device_map=device_map, **shared, **splitting, **of_drafter
        )
        if splitting.keys() & {
            "tp_plan",
            "distributed_config",
        }:  # the verifier stays whole, beside this process's part of the drafter
            device_map = loaded.device
        return cls(
            loaded,
            None if verifier is None else load_verifier(verifier, device_map=device_map, **shared, **of_verifier),
            tokenizer,
            config,
            verifier_tokenizer=verifier_tokenizer,
            **knobs_or_loading,
        )

    @classmethod
    def from_embedded(cls, config: APDConfig | None = None, **knobs: Any) -> APDSampler:
        """The small trained pair that ships with the package; no network. Arguments as in `from_pretrained`."""
        from apd.embedded import DRAFTER_DIR, VERIFIER_DIR

        return cls.from_pretrained(str(DRAFTER_DIR), str(VERIFIER_DIR), config=config, **knobs)

    @overload
    def generate(
        self, inputs: Tensor | None = ..., *, return_dict_in_generate: Literal[True], **kwargs: Any
    ) -> APDOutput: ...

    @overload
    def generate(self, inputs: Tensor | None = ..., **kwargs: Any) -> Tensor: ...

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable[LogitsProcessor] | None = None,
        stopping_criteria: Iterable[StoppingCriteria] | None = None,
        prefix_allowed_tokens_fn: AllowedTokens | None = None,
        *,
        attention_mask: Tensor | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        seed: int | Sequence[int] | None = None,
        strategy: Strategy | None = None,
        **kwargs: Any,
    ) -> Tensor | APDOutput:
        """Continue the prompts, as `transformers`' `generate()` does. `docs/generate.md` has all arguments in a table.

        1. Resolve the arguments and lay out the rows, each a prompt with masks behind it.
        2. While a row is not done, make one `decode_step`; rows that are done leave the batch (`Decoding`).
        3. Put the output together.

        Args:
            inputs: `b l` int64 prompt ids, padded on the left; also accepted as `input_ids`.
            generation_config: as in transformers; single arguments override it.
            logits_processor: transformers' processors or your own, pure functions of (ids, scores). They act on both
                models' raw logits; those that look at the tokens before see exactly these, one row without padding at a
                time. Warpers among them act on draft and mixture, behind the configured ones.
            stopping_criteria: asked at every committed token, with one row without padding; the row is cut there.
            prefix_allowed_tokens_fn: from (row, ids) the ids that may come next; every output obeys it.
            attention_mask: `b l`, 0 where padding stands; inferred from the pad token when not given.
            streamer: gets committed tokens, one row only; drafts too where it has `put_draft`.
            tokenizer: for `stop_strings`; the sampler's own when not given.
            seed: one integer for the call, or one per row (of the expanded batch); drawn from torch's default
                generator when not given. With its own seed a row's tokens do not depend on the rest of the batch.
            strategy: decode with this instead of APD, e.g. `apd.LeftToRight(1)`, one token per step.
            **kwargs: the knobs of `APDConfig` and the fields of `GenerationConfig`.
        Returns:
            `b·num_return_sequences l` int64 ids, prompt included, padded behind the stop token; with
            `return_dict_in_generate=True` an `APDOutput`.
        Raises:
            ValueError: an argument is out of its range, or is refused with the reason; a model is in training mode.
            TypeError: an argument is unknown or of the wrong type.
            RuntimeError: a strategy has committed nothing of a row in as many steps as the row has masks.
            FloatingPointError: a model gave NaN, +∞ or nothing finite where a token had to be decided.
        """
        # 1. Resolve the arguments and lay out the rows.
        prompt = one_prompt(inputs, kwargs)
        request = self._request(
            self._settings(generation_config, strategy, kwargs),
            prompt,
            attention_mask=attention_mask,
            seed=seed,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            tokenizer=tokenizer,
        )
        loop = self._open(request, record_probs=request.is_recorded)
        sequences = Sequences(loop.state, request.pad_token_id)
        recorder = Recorder(scores=request.record_scores, logits=request.record_logits)

        # 2. While a row is not done.
        steps = loop.steps()
        if streamer is not None:
            steps = feed(streamer, _only_row(request.prompt), steps)
        for info, state in steps:
            if any(state.layout.done):
                sequences.take(state)
            if request.is_recorded:
                recorder.record(info, state)

        # 3. Put the output together.
        if not request.is_recorded:
            return sequences.ids()
        return recorder.output(sequences.ids(), self.tokenizer if tokenizer is None else tokenizer)

    def compile(self, **options: Any) -> APDSampler:
        """Compile both models' forward passes, for a few fixed shapes, and what stands between them; returns the sampler.

        Worth it where launching kernels takes longer than running them: on a GPU, small batches, `kv_window` set. Then
        each new batch size, each further 64 columns that a step computes and each further 256 of prompt and answer are
        compiled once, at their first step, up to dynamo's limit of graphs, which is raised to 64 for the process; passes
        over whole rows, the first of each and those of `kv_refresh`, are not. Without `kv_window` every pass of the
        drafter is over whole rows, and compiled for each further 64 columns. The memory of a cache is kept for the next
        call. Drawing, mixing with accepting, and committing are three graphs of few kernels, made again when a size or a
        knob changes for the first time; an acceptance rule of yours is traced with them, and a call with processors,
        criteria or a grammar has none of the three. Tokens are those of the plain path, up to rounding.

        Args:
            **options: of `torch.compile`, for the passes; what stands between them has their backend. By default
                `mode="reduce-overhead"` on a GPU, which records CUDA graphs.

        Raises:
            TypeError: a model is no transformers model.
        """
        if not options and self.drafter.device.type == "cuda":
            options = {"mode": "reduce-overhead"}
        models = {"drafter": self.drafter, "verifier": self.verifier}
        from apd.models.graphs import compile_pair  # imports inductor's machinery

        self.kernels = compile_pair({role: model for role, model in models.items() if model is not None}, **options)
        return self

    def stream(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        strategy: Strategy | None = None,
        logits_processor: Iterable[LogitsProcessor] | None = None,
        stopping_criteria: Iterable[StoppingCriteria] | None = None,
        prefix_allowed_tokens_fn: AllowedTokens | None = None,
        tokenizer: Any = None,
        skip_special_tokens: bool = True,
        **kwargs: Any,
    ) -> Iterator[Chunk]:
        """Generate and hand out every row's new text as it becomes final, step by step; any number of rows.

        Args:
            skip_special_tokens: leave stop tokens and the like out of the text.
            inputs, …, **kwargs: as in `generate`.

        Example:
            >>> for chunk in sampler.stream(**inputs, max_new_tokens=32):
            ...     print(chunk.text, end="", flush=True)
        """
        refuse_for("stream()", kwargs, "streamer", "return_dict_in_generate")
        prompt = one_prompt(inputs, kwargs)
        request = self._request(
            self._settings(generation_config, strategy, kwargs),
            prompt,
            attention_mask=attention_mask,
            seed=seed,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            tokenizer=tokenizer,
        )
        tokenizer = self.tokenizer if tokenizer is None else tokenizer
        steps = self._open(request, record_probs=False).steps()
        return chunks(steps, tokenizer, skip_special_tokens=skip_special_tokens)

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        indices: Iterable[int] | None = None,
        batch_size: int = 8,
        ordered: bool = True,
        progress: bool = False,
        seed: int | None = None,
        on_error: Callable[[int, Exception], None] | None = None,
        generation_config: GenerationConfig | None = None,
        strategy: Strategy | None = None,
        logits_processor: Iterable[LogitsProcessor] | None = None,
        stopping_criteria: Iterable[StoppingCriteria] | None = None,
        prefix_allowed_tokens_fn: AllowedTokens | None = None,
        tokenizer: Any = None,
        **kwargs: Any,
    ) -> Iterator[Generated]:
        """Answer any number of prompts, refilling a row as soon as it is done.

        Each answer is what `generate` gives for its prompt alone with `seed=mix_seed(seed, index)`.

        Args:
            prompts: text, chats (lists of messages) or lists of ids; any iterable, drawn from as rows become free. A chat
                whose last message is the assistant's is continued within that message.
            indices: numbers of the prompts, all different, from which their seeds come; 0, 1, … when not given. With
                them a part of a run gives what the whole run would have.
            batch_size: rows decoded together, at least 1.
            ordered: yield in the order of the prompts; else as soon as each is done.
            progress: show a progress bar.
            seed: one integer for the run; drawn from torch's default generator when not given.
            on_error: told the number and the error of a prompt that is refused, which is then left out. When not
                given, the error is raised.
            generation_config, …, **kwargs: as in `generate`, one answer per prompt.

        Example:
            >>> for answer in sampler.generate_many(apd.EXAMPLE_PROMPTS, max_new_tokens=32):
            ...     print(answer.index, answer.text)
        """
        refuse_for(
            "generate_many()", kwargs, "streamer", "return_dict_in_generate", "inputs", "input_ids", "attention_mask"
        )
        settings = self._settings(generation_config, strategy, kwargs)
        for name, neutral in (("num_return_sequences", 1), ("min_length", 0), ("max_time", None)):
            value = getattr(settings.generation, name)
            if value not in (None, neutral):
                raise ValueError(
                    f"`{name}` cannot be meant in generate_many(), where prompts come and go, got {value!r}. Use "
                    "`min_new_tokens`, a prompt several times, or generate()."
                )
        check_count("batch_size", batch_size, "Use 1 for one row at a time")
        check_prompts(prompts)
        run_seed = fresh_seed() if seed is None else whole_seed(seed)
        given = {
            "logits_processor": list(logits_processor or ()),
            "stopping_criteria": list(stopping_criteria or ()),
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "tokenizer": tokenizer,
        }

        max_lengths = [length for length in self._limits(settings.strategy).max_lengths.values() if length is not None]

        def request_of(index: int, prompt: Prompt) -> Request:
            ids = encode(prompt, self.tokenizer, min(max_lengths, default=None))
            return self._request(
                settings, ids, attention_mask=torch.ones_like(ids), seed=[mix_seed(run_seed, index)], **given
            )

        numbered = enumerate(prompts) if indices is None else zip(indices, prompts, strict=True)
        queue = Queue(numbered, request_of, on_error)
        found = answers(queue, batch_size=batch_size, open_loop=self._open, tokenizer=self.tokenizer)
        total = len(prompts) if isinstance(prompts, Sized) else None
        found = in_order(found, queue) if ordered else found
        return iter(tqdm(found, total=total, unit="prompt", disable=not progress))

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        strategy: Strategy | None = None,
        mixture_weight: float | None = None,
        acceptance_threshold: float | None = None,
        window_size: Any = ...,
        kv_window: Any = ...,
        kv_refresh: Any = ...,
        acceptance: str | None = None,
        correction: bool | None = None,
        noise: str | None = None,
        **prepared: Any,
    ) -> Tensor | APDOutput:
        """`model.generate(..., custom_generate=sampler)`: the same ids as `sampler.generate`.

        transformers calls this with prepared inputs. It passes on only the keyword arguments named here, and neither
        `streamer` nor `stop_strings`: use `sampler.generate` for those.

        Raises:
            ValueError: `model` is not the sampler's drafter, or an argument is refused as in `generate`.
            TypeError: an argument is nearly one of those named here.
        """
        if model is not getattr(self.drafter, "model", None):
            raise ValueError(
                f"`custom_generate` must be given to the sampler's own drafter, got another {type(model).__name__}. "
                "Call `sampler.drafter.model.generate(...)`."
            )
        knobs: dict[str, Any] = {
            "mixture_weight": mixture_weight,
            "acceptance_threshold": acceptance_threshold,
            "acceptance": acceptance,
            "correction": correction,
            "noise": noise,
        }
        knobs = {name: value for name, value in knobs.items() if value is not None}
        may_be_none = {"window_size": window_size, "kv_window": kv_window, "kv_refresh": kv_refresh}
        knobs |= {name: value for name, value in may_be_none.items() if value is not ...}
        attention_mask = prepared.pop("attention_mask", None)  # transformers would pass it twice, were it named above
        check_prepared(model, prepared, [*KNOBS, "seed", "strategy"])
        return self.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids) if attention_mask is None else attention_mask,
            seed=seed,
            strategy=strategy,
            **unprepared(model, generation_config, logits_processor, stopping_criteria, input_ids.shape[1]),
            **knobs,
        )

    def _settings(
        self, generation_config: GenerationConfig | None, strategy: Strategy | None, kwargs: dict[str, Any]
    ) -> Settings:
        """What holds for every row of a call: knobs, strategy, generation configuration."""
        if strategy is not None:
            check_strategy(strategy)
        knobs = {name: kwargs.pop(name) for name in KNOBS if name in kwargs}
        idle = sorted(knobs.keys() & {"mixture_weight", "acceptance_threshold", "acceptance", "correction"})
        if strategy is not None and idle:
            raise ValueError(f"`{idle[0]}` has no effect beside `strategy`, got {strategy!r}. Leave one of them out.")
        config = self.config.replace(**knobs)
        of_model = getattr(self.drafter, "generation_config", None)
        of_tokenizer = {name: getattr(self.tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")}
        defaults = [{name: value for name, value in vars(of_model).items() if name[0] != "_"} if of_model else {}]
        generation = effective_config(generation_config, [*defaults, of_tokenizer], kwargs)
        strategy = strategy or self.strategy or _apd(config)
        if not callable(getattr(strategy, "open", None)):
            raise TypeError(
                f"`strategy` must be an `apd.decoding.step.Strategy`, got {strategy!r} without a method `open`."
            )
        return Settings(config, strategy, generation)

    def _request(
        self, settings: Settings, prompt: Any, *, attention_mask: Tensor | None, tokenizer: Any, **of_request: Any
    ) -> Request:
        """All arguments of `generate`, checked."""
        strategy = settings.strategy
        if strategy.needs_verifier and self.verifier is None:
            raise ValueError(
                f"`verifier` must be given with {strategy!r}, got None. Name a causal LM with the drafter's tokenizer; "
                "mixture_weight=1 needs none."
            )
        request = resolve(
            prompt,
            attention_mask,
            settings.generation,
            self._limits(strategy),
            config=settings.config,
            strategy=strategy,
            tokenizer=self.tokenizer if tokenizer is None else tokenizer,
            **of_request,
        )
        warn_of_unknown_words(request, self.tokenizer)
        if not strategy.left_to_right:
            self._check_any_order(settings, request)
        return request

    def _limits(self, strategy: Strategy) -> Limits:
        running = {"drafter": self.drafter} | ({"verifier": self.verifier} if strategy.needs_verifier else {})
        return Limits(
            vocab_size=self.vocab_size,
            mask_token_id=self.drafter.mask_token_id,
            max_lengths={name: model.max_length for name, model in running.items() if model is not None},
            device=self.drafter.device,
        )

    def _open(self, request: Request, rows: Tensor | None = None, *, record_probs: bool = True) -> DecodeLoop:
        if self.kernels is not PLAIN and not request.calls_user_code:
            from apd.models.graphs import BucketedWindow

            request = replace(request, policy=BucketedWindow(request.policy))
        return DecodeLoop(
            self.drafter,
            self.verifier,
            request,
            vocab_size=self.vocab_size,
            rows=rows,
            record_probs=record_probs,
            kernels=self.kernels,
        )

    def _check_any_order(self, settings: Settings, request: Request) -> None:
        if settings.config.window_size == "auto":
            raise ValueError(
                f"`window_size` must be a number or None with {settings.strategy!r}, got 'auto': the window follows how far "
                "a step gets from the left, and would decide here what may be committed."
            )
        if settings.config.kv_window is not None:
            raise ValueError(
                f"`kv_window` must be None with {settings.strategy!r}, got {settings.config.kv_window}: frozen keys "
                "presume that tokens are committed from left to right."
            )
        if request.processing.needs_history:
            raise ValueError(
                f"`logits_processor` must not look at earlier tokens with {settings.strategy!r}, which commits in any "
                "order. Decode from left to right (APD, LeftToRight), or mark a processor that ignores ids "
                "`history_free`."
            )


@dataclass(frozen=True)
class Settings:
    """What holds for every row of a call."""

    config: APDConfig
    strategy: Strategy
    generation: GenerationConfig


def _apd(config: APDConfig) -> APD:
    if config.acceptance == "rejection":
        return APD(config.mixture_weight, Rejection())
    return APD(config.mixture_weight, Coupling(config.acceptance_threshold, config.correction))


def _only_row(prompt: Tensor) -> Tensor:
    if len(prompt) != 1:
        raise ValueError(
            f"`streamer` must be given one row, got {len(prompt)}: streamers of transformers take one. Use "
            "`sampler.stream(...)`, which tells rows apart."
        )
    return prompt
