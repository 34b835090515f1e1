"""The knobs of adaptive parallel decoding, validated once."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

#: Masks per step: so many, as many as the row's own steps suggest, or all that are left.
WindowSize = int | Literal["auto"] | None


@dataclass(frozen=True)
class APDConfig:
    """Which prefix of a draft is committed, and how much is recomputed to draft it.

    Args:
        mixture_weight: R in [0, 1], weight of the drafter in p_T ∝ p_D^R · p_AR^(1-R). Higher commits more per step.
        acceptance_threshold: τ in [0, 1]. Beyond the first position a token is committed only if p_T ≥ τ; 0 is the
            paper's rule, 1 commits one token per step (as long as no probability rounds to 1).
        window_size: M, masks drafted per step, in tokens. `None`: all that are left. `"auto"`: twice what the row's own
            last steps committed on average, at least 8.
        kv_window: W, how many of the last committed tokens are recomputed each step, in tokens; older keys and values
            stay frozen, an approximation, since the drafter attends both ways. `None`: no cache, exact.
        kv_refresh: N, with `kv_window`: a row is recomputed as a whole once N tokens were committed since it last was,
            in tokens. 1 is exact. `None`: never.
        acceptance: `"coupling"` (the paper: draft and target share their noise) or `"rejection"` (speculative
            sampling toward p_T).
        correction: with `"coupling"`, also commit the target's token at the first mismatch.
        noise: `"keyed"` draws the same noise whenever a position is drafted again; `"step"` redraws it, as published
            code does, which biases what is generated unless `correction` is on.

    Raises:
        ValueError: a knob is outside its range.
        TypeError: a knob has the wrong type.

    Source: Israel, Van den Broeck, Grover 2025, arXiv:2506.00413; rejection: arXiv:2606.08048.
    """

    mixture_weight: float = 0.5
    acceptance_threshold: float = 0.0
    window_size: WindowSize = None
    kv_window: int | None = None
    kv_refresh: int | None = None
    acceptance: str = "coupling"
    correction: bool = False
    noise: str = "keyed"

    def __post_init__(self) -> None:
        check_fraction("mixture_weight", self.mixture_weight, "1 trusts the drafter alone, 0 the verifier alone")
        check_fraction("acceptance_threshold", self.acceptance_threshold, "0 is the paper, 1 one token per step")
        if self.window_size != "auto":
            remedy = "Use 1 for one mask per step, None for all that are left, 'auto' to follow what is committed"
            check_count("window_size", self.window_size, remedy, or_none=True)
        remedy = "Use None for no cache (exact); 0 would never recompute a new token"
        check_count("kv_window", self.kv_window, remedy, or_none=True)
        remedy = "Use 1 to recompute everything at each step, None for never"
        check_count("kv_refresh", self.kv_refresh, remedy, or_none=True)
        if self.kv_refresh is not None and self.kv_window is None:
            raise ValueError(
                f"`kv_refresh` must be None without `kv_window`, got {self.kv_refresh}: there is no cache to refresh. Set "
                "`kv_window`, or leave it out."
            )
        _check_choice("acceptance", self.acceptance, ("coupling", "rejection"))
        _check_choice("noise", self.noise, ("keyed", "step"))
        if not isinstance(self.correction, bool):
            raise TypeError(f"`correction` must be True or False, got {self.correction!r}.")
        if self.acceptance == "rejection" and self.acceptance_threshold > 0:
            raise ValueError(
                f"`acceptance_threshold` must be 0 with acceptance='rejection', got {self.acceptance_threshold}: a "
                "threshold would bias what rejection sampling keeps exact. Use acceptance='coupling' with a threshold."
            )
        if self.acceptance == "rejection" and self.correction:
            raise ValueError(
                "`correction` must be False with acceptance='rejection', got True: rejection always commits a draw "
                "from the residual in place of the rejected token."
            )

    @classmethod
    def paper(cls, **overrides: Any) -> APDConfig:
        """The setting of the paper's headline numbers: R 0.7, M 100, W 16, noise redrawn each step (Table 2)."""
        settings: dict[str, Any] = {"mixture_weight": 0.7, "window_size": 100, "kv_window": 16, "noise": "step"}
        return cls(**(settings | overrides))

    def replace(self, **changes: Any) -> APDConfig:
        """A copy with some knobs changed, validated again."""
        return dataclasses.replace(self, **changes)


KNOBS = tuple(field.name for field in dataclasses.fields(APDConfig))


def check_fraction(name: str, value: Any, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number in [0, 1], got {value!r}.")
    if not 0.0 <= float(value) <= 1.0:
        raise ValueError(f"`{name}` must be in [0, 1], got {value}: {remedy}.")


def check_number(name: str, value: Any, rule: str, holds: Callable[[float], bool], remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"`{name}` must be a number {rule}, got {value!r}. {remedy}.")
    if not holds(float(value)):
        raise ValueError(f"`{name}` must be {rule}, got {value}. {remedy}.")


def check_count(name: str, value: Any, remedy: str, *, or_none: bool = False) -> None:
    if value is None and or_none:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"`{name}` must be a whole number{' or None' * or_none}, got {value!r}. {remedy}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}. {remedy}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
