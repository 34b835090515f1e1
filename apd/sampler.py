"""`APDSampler`: a drop-in for `generate()` that decodes adaptively in parallel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from apd.acceptance import Coupling, Rejection
from apd.arguments import Request, generation_config, one_prompt, refuse_unknown, resolve
from apd.config import KNOBS, APDConfig
from apd.drafter import Drafter
from apd.models import (
    HUB_ARGUMENTS,
    ModelSpec,
    as_drafter,
    as_verifier,
    check_vocabularies,
    load_drafter,
    load_tokenizer,
    load_verifier,
)
from apd.output import APDOutput, Recorder
from apd.state import DecodeState, StepInfo
from apd.step import APD, Models, Strategy, decode_step
from apd.verifier import Verifier


class APDSampler:
    """Decodes a diffusion LM left to right, many tokens per step where a small verifier agrees.

    The sampler holds models and defaults and nothing of a running call, so calls may run beside each other.

    Args:
        drafter: a `Drafter`, or a transformers model together with `spec`.
        verifier: a `Verifier`, or a transformers causal LM; `None` only where it is never asked (R = 1).
        tokenizer: kept as `.tokenizer` for the caller; compared with the verifier's, and asked for stop and pad ids
            that the drafter's generation config does not name.
        config: the knobs; `APDConfig()` when not given.
        spec: family of a drafter given as a transformers model: `"dream"`, `"llada"`, … or a `ModelSpec`.
        mask_token_id: of a drafter given as a transformers model; by default its config's, else the tokenizer's.
        verifier_tokenizer: compared with `tokenizer`, token by token, when both are given.
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
        **knobs: Any,
    ) -> None:
        refuse_unknown(knobs, KNOBS, "APDSampler()")
        self.config = (config or APDConfig()).replace(**knobs)
        self.drafter: Drafter = as_drafter(drafter, spec, mask_token_id, tokenizer)
        self.verifier: Verifier | None = None if verifier is None else as_verifier(verifier)
        self.tokenizer: Any = tokenizer
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
        **knobs_or_hub: Any,
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
            attn_implementation: `"sdpa"` (default) or `"eager"`.
            revision: of the drafter.
            verifier_revision: of the verifier.
            **knobs_or_hub: single knobs that override `config`; `token`, `cache_dir`, `local_files_only` and
                `force_download`, as in transformers.
        """
        own = ("config", "spec", "mask_token_id", "dtype", "device_map", "attn_implementation", "verifier_revision")
        refuse_unknown(knobs_or_hub, [*KNOBS, *HUB_ARGUMENTS, *own], "from_pretrained()")
        hub = {name: knobs_or_hub.pop(name) for name in HUB_ARGUMENTS if name in knobs_or_hub}
        compute: dict[str, Any] = {
            "dtype": dtype,
            "device_map": device_map,
            "attn_implementation": attn_implementation,
        }
        of_drafter, of_verifier = hub | {"revision": revision}, hub | {"revision": verifier_revision}
        return cls(
            load_drafter(drafter, spec=spec, mask_token_id=mask_token_id, **compute, **of_drafter),
            None if verifier is None else load_verifier(verifier, **compute, **of_verifier),
            load_tokenizer(drafter, **of_drafter),
            config,
            verifier_tokenizer=None if verifier is None else load_tokenizer(verifier, **of_verifier),
            **knobs_or_hub,
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

    @torch.inference_mode()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        attention_mask: Tensor | None = None,
        seed: int | Sequence[int] | None = None,
        strategy: Strategy | None = None,
        **kwargs: Any,
    ) -> Tensor | APDOutput:
        """Continue the prompts, as `transformers`' `generate()` does.

        1. Resolve the arguments.
        2. Lay out the rows, each a prompt with masks behind it, and open the models.
        3. While a row is not done, make one `decode_step`; rows that are done leave the batch.
        4. Put the output together.

        Args:
            inputs: `b l` int64 prompt ids, padded on the left; also accepted as `input_ids`.
            generation_config: as in transformers; single arguments override it.
            attention_mask: `b l`, 0 where padding stands; inferred from the pad token when not given.
            seed: one integer for the call, or one per row (of the expanded batch); drawn from torch's default
                generator when not given. With its own seed a row's tokens do not depend on the rest of the batch.
            strategy: decode with this instead of APD, e.g. `apd.LeftToRight(1)`, one token per step.
            **kwargs: the knobs of `APDConfig`, and of `GenerationConfig`: `max_new_tokens`, `max_length` (padding
                counts, as there), `do_sample`, `temperature`, `top_k` (50 unless set, as there), `top_p`, `min_p`,
                `eos_token_id` (one or many), `pad_token_id`, `num_return_sequences`, `return_dict_in_generate`.
        Returns:
            `b·num_return_sequences l` int64 ids, prompt included, padded behind the stop token; with
            `return_dict_in_generate=True` an `APDOutput`.
        Raises:
            ValueError: an argument is out of its range, or is refused with the reason.
            TypeError: an argument is unknown or of the wrong type.
            FloatingPointError: a model gave NaN, +∞ or nothing finite where a token had to be decided.
        """
        # 1. Resolve the arguments.
        config = self.config.replace(**{name: kwargs.pop(name) for name in KNOBS if name in kwargs})
        strategy = strategy or _apd(config)
        self._check_strategy(strategy, config)
        request = self._request(inputs, attention_mask, generation_config, seed, config, kwargs)

        # 2. Lay out the rows and open the models.
        state = _lay_out(request, self.drafter.mask_token_id)
        models = Models(
            drafter=self.drafter.open(state, config.kv_window),
            verifier=self.verifier.open(state) if self.verifier and strategy.needs_verifier else None,
            mask_token_id=self.drafter.mask_token_id,
            vocab_size=self.vocab_size,
        )
        recorder = Recorder(state, request.pad_token_id)

        # 3. While a row is not done.
        while len(state.rows):
            state, info = decode_step(
                state,
                strategy=strategy,
                models=models,
                sampling=request.sampling,
                window_size=config.window_size,
                stop_token_ids=request.stop_token_ids,
            )
            recorder.record(info)
            if not _all_going_on(state, info):
                _refuse_unsound(state, info)
                recorder.finish(state.select(state.done.nonzero().squeeze(1)))
                going_on = (~state.done).nonzero().squeeze(1)
                state = state.select(going_on)
                models.select(going_on)

        # 4. Put the output together.
        return recorder.output() if request.as_dict else recorder.sequences()

    def _check_strategy(self, strategy: Strategy, config: APDConfig) -> None:
        if strategy.needs_verifier and self.verifier is None:
            raise ValueError(
                f"`verifier` must be given unless mixture_weight is 1, got None with mixture_weight="
                f"{config.mixture_weight}. Name a causal LM with the drafter's tokenizer."
            )
        if not strategy.left_to_right and config.kv_window is not None:
            raise ValueError(
                f"`kv_window` must be None with {type(strategy).__name__}, got {config.kv_window}: frozen keys "
                "presume that tokens are committed from left to right."
            )

    def _request(
        self,
        inputs: Tensor | None,
        attention_mask: Tensor | None,
        given: GenerationConfig | None,
        seed: int | Sequence[int] | None,
        config: APDConfig,
        kwargs: dict[str, Any],
    ) -> Request:
        prompt = one_prompt(inputs, kwargs)
        of_model = getattr(self.drafter, "generation_config", None)
        of_tokenizer = {name: getattr(self.tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")}
        generation = generation_config(given, [of_model.to_dict() if of_model else {}, of_tokenizer], kwargs)
        models = {"drafter": self.drafter} | ({} if self.verifier is None else {"verifier": self.verifier})
        return resolve(
            prompt,
            attention_mask,
            generation,
            seed,
            vocab_size=self.vocab_size,
            mask_token_id=self.drafter.mask_token_id,
            max_lengths={name: model.max_length for name, model in models.items()},
            device=self.drafter.device,
            redraw=config.noise == "step",
        )


def _apd(config: APDConfig) -> APD:
    if config.acceptance == "rejection":
        return APD(config.mixture_weight, Rejection())
    return APD(config.mixture_weight, Coupling(config.acceptance_threshold, config.correction))


def _lay_out(request: Request, mask_token_id: int) -> DecodeState:
    """Every row at its first step: the prompt decided, masks behind it."""
    rows, width = request.prompt.shape
    masks = request.prompt.new_full((rows, request.max_new_tokens), mask_token_id)
    tokens = torch.cat([request.prompt, masks], 1)
    return DecodeState(
        tokens=tokens,
        decided=(torch.arange(tokens.shape[1], device=tokens.device) < width).repeat(rows, 1),
        done=torch.zeros(rows, dtype=torch.bool, device=tokens.device),
        padding=request.padding,
        prompt_width=width,
        seeds=request.seeds,
        steps=torch.zeros_like(request.padding),
        rows=torch.arange(rows, device=tokens.device),
    )


def _all_going_on(state: DecodeState, info: StepInfo) -> bool:
    """Whether nothing happened that the host must act on; the one thing that it asks the device after a step."""
    return bool(torch.stack([*info.proposal.sound.values(), ~state.done]).all())


def _refuse_unsound(state: DecodeState, info: StepInfo) -> None:
    for model, sound in info.proposal.sound.items():
        if sound.all():
            continue
        row = int((~sound).long().argmax())
        what = "no token that both models allow" if model == "mixture" else "NaN, infinite or no finite logits"
        raise FloatingPointError(
            f"The {model} gave {what} at step {int(state.steps[row]) - 1} of row {int(state.rows[row])}, where a token "
            "had to be decided. Check its weights and dtype (float16 overflows where bfloat16 does not)."
        )
