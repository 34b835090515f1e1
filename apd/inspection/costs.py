"""What a decode costs, from `config.json` alone: bytes of memory, and bytes and operations of a pass.

`docs/cost.md` has the formulas. Parameters are counted on the meta device, which holds no numbers; times are lower bounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from apd.config import APDConfig, check_count
from apd.decoding.state import FIRST_COMMIT_RATE
from apd.decoding.window import AutoWindow
from apd.inspection.sizes import ModelSize
from apd.models.checkpoint import Checkpoint
from apd.models.horizon import Attention
from apd.models.loading import SELF, check_reads_causally, drafter_config, drafter_family, verifier_config

#: float32 copies of the window's logits that are alive at once, as counted in tests/inspection/test_costs.py.
COPIES = {"alone": 2, "coupling": 4, "rejection": 8}


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes:
        rows: rows, b.
        columns: columns of each row that are computed, q.
        keys: columns that they see, their own included.
        projected: columns whose logits are computed, m.
    """

    rows: int
    columns: int
    keys: int
    projected: int

    def operations(self, size: ModelSize) -> int:
        """Floating-point operations of the matrix products, a multiplication and an addition each."""
        products = size.multiplied * self.columns + size.head * self.projected
        attention = self.columns * self.keys * size.layers * 2 * size.query_width
        return 2 * self.rows * (products + attention)

    def bytes_read(self, size: ModelSize) -> int:
        """Bytes of the weights, of the embeddings of the computed tokens, and of the keys and values that are kept."""
        cached = self.rows * (self.keys - self.columns) * size.layers * (size.key_width + size.value_width)
        return size.item * (size.read + self.rows * self.columns * size.hidden + cached)

    def activation_bytes(self, size: ModelSize) -> int:
        """About the bytes of a layer's intermediate results, and of the attention mask."""
        return (
            self.rows * self.columns * (size.item * (3 * size.hidden + 3 * size.intermediate) + size.item * self.keys)
        )

    def seconds(self, size: ModelSize, bandwidth: float, rate: float) -> float:
        """The least time of this pass: the longer of reading and computing, with all else for free.

        Args:
            bandwidth: bytes per second.
            rate: operations per second.
        """
        return max(self.bytes_read(size) / bandwidth, self.operations(size) / rate)


@dataclass(frozen=True)
class Load:
    """What is decoded.

    Attributes:
        rows: rows of the batch, b.
        prompt: tokens of each prompt, p.
        new_tokens: tokens of each answer, N.
        config: the knobs; `window_size` (M) and `kv_window` (W) matter here.
        canvases: canvases of a row that the drafter computes in a pass, at most. More than one are those of checked decoding, whose
            verifier proposes one token after the other.
        masks: masks of a canvas whose logits are computed, at most; `None`: all of the window.
    """

    rows: int
    prompt: int
    new_tokens: int
    config: APDConfig
    canvases: int = 1
    masks: int | None = None

    def __post_init__(self) -> None:
        for name in ("rows", "prompt", "new_tokens", "canvases"):
            check_count(name, getattr(self, name), "It counts rows, tokens or canvases")

    def window(self, committed: int, per_step: int, attention: Attention, shift: int) -> int:
        """The masks that a step drafts, after so many committed tokens."""
        frontier, size = self.prompt + committed, self.config.window_size
        if size == "auto" or isinstance(size, AutoWindow):
            policy = size if isinstance(size, AutoWindow) else AutoWindow()
            size = max(math.ceil(policy.headroom * (per_step if committed else FIRST_COMMIT_RATE)), policy.least)
        limit = attention.window_end(frontier, 0, self.prompt, shift)
        drafted = [self.new_tokens - committed, size, None if limit is None else limit - frontier]
        return min(number for number in drafted if isinstance(number, int))

    def drafter_pass(self, committed: int, per_step: int, attention: Attention, shift: int) -> Pass:
        """The drafter's pass after so many committed tokens, of which the last step committed `per_step`."""
        drafted = self.window(committed, per_step, attention, shift)
        frontier, before = self.prompt + committed, self.prompt + max(committed - per_step, 0)
        end = attention.canvas_end(frontier, frontier + drafted, 0, shift)
        start = 0
        if committed and attention.is_final:
            start = min(attention.first_changing(before, 0, self.prompt), before - shift)
        elif committed and self.config.kv_window is not None:
            start = before - self.config.kv_window + 1
        return Pass(self.rows * self.canvases, end - max(start, 0), end, min(drafted, self.masks or drafted))

    def verifier_pass(self, committed: int, per_step: int, attention: Attention, shift: int) -> Pass:
        """The verifier's pass over the same window: it reads the draft, and the column before it. Of several canvases it
        sees none; it reads a guess, to propose the next one."""
        if self.canvases > 1:
            end = self.prompt + committed
            return Pass(self.rows, 1 if committed else end, end, 1)
        drafted = self.window(committed, per_step, attention, shift)
        end = self.prompt + committed + drafted - 1
        return Pass(self.rows, drafted if committed else end, end, drafted)


