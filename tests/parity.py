"""Do the families compute what their published code computes? Largest difference to the recorded logits, as a table.

Run `python tests/parity.py` from the repository root. What was recorded, and how, is in `fixtures/parity_*/NOTES.md`.
"""

from collections.abc import Callable

import torch
from paths import FIXTURES
from safetensors.torch import load_file
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from apd.models.cache import cache_argument
from apd.models.loading import load_drafter

FAMILIES = {"dream": "parity_dream", "llada": "parity_llada", "a2d-qwen3": "parity_a2d_qwen3"}
# Of the largest logit: 30 units in the last place of float32. Recorded and computed in float32, either is off by up to
# 20 of them from the same weights in float64, and no more from each other (largest: 1.6e-5 where logits reach 20).
TOLERANCE = 4e-6

Record = dict[str, Tensor]
Case = tuple[Tensor, Tensor]  # computed and recorded logits of the rows that are to be compared


def load(family: str, implementation: str) -> tuple[PreTrainedModel, Record]:
    directory = FIXTURES / FAMILIES[family]
    mask_token_id = 60 if family == "a2d-qwen3" else None  # the only one whose config does not say it
    drafter = load_drafter(directory, mask_token_id=mask_token_id, attn_implementation=implementation)
    return drafter.model, load_file(directory / "parity.safetensors")


def plain(name: str) -> Callable[[PreTrainedModel, Record], Case]:
    def run(model: PreTrainedModel, record: Record) -> Case:
        positions = record.get(f"{name}.position_ids")
        return model(record[f"{name}.input_ids"], position_ids=positions).logits, record[f"{name}.logits"]

    return run


def padded(name: str, dimensions: int) -> Callable[[PreTrainedModel, Record], Case]:
    def run(model: PreTrainedModel, record: Record) -> Case:
        real = record["pad.attention_mask"].bool()
        mask = real.long()
        if dimensions == 4:
            mask = real[:, None, None, :].expand(-1, 1, real.shape[1], -1)
            if model.config._attn_implementation == "eager":  # it adds the mask to the scores
                mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        positions = record.get(f"{name}.position_ids", torch.arange(real.shape[1])[None])
        logits = model(record["pad.input_ids"], attention_mask=mask, position_ids=positions).logits
        return logits[real], record[f"{name}.logits"][real]

    return run


def prefill(name: str) -> Callable[[PreTrainedModel, Record], Case]:
    def run(model: PreTrainedModel, record: Record) -> Case:
        return model(record[f"{name}.prefill_ids"]).logits, record[f"{name}.prefill_logits"]

    return run


def window(name: str) -> Callable[[PreTrainedModel, Record], Case]:
    """The window is recomputed over what the first pass left in the cache outside of it."""

    def run(model: PreTrainedModel, record: Record) -> Case:
        ids, cache = record[f"{name}.window_ids"], DynamicCache(config=model.config)
        keys = {cache_argument(type(model)): cache}
        model(record[f"{name}.prefill_ids"], **keys)
        if name == "dual":
            start = int(record["dual.replace_position"][0].nonzero()[0])
        else:
            start = int(record[f"{name}.crop"])
        end = start + ids.shape[1] if name == "dual" else record[f"{name}.prefill_ids"].shape[1]
        for layer in cache.layers:  # keys carry their positions, so their order in the cache does not matter
            layer.keys = torch.cat([layer.keys[:, :, :start], layer.keys[:, :, end:]], dim=2)
            layer.values = torch.cat([layer.values[:, :, :start], layer.values[:, :, end:]], dim=2)
        positions = start + torch.arange(ids.shape[1])[None]
        return model(ids, position_ids=positions, **keys).logits, record[f"{name}.window_logits"]

    return run


_EVERYWHERE = {
    "full": plain("full"),
    "batch": plain("batch"),
    "pad 2-D": padded("pad", 2),
    "pad 4-D": padded("pad", 4),
}
CASES: dict[str, dict[str, Callable[[PreTrainedModel, Record], Case]]] = {
    "dream": _EVERYWHERE | {"far": plain("far"), "cache prefill": prefill("cache"), "cache window": window("cache")},
    "llada": _EVERYWHERE
    | {"prefix prefill": prefill("prefix"), "prefix window": window("prefix"), "dual window": window("dual")},
    "a2d-qwen3": _EVERYWHERE | {"padpos 2-D": padded("padpos", 2), "padpos 4-D": padded("padpos", 4)},
}


@torch.no_grad()
def difference(family: str, case: str, implementation: str) -> tuple[float, float]:
    """Largest absolute difference between our logits and the recorded ones, and the largest recorded logit."""
    computed, recorded = CASES[family][case](*load(family, implementation))
    assert computed.shape == recorded.shape
    return float((computed - recorded).abs().max()), float(recorded.abs().max())


if __name__ == "__main__":
    names = ("grouped_sdpa", "sdpa", "eager")
    print(f"{'family':<12}{'case':<18}{'largest logit':>15}" + "".join(f"{name:>14}" for name in names))
    for family, cases in CASES.items():
        for case in cases:
            found = [difference(family, case, name) for name in names]
            print(f"{family:<12}{case:<18}{found[0][1]:>15.1f}" + "".join(f"{gap:>14.1e}" for gap, _ in found))
