"""Prompts as ids: one tensor, padded on the left, of tokens that both models know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from apd.config import KNOBS
from apd.generation.elsewhere import refuse_unknown
from apd.generation.support import REFUSED, SUPPORTED, warn
from apd.included import BLOCK_DRAFTER_DIR, DRAFTER_DIR
from apd.included.known import ABOUT, why_unknown

_INCLUDED = {str(DRAFTER_DIR), str(BLOCK_DRAFTER_DIR)}


def one_prompt(inputs: Any, kwargs: dict[str, Any]) -> Any:
    """The prompt, given as `inputs` or as `kwargs["input_ids"]`, which is removed.

    Raises:
        ValueError: both are given, or neither.
        TypeError: neither is given, but an argument that is unknown; the message has what it becomes here.
    """
    if inputs is not None and kwargs.get("input_ids") is not None:
        raise ValueError("The prompt must be given once, got both `inputs` and `input_ids`.")
    input_ids = kwargs.pop("input_ids", None)
    if inputs is None and input_ids is None:
        refuse_unknown(
            kwargs, [*SUPPORTED, *REFUSED, *KNOBS], "generate()"
        )  # `prompt=` says more than that there is none
        raise ValueError("`input_ids` must hold at least one prompt token, got none. Start with a BOS or a prompt.")
    return input_ids if inputs is None else inputs


def checked_ids(prompt: Any) -> Tensor:
    """`prompt` as `b l` int64, at least one row and one column.

    Raises:
        TypeError: not a tensor of integers.
        ValueError: not two dimensions, or empty.
    """
    if isinstance(prompt, Mapping):
        raise TypeError(
            f"`input_ids` must be a tensor, got a whole {type(prompt).__name__}. Write two stars, "
            "`generate(**inputs)`: its attention mask counts, too."
        )
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


def left_padding(
    prompt: Tensor, attention_mask: Tensor | None, pad_token_id: int | None, stop_token_ids: list[int]
) -> Tensor:
    """Columns of left padding per row, `b` int64.

    Args:
        prompt: `b l` int64.
        attention_mask: `b l`, 0 at padding; `None` infers it from `pad_token_id`.

    Raises:
        TypeError: the mask is not a tensor.
        ValueError: the mask has another shape, a row is all padding, or padding is not on the left.
    """
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
    """True at real tokens, `b l`, inferred from the pad token as in transformers."""
    if pad_token_id is None or not (prompt == pad_token_id).any():
        return torch.ones_like(prompt, dtype=torch.bool)
    if pad_token_id in stop_token_ids:
        warn(
            "`attention_mask` cannot be inferred, since the pad token is a stop token too; nothing is taken for "
            "padding. Pass `attention_mask`."
        )
        return torch.ones_like(prompt, dtype=torch.bool)
    return prompt != pad_token_id


def check_tokens(prompt: Tensor, padding: Tensor, *, vocab_size: int, mask_token_id: int) -> None:
    """Refuse ids that one of the models does not have, outside the padding and the holes.

    Args:
        prompt: `b l` int64.
        padding: `b` int64, columns of left padding.
        vocab_size: number of shared ids.

    Raises:
        ValueError: a foreign id.
    """
    lowest, highest = prompt.aminmax()
    if lowest >= 0 and highest < vocab_size:
        return  # the usual case, for which a server has no time to look at each column
    real = torch.arange(prompt.shape[1], device=prompt.device) >= padding[:, None]
    foreign = real & (prompt != mask_token_id) & ((prompt < 0) | (prompt >= vocab_size))
    if foreign.any():
        raise ValueError(
            f"`input_ids` must be below {vocab_size}, the vocabulary that the models share, got "
            f"{int(prompt[foreign][0])}. Was the prompt encoded with another tokenizer?"
        )


def warn_of_unknown_prompts(prompt: Tensor, tokenizer: Any) -> None:
    """Warn of a prompt, `b l` int64, with the tokenizer's unknown token, or, of the included pair, of another form than its tasks."""
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is None:
        return
    padding, mask = tokenizer.pad_token_id, tokenizer.mask_token_id  # tokenizers look ids up each time
    if unknown in (padding, tokenizer.eos_token_id):
        return  # the unknown token has another use too
    if getattr(tokenizer, "name_or_path", None) in _INCLUDED:
        for row in prompt.tolist():
            ids = [token for token in row if token != padding]
            reason = None if mask in ids else why_unknown(tokenizer.decode(ids))
            if reason is not None:
                warn(f"The prompt is none of those that the included pair was trained on: {reason}. {ABOUT}")
                return
    if (prompt == unknown).any():
        warn(
            "The prompt has words that the tokenizer does not know; they became its unknown token. The models cannot "
            "read them."
        )


def only_row(prompt: Tensor) -> Tensor:
    """`prompt` if it has one row, `1 l`.

    Raises:
        ValueError: several rows.
    """
    if len(prompt) != 1:
        raise ValueError(
            f"`streamer` must be given one row, got {len(prompt)}: streamers of transformers take one. Use "
            "`sampler.stream(...)`, which tells rows apart."
        )
    return prompt
