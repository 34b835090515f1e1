"""Models that tests share, and small helpers to call them."""

import functools
import json

import torch
from paths import FIXTURES

from apd import APDSampler

TRACES = FIXTURES / "apd_traces"
STOP = 151  # of the recorded pair


@functools.cache
def trace_sampler() -> APDSampler:
    """The lightly trained pair that the recorded traces were made with."""
    return APDSampler.from_pretrained(str(TRACES / "models/dream"), str(TRACES / "models/verifier"))


@functools.cache
def trace_prompts() -> list[list[int]]:
    return json.loads((TRACES / "prompts.json").read_text())["prompts"]


def left_padded(prompts: list[list[int]], width: int | None = None, pad: int = STOP) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` of prompts of any lengths."""
    width = width or max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def new_tokens(output) -> list[list[int]]:
    """The new tokens of every row of an `APDOutput`, as lists."""
    width = output.sequences.shape[1] - int(output.new_tokens.max())
    return [row[width : width + n].tolist() for row, n in zip(output.sequences, output.new_tokens, strict=True)]