@dataclass(frozen=True)
class Costs:
    """Of a drafter and, where one runs, a verifier.

    Attributes:
        drafter, verifier: their sizes; `verifier` is `None` where none runs.
        shares_weights: the verifier is the drafter, read causally.
        attention, shift: of the drafter.
        load: what is decoded.
        copies: float32 copies of the window's logits that are alive at once.
    """

    drafter: ModelSize
    verifier: ModelSize | None
    shares_weights: bool
    attention: Attention
    shift: int
    load: Load
    copies: int

    @property
    def sizes(self) -> dict[str, ModelSize]:
        both = {"drafter": self.drafter, "verifier": self.verifier}
        return {role: size for role, size in both.items() if size is not None}

    def passes(self, committed: int, per_step: int) -> dict[str, Pass]:
        """The pass of each model after so many committed tokens."""
        arguments = (committed, per_step, self.attention, self.shift)
        makers = {"drafter": self.load.drafter_pass, "verifier": self.load.verifier_pass}
        return {role: makers[role](*arguments) for role in self.sizes}

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes by kind and role, at the widest pass: the first."""
        columns, passes = self.load.prompt + self.load.new_tokens, self.passes(0, 1)
        is_cached = {"drafter": self.attention.is_final or self.load.config.kv_window is not None, "verifier": True}
        margins = {"drafter": self.attention.margin, "verifier": 0}
        found: dict[str, dict[str, int]] = {}
        for role, size in self.sizes.items():
            is_own = role == "drafter" or not self.shares_weights
            found[role] = {
                "weights": size.weight_bytes if is_own else 0,
                "keys and values": size.cache_bytes(self.load.rows, columns + margins[role]) if is_cached[role] else 0,
                "activations, about": passes[role].activation_bytes(size),
            }
        masks = passes["drafter"].rows * passes["drafter"].projected
        found["drafter"]["logits, about"] = self.copies * masks * self.drafter.vocab * 4
        return found

    def answer_seconds(self, per_step: int, bandwidth: float, rate: float, *, roles: tuple[str, ...]) -> float:
        """The least time of an answer at `per_step` tokens per step; later passes cost what the middle one costs."""
        steps = math.ceil(self.load.new_tokens / per_step)
        first, later = self.passes(0, per_step), self.passes(max(self.load.new_tokens // 2, 1), per_step)
        return sum(
            first[role].seconds(size, bandwidth, rate) + (steps - 1) * later[role].seconds(size, bandwidth, rate)
            for role, size in self.sizes.items()
            if role in roles
        )


def estimate(
    drafter: str | Path,
    verifier: str | Path | None,
    load: Load,
    *,
    spec: str | None = None,
    block_size: int | None = None,
    dtype: torch.dtype | None = None,
    copies: int = 4,
) -> Costs:
    """The costs of a pair whose weights need not exist.

    Args:
        drafter, verifier: a directory, a `config.json` or a name on the hub; `verifier` may be "self" and `None`.
        load: what is decoded.
        spec, block_size: as in `load_drafter`.
        dtype: of both models; by default as `config.json` says, else float32.
        copies: see `Costs`.

    Raises:
        ValueError: a config that cannot be read, or a model that is refused as a drafter or verifier.
    """
    place = folder_of(drafter)
    family = drafter_family(place, spec=spec)
    # Any mask token will do: it decides nothing here, and looking for it would load the tokenizer.
    config = drafter_config(place, spec=spec, mask_token_id=0, block_size=block_size)
    of_drafter = _size(family.model_class, config, dtype, _stored_dtype(place))
    of_verifier = None
    if verifier == SELF:
        check_reads_causally(family.reads_causally, f"the family {family.name!r}")
        of_verifier = of_drafter
    elif verifier is not None:
        place = folder_of(verifier)
        of_verifier = _size(AutoModelForCausalLM, verifier_config(place), dtype, _stored_dtype(place))
    attention = Attention(family.attention, getattr(config, "block_size", None), family.anchored)
    return Costs(of_drafter, of_verifier, verifier == SELF, attention, family.logit_shift, load, copies)


def folder_of(path: str | Path) -> str | Path:
    """The directory of a `config.json`; other paths and names as they are.

    Raises:
        ValueError: a file of another name.
    """
    file = Path(path)
    if not file.is_file():
        return path
    if file.name != "config.json":
        raise ValueError(f"A model must be a directory, a config.json or a name on the hub, got the file {path}.")
    return file.parent


def _stored_dtype(place: str | Path) -> Any:
    """The name of the dtype in `config.json`."""
    raw = Checkpoint(place, {}).read_json("config.json") or {}
    return raw.get("dtype") or raw.get("torch_dtype")


def _size(model_class: Any, config: PreTrainedConfig, dtype: torch.dtype | None, stored: Any) -> ModelSize:
    quantised = getattr(config, "quantization_config", None) is not None
    if quantised:
        del config.quantization_config
    with torch.device("meta"):
        model = model_class.from_config(config) if model_class is AutoModelForCausalLM else model_class(config)
    named = getattr(torch, stored, torch.float32) if isinstance(stored, str) else torch.float32
    return ModelSize.of(model.to(dtype or named), quantised=quantised)
