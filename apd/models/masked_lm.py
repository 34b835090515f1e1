"""`MaskedLMDrafter`: a masked LM of transformers (BERT, RoBERTa, ModernBERT, ESM-2, …) drafts every mask in one pass.

Such classes attend both ways without being asked and predict a mask at its own row. What differs is how they count positions
and what they do with padding: absolute positions, positions counted from padding, rotary ones, sliding windows, embeddings
scaled by a row's share of masks. So every row is laid out as if it were alone, from column 0 on with padding behind it, and
its own class computes it.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import BaseModelOutput

from apd.decoding.protocols import Logits
from apd.decoding.state import DecodeState, to_device
from apd.decoding.window import Window
from apd.models.drafter import check_mask_token
from apd.models.horizon import FULL
from apd.models.transformer import Projection, check_evaluating, input_device, max_positions
from apd.models.ways import MOST_DIFFERENCE, UNSUPPORTED, relative_difference

__all__ = ["TRIED", "MaskedLMDrafter", "is_masked_lm", "masked_lm_class", "special_ids"]

#: Model types whose logits, alone and in ragged batches, are compared with their class (`python -m benchmarks.masked_lms`).
TRIED = frozenset(
    {"bert", "deberta", "deberta-v2", "distilbert", "electra", "esm", "modernbert", "roberta", "xlm-roberta"}
)

_SPECIAL_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "cls_token_id", "sep_token_id")


def masked_lm_class(model_type: Any) -> type[PreTrainedModel] | None:
    """transformers' masked LM for a `model_type` in `config.json`; `None` if it has none."""
    if model_type not in CONFIG_MAPPING:
        return None
    return MODEL_FOR_MASKED_LM_MAPPING.get(CONFIG_MAPPING[model_type], None)


def is_masked_lm(model_class: type) -> bool:
    """True if the class, or one that it extends, is a masked LM of transformers."""
    config_class = getattr(model_class, "config_class", None)
    known = None if config_class is None else MODEL_FOR_MASKED_LM_MAPPING.get(config_class, None)
    return known is not None and issubclass(model_class, known)


