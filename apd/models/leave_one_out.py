"""Leave-one-out passes: predict each decided column from all other columns, in one pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from apd.decoding.state import to_device
from apd.models.span import Span
from apd.models.transformer import attention_mask, check_evaluating, input_device


@dataclass(frozen=True)
class Shadows:
    """Extra inputs for leave-one-out logits, in k groups of g tokens per row.

    Each group replaces g columns and has their positions. It attends to itself and to every other column; no column
    attends to it.

    Attributes:
        tokens: `b k g` int64, the ids of the group.
        columns: `b k g` int64, the columns that the group replaces.
    """

    tokens: Tensor
    columns: Tensor


def shadowed_hidden_states(model: PreTrainedModel, tokens: Tensor, span: Span, shadows: Shadows) -> Tensor:
    """Last hidden states of the span's columns, then of the shadows, from one bidirectional pass without a cache.

    Args:
        model: a decoder in evaluation mode.
        tokens: `b l` int64.
        span: q columns of each row, starting at the first real one.
        shadows: k groups of g tokens per row.
    Returns:
        `b q+k·g d` in the model's dtype.
    Raises:
        ValueError: the model is in training mode.
    """
    check_evaluating(model, [("", model)], "drafter")
    device = input_device(model)
    padding = to_device(span.paddings, tokens.device)[:, None]
    visible = (span.columns >= padding) & span.real  # b q
    seen = visible[:, None] & (span.columns[:, None, None] != shadows.columns[..., None]).all(2)  # b k q
    num_groups, group = shadows.columns.shape[1:]
    own = torch.eye(num_groups, device=tokens.device).bool()[None].expand(len(tokens), -1, -1)
    of_row = pad(visible[:, None].expand(-1, visible.shape[1], -1), (0, num_groups * group))
    of_shadows = torch.cat([seen, own.repeat_interleave(group, 2)], 2).repeat_interleave(group, 1)
    mask = attention_mask(torch.cat([of_row, of_shadows], 1)[:, None], model)
    assert mask is not None
    positions = torch.cat([span.positions.expand_as(visible), shadows.columns.flatten(1) - padding], 1)
    ids = torch.cat([span.ids(tokens), shadows.tokens.flatten(1)], 1)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return model.base_model(
        **{name: each.to(device) for name, each in inputs.items()}, use_cache=False
    ).last_hidden_state
