"""`Reading`: one way to read a drafter's weights, and the others that a checkpoint may have been trained for."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from apd.inspection.canvases import CheckedDrafter
from apd.models.drafter import MaskedDiffusionDrafter
from apd.models.horizon import CAUSAL, FULL, Attention
from apd.models.masked_lm import MaskedLMDrafter

#: The parts of a reading, each of which may be wrong alone.
Axis = Literal["shift", "mask", "attention"]

#: Block lengths that are tried; families of today use 4 to 64. Blocks of 1 are causal attention.
BLOCK_SIZES = (2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Reading:
    """How a drafter's weights are read.

    Args:
        shift: row i of the logits predicts token i + `shift`.
        mask: id of the mask token.
        attention: which columns see each other.
    """

    shift: int
    mask: int
    attention: Attention

    @classmethod
    def of(cls, drafter: CheckedDrafter) -> Reading:
        """The reading with which the drafter decodes."""
        return cls(drafter.logit_shift, drafter.mask_token_id, drafter.attention)

    def drafter(self, declared: CheckedDrafter) -> CheckedDrafter:
        """The same model, read in this way. Weights are shared."""
        if isinstance(declared, MaskedLMDrafter):
            other = copy.copy(declared)
            other.mask_token_id = self.mask
            return other
        return MaskedDiffusionDrafter(
            declared.model,
            mask_token_id=self.mask,
            logit_shift=self.shift,
            attention=self.attention.kind,
            block_size=self.attention.block_size,
            anchored=self.attention.anchored,
            cache=False,
        )

    def others(self, axis: Axis, masks: Sequence[int]) -> Iterator[Reading]:
        """Readings that differ from this one in one part.

        Args:
            axis: the part.
            masks: other ids that may be the mask token.
        """
        if axis == "shift":
            yield dataclasses.replace(self, shift=1 - self.shift)
        elif axis == "mask":
            yield from (dataclasses.replace(self, mask=mask) for mask in masks if mask != self.mask)
        else:
            blocks = [Attention("block", size) for size in BLOCK_SIZES]
            for attention in (FULL, CAUSAL, Attention("prefix"), *blocks):
                # A limit on a causal or prefix draft does not change what a column sees.
                is_same = attention.kind == self.attention.kind != "block" or attention == self.attention
                if not is_same:
                    yield dataclasses.replace(self, attention=attention)

    def pairs(self, masks: Sequence[int]) -> Iterator[Reading]:
        """Readings that differ from this one in both shift and mask token."""
        yield from dataclasses.replace(self, shift=1 - self.shift).others("mask", masks)


def describe(attention: Attention) -> str:
    """An attention in a few words, such as "block of 32"."""
    if attention.kind == "block":
        return f"block of {attention.block_size}"
    limit = "" if attention.block_size is None else f", drafts {attention.block_size}"
    return f"{attention.kind}{' (anchored)' if attention.anchored else ''}{limit}"
