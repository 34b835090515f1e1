"""Attention for models whose query heads share keys, without a copy of the keys for every head.

With a mask transformers' "sdpa" repeats keys and values for each query head of a group, since torch's fused kernels
for CUDA take no `enable_gqa` beside a mask. A causal model with a cache always has one, so do ragged rows and compiled
passes, and in a narrow pass over many keys these copies are most of the work.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

__all__ = ["GROUPED", "group_heads", "grouped_sdpa"]

# transformers' own, by the public name rather than by the module that it is in.
sdpa_attention_forward, sdpa_mask = AttentionInterface()["sdpa"], AttentionMaskInterface()["sdpa"]

#: What transformers knows it by. It refuses a name with "sdpa" in it for models that cannot do that.
GROUPED = "grouped_sdpa"

#: What models hand over besides, and "sdpa" does not look at either.
_WITHOUT_EFFECT = ("cache_position", "is_causal", "position_ids", "sliding_window", "use_cache")


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' "sdpa", where the g heads that share keys are g times as many queries of one head.

    The same up to rounding. What gains nothing by it, or is not known here, goes to "sdpa" itself.

    Args:
        module: the attention layer.
        query: `b (h g) q d`.
        key, value: `b h k d`.
        attention_mask: `b 1 q k`, bool or added to the scores; anything else goes to "sdpa".
        dropout, scaling, **kwargs: as in transformers' attention functions.
    Returns:
        `b q (h g) d`, contiguous, and no weights.
    Source: `pack_gqa` of FlashAttention 3; from 5.23 on, transformers' "sdpa" does it for a single query.
    """
    num_heads, num_queries = query.shape[1:3]
    num_shared, size = key.shape[1], key.shape[3]
    asks_more = [name for name, on in kwargs.items() if not (on is None or on is False or name in _WITHOUT_EFFECT)]
    if (
        attention_mask is None  # there are kernels for groups without one
        or attention_mask.dim() != 4
        or attention_mask.shape[1] != 1
        or num_heads == num_shared
        or num_heads % num_shared
        or num_queries > num_shared * size  # the packed mask is a copy as well, then larger than the repeated keys
        or dropout
        or asks_more
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    group = num_heads // num_shared
    attended = scaled_dot_product_attention(
        rearrange(query, "b (h g) q d -> b h (g q) d", g=group),
        key,
        value,
        attn_mask=repeat(attention_mask.expand(-1, -1, num_queries, -1), "b 1 q k -> b 1 (g q) k", g=group),
        scale=scaling,
    )
    return rearrange(attended, "b h (g q) d -> b q (h g) d", g=group).contiguous(), None


AttentionInterface.register(GROUPED, grouped_sdpa)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


def group_heads(model: PreTrainedModel, asked: str | None) -> None:
    """Let a model that was loaded with "sdpa" use `grouped_sdpa` where heads share keys, or where it was asked for.

    A model with attention code of its own, such as Falcon, stays as it is, and transformers says so.
    """
    num_heads = getattr(model.config, "num_attention_heads", None)
    shares = getattr(model.config, "num_key_value_heads", num_heads) not in (None, num_heads)
    if model.config._attn_implementation == "sdpa" and (asked == GROUPED or (asked is None and shares)):
        model.set_attn_implementation(GROUPED)
