"""Strategies by short names, such as `apd:R=0.5,correction`, `confidence:2` or `blocks:8/threshold:0.9`.

    >>> parse("apd:correction").spec
    'apd:R=0.5,correction'
    >>> parse("threshold:.9").family
    'threshold'

Every kind has at most one parameter that a curve runs over; what is left without it is the setting's family.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from apd import strategies as rivals
from apd.config import APDConfig
from apd.decoding.strategy import Strategy

__all__ = ["ENDPOINT", "GRAMMAR", "KINDS", "PRESETS", "Setting", "expand", "parse"]

GRAMMAR = """\
  left-to-right:K  random:K  confidence:K  margin:K  entropy:K    K tokens per step
  threshold:γ  factor:f  entropy-bound:γ  klass:γ[,kl=ε,h=steps]
  wino:γ[,revoke=γ,length=LENGTH]                                 e.g. wino:0.6,length=8
  blocks:LENGTH/ANY-ORDER                                         e.g. blocks:8/threshold:0.9
  one-step  autoregressive
  apd:R=.5[,tau=τ,M=window or auto,W=kv window,refresh=tokens,correction,rejection]"""


@dataclass(frozen=True)
class Setting:
    """One strategy with its parameters.

    Attributes:
        spec: its name in full; equal settings have equal names.
        family: the name without the parameter that a curve runs over.
        parameter: letter of that parameter; "" if there is none.
        value: its value; 0 if there is none.
        interpolates: whether values between two of them mean something (a threshold, not a number of tokens).
        strategy: for `generate_many(strategy=...)`; `None` is APD with `knobs`.
        knobs: of `APDConfig`.
    """

    spec: str
    family: str
    parameter: str
    value: float
    interpolates: bool
    strategy: Strategy | None
    knobs: dict[str, Any] = field(default_factory=dict)

    @property
    def is_apd(self) -> bool:
        return self.strategy is None

    @property
    def is_any_order(self) -> bool:
        return self.strategy is not None and not self.strategy.left_to_right


@dataclass(frozen=True)
class Kind:
    """How one kind of strategy is written.

    Args:
        make: a dataclass whose fields the options below name; `None` is APD with its knobs.
        sweep: letter, field and type of the parameter a curve runs over.
        options: further ones by the name they are written with: field and what reads it; `bool` is a flag.
        named: whether the swept parameter is written with its letter.
    """

    make: type[Strategy] | None
    sweep: tuple[str, str, type] | None = None
    options: dict[str, tuple[str, Callable[[str], Any]]] = field(default_factory=dict)
    named: bool = False


def _window(text: str) -> int | str:
    return text if text == "auto" else int(text)


_TOP_K = ("K", "tokens_per_step", int)
KINDS: dict[str, Kind] = {
    "left-to-right": Kind(rivals.LeftToRight, _TOP_K),
    "random": Kind(rivals.RandomOrder, _TOP_K),
    "confidence": Kind(rivals.Confidence, _TOP_K),
    "margin": Kind(rivals.Margin, _TOP_K),
    "entropy": Kind(rivals.Entropy, _TOP_K),
    "threshold": Kind(rivals.Threshold, ("γ", "threshold", float)),
    "factor": Kind(rivals.Factor, ("f", "factor", float)),
    "entropy-bound": Kind(rivals.EntropyBound, ("γ", "bound", float)),
    "klass": Kind(rivals.KLASS, ("γ", "threshold", float), {"kl": ("kl_threshold", float), "h": ("history", int)}),
    "wino": Kind(
        rivals.WINO, ("γ", "threshold", float), {"revoke": ("revoke_below", float), "length": ("length", int)}
    ),
    "one-step": Kind(rivals.OneStep),
    "autoregressive": Kind(rivals.Autoregressive),
    "apd": Kind(
        None,
        ("R", "mixture_weight", float),
        {
            "tau": ("acceptance_threshold", float),
            "M": ("window_size", _window),
            "W": ("kv_window", int),
            "refresh": ("kv_refresh", int),
            "correction": ("correction", bool),
            "rejection": ("acceptance", bool),
        },
        named=True,
    ),
}
_DEFAULT_R = APDConfig().mixture_weight

#: What the records of an endpoint are called, whose ways are its own: neither APD nor in any order. Only an endpoint runs it.
ENDPOINT = Setting("endpoint", "endpoint", "", 0.0, False, rivals.Autoregressive())


def parse(spec: str) -> Setting:
    """A setting from its short name.

    Raises:
        ValueError: what is wrong with it, and how it is written.
    """
    text = spec.strip()
    if text == ENDPOINT.spec:
        return ENDPOINT
    if text.startswith("blocks"):
        return _parse_blocks(text)
    kind_name, colon, arguments = text.partition(":")
    if kind_name not in KINDS:
        raise ValueError(f"`strategies` must be made of the names below, got {spec!r}.\n{GRAMMAR}")
    kind = KINDS[kind_name]
    values = _arguments(spec, kind, arguments.split(",") if colon else [])
    if kind.make is None:
        values.setdefault(kind.sweep[1], _DEFAULT_R)
    elif kind.sweep is not None and kind.sweep[1] not in values:
        raise ValueError(f"`{kind_name}` needs its {kind.sweep[0]}, as in `{kind_name}:1`, got {spec!r}.")
    strategy, knobs = _build(spec, kind, values)
    letter, name, _ = kind.sweep or ("", "", float)
    defaults = {field.name: field.default for field in dataclasses.fields(kind.make or APDConfig)}
    options = [
        _written(short, values[full])
        for short, (full, _) in sorted(kind.options.items())
        if full in values and values[full] != defaults[full]
    ]
    swept = [] if kind.sweep is None else [f"{letter}={values[name]:g}" if kind.named else f"{values[name]:g}"]
    return Setting(
        spec=_join(kind_name, swept + options),
        family=_join(kind_name, options),
        parameter=letter,
        value=float(values.get(name, 0)),
        interpolates=kind.sweep is not None and kind.sweep[2] is float,
        strategy=strategy,
        knobs=knobs,
    )


def expand(specs: Iterable[str]) -> list[Setting]:
    """Settings of specs and presets, each once, in the order given."""
    names = [name for spec in specs for name in PRESETS.get(spec, (spec,))]
    return list({setting.spec: setting for setting in map(parse, names)}.values())


def _parse_blocks(spec: str) -> Setting:
    head, slash, inner = spec.partition("/")
    length = head.removeprefix("blocks:")
    if not slash or not length.isdigit() or int(length) < 1:
        raise ValueError(f"`blocks` is written blocks:LENGTH/STRATEGY, e.g. blocks:8/threshold:0.9, got {spec!r}.")
    setting = parse(inner)
    if not isinstance(setting.strategy, rivals.Unmasking):
        raise ValueError(
            f"`blocks` must be around a strategy without memory that the drafter decides, got {inner!r}. Use threshold, "
            "factor, entropy-bound or a top-k."
        )
    return Setting(
        spec=f"blocks:{int(length)}/{setting.spec}",
        family=f"blocks:{int(length)}/{setting.family}",
        parameter=setting.parameter,
        value=setting.value,
        interpolates=setting.interpolates,
        strategy=rivals.Blocks(setting.strategy, int(length)),
    )


def _arguments(spec: str, kind: Kind, arguments: list[str]) -> dict[str, Any]:
    """By field name; a bare number is the swept parameter."""
    known: dict[str, tuple[str, Callable[[str], Any]]] = dict(kind.options)
    if kind.sweep is not None:
        known[kind.sweep[0]] = kind.sweep[1:]
    values: dict[str, Any] = {}
    for argument in arguments:
        short, equals, text = (part.strip() for part in argument.partition("="))
        if not equals and short not in known and kind.sweep is not None:
            short, text = kind.sweep[0], short
        if short not in known:
            raise ValueError(f"{spec!r} has no option {short!r}. It has {', '.join(known) or 'none'}.")
        name, convert = known[short]
        if name in values:
            raise ValueError(f"{spec!r} gives {short!r} twice.")
        if (convert is bool) != (short == argument.strip()):
            raise ValueError(f"In {spec!r}, {short!r} must be {'a bare word' if convert is bool else 'a number'}.")
        try:
            values[name] = True if convert is bool else convert(text)
        except ValueError:
            wanted = {int: "a whole number", _window: "a whole number or auto"}.get(convert, "a number")
            raise ValueError(f"In {spec!r}, {short} must be {wanted}, got {text!r}.") from None
    return values


def _build(spec: str, kind: Kind, values: dict[str, Any]) -> tuple[Strategy | None, dict[str, Any]]:
    """The strategy, or APD's knobs; what is out of range is told with the spec."""
    try:
        if kind.make is not None:
            return kind.make(**values), {}
        knobs = values | ({"acceptance": "rejection"} if "acceptance" in values else {})
        APDConfig(**knobs)
    except ValueError as error:
        raise ValueError(f"{spec!r}: {error}") from None
    return None, knobs


