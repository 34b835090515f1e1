"""The knobs of adaptive parallel decoding. Each is declared once, in its field of `APDConfig`."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from apd.kinds import FLAG, REAL, WHOLE

if TYPE_CHECKING:
    from typing import Literal

    from apd.decoding.acceptance import AcceptanceRule
    from apd.decoding.window import WindowPolicy

T = TypeVar("T")

#: Masks per step: a number, "auto" (from the row's own commits), a policy, or `None` for all that are left.
WindowSize: TypeAlias = "int | Literal['auto'] | WindowPolicy | None"


@dataclass(frozen=True)
class Form:
    """How a value is written as text, on the command line or in a strategy spec.

    Args:
        name: the kind of value, behind "must be".
        parse: text → value; raises ValueError for other text.
        write: value → text; `None` for a value that this form does not write.
    """

    name: str
    parse: Callable[[str], Any]
    write: Callable[[Any], str | None] = lambda value: value if isinstance(value, str) else f"{value:g}"

    def read(self, text: str) -> Any:
        """Parse `text`.

        Raises:
            ValueError: "must be …, got …".
        """
        try:
            return self.parse(text)
        except ValueError:
            raise ValueError(f"must be {self.name}, got {text!r}") from None


NUMBER = Form("a number", float)
WHOLE_NUMBER = Form("a whole number", int)
_COUNT = Form("a whole number or 'none'", lambda text: None if text == "none" else int(text))
_WINDOW = Form("a whole number, 'auto' or 'none'", lambda text: text if text == "auto" else _COUNT.parse(text))


@dataclass(frozen=True)
class Knob:
    """How a knob is written, checked and explained. Command line, strategy specs, lm-eval and README follow from it.

    Args:
        help: its effect, in one line.
        check: (name, value) → raises for an invalid value.
        letter: its letter in the paper; "" if it has none.
        spec: its name in strategy specs, where that is not the letter; choices without one are bare words there.
        form: how a number is written; `None` for flags and choices.
        choices: the valid names.
    """

    help: str
    check: Callable[[str, Any], None]
    letter: str = ""
    spec: str = ""
    form: Form | None = None
    choices: tuple[str, ...] = ()


def _knob(*args: Any, **kwargs: Any) -> dict[str, Knob]:
    """Metadata of a field of `APDConfig`."""
    return {"knob": Knob(*args, **kwargs)}


def check_fraction(name: str, value: Any, remedy: str) -> None:
    check_number(name, value, "in [0, 1]", lambda number: 0 <= number <= 1, remedy)


def check_number(name: str, value: Any, rule: str, holds: Callable[[float], bool], remedy: str) -> None:
    if not REAL.fits(value):
        raise TypeError(f"`{name}` must be a number {rule}, got {value!r}. {remedy}.")
    if not holds(float(value)):
        raise ValueError(f"`{name}` must be {rule}, got {value}. {remedy}.")


def check_count(name: str, value: Any, remedy: str, *, or_none: bool = False) -> None:
    if value is None and or_none:
        return
    if not WHOLE.fits(value):
        raise TypeError(f"`{name}` must be a whole number{' or None' * or_none}, got {value!r}. {remedy}.")
    if value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}. {remedy}.")
    if value >= 2**31:
        raise ValueError(f"`{name}` must be below 2^31, got {value}. {remedy}.")


def _check_flag(name: str, value: Any) -> None:
    if not FLAG.fits(value):
        raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...], otherwise: str = "") -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}{otherwise}, got {value!r}.")


def _check_window_size(name: str, value: Any) -> None:
    if _is_object(name, value, "window", "update") or value == "auto":
        return
    remedy = (
        "Use 1 for one mask per step, None for all that are left, 'auto' to follow what is committed, or give a "
        "`WindowPolicy`"
    )
    check_count(name, value, remedy, or_none=True)


def _check_acceptance(name: str, value: Any) -> None:
    if not _is_object(name, value, "__call__"):
        _check_choice(name, value, _RULES, " or an `AcceptanceRule`")


def _is_object(name: str, value: Any, *methods: str) -> bool:
    """Whether `value` is an object with these methods. It must be hashable, since configurations are hashed.

    Raises:
        TypeError: a class that has the methods, or an object that cannot be hashed.
    """
    if not all(callable(getattr(value, method, None)) for method in methods):
        return False
    if isinstance(value, type):
        raise TypeError(f"`{name}` must be an instance, got the class {value.__name__}. Call it.")
    try:
        hash(value)
    except TypeError:
        raise TypeError(f"`{name}` must be hashable, got {value!r}. Make it a `@dataclass(frozen=True)`.") from None
    return True


_RULES = ("coupling", "rejection")
_NOISES = ("keyed", "step")
_FIRSTS = ("draft", "judge")


def check_first(name: str, value: Any) -> None:
    _check_choice(name, value, _FIRSTS)


def _naming_knobs(cls: type[T]) -> type[T]:
    """A class whose fields are knobs answers an unknown one with the one that is meant."""
    init = cls.__init__

    @functools.wraps(init)
    def checked(self: T, *args: Any, **knobs: Any) -> None:
        for name, value in knobs.items():
            if name not in KNOBS:
                shown = f"{value!r:.60}"
                hint = letter_hint(name, shown)
                if not hint:
                    nearest = difflib.get_close_matches(name, KNOBS, n=1)
                    hint = f"Did you mean `{nearest[0]}`?" if nearest else f"Known: {', '.join(KNOBS)}."
                raise TypeError(f"{cls.__name__}() has no argument `{name}`. {hint}")
        init(self, *args, **knobs)

    cls.__init__ = checked  # type: ignore[assignment, method-assign]
    return cls


@_naming_knobs
@dataclass(frozen=True)
class APDConfig:
    """Which prefix of a draft is committed, and how much is recomputed to draft it.

    Args:
        mixture_weight: R in [0, 1], weight of the drafter in p_T ∝ p_D^R · p_AR^(1-R). Higher commits more per step.
        acceptance_threshold: τ in [0, 1]. Beyond the first position a token is committed only if p_T ≥ τ; 0 is the
            paper's rule, 1 commits one token per step (as long as no probability rounds to 1).
        window_size: M, masks drafted per step, in tokens. `None`: all that are left. `"auto"`: twice what the row's own
            last steps committed on average, at least 8. Or a `WindowPolicy`.
        kv_window: W, how many of the last committed tokens are recomputed each step, in tokens; older keys and values
            stay frozen, an approximation, since the drafter attends both ways. `None`: no cache, exact.
        kv_refresh: N, with `kv_window`: a row is recomputed as a whole once N tokens were committed since it last was,
            in tokens. 1 is exact. `None`: never.
        acceptance: `"coupling"` (the paper: draft and target share their noise), `"rejection"` (speculative sampling
            toward p_T), or an `AcceptanceRule`.
        correction: with `"coupling"`, also commit the target's token at the first mismatch.
        noise: `"keyed"` draws the same noise whenever a position is drafted again; `"step"` redraws it, as published
            code does, which biases what is generated unless `correction` is on.
        first: `"draft"`: the first token of a step is the drafter's, whatever the rule says, since p_D is its exact
            conditional there. `"judge"`: the rule judges it, too, and what it rejects is replaced; at R = 0 with
            `correction` and keyed noise the output is the verifier's own, token for token.

    Raises:
        ValueError: a knob is outside its range.
        TypeError: a knob is unknown, or has the wrong type.

    Source: Israel, Van den Broeck, Grover 2025, arXiv:2506.00413; rejection: arXiv:2606.08048.
    """

    mixture_weight: float = field(
        default=0.5,
        metadata=_knob(
            "the drafter's weight in the mixture, 0 to 1; higher commits more per step and makes more mistakes; 1 needs no "
            "verifier",
            partial(check_fraction, remedy="1 trusts the drafter alone, 0 the verifier alone"),
            "R",
            form=NUMBER,
        ),
    )
    acceptance_threshold: float = field(
        default=0.0,
        metadata=_knob(
            "beyond the first token, accept only where p_T(x) is at least this; higher is slower and safer; 0 is the paper, "
            "1 commits one token per step unless p_T is exactly 1",
            partial(check_fraction, remedy="0 is the paper, 1 one token per step"),
            "τ",
            "tau",
            form=NUMBER,
        ),
    )
    window_size: WindowSize = field(
        default=None,
        metadata=_knob(
            "masks drafted per step; smaller makes a step cheaper, and a drafter that never saw so few masks worse; auto "
            "follows what the row's steps commit",
            _check_window_size,
            "M",
            form=_WINDOW,
        ),
    )
    kv_window: int | None = field(
        default=None,
        metadata=_knob(
            "committed tokens recomputed per step, older keys and values stay frozen; smaller is cheaper and less exact; none "
            "is exact",
            partial(
                check_count, remedy="Use None for no cache (exact); 0 would never recompute a new token", or_none=True
            ),
            "W",
            form=_COUNT,
        ),
    )
    kv_refresh: int | None = field(
        default=None,
        metadata=_knob(
            "with W: recompute a whole row after every N committed tokens; smaller is more exact and costs more",
            partial(check_count, remedy="Use 1 to recompute everything at each step, None for never", or_none=True),
            "N",
            "refresh",
            form=_COUNT,
        ),
    )
    acceptance: str | AcceptanceRule = field(
        default="coupling",
        metadata=_knob(
            "coupling is the paper's rule, rejection is speculative sampling toward p_T",
            _check_acceptance,
            choices=_RULES,
        ),
    )
    correction: bool = field(
        default=False,
        metadata=_knob(
            "at the first mismatch, also commit the target token: more tokens per step, but a weak verifier gets to write",
            _check_flag,
        ),
    )
    noise: str = field(
        default="keyed",
        metadata=_knob(
            "keyed: the same noise whenever a position is drafted again; step: redrawn at each step, which biases samples towards parallel guesses",
            partial(_check_choice, choices=_NOISES),
            choices=_NOISES,
        ),
    )
    first: str = field(
        default="draft",
        metadata=_knob(
            "draft: a step's first token is the drafter's; judge: it is judged as all others are, and replaced if rejected; "
            "with R = 0 and correction the answer is the verifier's own",
            check_first,
            spec="first",
            choices=_FIRSTS,
        ),
    )

    def __post_init__(self) -> None:
        for name, knob in KNOBS.items():
            knob.check(name, getattr(self, name))
        if self.kv_refresh is not None and self.kv_window is None:
            raise ValueError(
                f"`kv_refresh` must be None without `kv_window`, got {self.kv_refresh}: there is no cache to refresh. Set "
                "`kv_window`, or leave it out."
            )
        if self.acceptance == "coupling":
            self._check_first()
            return
        if self.acceptance == "rejection":
            reasons = (
                "a threshold would bias what rejection sampling keeps exact. Use acceptance='coupling' with a threshold",
                "rejection always commits a draw from the residual in place of the rejected token",
            )
        else:
            reasons = ("a rule has its own settings. Set them there, as in `Coupling(threshold=0.9)`",) * 2
        for name, reason in zip(("acceptance_threshold", "correction"), reasons, strict=True):
            if value := getattr(self, name):
                neutral = "False" if value is True else "0"
                raise ValueError(
                    f"`{name}` must be {neutral} with acceptance={self.acceptance!r}, got {value}: {reason}."
                )

    def _check_first(self) -> None:
        """Refuse a first token that coupling could reject without a replacement: the step would commit nothing."""
        if self.first == "draft":
            return
        if not self.correction:
            raise ValueError(
                "`correction` must be True with first='judge' and acceptance='coupling', got False: a step whose first "
                "token is rejected would commit nothing. Set `correction`, take acceptance='rejection', or first='draft'."
            )
        if self.acceptance_threshold:
            raise ValueError(
                f"`acceptance_threshold` must be 0 with first='judge', got {self.acceptance_threshold}: where no token is "
                "as likely, a step would commit nothing. Leave it out, or take first='draft'."
            )

    @classmethod
    def paper(cls, **overrides: Any) -> APDConfig:
        """The setting of the paper's headline numbers: R 0.7, M 100, W 16, noise redrawn each step (Table 2)."""
        settings: dict[str, Any] = {"mixture_weight": 0.7, "window_size": 100, "kv_window": 16, "noise": "step"}
        return cls(**(settings | overrides))

    def replace(self, **changes: Any) -> APDConfig:
        """A copy with some knobs changed, validated again."""
        return dataclasses.replace(self, **changes)


