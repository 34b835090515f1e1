"""Forward passes of a transformers decoder: from the columns of a span to their hidden states and logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from apd.decoding.protocols import RowMemory
from apd.decoding.state import DecodeState, to_device
from apd.decoding.window import Window
from apd.models.cache import ColumnCache
from apd.models.horizon import Attention
from apd.models.span import WHOLE_ROW, Reach, Span


class TransformersModel:
    """A transformers decoder with an output layer, the base of drafter and verifier.

    Args:
        model: the decoder.
        attention: which keys its columns see in these passes, whatever the config says.
    """

    role = "model"  # in error messages

    def __init__(self, model: PreTrainedModel, *, attention: Attention) -> None:
        self.model = model
        self.attention = attention
        self.compiled: PassFactory | None = None
        self.vocab_size: int = model.config.get_text_config(decoder=True).vocab_size
        self.max_length = max_positions(model.config)

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    def passes(self, state: DecodeState, *, is_cached: bool) -> Passes:
        """Forward passes over the rows of `state`; compiled ones if `compile_pair` has compiled the model."""
        if self.compiled is not None:
            return self.compiled.passes(state, is_cached=is_cached)
        shape = (state.tokens.shape[0], state.width + self.attention.margin) if is_cached else None
        return EagerPasses(self.model, attention=self.attention, cache_shape=shape, role=self.role)


class Passes(RowMemory, Protocol):
    """Forward passes of a model over the rows of one call."""

    def __call__(
        self, tokens: Tensor, span: Span, positions: Tensor | None = None, unseen: Tensor | None = None
    ) -> Tensor:
        """Last hidden states of the columns in `span`, each attending to real columns before the span's end.

        Args:
            tokens: `b l` int64.
            span: the columns to compute; without a cache, they start at the first real column.
            positions: `b l` int64, the position id of each column; by default they count from the first real column.
            unseen: `b l` bool, columns that no column attends to; `None`: none.
        Returns:
            `b q d`, float dtype of the model; fillers hold arbitrary numbers.
        """


class PassFactory(Protocol):
    """A compiled model, which makes its own passes."""

    def passes(self, state: DecodeState, *, is_cached: bool) -> Passes: ...


class EagerPasses:
    """Passes as wide as they need to be.

    Args:
        model: a transformers decoder with an output layer.
        attention: see `TransformersModel`.
        cache_shape: rows and columns of a cache that keeps keys and values from pass to pass; `None`: each pass computes
            everything.
        role: `"drafter"` or `"verifier"`, for error messages.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        attention: Attention,
        cache_shape: tuple[int, int] | None = None,
        role: str = "model",
    ) -> None:
        self.model = model
        self.device = input_device(model)
        self.attention = attention
        self.role = role
        if _trains(model):
            check_evaluating(model, model.named_modules(), role)
        self.cache: ColumnCache | None = None if cache_shape is None else ColumnCache(model, *cache_shape)

    def __call__(
        self, tokens: Tensor, span: Span, positions: Tensor | None = None, unseen: Tensor | None = None
    ) -> Tensor:
        check_evaluating(self.model, [("", self.model)], self.role)  # `train()` sets the flag here, too
        groups = [[]] if self.cache is None else span.groups()
        whole: Tensor | None = None
        for group in groups:
            rows = to_device(group, tokens.device) if len(groups) > 1 else None
            part, of_part = (tokens, span) if rows is None else (tokens.index_select(0, rows), span.select(group))
            more = [
                each if rows is None or each is None else each.index_select(0, rows) for each in (positions, unseen)
            ]
            inputs = self.inputs(part, of_part, rows, *more)
            # Spares each operation autograd's bookkeeping. Only the output layer reads the hidden states, outside of this
            # mode, so everything computed from its logits is an ordinary tensor.
            with torch.inference_mode():
                computed = self.forward(inputs)
            if rows is None:
                return computed
            if whole is None:
                whole = computed.new_zeros(len(tokens), span.width, computed.shape[-1])
            whole[rows.to(computed.device), : computed.shape[1]] = computed
        assert whole is not None
        return whole

    def forward(self, inputs: dict[str, Any]) -> Tensor:
        """The last hidden states for these arguments of the model's forward: `n q d`."""
        return self.model.base_model(**inputs).last_hidden_state

    def inputs(
        self,
        tokens: Tensor,
        span: Span,
        rows: Tensor | None = None,
        positions: Tensor | None = None,
        unseen: Tensor | None = None,
    ) -> dict[str, Any]:
        """Arguments of the model's forward for this span: ids `n q`, mask `n 1 q k`, positions `n q`, the cache.

        Args:
            tokens: `n l` int64.
            rows: `n` int64, their rows of the cache; `None`: all of them.
            positions, unseen: `n l`, see `Passes`.
        """
        if self.cache is not None:
            self.cache.set_target(span, rows)
        inputs = forward_inputs(self.model, tokens, span, self.attention, self.cache, unseen)
        if positions is not None:
            inputs["position_ids"] = span.ids(positions)
        return on_device(inputs, self.device)

    def select(self, rows: Tensor) -> None:
        if self.cache is not None:
            self.cache.select(rows)

    def join(self, state: DecodeState) -> None:
        if self.cache is not None:
            self.cache.grow(len(state.tokens), state.width + self.attention.margin)


