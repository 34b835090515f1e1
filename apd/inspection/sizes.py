"""The sizes of a model that determine what it costs, counted on its modules; they may be on the meta device."""

from __future__ import annotations

import math
from dataclasses import dataclass

from transformers import PreTrainedConfig, PreTrainedModel

#: Layers that keep a state in place of keys and values.
_RECURRENT = ("linear", "mamba", "recurrent", "conv", "ssm")


@dataclass(frozen=True)
class ModelSize:
    """The sizes that determine what a model costs.

    Attributes:
        name: class that computes it.
        parameters: all weights, shared ones once.
        read: weights that a pass over one token reads: all but the embedding table, and of experts those that it is routed to.
        multiplied: those of them that are matrices of the decoder, the output layer left out.
        head: weights of the output layer's matrix.
        hidden, intermediate, vocab: d, widest layer of the feed-forward part per token, v.
        layers: layers that keep keys and values.
        query_width: query heads × head dimension.
        key_width, value_width: key heads × head dimensions, of what a layer keeps per column.
        item: bytes of a number.
        remarks: what is not counted.
    """

    name: str
    parameters: int
    read: int
    multiplied: int
    head: int
    hidden: int
    intermediate: int
    vocab: int
    layers: int
    query_width: int
    key_width: int
    value_width: int
    item: int
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: PreTrainedModel, *, quantised: bool = False) -> ModelSize:
        """The sizes of a model, whose weights may be on the meta device."""
        config = model.config.get_text_config(decoder=True)
        head, table = model.get_output_embeddings(), model.get_input_embeddings().weight
        share = _expert_share(config)
        used = {
            name: math.ceil(weight.numel() * (share if "experts" in name.split(".") else 1))
            for name, weight in model.named_parameters()
            if weight is not table or table is head.weight
        }
        matrices = {name for name, weight in model.named_parameters() if weight.ndim > 1 and weight is not head.weight}
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_heads = getattr(config, "num_key_value_heads", None) or heads
        key_dim, value_dim = (getattr(config, name, None) or head_dim for name in ("qk_head_dim", "v_head_dim"))
        kinds = getattr(config, "layer_types", None) or ["attention"] * config.num_hidden_layers
        recurrent = sum(any(word in kind for word in _RECURRENT) for kind in kinds)
        remarks = []
        if recurrent:
            remarks.append(
                f"{recurrent} recurrent layers: their states and operations beside the weights are not counted"
            )
        if share < 1:
            remarks.append("experts: a pass is taken to read those of one token only")
        if quantised:
            remarks.append("stored quantised: the bytes are those of unpacked weights")
        return cls(
            name=type(model).__name__,
            parameters=sum(weight.numel() for weight in model.parameters()),
            read=sum(used.values()),
            multiplied=sum(number for name, number in used.items() if name in matrices),
            head=head.weight.numel(),
            hidden=config.hidden_size,
            intermediate=_intermediate(config),
            vocab=config.vocab_size,
            layers=len(kinds) - recurrent,
            query_width=heads * key_dim,
            key_width=key_heads * key_dim,
            value_width=key_heads * value_dim,
            item=table.element_size(),
            remarks=tuple(remarks),
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights."""
        return self.parameters * self.item

    def cache_bytes(self, rows: int, columns: int) -> int:
        """Bytes of the keys and values of a batch; one entry per row takes what fillers write."""
        return rows * (columns + 1) * self.layers * (self.key_width + self.value_width) * self.item


def _expert_share(config: PreTrainedConfig) -> float:
    """The share of a layer's experts that a token is routed to; 1 without experts."""
    names = ("num_experts", "n_routed_experts", "num_local_experts")
    experts = next((number for name in names if (number := getattr(config, name, None))), None)
    used = getattr(config, "num_experts_per_tok", None)
    return used / experts if experts and used else 1.0


def _intermediate(config: PreTrainedConfig) -> int:
    """Widest layer of the feed-forward part, per token."""
    per_expert = getattr(config, "moe_intermediate_size", None) if _expert_share(config) < 1 else None
    routed = per_expert * config.num_experts_per_tok if per_expert else 0
    return max(routed, getattr(config, "intermediate_size", 0) or 0)
