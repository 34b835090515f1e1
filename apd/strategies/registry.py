"""Strategies by name: `confidence:2`, `blocks:8/threshold:0.9`, `apd:R=0.5,correction`.

    >>> parse("apd:correction").spec
    'apd:R=0.5,correction'
    >>> parse("threshold:.9").strategy
    Threshold(threshold=0.9)

Every kind has at most one swept parameter, over which quality-speed curves run. A setting's name without it is its family.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from apd.config import KNOBS, NUMBER, WHOLE_NUMBER, APDConfig, Form
from apd.decoding.acceptance import AcceptanceRule, Coupling, Rejection
from apd.decoding.step import APD
from apd.decoding.strategy import Strategy, check_strategy
from apd.strategies.base import Unmasking
from apd.strategies.blocks import Blocks, Seeded
from apd.strategies.checked import Checked
from apd.strategies.klass import KLASS
from apd.strategies.proposers import PROPOSERS, Mixture
from apd.strategies.unmasking import (
    Autoregressive,
    Confidence,
    ConfidentPrefix,
    Entropy,
    EntropyBound,
    EntropyThreshold,
    Factor,
    LeftToRight,
    Margin,
    OneStep,
    RandomOrder,
    Threshold,
)
from apd.strategies.wino import WINO

__all__ = ["GRAMMAR", "KINDS", "OF_APD", "Kind", "Setting", "apd_of", "parse", "settle"]

GRAMMAR = """\
  left-to-right:K  random:K  confidence:K  margin:K  entropy:K
      K tokens per step
  threshold:γ[,least=n]  prefix:γ  factor:f  entropy-bound:γ
  entropy-threshold:γ[,penalty=nats]  klass:γ[,kl=ε,h=steps]
  wino:γ[,revoke=γ,length=LENGTH]                e.g. wino:0.6,length=8
  blocks:LENGTH[,aligned]/ANY-ORDER              e.g. blocks:8/threshold:0.9
  seeded:LENGTH[,aligned,verifier]/ANY-ORDER
      first token of a block alone; e.g. seeded:32,verifier/threshold:0.9
  one-step  autoregressive
  checked:[c=certainty,K=steps or auto,R=.5,proposer=NAME,breadth=N,
           pass=COLUMNS][/STRATEGY]
      the strategy's own tokens; NAME: mixture drafter verifier lookup;
      e.g. checked, checked:K=8,proposer=drafter/threshold:0.9
  apd:R=.5[,tau=τ,M=window or auto,W=kv window,refresh=tokens,
           first=judge,correction,rejection,step]
  A parameter that is left out has its default; `;` may stand for `,`."""


@dataclass(frozen=True)
class Setting:
    """One strategy with its parameters.

    Attributes:
        spec: the full name; equal settings have equal names.
        family: the name without the swept parameter.
        parameter: letter of the swept parameter; "" if there is none.
        value: value of the swept parameter; 0 if there is none.
        interpolates: True if the swept parameter is continuous (a threshold, not a number of tokens).
        strategy: the object; `None` for APD with `knobs`.
        knobs: fields of `APDConfig` that the name sets.
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
    """The grammar of one kind of strategy.

    Args:
        make: the strategy's dataclass; `APDConfig` for APD.
        sweep: letter and field of the swept parameter; `None` if there is none.
        options: field and form of each parameter, by its name in a spec.
        words: field and value of each bare word.
    """

    make: type[Any]
    sweep: tuple[str, str] | None = None
    options: Mapping[str, tuple[str, Form]] = field(default_factory=dict)
    words: Mapping[str, tuple[str, Any]] = field(default_factory=dict)


def _kind(make: type[Strategy], letter: str, name: str, form: Form = NUMBER, **more: tuple[str, Form]) -> Kind:
    return Kind(
        make, (letter, name), {letter: (name, form), **{key.rstrip("_"): value for key, value in more.items()}}
    )


def _apd_kind() -> Kind:
    """The grammar of APD, from its knobs: numbers by letter, flags as bare words, choices by name or as bare words."""
    defaults = APDConfig()
    options = {knob.spec or knob.letter: (name, knob.form) for name, knob in KNOBS.items() if knob.form is not None}
    named = {knob.spec: (name, _choice(knob.choices)) for name, knob in KNOBS.items() if knob.choices and knob.spec}
    words = {
        choice: (name, choice)
        for name, knob in KNOBS.items()
        for choice in knob.choices
        if not knob.spec and choice != getattr(defaults, name)
    }
    flags = {name: (name, True) for name in KNOBS if getattr(defaults, name) is False}
    return Kind(APDConfig, ("R", "mixture_weight"), options | named, words | flags)


def _choice(names: Collection[str]) -> Form:
    """One of these names; other values are not written."""

    def named(text: str) -> str:
        if text not in names:
            raise ValueError
        return text

    return Form(f"one of {', '.join(names)}", named, lambda value: value if isinstance(value, str) else None)


