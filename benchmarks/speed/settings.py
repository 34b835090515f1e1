"""The compared settings, and how each decodes a call."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from apd import LeftToRight, Threshold
from apd.decoding.acceptance import Coupling
from apd.decoding.step import APD
from apd.decoding.strategy import Strategy
from benchmarks.speed.instruments import Meter, Timed
from benchmarks.speed.pairs import Inputs, Pair, causal_twin
from benchmarks.speed.schedule import Schedule, Scheduled, ScheduledThreshold

__all__ = ["KV_WINDOW", "ONE_PER_STEP", "Answers", "Decoder", "Setting", "compared", "decoder", "supports"]

KV_WINDOW = 16  # W of the paper's fast setting
THRESHOLD = 0.9


@dataclass(frozen=True)
class Setting:
    """One way of decoding.

    Attributes:
        strategy: `"apd"`, `"left-to-right"` (one token per step), `"threshold"`, `"autoregressive"` (transformers'
            own `generate()` on a causal model of the drafter's shape) or `"reference"` (the slow step of the tests).
        mixture_weight: R, for `"apd"` and `"reference"`.
        window_size: M.
        kv_window: W.

    Where M or W is `None`, the label says "all".
    """

    strategy: str
    mixture_weight: float | None = None
    window_size: int | str | None = None
    kv_window: int | None = None

    @property
    def label(self) -> str:
        if self.strategy == "left-to-right":
            return "one token per step"
        if self.strategy == "threshold":
            return f"threshold {THRESHOLD:g}"
        if self.strategy == "autoregressive":
            return "autoregressive"
        if self.strategy == "reference":
            return f"slow reference R {self.mixture_weight:g}"
        return f"APD R {self.mixture_weight:g} M {_or_all(self.window_size)} W {_or_all(self.kv_window)}"


def _or_all(value: int | str | None) -> str:
    return "all" if value is None else str(value)


ONE_PER_STEP = Setting("left-to-right")


def compared() -> list[Setting]:
    """APD with its main knobs, and the settings that it is compared with. Ratios refer to the first."""
    apd = [
        Setting("apd", weight, window, kv)
        for weight in (0.5, 0.7)
        for window in (16, None)
        for kv in (None, KV_WINDOW)
    ]
    rivals = [Setting("threshold"), Setting("autoregressive"), Setting("reference", 0.5)]
    return [ONE_PER_STEP, *apd, *rivals]


def supports(setting: Setting, pair: Pair, device: str) -> str | None:
    """The reason why a setting is left out, or `None`."""
    if setting.strategy == "reference" and device != "cpu":
        return "the slow reference runs on a CPU only"
    return None


@dataclass(frozen=True)
class Answers:
    """The result of a call, per row.

    Attributes:
        tokens: new ids, the stop token included.
        forwards: drafter passes while the row was not done.
        steps: decode steps of the whole call.
    """

    tokens: Sequence[list[int]]
    forwards: Sequence[int]
    steps: int


class Decoder(Protocol):
    """One setting on one pair, ready to decode."""

    def decode(self, inputs: Inputs, meter: Meter | None = None) -> object:
        """The timed call, with the meter attached if there is one."""

    def answers(self, inputs: Inputs) -> Answers:
        """Repeat the call of `decode`, counting tokens and forwards."""


def decoder(setting: Setting, pair: Pair, schedule: Schedule, lengths: Callable[[Inputs], int]) -> Decoder:
    """How a setting decodes.

    Args:
        schedule: accepted counts where the pair's weights are random.
        lengths: tokens that plain `generate()` writes in a call, which knows no stop token.
    """
    if setting.strategy == "autoregressive":
        return Autoregressive(pair, lengths)
    if setting.strategy == "reference":
        return Reference(setting, pair)
    return Library(setting, pair, _strategy(setting, pair, schedule))


def _strategy(setting: Setting, pair: Pair, schedule: Schedule) -> Strategy:
    if setting.strategy == "left-to-right":
        return LeftToRight(1)
    if setting.strategy == "threshold":
        return Threshold(THRESHOLD) if pair.trained else ScheduledThreshold(THRESHOLD, schedule=schedule)
    if setting.strategy == "apd" and setting.mixture_weight is not None:
        return APD(setting.mixture_weight, Coupling() if pair.trained else Scheduled(Coupling(), schedule))
    raise ValueError(f"`strategy` must be one that `Setting` names, with its knobs, got {setting}.")


class Library:
    """`APDSampler.generate` with a strategy."""

    def __init__(self, setting: Setting, pair: Pair, strategy: Strategy) -> None:
        self.pair, self.strategy = pair, strategy
        self.knobs = {"window_size": setting.window_size, "kv_window": setting.kv_window, **pair.generation}

    def decode(self, inputs: Inputs, meter: Meter | None = None, **more: Any) -> Any:
        strategy = self.strategy if meter is None else Timed(self.strategy, meter)
        return self.pair.sampler.generate(**inputs, strategy=strategy, **self.knobs, **more)

    def answers(self, inputs: Inputs) -> Answers:
        output = self.decode(inputs, return_dict_in_generate=True)
        width = inputs["input_ids"].shape[1]
        rows = zip(output.sequences[:, width:].tolist(), output.new_tokens.tolist(), strict=True)
        forwards = output.drafter_forwards.tolist()
        return Answers([row[:count] for row, count in rows], forwards, max(forwards))


class Autoregressive:
    """transformers' `generate()`, greedy, with its cache, on a causal model of the drafter's shape."""

    def __init__(self, pair: Pair, lengths: Callable[[Inputs], int]) -> None:
        self.model = causal_twin(pair.models["drafter"])
        self.lengths = lengths

    @torch.no_grad()
    def decode(self, inputs: Inputs, meter: Meter | None = None) -> Tensor:
        return self.model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=self.lengths(inputs),
            do_sample=False,
        )

    def answers(self, inputs: Inputs) -> Answers:
        new = self.decode(inputs)[:, inputs["input_ids"].shape[1] :]
        return Answers(new.tolist(), [new.shape[1]] * len(new), new.shape[1])


class Reference:
    """The step of `tests/reference.py`: one row after another, no cache, Python loops.

    It supports no schedule. With random weights it runs at τ = 1, one token per step: its milliseconds per step can be
    compared, its tokens per step cannot.
    """

    def __init__(self, setting: Setting, pair: Pair) -> None:
        self.setting, self.pair = setting, pair
        self.stop = next(iter(pair.stop_token_ids), None)

    def decode(self, inputs: Inputs, meter: Meter | None = None) -> list[tuple[list[int], list[int]]]:
        sampler, found = self.pair.sampler, []
        for ids, mask in zip(inputs["input_ids"].tolist(), inputs["attention_mask"].tolist(), strict=True):
            found.append(
                reference_generate()(
                    sampler.drafter,
                    sampler.verifier,
                    [id for id, real in zip(ids, mask, strict=True) if real],
                    max_new_tokens=self.pair.new_tokens,
                    mixture_weight=self.setting.mixture_weight,
                    window_size=self.setting.window_size,
                    acceptance_threshold=0.0 if self.pair.trained else 1.0,
                    stop=self.stop,
                )
            )
        return found

    def answers(self, inputs: Inputs) -> Answers:
        found = self.decode(inputs)
        forwards = [len(counts) for _, counts in found]
        return Answers([tokens for tokens, _ in found], forwards, sum(forwards))


@cache
def reference_generate() -> Callable[..., tuple[list[int], list[int]]]:
    """Load `reference_generate` from the tests, which are no package.

    Raises:
        FileNotFoundError: this file is not in a checkout.
    """
    path = Path(__file__).resolve().parents[2] / "tests" / "reference.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run the benchmark from a checkout of the repository.")
    spec = importlib.util.spec_from_file_location("apd_slow_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.reference_generate
