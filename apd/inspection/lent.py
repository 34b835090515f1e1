"""What a part may read and must leave as it is: tensors that it is lent, and attributes of its own that outlive a call."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from apd.decoding.pair import Draft
from apd.inspection.bed import Broken


class Lent:
    """Tensors as they were when a part got them.

    Args:
        **lent: tensors, or dataclasses and tuples that hold some, by the name that the part's arguments have.
    """

    def __init__(self, **lent: Any) -> None:
        found = [each for name, value in lent.items() for each in _tensors(name, value)]
        self.before = [(name, tensor, tensor.clone()) for name, tensor in found]

    @property
    def written(self) -> str | None:
        """The name of the first tensor that was written to, such as "evidence.draft"; `None`: none was."""
        return next((name for name, now, before in self.before if not _same(now, before)), None)

    def check(self, by: str) -> None:
        """Refuse that something was written to.

        Raises:
            Broken: the message names it.
        """
        if name := self.written:
            raise Broken(written(by, name))


def written(by: str, name: str) -> str:
    """What is wrong where a part writes to a tensor of this name."""
    return f"`{by}` writes to `{name}`. Clone what you change: it belongs to others, who read it, too."


def lend(draft: Draft) -> Lent:
    """A draft as it is, with the log-probabilities that it computes when it is asked."""
    assert draft.logprobs is not None
    return Lent(draft=draft)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a value, by name. Of a dataclass also those that it has cached."""
    if isinstance(value, Tensor):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for field, part in vars(value).items():
            yield from _tensors(f"{name}.{field.lstrip('_')}", part)
    elif isinstance(value, (list, tuple)):
        for i, part in enumerate(value):
            yield from _tensors(f"{name}[{i}]", part)


def _same(now: Tensor, before: Tensor) -> bool:
    return now.shape == before.shape and bool(((now == before) | ((now != now) & (before != before))).all())


class Kept:
    """The attributes of an object as they were, however deep; to find out whether a call leaves something on it.

    Attributes that are new are compared from the time of `Kept` on, so a `cached_property` counts as nothing once it is
    there. Functions, classes and modules of torch are themselves.
    """

    def __init__(self, part: Any) -> None:
        self.part, self.before = part, _frozen(part)

    def check(self, name: str, remedy: str) -> None:
        """Refuse that an attribute has changed.

        Args:
            name: of the object.
            remedy: a sentence that ends the message.

        Raises:
            Broken: the message names it, with both values.
        """
        for attribute, before, now in _changes(self.before, _frozen(self.part)):
            raise Broken(
                f"`{name}.{attribute}` changes while it decodes, from {before!r:.60} to {now!r:.60}: the same call may give something "
                f"else the next time, and calls may overlap. {remedy}"
            )


def _frozen(value: Any, seen: set[int] | None = None) -> Any:
    """A copy to compare with: tensors cloned, containers and objects as what they hold, each of them once."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return value.detach().clone()
    if id(value) in seen:
        return None
    if isinstance(value, (torch.nn.Module, type)) or inspect.isroutine(value):
        return value
    if isinstance(value, (set, frozenset)):
        return set(value)
    if isinstance(value, Mapping):
        seen.add(id(value))
        return {key: _frozen(each, seen) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        seen.add(id(value))
        return [_frozen(each, seen) for each in value]
    if not hasattr(value, "__dict__"):
        return value
    seen.add(id(value))
    return _Attributes((name, _frozen(each, seen)) for name, each in vars(value).items())


class _Attributes(dict[str, Any]):
    """Those of an object, which gets further ones where it caches something."""


def _changes(before: Any, now: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Name, former and present value of what differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        missing = object()
        for key, value in before.items():
            yield from _changes(value, now.get(key, missing), f"{name}.{key}" if name else str(key))
        if len(now) > len(before) and not isinstance(before, _Attributes):
            yield name, before, now
        return
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (a, b) in enumerate(zip(before, now, strict=True)):
            yield from _changes(a, b, f"{name}[{i}]")
        return
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        if not _same(before, now):
            yield name, before, now
        return
    if before is not now and not _equal(before, now):
        yield name, before, now


def _equal(before: Any, now: Any) -> bool:
    try:
        return bool(before == now)
    except Exception:  # arrays and other objects of the caller's own compare as they like
        return False
