"""A model in one line, for `repr`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def described(model: Any) -> str:
    """A drafter or verifier: its class and, of a transformers model, how it is read, its size and its dtype."""
    if model is None:
        return "None"
    name = type(model).__name__
    inner = getattr(model, "model", None)
    if not isinstance(inner, PreTrainedModel):
        return f"{name}(vocab_size={model.vocab_size})"
    said = [type(inner).__name__, f"{_short(sum(each.numel() for each in inner.parameters()))} parameters"]
    said.append(str(inner.dtype).removeprefix("torch."))
    if path := getattr(inner.config, "_name_or_path", ""):
        said.insert(0, repr(path))
    if hasattr(model, "logit_shift"):
        attention = model.attention
        block = f" of {attention.block_size}" if attention.block_size is not None else ""
        said += [f"attention={attention.kind!r}{block}", f"logit_shift={model.logit_shift}"]
    if hasattr(model, "mask_token_id"):
        said.append(f"mask_token_id={model.mask_token_id}")
    return f"{name}({', '.join(said)})"


def _short(count: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.1f}{letter}"
    return str(count)