def forward_inputs(
    model: PreTrainedModel,
    tokens: Tensor,
    span: Span,
    attention: Attention,
    cache: ColumnCache | None,
    unseen: Tensor | None = None,
) -> dict[str, Any]:
    """Arguments of `model.base_model` for a span: ids `n q`, mask `n 1 q k`, positions `n q`, the cache.

    Args:
        model: a transformers decoder.
        tokens: `n l` int64.
        span: the columns to compute.
        attention: see `TransformersModel`.
        cache: its target must be set to `span`; `None` without a cache.
        unseen: see `Passes`.
    """
    num_cached, reach = (None, WHOLE_ROW) if cache is None else (cache.num_readable, cache.reach)

    def mask_of(reach: Reach) -> Tensor | None:
        return attention_mask(span.mask(num_cached, attention, reach, unseen), model)

    masks = mask_of(reach) if isinstance(reach, Reach) else {kind: mask_of(each) for kind, each in reach.items()}
    inputs = {"input_ids": span.ids(tokens), "attention_mask": masks, "use_cache": False}
    return inputs | {"position_ids": span.positions} | ({} if cache is None else {cache.argument: cache})


def on_device(inputs: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The same arguments, tensors and dictionaries of tensors moved to `device`."""
    moved = dict(inputs)
    for name, each in inputs.items():
        if isinstance(each, Tensor):
            moved[name] = each.to(device)
        elif isinstance(each, dict):
            moved[name] = on_device(each, device)
    return moved


def check_evaluating(model: PreTrainedModel, modules: Iterable[tuple[str, nn.Module]], role: str) -> None:
    """Refuse a model in training mode, where dropout is active and gradient checkpointing may drop the cache.

    This function does not switch the mode: other threads share the module, and a suspended iterator would leave it
    switched while the caller trains.

    Args:
        model: the model, for the message.
        modules: modules of the model, with their names.
        role: "drafter" or "verifier", for the message.

    Raises:
        ValueError: one of them is in training mode.
    """
    name = next((name for name, module in modules if module.training), None)
    if name is not None:
        what = f"its module `{name}`" if name else f"the {type(model).__name__}"
        raise ValueError(
            f"The {role} must be in evaluation mode, got {what} in training mode: dropout and gradient "
            "checkpointing change what it computes. Call `model.eval()` before decoding, and `model.train()` to go on "
            "training."
        )


def _trains(model: nn.Module) -> bool:
    """True if a module of the model is in training mode. `Module.modules()` takes four times as long, in every call."""
    modules = [model]
    for module in modules:
        modules += filter(None, module._modules.values())
    return any(module.training for module in modules)


def max_positions(config: PreTrainedConfig) -> int | None:
    """The most positions that a row may have; `None` for no limit.

    Some rope types change the angles of all rows of a batch, but not of cached keys, when the longest row exceeds a limit:
    "longrope" beyond `original_max_position_embeddings`, "dynamic" beyond `max_position_embeddings`.
    """
    config = config.get_text_config(decoder=True)
    limit: int | None = getattr(config, "max_position_embeddings", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [each for each in parameters.values() if isinstance(each, Mapping)]
    originals = [
        each.get("original_max_position_embeddings")
        for each in (parameters, *by_layer_type)
        if each.get("rope_type") == "longrope"
    ]
    return min(filter(None, [limit, *originals]), default=None)


def input_device(model: PreTrainedModel) -> torch.device:
    """The device of a model's inputs. Weights that accelerate has offloaded are on "meta" and do not tell it."""
    embeddings = model.get_input_embeddings()
    elsewhere = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return embeddings.weight.device if elsewhere is None else torch.device(elsewhere)


def attention_mask(mask: Tensor | None, model: PreTrainedModel) -> Tensor | None:
    """The mask in the form that the model's attention takes: for eager attention 0 or the least float, else Boolean.

    Eager attention adds the mask to the scores; a Boolean would add 0 and 1.

    Args:
        mask: `b 1 q k` bool, True where a query attends; `None` for no mask.
        model: determines the form and the dtype.
    """
    if mask is None or model.config._attn_implementation != "eager":
        return mask
    dtype = model.get_input_embeddings().weight.dtype
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


@dataclass(frozen=True)
class Projection:
    """Logits of a window's positions, `b m v` in the model's dtype, computed on access: `projection[:, 3:7]`.

    The output layer is the widest matrix product of a small step, so only the requested positions are computed.

    Attributes:
        head: the output layer.
        hidden: `b m d`, last hidden states.
        device: device of the logits.
    """

    head: nn.Module
    hidden: Tensor
    device: torch.device

    @classmethod
    def of_window(cls, head: nn.Module, hidden: Tensor, span: Span, window: Window, shift: int) -> Projection:
        """Logits of a window's columns, each predicted at the column `shift` further right.

        Args:
            head: the output layer.
            hidden: `b q d`, last hidden states of the span's columns.
            shift: 0 or −1.
        """
        offsets = {t + shift - start for t, start in zip(window.starts, span.starts, strict=True)}
        width = window.columns.shape[1]
        if len(offsets) == 1 and (first := min(offsets)) >= 0 and first + width <= hidden.shape[1]:
            return cls(head, hidden[:, first : first + width], window.columns.device)
        return cls.at(head, hidden, window.columns + shift - span.columns[:, :1])

    @classmethod
    def at(cls, head: nn.Module, hidden: Tensor, index: Tensor) -> Projection:
        """Logits of the hidden states at `index`, `b m` int64. Indices outside the row's window are clamped."""
        index = index.clamp(0, hidden.shape[1] - 1)
        at = index.to(hidden.device)[..., None].expand(-1, -1, hidden.shape[-1])
        return cls(head, hidden.gather(1, at), index.device)

    def __getitem__(self, index: tuple[slice, slice] | tuple[Tensor, Tensor]) -> Tensor:
        rows, positions = (each.to(self.hidden.device) if isinstance(each, Tensor) else each for each in index)
        hidden = self.hidden[rows, positions].contiguous()
        # `contiguous` keeps unusual strides of a single row, with which torch computes a batch of products, up to 20 times
        # slower on a CPU. `view` resets the strides.
        return self.head(hidden.view(hidden.shape)).to(self.device)