def check_masked_lm(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> None:
    """Refuse masked LMs that read more than one text: encoder–decoders, and models of images or page layouts.

    Raises:
        ValueError: it is one of those.
    """
    if getattr(config, "is_encoder_decoder", False):
        reads = "has an encoder and a decoder, and fills masks by writing the text again"
    elif model_class.input_modalities not in ("text", ("text",)):
        reads = "reads images, too"
    elif "bbox" in inspect.signature(model_class.forward).parameters:
        reads = "reads the place of each token on a page, too"
    elif getattr(config, "is_decoder", False) or getattr(config, "causal", False):
        reads = "is set up as a causal model by its config (`is_decoder` or `causal`)"
    else:
        return
    raise ValueError(
        f"A masked LM that drafts must predict masks from token ids that it sees both ways, but {model_class.__name__} {reads}. "
        "Choose an encoder of text, such as BERT, RoBERTa, ModernBERT or ESM-2."
    )


def special_ids(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Ids of the special tokens that a config or a tokenizer names, ascending: [CLS], [SEP], [PAD], [UNK], [MASK], …"""
    named = [getattr(config, name, None) for name in _SPECIAL_FIELDS]
    named += getattr(tokenizer, "all_special_ids", None) or []
    flat = [id for ids in named for id in (ids if isinstance(ids, Sequence) else [ids])]
    return sorted({id for id in flat if isinstance(id, int) and id >= 0})


class MaskedLMDrafter:
    """A drafter from a masked LM of transformers. It keeps no keys between passes.

    Args:
        model: an instance of a class of transformers' masked-LM mapping, in evaluation mode.
        mask_token_id: id of the mask token, in `[0, vocab_size)`.
        never_drawn: ids that are never drawn unless they are stop tokens, such as those of [CLS] and [PAD].
        generation_config: stop and pad ids; by default those of the model's config.

    Attributes:
        max_length: most tokens of a row, those behind RoBERTa's offset left out.
        pads: rows of different lengths share a pass, padded on the right. False for classes that would read the padding:
            there every length has a pass of its own.
        splits: the output layers are computed at the window's columns only. False for classes whose logits are not a function
            of the last hidden states: there every column is.

    Raises:
        ValueError: `mask_token_id` is not in the vocabulary; the model reads more than one text; its logits of a row depend
            on other rows or on chance; or it is in training mode.
    """

    role = "drafter"
    attention = FULL
    logit_shift = 0
    reads_causally = False
    keeps_keys = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        mask_token_id: int,
        never_drawn: Iterable[int] = (),
        generation_config: GenerationConfig | None = None,
    ) -> None:
        check_masked_lm(type(model), model.config)
        check_evaluating(model, model.named_modules(), self.role)
        self.model = model
        self.mask_token_id = mask_token_id
        self.vocab_size: int = model.config.vocab_size
        check_mask_token(mask_token_id, self.vocab_size)
        self.never_drawn = sorted({*never_drawn} - {mask_token_id})
        if generation_config is None:
            ids = {name: getattr(model.config, name, None) for name in _SPECIAL_FIELDS[:3]}
            generation_config = GenerationConfig(**ids)
        self.generation_config = generation_config
        self.max_length = _max_length(model)
        self.pads, self.splits = _find_way(model, mask_token_id)

    @property
    def unseen_id(self) -> int:
        """What stands in columns that nobody sees: a word, since some classes count masks or padding by their ids."""
        return _words(self.model.config, self.mask_token_id)[0]

    @cached_property
    @torch.no_grad()
    def hides(self) -> bool:
        """True if columns in the middle of a row, left out by the attention mask, are not read. Runs the model on a few tokens."""
        words = _words(self.model.config, self.mask_token_id)
        row = [words[i % len(words)] for i in range(8)]
        rows = torch.tensor([row, [*row[:3], *words[-2:], *row[5:]]], device=self.device)
        mask = torch.ones_like(rows)
        mask[:, 3:5] = 0
        found = _logits_of(self.model)(rows, mask)[:, [0, 1, 2, 5, 6, 7]]
        return self.pads and relative_difference(found[0], found[1]) <= MOST_DIFFERENCE.get(self.model.dtype, 2e-2)

    @property
    def device(self) -> torch.device:
        return input_device(self.model)

    def open(self, state: DecodeState) -> MaskedLMSession:
        check_evaluating(self.model, self.model.named_modules(), self.role)
        return MaskedLMSession(self)


@dataclass(frozen=True)
class Canvas:
    """What the model sees of each row. A row's first real token is in column 0, and padding is behind its end.

    Attributes:
        ids: `b n` int64.
        mask: `b n` int64, 1 at columns that are seen.
        lengths: columns of each row, host integers.
    """

    ids: Tensor
    mask: Tensor
    lengths: Sequence[int]

    @classmethod
    def of_rows(cls, tokens: Tensor, starts: Sequence[int], ends: Sequence[int], pad_token_id: int) -> Canvas:
        """The columns `starts … ends − 1` of `tokens`, `b l` int64.

        Args:
            pad_token_id: the id behind a row's end. Classes that count positions from padding need their own.
        """
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        first, length = to_device([list(starts), lengths], tokens.device)[..., None].unbind()
        column = torch.arange(max(lengths), device=tokens.device)
        inside = column < length
        ids = tokens.gather(1, (first + column).clamp(max=tokens.shape[1] - 1))
        return cls(torch.where(inside, ids, pad_token_id), inside.long(), lengths)

    def run(self, forward: Callable[[Tensor, Tensor], Tensor], *, pads: bool) -> Tensor:
        """`forward(ids, mask)` of the rows, `b n x`, in one pass or, without `pads`, in a pass per length."""
        distinct = sorted(set(self.lengths))
        if pads or len(distinct) == 1:
            return forward(self.ids, self.mask)
        whole: Tensor | None = None
        for length in distinct:
            at = [row for row, each in enumerate(self.lengths) if each == length]
            rows = to_device(at, self.ids.device)
            part = forward(*(each.index_select(0, rows)[:, :length] for each in (self.ids, self.mask)))
            if whole is None:
                whole = part.new_zeros(*self.ids.shape, part.shape[-1])
            whole[rows.to(part.device), :length] = part
        assert whole is not None
        return whole


class MaskedLMSession:
    """Computes the canvas of each row in each pass; remembers nothing of a row."""

    def __init__(self, drafter: MaskedLMDrafter) -> None:
        self.drafter = drafter
        self.head = Head(drafter.model) if drafter.splits else None

    def logits(self, state: DecodeState, window: Window) -> Logits:
        drafter, model = self.drafter, self.drafter.model
        check_evaluating(model, [("", model)], drafter.role)
        canvas = self.visible(state, window)
        index = (window.columns - state.padding[:, None]).clamp(0, canvas.ids.shape[1] - 1)
        forward = _logits_of(model) if self.head is None else _hidden_of(model)
        # Only the output layers run outside of this mode, so what is computed from logits are ordinary tensors.
        with torch.inference_mode():
            found = canvas.run(forward, pads=drafter.pads)
        if self.head is not None:
            return Projection.at(self.head, found, index)
        at = index.to(found.device)[..., None].expand(-1, -1, found.shape[-1])
        return found.gather(1, at).to(index.device)

    def canvas_logits(self, state: DecodeState, window: Window, rows: Tensor) -> Logits:
        return self.logits(state, window)

    def visible(self, state: DecodeState, window: Window) -> Canvas:
        """What the pass sees: the columns from each row's first real token to its window's end, and what is given behind it.

        Raises:
            ValueError: a mask behind the window stands before a given token, and the class reads columns that are left out.
        """
        pad, ends = _pad_token_id(self.drafter.model.config), window.ends
        if not state.has_holes:
            return Canvas.of_rows(state.tokens, state.layout.padding, ends, pad)
        far = [max(end, given) for end, given in zip(ends, state.layout.given_end, strict=True)]
        canvas = Canvas.of_rows(state.tokens, state.layout.padding, far, pad)
        first, end = to_device([list(state.layout.padding), list(ends)], state.tokens.device)[..., None].unbind()
        column = first + torch.arange(canvas.ids.shape[1], device=first.device)
        is_open = ~state.decided.gather(1, column.clamp(max=state.width - 1))
        unseen = is_open & (column >= end) & canvas.mask.bool()
        if not bool(unseen.any()):
            return canvas
        if not self.drafter.hides:
            raise ValueError(
                f"`window_size` must be None with holes and a {type(self.drafter.model).__name__}, got a window that ends before a "
                "hole: the class reads columns that its attention mask leaves out. Leave out `window_size`."
            )
        ids = canvas.ids.masked_fill(unseen, self.drafter.unseen_id)
        return Canvas(ids, canvas.mask * ~unseen, canvas.lengths)

    def select(self, rows: Tensor) -> None:
        pass

    def join(self, state: DecodeState) -> None:
        pass


class _Given(nn.Module):
    """In the place of an encoder: its last hidden states are those that come in."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=inputs_embeds)


class Head(nn.Module):
    """What a masked LM computes behind its encoder: from hidden states `b k d` to logits `b k v`, by the class's own forward.

    The class runs on a twin of the model that shares all of its parts but the encoder.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        twin = copy.copy(model)
        twin.__dict__["_modules"] = {**model._modules, model.base_model_prefix: _Given()}
        self.compute = lambda hidden: type(model).forward(twin, inputs_embeds=hidden).logits

    def forward(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.compute(hidden)
        return logits


def _hidden_of(model: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda ids, mask: model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state


def _logits_of(model: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits


def _pad_token_id(config: PreTrainedConfig) -> int:
    pad: int | None = getattr(config, "pad_token_id", None)
    return 0 if pad is None else pad


def _max_length(model: PreTrainedModel) -> int | None:
    """The most tokens that have a position each. RoBERTa and its kin number them from behind the pad token's id."""
    limit = max_positions(model.config)
    if limit is None:
        return None
    counting = [m for m in model.modules() if not isinstance(m, nn.Embedding) and hasattr(m, "padding_idx")]
    offsets = [module.padding_idx + 1 for module in counting if isinstance(module.padding_idx, int)]
    return limit - max(offsets, default=0)


def _words(config: PreTrainedConfig, mask_token_id: int) -> list[int]:
    """Some ids of ordinary tokens."""
    avoided = {mask_token_id, *special_ids(config, None)}
    return [id for id in range(config.vocab_size) if id not in avoided][:40] or [mask_token_id]


#: Tokens of the rows that `_find_way` runs.
_LENGTHS = (11, 6, 11)


@torch.no_grad()
def _find_way(model: PreTrainedModel, mask_token_id: int) -> tuple[bool, bool]:
    """`pads` and `splits` of a model, the fastest that give every row its logits alone. Runs it on a few tokens.

    Raises:
        ValueError: there is none.
    """
    words = _words(model.config, mask_token_id)
    rows = [[words[(7 * i + 3 * row) % len(words)] for i in range(n)] for row, n in enumerate(_LENGTHS)]
    for row in rows:
        row[-2:] = [mask_token_id, mask_token_id]
    device, pad = input_device(model), _pad_token_id(model.config)
    tokens = torch.tensor([row + [pad] * (max(_LENGTHS) - len(row)) for row in rows], device=device)
    canvas = Canvas.of_rows(tokens, [0] * len(rows), _LENGTHS, pad)
    most, reason = MOST_DIFFERENCE.get(model.dtype, 2e-2), ""
    try:
        forward = _logits_of(model)
        alone = [
            forward(tokens[i : i + 1, :n], torch.ones_like(tokens[i : i + 1, :n]))[0] for i, n in enumerate(_LENGTHS)
        ]
        for pads in (True, False):
            found = canvas.run(forward, pads=pads)
            worst = max(relative_difference(one[:n], own) for one, own, n in zip(found, alone, _LENGTHS, strict=True))
            if worst <= most:
                return pads, _splits(model, canvas, found, pads=pads)
        reason = f"its logits differ by {worst:.2g} of the largest"
    except torch.OutOfMemoryError:
        raise
    except UNSUPPORTED as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    raise ValueError(
        f"A masked LM that drafts must compute a row in a batch as it does alone, which {type(model).__name__} does not "
        f"({reason}). Choose another, such as BERT, RoBERTa, ModernBERT or ESM-2."
    )


def _splits(model: PreTrainedModel, canvas: Canvas, logits: Tensor, *, pads: bool) -> bool:
    """True if the logits of some columns follow from the last hidden states of these columns alone."""
    if model.base_model_prefix not in model._modules:
        return False
    at = torch.tensor([[4, 1, 5]], device="cpu").expand(len(canvas.lengths), -1)
    try:
        hidden = canvas.run(_hidden_of(model), pads=pads)
        found = Projection.at(Head(model), hidden, at)[:, :]
    except torch.OutOfMemoryError:
        raise
    except UNSUPPORTED:
        return False
    expected = logits.cpu().gather(1, at[..., None].expand(-1, -1, logits.shape[-1]))
    if found.shape != expected.shape:
        return False
    return relative_difference(found, expected) <= MOST_DIFFERENCE.get(model.dtype, 2e-2)


def warn_if_untried(model_type: str, name: str, path: object = "PATH") -> None:
    """Warn of a masked LM whose class was not tried with this library.

    Args:
        name: the class.
        path: the checkpoint, for the command.
    """
    if model_type not in TRIED:
        warnings.warn(
            f"{name} was not tried with this library: only a few tokens were compared when it was loaded. Run `apd check "
            f"--drafter {path}` before you rely on it.",
            stacklevel=4,
        )
