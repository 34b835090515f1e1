"""`APDSampler`: a drop-in for `generate()` that decodes adaptively in parallel."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeGuard, overload

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

from apd.config import KNOBS, APDConfig, check_config, check_count
from apd.decoding.loop import DecodeLoop
from apd.decoding.noise import mix_seed
from apd.decoding.processing import AllowedTokens
from apd.decoding.protocols import Drafter, Verifier
from apd.decoding.request import Request
from apd.decoding.step import PLAIN
from apd.decoding.strategy import Strategy
from apd.generation.arguments import Resolver, check_attention, check_row_by_row, fresh_seed, whole_seed
from apd.generation.batch import Batch, Generated
from apd.generation.elsewhere import LOADING, refuse_idle_attribute, refuse_unknown
from apd.generation.infilling import (
    Infilled,
    Part,
    best_first,
    encode_parts,
    infilled,
    lengths_of,
    padded,
    refuse_without_hole,
    texts_of,
    with_likelihood,
)
from apd.generation.interop import naming_knobs, unprepared
from apd.generation.many import Prompt, Queue, answers, check_prompts, encode, in_order
from apd.generation.output import APDOutput, Recorder, Sequences
from apd.generation.prompts import one_prompt, only_row
from apd.generation.streaming import Chunk, chunks, feed
from apd.generation.support import refuse_for, warn
from apd.models.described import described
from apd.models.families import ModelSpec
from apd.models.loading import as_drafter, as_verifier
from apd.models.pairs import PAIR_OPTIONS, load_pair, shared_vocab_size
from apd.models.text_proposer import TextProposer
from apd.models.verifier import CausalVerifier
from apd.strategies.checked import Checked
from apd.strategies.registry import apd_of, settle


class APDSampler:
    """Decodes a diffusion LM left to right, many tokens per step where a small verifier agrees.

    The sampler holds models and defaults, no state of a running call, so calls may overlap. A compiled sampler keeps the
    cache memory of finished calls for later ones.

    Args:
        drafter: a `Drafter`, a masked LM of transformers, or a transformers decoder together with `spec`.
        verifier: a `Verifier`, a transformers causal LM, or the drafter's own transformers model, which then verifies its
            drafts with causal attention; `"self"` for the latter where the drafter was trained to predict the next token, too;
            `None` only where no verifier runs (R = 1).
        tokenizer: kept as `.tokenizer`; compared with the verifier's. Its stop and pad ids count where the drafter's
            generation config has none.
        config: the knobs; `APDConfig()` when not given.
        spec: family of a drafter given as a transformers model: `"dream"`, `"llada"`, … or a `ModelSpec`.
        mask_token_id: id of [MASK] for a drafter given as a transformers model; by default its config's, else the
            tokenizer's.
        verifier_tokenizer: compared with `tokenizer`, id by id, if both are given.
        strategy: decode with this instead of APD unless a call says otherwise; an object or a short name, see
            `apd.strategies.registry`. With `Checked` and both tokenizers, a transformers verifier may have another
            vocabulary than the drafter, see `proposer`.
        **knobs: single knobs that override `config`.

    Attributes:
        proposer: `None` if the two models share a vocabulary. Else a `TextProposer` of the verifier, which `Checked` uses in
            place of every proposer that would run the verifier; `verifier` is `None`, and strategies that need one are
            refused.

    Raises:
        ValueError: models or vocabularies do not match, or a knob is out of range.
        TypeError: an unknown argument.

    Example:
        >>> sampler = APDSampler.from_included()
        >>> inputs = sampler.tokenizer(apd.EXAMPLE_PROMPTS[:4], return_tensors="pt", padding=True)
        >>> output = sampler.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True)
        >>> output.tokens_per_forward.shape
        torch.Size([4])
    """

    def __init__(
        self,
        drafter: Drafter | PreTrainedModel,
        verifier: Verifier | PreTrainedModel | Literal["self"] | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: APDConfig | None = None,
        *,
        spec: ModelSpec | str | None = None,
        mask_token_id: int | None = None,
        verifier_tokenizer: PreTrainedTokenizerBase | None = None,
        strategy: Strategy | str | None = None,
        **knobs: Any,
    ) -> None:
        refuse_unknown(knobs, KNOBS, "APDSampler()", LOADING)
        check_config(config)
        self.strategy, self.config = settle(strategy, config or APDConfig(), knobs)
        self.drafter: Drafter = as_drafter(drafter, spec, mask_token_id, tokenizer)
        check_attention(self.strategy or apd_of(self.config), self.config, self.drafter)
        self.verifier: Verifier | None = None if verifier is None else as_verifier(verifier, self.drafter)
        self.tokenizer: Any = tokenizer
        self.kernels = PLAIN
        self.vocab_size = self.drafter.vocab_size
        self.proposer: TextProposer | None = None
        if self.verifier is not None:
            shared = shared_vocab_size(
                self.drafter.vocab_size,
                self.verifier.vocab_size,
                tokenizer,
                verifier_tokenizer,
                mask_token_id=self.drafter.mask_token_id,
                may_differ=_only_guesses(self.strategy) and isinstance(self.verifier, CausalVerifier),
            )
            if shared is None:
                self.proposer = TextProposer(self.verifier, verifier_tokenizer, tokenizer)
                self.verifier = None
            else:
                self.vocab_size = shared

    @classmethod
    def from_pretrained(
        cls,
        drafter: str,
        verifier: str | None = None,
        *,
        config: APDConfig | None = None,
        spec: ModelSpec | str | None = None,
        mask_token_id: int | None = None,
        block_size: int | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        verifier_revision: str | None = None,
        strategy: Strategy | str | None = None,
        **knobs_or_loading: Any,
    ) -> APDSampler:
        """Load drafter, verifier and tokenizers from directories or hub ids; never remote code, never pickles.

        Args:
            drafter: a diffusion LM of a supported family (`apd.FAMILIES`), or a masked LM of transformers.
            verifier: a causal LM with the same tokenizer; with `strategy=Checked()`, with any tokenizer. `"self"`: the
                drafter's own weights, read with a causal mask, where its family was trained for that; they are loaded once.
            config: the knobs.
            spec: overrides the family that `config.json` names.
            mask_token_id: overrides the mask id of config and tokenizer.
            block_size: overrides the number of tokens that the drafter's `config.json` or family drafts at once.
            dtype: dtype of both models; `None`: float32 on a CPU, else as stored.
            device_map: as in transformers, for both models.
            attn_implementation: `"sdpa"`, `"eager"` or `"grouped_sdpa"`, the default where heads share keys.
            revision: branch, tag or commit of the drafter.
            verifier_revision: branch, tag or commit of a verifier of its own.
            strategy: as in `APDSampler`.
            **knobs_or_loading: single knobs that override `config`; and as in transformers `token`, `cache_dir`,
                `local_files_only`, `force_download`, for both models `max_memory`, `offload_folder`, `offload_buffers`,
                for the drafter alone `tp_plan` or `distributed_config` (under torchrun; give every process the same `seed`) and
                `quantization_config`.

        Raises:
            ValueError: the vocabularies differ and the strategy needs a shared one, a file is damaged, or `load_drafter` or `load_verifier` refuses a model.
            OSError: no weights in safetensors.
            TypeError: an unknown argument.
        """
        own = ("config", "spec", "mask_token_id", "block_size", "dtype", "device_map", "attn_implementation")
        known = [*KNOBS, *PAIR_OPTIONS, *own, "verifier_revision", "strategy"]
        refuse_unknown(knobs_or_loading, known, "from_pretrained()", LOADING)
        check_config(config)
        knobs = {name: knobs_or_loading.pop(name) for name in KNOBS if name in knobs_or_loading}
        chosen, config = settle(strategy, config or APDConfig(), knobs)  # before anything is loaded
        if verifier is None and (chosen or apd_of(config)).needs_verifier:
            warn(
                f"`verifier` is None, and {chosen or apd_of(config)!r} needs one: each call will need mixture_weight=1, or a "
                "`strategy` that runs the drafter alone."
            )
        pair = load_pair(
            drafter,
            verifier,
            spec=spec,
            mask_token_id=mask_token_id,
            block_size=block_size,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            revision=revision,
            verifier_revision=verifier_revision,
            vocabularies_may_differ=_only_guesses(chosen),
            check_family=partial(check_attention, chosen or apd_of(config), config),
            **knobs_or_loading,
        )
        return cls(
            pair.drafter,
            pair.verifier,
            pair.tokenizer,
            config,
            verifier_tokenizer=pair.verifier_tokenizer,
            strategy=chosen,
        )

    @classmethod
    def from_included(cls, config: APDConfig | None = None, **knobs: Any) -> APDSampler:
        """Load the included pair, a small trained one; no network. Arguments as in `from_pretrained`."""
        from apd.included import DRAFTER_DIR, VERIFIER_DIR

        return cls.from_pretrained(str(DRAFTER_DIR), str(VERIFIER_DIR), config=config, **knobs)

    from_embedded = from_included  # its name in release 0.1.0

    def __setattr__(self, name: str, value: Any) -> None:
        if not hasattr(self, name):  # those of a subclass stay its own
            refuse_idle_attribute(name, value)
        super().__setattr__(name, value)

    @property
    def device(self) -> torch.device:
        """The device of the drafter's inputs. `generate` moves prompts there."""
        return self.drafter.device

    def __repr__(self) -> str:
        """Both models, their device, and the knobs."""
        own = getattr(self.drafter, "model", None)
        is_self = self.verifier is not None and own is not None and getattr(self.verifier, "model", None) is own
        parts = {
            "drafter": described(self.drafter),
            "verifier": "'self', the drafter's own weights" if is_self else described(self.verifier),
            "proposer": repr(self.proposer),
            "tokenizer": type(self.tokenizer).__name__ if self.tokenizer is not None else "None",
            "strategy": repr(self.strategy),
            "config": repr(self.config),
            "device": str(self.device),
        }
        left_out = [name for name in ("proposer", "strategy") if parts[name] == "None"]
        lines = [f"    {name}={value},\n" for name, value in parts.items() if name not in left_out]
        return f"APDSampler(\n{''.join(lines)})"

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
        strategy: Strategy | str | None = None,
        **kwargs: Any,
    ) -> Tensor | APDOutput:
        """Continue the prompts, as `transformers`' `generate()` does. `docs/generate.md` has all arguments in a table.

        1. Resolve the arguments and lay out the rows, each a prompt with masks behind it.
        2. While a row is not done, make one `decode_step`; rows that are done leave the batch (`DecodeLoop`).
        3. Put the output together.

        Args:
            inputs: `b l` int64 prompt ids, padded on the left; also accepted as `input_ids`.
            generation_config: as in transformers; single arguments override it.
            logits_processor: transformers' processors or your own, pure functions of (ids, scores). They act on both
                models' raw logits. Processors that read earlier tokens get exactly those, one row without padding at a
                time. Warpers among them act on draft and mixture, behind the configured ones.
            stopping_criteria: called at every committed token, with one row without padding; the row is cut there.
            prefix_allowed_tokens_fn: from (row, ids) the ids that may come next; every output obeys it.
            attention_mask: `b l`, 0 at padding; inferred from the pad token when not given.
            streamer: gets committed tokens, one row only; drafts too where it has `put_draft`.
            tokenizer: for `stop_strings`; the sampler's own when not given.
            seed: one integer for the call, or one per row (of the expanded batch); drawn from torch's default
                generator when not given. With its own seed a row's tokens do not depend on the rest of the batch.
            strategy: decode with this instead of APD: `apd.LeftToRight(1)`, one token per step, or a short name such as
                `"confidence:2"`.
            **kwargs: the knobs of `APDConfig` and the fields of `GenerationConfig`; and `allow_stop_in_holes=True` to let stop
                tokens be drawn in a hole of the prompt, where they end nothing.
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
        resolve = self._resolver(
            generation_config=generation_config,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            tokenizer=tokenizer,
            strategy=strategy,
            **kwargs,
        )
        request = resolve(prompt, attention_mask, seed)
        loop = self.loop(request, record_probs=request.is_recorded)
        sequences = Sequences(loop.state, request.pad_token_id)
        recorder = Recorder(scores=request.record_scores, logits=request.record_logits)

        if request.is_recorded:
            recorder.expect(loop.state)

        # 2. While a row is not done.
        steps = loop.steps()
        if streamer is not None:
            steps = feed(streamer, only_row(request.prompt), steps)
        for info, state in steps:
            if any(state.layout.done):
                sequences.take(state)
            if request.is_recorded:
                recorder.record(info, state)

        # 3. Put the output together.
        if not request.is_recorded:
            return sequences.ids()
        return recorder.output(sequences.ids(), resolve.tokenizer, mask_token_id=self.drafter.mask_token_id)

    @overload
    def infill(self, parts: Sequence[Part], *, seed: int | Sequence[int] | None = ..., **kwargs: Any) -> Infilled: ...

    @overload
    def infill(
        self,
        parts: Sequence[list[Any] | tuple[Any, ...]],
        *,
        seed: int | Sequence[int] | None = ...,
        **kwargs: Any,
    ) -> list[Infilled]: ...

    def infill(
        self, parts: Sequence[Any], *, seed: int | Sequence[int] | None = None, **kwargs: Any
    ) -> Infilled | list[Infilled]:
        """Fill the holes of a text, or of a list of texts; both sides of a hole are read.

        Decoding goes from left to right through the holes, with everything given in sight. The verifier of APD sees only what is
        to the left; it decides how much of a draft is kept, not what is drafted (`docs/holes.md`).

        Args:
            parts: strings and numbers of masks, such as `["def area(r):\n    return ", 8, " * r\n"]`; or a list of such lists. A
                `range` of numbers is a hole of unknown length: every length is decoded as a row. Returned is the one whose
                text is the likeliest to the verifier; without a verifier, the one with the best `score`, which is poor.
            seed: as in `generate`, one per row; with ranges one for all.
            **kwargs: as in `generate`. `max_new_tokens` counts tokens behind the text, 0 by default. With a range the strategy
                is `checked` by default, whose log-probabilities are those of the drafter's own sequential decoding.

        Returns:
            An `Infilled` for a text, a list of them for a list of texts.

        Raises:
            ValueError, TypeError: no tokenizer, parts that are none, a text without a hole, or what `generate` refuses.

        Example:
            >>> sampler.infill(["Reverse: [", 3, '"] -> ["Uma"]']).text  # doctest: +SKIP
        """
        not_here = (
            "streamer",
            "return_dict_in_generate",
            "inputs",
            "input_ids",
            "attention_mask",
            "num_return_sequences",
        )
        refuse_for("infill()", kwargs, *not_here)
        if self.tokenizer is None:
            raise ValueError(
                "`infill()` must have a tokenizer, got a sampler without one. Give it one, or use `generate`."
            )
        texts = texts_of(parts)
        refuse_without_hole(texts)
        has_ranges = any(isinstance(part, range) for text in texts for part in text)
        if (
            has_ranges
            and self.strategy is None
            and kwargs.get("strategy") is None
            and not kwargs.keys() & KNOBS.keys()
        ):
            kwargs["strategy"] = "checked" if self.verifier is not None else "checked:proposer=drafter"
        variants = [lengths_of(text) for text in texts]
        rows = [encode_parts(row, self.tokenizer, self.drafter.mask_token_id) for each in variants for row in each]
        ids, real = padded(rows, 0)
        output = self.generate(
            ids, attention_mask=real, seed=seed, return_dict_in_generate=True, **{"max_new_tokens": 0, **kwargs}
        )
        counts = zip(output.drafter_forwards.tolist(), output.verifier_forwards.tolist(), strict=True)
        found = []
        for row, tokens, trace, forwards in zip(rows, output.sequences.tolist(), output.trace, counts, strict=True):
            start, appended = ids.shape[1] - len(row.ids), len(trace.tokens) - sum(b - a for a, b in row.holes)
            found.append(infilled(row, tokens[start : ids.shape[1] + appended], trace, forwards, self.tokenizer))
        pairs, best = zip(found, rows, strict=True), list[Infilled]()
        for of_text in variants:
            filled = list(itertools.islice(pairs, len(of_text)))
            if len(filled) > 1 and self.verifier is not None:
                filled = [
                    (with_likelihood(*each, self.verifier, self.vocab_size, self.drafter.device), each[1])
                    for each in filled
                ]
            best.append(best_first([each for each, _ in filled]))
        return best if all(isinstance(text, (list, tuple)) for text in parts) else best[0]

    def compile(self, **options: Any) -> APDSampler:
        """Compile both models' forward passes for a few fixed shapes, and the functions of a step; returns the sampler.

        It pays if launching kernels takes longer than running them: on a GPU, with small batches and `kv_window`. On a CPU a
        warning says what it costs.
        Each new batch size, each further 64 columns of a pass and each further 256 of prompt and answer are compiled at
        their first step, up to dynamo's limit of graphs, which is raised to 64 for the process. Prefill and full refreshes
        run eagerly. Without `kv_window` every pass of the drafter computes whole rows, and is compiled for each further 64
        columns. Cache memory is kept for the next call. Drawing, mixing with accepting, and committing are three graphs,
        compiled again when a size or knob is new; an acceptance rule of yours is traced with them, and a call with
        processors, criteria or a grammar runs them eagerly. Tokens are those of the eager path, up to rounding.

        Args:
            **options: of `torch.compile`, for the passes; the functions of a step use their backend. By default
                `mode="reduce-overhead"` on a GPU, which records CUDA graphs.

        Raises:
            TypeError: a model is no transformers model.
        """
        if self.device.type == "cpu" and options.get("backend") not in ("eager", "aot_eager"):  # they compile nothing
            warn(
                "`compile()` is made for GPUs. On a CPU the first step of every new batch size waits for the compiler, tens of "
                "seconds on the included pair, and later steps launch no kernels that compiling could save. Measure before you "
                "use it: `python -m benchmarks.speed`."
            )
        if not options and self.device.type == "cuda":
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
        skip_special_tokens: bool = True,
        **kwargs: Any,
    ) -> Iterator[Chunk]:
        """Generate and yield the new text of each row as it becomes final, step by step; any number of rows.

        Args:
            skip_special_tokens: leave stop tokens and the like out of the text.
            inputs, …, **kwargs: as in `generate`.

        Example:
            >>> for chunk in sampler.stream(**inputs, max_new_tokens=32):
            ...     print(chunk.text, end="", flush=True)
        """
        refuse_for("stream()", kwargs, "streamer", "return_dict_in_generate")
        prompt = one_prompt(inputs, kwargs)
        resolve = self._resolver(generation_config=generation_config, **kwargs)
        loop = self.loop(resolve(prompt, attention_mask, seed), record_probs=False)
        return chunks(loop.steps(), resolve.tokenizer, skip_special_tokens=skip_special_tokens)

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
        num_return_sequences: int = 1,
        **kwargs: Any,
    ) -> Iterator[Generated]:
        """Answer any number of prompts by continuous batching: a finished row is refilled with the next prompt.

        Each answer equals that of `generate` for its prompt alone with `seed=mix_seed(seed, index)`.

        Args:
            prompts: text, chats (lists of messages) or lists of ids; any iterable, drawn from as rows become free. A chat
                whose last message is the assistant's is continued within that message.
            indices: numbers of the prompts, all different, which determine their seeds; 0, 1, … when not given. With
                them a part of a run gives the answers of the whole run.
            batch_size: rows decoded together, at least 1.
            ordered: yield in the order of the prompts; else as soon as each is done.
            progress: show a progress bar.
            seed: one integer for the run; drawn from torch's default generator when not given.
            on_error: called with number and error of a refused prompt, which is then left out. When not given, the
                error is raised.
            num_return_sequences: answers per prompt, told apart by `Generated.sequence`; more than one needs `do_sample=True`.
                They are those of `generate` with the prompt's seed and the same `num_return_sequences`.
            **kwargs: as in `generate`.

        Example:
            >>> for answer in sampler.generate_many(apd.EXAMPLE_PROMPTS, max_new_tokens=32):
            ...     print(answer.index, answer.text)
        """
        refuse_for(
            "generate_many()", kwargs, "streamer", "return_dict_in_generate", "inputs", "input_ids", "attention_mask"
        )
        check_count("num_return_sequences", num_return_sequences, "Use 1 for one answer per prompt")
        resolve = self._resolver(**kwargs)
        check_row_by_row(resolve.generation, num_return_sequences)
        check_count("batch_size", batch_size, "Use 1 for one row at a time")
        check_prompts(prompts)
        run_seed = fresh_seed() if seed is None else whole_seed(seed)
        most_tokens = min(filter(None, resolve.max_lengths.values()), default=None)

        def request_of(index: int, sequence: int, prompt: Prompt) -> Request:
            ids = encode(prompt, self.tokenizer, most_tokens)
            if resolve.fills_only and not bool((ids == self.drafter.mask_token_id).any()):
                raise ValueError(
                    "A prompt must have a mask token with max_new_tokens=0, got none: there is nothing to decode. Raise "
                    "`max_new_tokens`, or leave the prompt out."
                )
            return resolve(ids, torch.ones_like(ids), [mix_seed(mix_seed(run_seed, index), sequence)])

        if isinstance(indices, Sized) and isinstance(prompts, Sized) and len(indices) != len(prompts):
            raise ValueError(
                f"`indices` must have a number for each of {len(prompts)} prompts, got {len(indices)}. Leave them out for 0, 1, …"
            )
        numbered = enumerate(prompts) if indices is None else zip(indices, prompts, strict=True)
        queue = Queue(numbered, request_of, on_error, copies=num_return_sequences)
        found = answers(queue, self.batch(), batch_size=batch_size)
        total = len(prompts) * num_return_sequences if isinstance(prompts, Sized) else None
        found = in_order(found, queue) if ordered else found
        return iter(tqdm(found, total=total, unit="prompt", disable=not progress))

    def resolver(self, **kwargs: Any) -> Resolver:
        """The checked arguments of a call; called with a prompt, `1 l` int64, it makes a `Request` for `batch`.

        Args:
            **kwargs: as in `generate`, without prompt and seed, which the resolver is called with.

        Raises:
            ValueError, TypeError: what `generate` would refuse.
        """
        refuse_for("resolver()", kwargs, "streamer", "return_dict_in_generate", "inputs", "input_ids", "seed")
        resolve = self._resolver(**kwargs)
        check_row_by_row(resolve.generation)
        return resolve

    def batch(self, *, scores: bool = False, logits: bool = False) -> Batch:
        """A batch without rows, whose rows come and go between steps; for servers.

        Args:
            scores, logits: record them, see `APDOutput`; the first request must ask for them, too.

        Example:
            >>> batch, resolve = sampler.batch(), sampler.resolver(max_new_tokens=32)
            >>> batch.add(resolve(ids, seed=1), row=0)
            >>> while batch.num_rows:
            ...     answers = batch.step().ended
        """
        return Batch(self.loop, self.tokenizer, self.drafter.mask_token_id, scores=scores, logits=logits)

    @naming_knobs
    def __call__(
        self,
        model: PreTrainedModel | None = None,
        input_ids: Tensor | None = None,
        logits_processor: LogitsProcessorList | None = None,
        stopping_criteria: StoppingCriteriaList | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        seed: int | Sequence[int] | None = None,
        strategy: Strategy | str | None = None,
        **prepared: Any,
    ) -> Tensor | APDOutput:
        """`model.generate(..., custom_generate=sampler)`: the ids of `sampler.generate`.

        transformers calls this with prepared inputs. It passes on the caller's `seed`, `strategy` and knobs, but neither
        `streamer` nor `stop_strings`: use `sampler.generate` for those.

        Raises:
            ValueError: `model` is not the sampler's drafter, or an argument is refused as in `generate`.
            TypeError: called directly, or an argument is nearly one of those named here.
        """
        if not isinstance(model, PreTrainedModel) or input_ids is None:
            raise TypeError(
                "`sampler(...)` is what transformers calls in `model.generate(..., custom_generate=sampler)`. Write "
                "`sampler.generate(**inputs)`."
            )
        if model is not getattr(self.drafter, "model", None):
            raise ValueError(
                f"`custom_generate` must be given to the sampler's own drafter, got another {type(model).__name__}. "
                "Call `sampler.drafter.model.generate(...)`."
            )
        meant = unprepared(model, input_ids, logits_processor, stopping_criteria, generation_config, prepared)
        return self.generate(seed=seed, strategy=strategy, **meant)

    def _resolver(self, *, strategy: Strategy | str | None = None, **kwargs: Any) -> Resolver:
        """The arguments of a call, its knobs among them, checked and ready for a prompt."""
        knobs = {name: kwargs.pop(name) for name in KNOBS if name in kwargs}
        chosen, config = settle(strategy, self.config, knobs, default=self.strategy)
        if self.proposer is not None and _only_guesses(chosen):
            chosen = replace(chosen, proposer=self.proposer)
        return Resolver(self, chosen or apd_of(config), config, **kwargs)

    def loop(
        self,
        request: Request,
        rows: Tensor | None = None,
        on_fault: Callable[[int, Exception], None] | None = None,
        *,
        record_probs: bool = True,
    ) -> DecodeLoop:
        """The decode loop of a request, to be driven step by step.

        Args:
            request: of `resolver`.
            rows, on_fault, record_probs: see `DecodeLoop`.
        """
        if self.kernels is not PLAIN and not request.is_uncommon:
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
            on_fault=on_fault,
        )


def _only_guesses(strategy: Strategy | None) -> TypeGuard[Checked]:
    """True if the strategy runs the verifier, and nothing but the time depends on what the verifier says."""
    return isinstance(strategy, Checked) and strategy.needs_verifier