#: The knobs by name, in the order of their fields.
KNOBS: dict[str, Knob] = {each.name: each.metadata["knob"] for each in dataclasses.fields(APDConfig)}

#: Letters of the paper, as they are written in strategy specs, and names that come to mind: the knob that each means.
LETTERS = {
    **{knob.letter: name for name, knob in KNOBS.items() if knob.letter},
    **{knob.spec: name for name, knob in KNOBS.items() if knob.spec and knob.spec != name},
    "r": "mixture_weight",
    "weight": "mixture_weight",
    "apd_mixture_weight": "mixture_weight",
    "window": "window_size",
    "max_lookahead": "window_size",
    "lookahead": "window_size",
}


def letter_hint(name: str, shown: str) -> str:
    """What to write for a letter of the paper, with a value as it is shown; "" for another name."""
    if name not in LETTERS:
        return ""
    letter = f" ({name} of the paper)" if name == KNOBS[LETTERS[name]].letter else ""
    return f"Write {LETTERS[name]}={shown}{letter}."


def check_config(config: Any) -> None:
    """Refuse what is no `APDConfig`, where one may be given.

    Raises:
        TypeError: the message has the value.
    """
    if not isinstance(config, APDConfig | None):
        raise TypeError(
            f"`config` must be an APDConfig, got {type(config).__name__} {config!r:.60}. Give single knobs by name, as in "
            "mixture_weight=0.7, and another way to decode as strategy=..."
        )
