"""Checks of the values that strategies, acceptance rules, sessions and logits processors return.

Shapes and dtypes are checked everywhere, which needs no host sync. Without these checks a wrong shape would be broadcast or
cut, and the output would be silently wrong. Values are checked of parts that are not of this package, where they are on the
host, as in `apd.check`: on a device a step would wait for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def name_of(value: object, method: str = "") -> str:
    """Name of an object for error messages: its class and method, or a function's own name."""
    name = getattr(value, "__name__", type(value).__name__)
    return f"{name}.{method}" if method else name


def check_returned(value: object, by: str, shape: tuple[int | None, ...], dtype: torch.dtype) -> None:
    """Refuse a value that is not a tensor of this shape and dtype.

    Args:
        value: the returned value.
        by: name of the function that returned it, see `name_of`.
        shape: sizes; `None` for any.
        dtype: `torch.bool`, `torch.int64`, or `torch.float32` for any float dtype.

    Raises:
        TypeError: not a tensor, or another dtype.
        ValueError: another shape.
    """
    is_float = dtype == torch.float32
    if not isinstance(value, Tensor) or (not value.is_floating_point() if is_float else value.dtype != dtype):
        kind = "float" if is_float else str(dtype).removeprefix("torch.")
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"`{by}` must return a tensor of {kind}, got {got}. Convert what it returns.")
    if value.dim() != len(shape) or any(
        size not in (wanted, None) for wanted, size in zip(value.shape, shape, strict=True)
    ):
        sizes = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(
            f"`{by}` must return a tensor of shape [{sizes}], got {list(value.shape)}. Return a value for each row and "
            "position: nothing is broadcast or cut."
        )


def _is_readable(value: Tensor, part: object) -> bool:
    """Whether a part of the caller's gave the value, which can be read without waiting for a device and is not traced."""
    of_caller = getattr(part, "__module__", "").partition(".")[0] != "apd"
    return of_caller and value.device.type == "cpu" and not torch.compiler.is_compiling()


def check_numbers(values: Tensor, part: object, method: str, *, where: Tensor, fault: Tensor) -> None:
    """Refuse NaN, with which every comparison is False.

    Args:
        values: float.
        part, method: what returned them.
        where: bool, the values that count.
        fault: bool, where the model that they are computed from gave no numbers, which is an error of its own.

    Raises:
        ValueError: a value that counts is NaN.
    """
    if _is_readable(values, part) and bool((values.isnan() & where & ~fault).any()):
        raise ValueError(
            f"`{name_of(part, method)}` must return numbers, got NaN at a position that can be chosen: every comparison with NaN is "
            "False. Where a logarithm or a quotient is undefined, write what it should count as."
        )


def check_drawable(tokens: Tensor, part: object, field: str, *, vocab_size: int, mask_token_id: int) -> None:
    """Refuse ids that no model can draw.

    Args:
        tokens: int64.
        part, field: what returned them, and in which field of its result.

    Raises:
        ValueError: an id is negative, outside the vocabulary or the mask token.
    """
    if not _is_readable(tokens, part):
        return
    foreign = (tokens < 0) | (tokens >= vocab_size) | (tokens == mask_token_id)
    if foreign.any():
        raise ValueError(
            f"`{name_of(part)}().{field}` must be ids that can be drawn, 0 to {vocab_size - 1} and not the mask token "
            f"{mask_token_id}, got {int(tokens[foreign][0])}."
        )


def check_session(session: object, by: str, *methods: str) -> None:
    """Refuse an object that is not a session.

    Args:
        session: the returned object.
        by: name of the method that returned it, see `name_of`.
        methods: names of which the session must have at least one.

    Raises:
        TypeError: it has none.
    """
    if not any(callable(getattr(session, method, None)) for method in methods):
        raise TypeError(
            f"`{by}` must return a session with the method `{methods[0]}`, got {type(session).__name__}. Return `self` "
            "where nothing is remembered."
        )


class CheckedLogits:
    """A model's logits, `b m v`, each part checked when it is computed.

    Args:
        logits: `b m v` float, or an object that computes a part on access, see `Logits`.
        by: name of the method that returned the logits, see `name_of`.
        shape: b and m.
        vocab_size: the least v.

    Raises:
        TypeError, ValueError: see `check_returned`; also raised on access.
    """

    def __init__(self, logits: Any, by: str, shape: tuple[int, int], vocab_size: int) -> None:
        self.logits, self.by, self.shape, self.vocab_size = logits, by, shape, vocab_size
        if isinstance(logits, Tensor) or not hasattr(logits, "__getitem__"):
            self._check(logits, shape)

    def __getitem__(self, index: tuple[slice, slice] | tuple[Tensor, Tensor], /) -> Tensor:
        part: Tensor = self.logits[index]
        shape = [*torch.broadcast_shapes(*(each.shape for each in index if isinstance(each, Tensor)))]
        shape = shape or [
            len(range(size)[each]) for size, each in zip(self.shape, index, strict=True) if isinstance(each, slice)
        ]
        self._check(part, (shape[0], shape[1]))
        return part

    def _check(self, logits: Tensor, shape: tuple[int, int]) -> None:
        check_returned(logits, self.by, (*shape, None), torch.float32)
        if logits.shape[2] < self.vocab_size:
            raise ValueError(
                f"`{self.by}` must return logits of at least {self.vocab_size} ids, the model's `vocab_size`, got "
                f"{logits.shape[2]}. Give −∞ to ids that it never predicts."
            )


def processed(processors: Iterable[Callable[[Any, Any], Any]], ids: Tensor | None, scores: Tensor) -> Tensor:
    """Apply logits processors in order, as transformers' `LogitsProcessorList` does: `n v` → `n v` float.

    Args:
        processors: functions of (ids, scores).
        ids: `n t` int64, the tokens before the position; `None` for processors that do not read them.
        scores: `n v` float32.
    Raises:
        TypeError, ValueError: a processor returns another shape or dtype.
    """
    for processor in processors:
        shape, result = tuple(scores.shape), processor(ids, scores)
        check_returned(result, name_of(processor), shape, torch.float32)
        scores = result
    return scores