def _written(short: str, value: Any) -> str:
    return short if value is True else f"{short}={value}" if isinstance(value, str) else f"{short}={value:g}"


def _join(kind: str, arguments: list[str]) -> str:
    return f"{kind}:{','.join(arguments)}" if arguments else kind


def _grid(pattern: str, values: Iterable[float]) -> tuple[str, ...]:
    return tuple(pattern.format(f"{value:g}") for value in values)


_POWERS = (1, 2, 4, 8, 16, 32)
_WEIGHTS = (0, 0.3, 0.5, 0.7, 0.9)
_TOP_K_KINDS = ("left-to-right", "random", "confidence", "margin", "entropy")
_APD = tuple(
    spec
    for options in ("", ",correction", ",tau=0.5", ",tau=0.7", ",tau=0.9", ",correction,tau=0.5")
    for spec in _grid(f"apd:R={{}}{options}", _WEIGHTS)
)
_FINE_WEIGHTS = (0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
_FINE_TAUS = (0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
PRESETS: dict[str, tuple[str, ...]] = {
    # The grids of the paper and of the later official code; for APD and the entropy bound, ours.
    "all": (
        *(spec for kind in _TOP_K_KINDS for spec in _grid(f"{kind}:{{}}", _POWERS)),
        *_grid("threshold:{}", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        *_grid("factor:{}", (0.7, 1.0, 1.3, 1.6, 1.9)),
        *_grid("entropy-bound:{}", (0.01, 0.1, 0.3, 1.0)),
        *_grid("klass:{}", (0.7, 0.8, 0.9, 0.95)),
        *_grid("wino:{}", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        *_grid("wino:{},length=8", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        *(spec for length in _POWERS[1:5] for spec in _grid(f"blocks:{length}/confidence:{{}}", (1, 2, 4))),
        *_grid("blocks:8/threshold:{}", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        "one-step",
        "autoregressive",
        *_APD,
        *_grid("apd:R={},rejection", _WEIGHTS),
    ),
    # For tasks whose answers depend on chance: finer grids of what is fast there and of what tells the accuracy.
    "dependent": (
        *_grid("left-to-right:{}", (1, 2)),
        "confidence:1",
        "random:2",
        *_grid("threshold:{}", (0.6, 0.7, 0.75, 0.8, 0.85, 0.9)),
        *_grid("factor:{}", (0.7, 0.85, 1.0, 1.15, 1.3)),
        *_grid("entropy-bound:{}", (0.01, 0.03, 0.1, 0.3, 0.5, 1.0)),
        *_grid("klass:{}", (0.7, 0.9)),
        *(spec for rest in ("", ",revoke=0", ",length=8") for spec in _grid(f"wino:{{}}{rest}", (0.6, 0.7, 0.8, 0.9))),
        *_grid("blocks:{}/threshold:0.8", (4, 8)),
        "autoregressive",
        "one-step",
        *(spec for tau in _FINE_TAUS for spec in _grid(f"apd:R={{}},tau={tau:g}", _FINE_WEIGHTS)),
        *(spec for tau in _FINE_TAUS[:5] for spec in _grid(f"apd:R={{}},correction,tau={tau:g}", _FINE_WEIGHTS)),
        *_grid("apd:R={},M=8,correction", (0.3, 0.5, 0.7)),
        *(spec for M in (5, 6, 8) for spec in _grid(f"apd:R={{}},M={M},tau=0.7", (0.1, 0.3, 0.5))),
        *_grid("apd:R={},rejection", (0.3, 0.5, 0.7)),
    ),
    # A first look, in a minute.
    "few": (
        "apd:R=0.5",
        "apd:R=0.5,correction",
        "threshold:0.9",
        "confidence:4",
        "left-to-right:4",
        "one-step",
        "autoregressive",
    ),
}