_WEIGHT = Form(
    "a number in [0, 1]",
    lambda text: Mixture(float(text)),
    lambda value: f"{value.mixture_weight:g}" if isinstance(value, Mixture) else None,
)
_PROPOSER = _choice(PROPOSERS)
_DEPTH = Form("a whole number or 'auto'", lambda text: text if text == "auto" else int(text))


def _top_k(make: type[Strategy]) -> Kind:
    return _kind(make, "K", "tokens_per_step", WHOLE_NUMBER)


KINDS: dict[str, Kind] = {
    "left-to-right": _top_k(LeftToRight),
    "random": _top_k(RandomOrder),
    "confidence": _top_k(Confidence),
    "margin": _top_k(Margin),
    "entropy": _top_k(Entropy),
    "threshold": _kind(Threshold, "γ", "threshold", least=("at_least", WHOLE_NUMBER)),
    "prefix": _kind(ConfidentPrefix, "γ", "threshold"),
    "factor": _kind(Factor, "f", "factor"),
    "entropy-bound": _kind(EntropyBound, "γ", "bound"),
    "entropy-threshold": _kind(EntropyThreshold, "γ", "threshold", penalty=("penalty", NUMBER)),
    "klass": _kind(KLASS, "γ", "threshold", kl=("kl_threshold", NUMBER), h=("history", WHOLE_NUMBER)),
    "wino": _kind(WINO, "γ", "threshold", revoke=("revoke_below", NUMBER), length=("length", WHOLE_NUMBER)),
    "checked": _kind(
        Checked,
        "c",
        "certainty",
        K=("num_checked", _DEPTH),
        R=("proposer", _WEIGHT),
        proposer=("proposer", _PROPOSER),
        breadth=("breadth", WHOLE_NUMBER),
        pass_=("pass_columns", WHOLE_NUMBER),
    ),
    "one-step": Kind(OneStep),
    "autoregressive": Kind(Autoregressive),
    "apd": _apd_kind(),
}


