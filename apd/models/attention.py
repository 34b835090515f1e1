"""Grouped-query attention that does not copy the keys for every query head.

With a mask, transformers' "sdpa" repeats keys and values for each query head of a group, because torch's fused CUDA
kernels do not take a mask together with `enable_gqa`. Causal models with a cache, ragged rows and compiled passes always
have a mask, and in a narrow pass over many keys these copies are most of the work.
"""

from __future__ import annotations

from typing import Any

from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

__all__ = ["GROUPED", "group_heads", "grouped_sdpa"]

# transformers' own functions, looked up by their public name: their module may move.
sdpa_attention_forward, sdpa_mask = AttentionInterface()["sdpa"], AttentionMaskInterface()["sdpa"]

#: The name under which transformers finds the function. transformers refuses names that contain "sdpa" for models that
#: do not support sdpa.
GROUPED = "grouped_sdpa"

#: Arguments that models pass and "sdpa" ignores.
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
    """Scaled dot-product attention with the g query heads of a group packed into one head with g times as many queries.

    Equals transformers' "sdpa" up to rounding. Calls that gain nothing, or that pass unknown arguments, go to "sdpa".

    Args:
        module: the attention layer.
        query: `b (h g) q d`, any float dtype.
        key, value: `b h k d`, the dtype of `query`.
        attention_mask: `b 1 q k`, bool (True attends) or float (added to the scores); other shapes go to "sdpa".
        dropout, scaling, **kwargs: as in transformers' attention functions.
    Returns:
        `b q (h g) d`, contiguous, in the dtype of `query`; and `None`, since no attention weights are computed.
    Source: `pack_gqa` of FlashAttention 3; from 5.23 on, transformers' "sdpa" does it for a single query.
    """
    num_heads, num_queries = query.shape[1:3]
    num_shared, size = key.shape[1], key.shape[3]
    unknown = [name for name, on in kwargs.items() if not (on is None or on is False or name in _WITHOUT_EFFECT)]
    if (
        attention_mask is None  # torch has grouped kernels for calls without a mask
        or attention_mask.dim() != 4
        or attention_mask.shape[1] != 1
        or num_heads == num_shared
        or num_heads % num_shared
        or num_queries > num_shared * size  # the packed mask would be larger than the repeated keys
        or dropout
        or unknown
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


def group_heads(model: PreTrainedModel, requested: str | None) -> None:
    """Switch a model loaded with "sdpa" to `grouped_sdpa` if its heads share keys or the caller requested it.

    transformers warns about models with their own attention code, such as Falcon, and leaves them unchanged.

    Args:
        model: a loaded model.
        requested: the caller's `attn_implementation`.
    """
    num_heads = getattr(model.config, "num_attention_heads", None)
    shares = getattr(model.config, "num_key_value_heads", num_heads) not in (None, num_heads)
    if model.config._attn_implementation == "sdpa" and (requested == GROUPED or (requested is None and shares)):
        model.set_attn_implementation(GROUPED)
