"""How a request's sampling, biases and knobs become arguments of `generate()`."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from apd.config import KNOBS
from apd.serve.engine.errors import refused
from apd.serve.engine.processors import Bias, Penalties
from apd.serve.schemas import Common
from apd.serve.settings import FIXED_KNOBS, ServeSettings
from apd.strategies.registry import parse

_DECODING = ("strategy", *KNOBS)
#: Of `Checked` in a request: with more, a step could keep everyone waiting, without end.
_MOST = {"num_checked": 32, "breadth": 2}
_LONGEST = 200  # characters of a strategy; a long chain of them exceeds Python's recursion limit


def arguments_of(body: Common, settings: ServeSettings) -> dict[str, Any]:
    """Sampling, strategy and knobs of a request, by `generate()`'s names; all of them can be hashed.

    Raises:
        APIError: a knob that no request may change.
    """
    return _sampling(body, settings.sampling) | _decoding(body, settings)


def _sampling(body: Common, default: Mapping[str, Any]) -> dict[str, Any]:
    truncation = {name: getattr(body, name) for name in ("top_k", "top_p", "min_p")}
    truncation = {name: value for name, value in truncation.items() if value is not None}
    if body.temperature is None and not truncation:
        chosen = dict(default)
    elif body.temperature == 0 or truncation.get("top_p") == 0:
        chosen = {"do_sample": False}
    else:
        temperature = default.get("temperature", 1.0) if body.temperature is None else body.temperature
        kept = {name: default[name] for name in ("top_k", "top_p", "min_p") if name in default}
        chosen = {"do_sample": True, "temperature": temperature, "top_k": 0} | kept | truncation
    if body.repetition_penalty not in (None, 1):
        chosen["repetition_penalty"] = float(body.repetition_penalty)
    return chosen


def _decoding(body: Common, settings: ServeSettings) -> dict[str, Any]:
    given = {name: value for name in _DECODING if (value := getattr(body, name)) is not None}
    if settings.fixed_decoding and given:
        name = next(iter(given))
        raise refused(f"`{name}` was set when this server was started (--fixed-decoding). Leave it out.", name)
    named = set(given)
    if "strategy" in given:
        if len(given["strategy"]) > _LONGEST:
            raise refused(f"`strategy` may have {_LONGEST} characters here, got more.", "strategy", "invalid_value")
        try:
            setting = parse(given["strategy"])
        except ValueError as error:
            raise refused(str(error), "strategy", "invalid_value") from None
        named |= setting.knobs.keys()
        for name, most in _MOST.items():
            if isinstance(value := getattr(setting.strategy, name, 1), int) and value > most:
                raise refused(f"`{name}` of a strategy may be {most} here, got {value}.", "strategy", "invalid_value")
    for name in FIXED_KNOBS:
        if name in named:
            flag = "--" + name.replace("_", "-")
            raise refused(
                f"`{name}` cannot be chosen by a request: it decides what a step costs, and was set when this server was "
                f"started ({flag}). Leave it out.",
                name,
            )
    return given


def processors_of(body: Common, prompt_length: int, vocab_size: int) -> tuple[Hashable, ...]:
    """The logits processors of a request; equal ones are equal objects.

    Raises:
        APIError: a bias of what is no token, or out of [-100, 100].
    """
    found: list[Hashable] = []
    if body.logit_bias:
        found.append(Bias(tuple(sorted(_bias(key, value, vocab_size) for key, value in body.logit_bias.items()))))
    if body.frequency_penalty or body.presence_penalty:
        found.append(Penalties(body.frequency_penalty or 0.0, body.presence_penalty or 0.0, prompt_length))
    return tuple(found)


def _bias(key: str, value: float, vocab_size: int) -> tuple[int, float]:
    if not key.isdecimal() or len(key) > 12 or int(key) >= vocab_size:
        raise refused(f"Keys of `logit_bias` must be token ids below {vocab_size}, got {key[:20]!r}.", "logit_bias")
    if not -100 <= value <= 100:
        raise refused(f"Values of `logit_bias` must be in [-100, 100], got {value} for {key}.", "logit_bias")
    return int(key), value