def parse(spec: str) -> Setting:
    """The setting with this name, see `GRAMMAR`.

    Raises:
        ValueError: an unknown kind or option, or a value outside its range.
    """
    text = spec.strip()
    outer, slash, inner = text.partition("/")
    kind_name, colon, arguments = outer.partition(":")
    if kind_name in _AROUND:
        return _parse_around(text, kind_name)
    if kind_name == "checked" and slash:
        return _checked(parse(outer), inner)
    if slash:
        raise ValueError(
            f"`strategy` must name one strategy, got {spec!r}: only blocks, seeded and checked go around another."
        )
    if kind_name not in KINDS:
        known = [*KINDS, *_AROUND]
        nearest = difflib.get_close_matches(kind_name.lower().replace("_", "-"), known, n=1)
        hint = f"Did you mean `{nearest[0]}`?" if nearest else f"Known: {', '.join(known)}."
        raise ValueError(f"`strategy` must be a known name, got {spec!r}. {hint}")
    kind = KINDS[kind_name]
    given = _arguments(spec, kind, arguments.replace(";", ",").split(",") if colon else [])
    try:
        made = kind.make(**given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{spec!r}: {error}") from None
    defaults = {field.name: field.default for field in dataclasses.fields(kind.make)}
    letter, swept = kind.sweep or ("", "")
    changed = {name: value for name, value in given.items() if name != swept and value != defaults[name]}
    rest = sorted(_written(kind, name, value) for name, value in changed.items())
    value = getattr(made, swept) if swept else 0
    is_apd = kind.make is APDConfig
    first = [f"{letter}=" * is_apd + f"{value:g}"] if swept else []
    return Setting(
        spec=_join(kind_name, first + rest),
        family=_join(kind_name, rest),
        parameter=letter,
        value=float(value),
        interpolates=bool(swept) and kind.options[letter][1] is NUMBER,
        strategy=None if is_apd else made,
        knobs=given if is_apd else {},
    )


def _parse_around(spec: str, kind_name: str) -> Setting:
    """A strategy that decides block by block, around another one."""
    make, words = _AROUND[kind_name]
    head, slash, inner = spec.partition("/")
    length, *options = head.removeprefix(kind_name).removeprefix(":").replace(";", ",").split(",")
    options = [option.strip() for option in options]
    if not slash or not length.isdigit() or int(length) < 1 or not set(options) <= words.keys():
        more = "".join(f"[,{word}]" for word in words)
        raise ValueError(
            f"`{kind_name}` is written {kind_name}:LENGTH{more}/STRATEGY, e.g. {kind_name}:8/threshold:0.9, got {spec!r}."
        )
    setting = parse(inner)
    if not isinstance(setting.strategy, Unmasking) or setting.strategy.needs_verifier:
        raise ValueError(
            f"`{kind_name}` must be around a strategy without memory that the drafter decides, got {inner!r}. Use threshold, "
            "factor, entropy-bound or a top-k."
        )
    name = _join(kind_name, [str(int(length)), *sorted(set(options))])
    return dataclasses.replace(
        setting,
        spec=f"{name}/{setting.spec}",
        family=f"{name}/{setting.family}",
        strategy=make(setting.strategy, int(length), **dict(words[option] for option in options)),
    )


#: Strategies around another one that decides within a block: the class, and the field and value of each bare word.
_AROUND: dict[str, tuple[type[Any], dict[str, tuple[str, Any]]]] = {
    "blocks": (Blocks, {"aligned": ("aligned", True)}),
    "seeded": (Seeded, {"aligned": ("aligned", True), "verifier": ("by", "verifier")}),
}


def _checked(setting: Setting, inner: str) -> Setting:
    """Checked decoding of another strategy than sequential decoding."""
    reference = parse(inner)
    if not isinstance(reference.strategy, Unmasking):
        raise ValueError(
            f"`checked` must be around a strategy without memory that the drafter decides, got {inner!r}. Use "
            "left-to-right, threshold, blocks or the like."
        )
    assert isinstance(setting.strategy, Checked)
    return dataclasses.replace(
        setting,
        spec=f"{setting.spec}/{reference.spec}",
        family=f"{setting.family}/{reference.spec}",
        strategy=dataclasses.replace(setting.strategy, reference=reference.strategy),
    )


def _arguments(spec: str, kind: Kind, arguments: list[str]) -> dict[str, Any]:
    """Values by field name; a bare number is the swept parameter."""
    values: dict[str, Any] = {}
    for argument in arguments:
        short, equals, text = (part.strip() for part in argument.partition("="))
        known = [*kind.options, *kind.words]
        if not equals and short not in known and kind.sweep is not None:
            short, equals, text = kind.sweep[0], "=", short
        if short not in known:
            raise ValueError(f"{spec!r} has no option {short!r}. It has {', '.join(known) or 'none'}.")
        if (short in kind.words) == bool(equals):
            wanted = "a bare word" if short in kind.words else kind.options[short][1].name
            raise ValueError(f"In {spec!r}, {short!r} must be {wanted}.")
        if short in kind.words:
            name, value = kind.words[short]
        else:
            name, form = kind.options[short]
            try:
                value = form.read(text)
            except ValueError as error:
                raise ValueError(f"In {spec!r}, {short} {error}.") from None
        if name in values:
            raise ValueError(f"{spec!r} gives {short!r} twice.")
        values[name] = value
    return values


def _written(kind: Kind, name: str, value: Any) -> str:
    """The text that sets a field to this value in a spec."""
    for word, meaning in kind.words.items():
        if meaning == (name, value):
            return word
    written = {short: form.write(value) for short, (field_name, form) in kind.options.items() if field_name == name}
    return next(f"{short}={text}" for short, text in written.items() if text is not None)


def _join(kind: str, arguments: list[str]) -> str:
    return f"{kind}:{','.join(arguments)}" if arguments else kind


def apd_of(config: APDConfig) -> APD:
    """Adaptive parallel decoding with these knobs."""
    if config.acceptance == "coupling":
        rule: AcceptanceRule = Coupling(config.acceptance_threshold, config.correction)
    else:
        rule = Rejection() if isinstance(config.acceptance, str) else config.acceptance
    return APD(config.mixture_weight, rule, config.first)


def settle(
    strategy: Strategy | str | None, config: APDConfig, knobs: Mapping[str, Any], *, default: Strategy | None = None
) -> tuple[Strategy | None, APDConfig]:
    """Resolve strategy and knobs: the strategy object, `None` for APD, and the resulting config.

    Args:
        strategy: an object or a name; `None` if the caller gave none.
        config: default knobs.
        knobs: knobs that the caller gave beside the strategy; they override `config`.
        default: the strategy if the caller gave none.

    Raises:
        ValueError: a name that cannot be parsed, or a knob that is given twice or would have no effect.
        TypeError: the object is no strategy.
    """
    if strategy is None:
        strategy = default
    if isinstance(strategy, str):
        setting = parse(strategy)
        for name in knobs.keys() & setting.knobs.keys():
            raise ValueError(
                f"`{name}` must be given once, got {knobs[name]!r} and {strategy!r}. Leave one of them out."
            )
        config, strategy = config.replace(**setting.knobs), setting.strategy
    if strategy is not None:
        check_strategy(strategy)
        if idle := sorted(knobs.keys() & OF_APD):
            raise ValueError(
                f"`{idle[0]}` has no effect beside `strategy`, got {strategy!r}. Leave one of them out, or decode with "
                'strategy="apd".'
            )
    config = config.replace(**knobs)
    if strategy is None:
        apd_of(config)  # refuses a rule that could commit nothing
    return strategy, config


#: Knobs that only APD reads; the others apply to every strategy.
OF_APD = {"mixture_weight", "acceptance_threshold", "acceptance", "correction", "first"}
