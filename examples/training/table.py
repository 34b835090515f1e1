"""Measures a pair: right answers, and tokens per forward pass."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from apd import APDSampler, Autoregressive, Confidence, LeftToRight, Threshold

#: The settings that are compared, as arguments of `generate`. Rivals decode in their own order.
SETTINGS: dict[str, dict[str, Any]] = {
    "left to right, 1 per step": {"strategy": LeftToRight(1)},
    "by confidence, 1 per step": {"strategy": Confidence(1)},
    "left to right, 4 per step": {"strategy": LeftToRight(4)},
    "by confidence, 4 per step": {"strategy": Confidence(4)},
    "threshold 0.9": {"strategy": Threshold(0.9)},
    "verifier alone": {"strategy": Autoregressive()},
    "APD, R = 0": {"mixture_weight": 0.0},
    "APD, R = 0.5": {"mixture_weight": 0.5},
    "APD, R = 0.5, correction": {"mixture_weight": 0.5, "correction": True},
}


@dataclass(frozen=True)
class Measured:
    """Right answers, tokens and forward passes (of the drafter, or of the verifier alone) over some instances."""

    right: int
    instances: int
    tokens: int
    forwards: int

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        return f"{self.right / self.instances:.2f} @ {self.tokens / self.forwards:.1f}"


def measure(
    sampler: APDSampler,
    prompts: Sequence[str],
    is_right: Callable[[int, str], bool],
    max_new_tokens: int,
    arguments: dict[str, Any],
) -> Measured:
    """Greedy answers to the prompts; `is_right` judges the text of the i-th."""
    inputs = sampler.tokenizer(list(prompts), return_tensors="pt", padding=True)
    output = sampler.generate(**inputs, max_new_tokens=max_new_tokens, return_dict_in_generate=True, **arguments)
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]
    texts = sampler.tokenizer.batch_decode(answers, skip_special_tokens=True)
    right = sum(is_right(i, text) for i, text in enumerate(texts))
    forwards = output.drafter_forwards.sum() or output.verifier_forwards.sum()
    return Measured(right, len(prompts), int(output.new_tokens.sum()), int(forwards))


def print_table(heading: str, rows: Iterable[tuple[str, list[Measured]]], *, total: bool) -> None:
    """Rows of a name and a result per setting, each as soon as it is there; `total` adds their sum."""
    print(f"| {heading} |", " | ".join(SETTINGS), "|")
    print("|---" * (len(SETTINGS) + 1) + "|")
    found = []
    for name, results in rows:
        found.append(results)
        print(f"| {name} |", " | ".join(map(str, results)), "|", flush=True)
    if total:
        totals = [sum(column[1:], start=column[0]) for column in zip(*found, strict=True)]
        print("| **all** |", " | ".join(map(str, totals)), "|")


def print_sizes(sampler: APDSampler, drafter: Path, verifier: Path) -> None:
    print()
    for name, place in {"drafter": drafter, "verifier": verifier}.items():
        network: Any = getattr(sampler, name).model
        size = (place / "model.safetensors").stat().st_size
        print(f"{name}: {network.num_parameters():,} parameters, {size / 1e6:.2f} MB")
