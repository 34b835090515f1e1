"""The strategies that ParallelBench compares: short names of `apd.strategies.registry`, and presets of them."""

from __future__ import annotations

from collections.abc import Iterable

from apd.strategies import Autoregressive, registry
from apd.strategies.registry import GRAMMAR, KINDS, Setting

__all__ = ["ENDPOINT", "GRAMMAR", "KINDS", "PRESETS", "Setting", "expand", "parse"]

#: What the records of an endpoint are called: it decodes in its own way, neither as APD nor in any order.
ENDPOINT = Setting("endpoint", "endpoint", "", 0.0, False, Autoregressive())


def parse(spec: str) -> Setting:
    """A setting from its short name.

    Raises:
        ValueError: the name is invalid; the message has the grammar.
    """
    return ENDPOINT if spec.strip() == ENDPOINT.spec else registry.parse(spec)


def expand(specs: Iterable[str]) -> list[Setting]:
    """Settings of specs and presets, each once, in the order given."""
    names = [name for spec in specs for name in PRESETS.get(spec, (spec,))]
    return list({setting.spec: setting for setting in map(parse, names)}.values())


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
_CHECKED = ("checked", "checked:0.9", "checked/threshold:0.9", "checked:breadth=2/threshold:0.9")
_FINE_WEIGHTS = (0, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9)
_FINE_TAUS = (0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9)
PRESETS: dict[str, tuple[str, ...]] = {
    # The grids of the paper and of the later official code; for APD, the prefix and entropies, ours.
    "all": (
        *(spec for kind in _TOP_K_KINDS for spec in _grid(f"{kind}:{{}}", _POWERS)),
        *_grid("threshold:{}", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        *_grid("prefix:{}", (0.5, 0.7, 0.9, 0.98)),
        *_grid("factor:{}", (0.7, 1.0, 1.3, 1.6, 1.9)),
        *_grid("entropy-bound:{}", (0.01, 0.1, 0.3, 1.0)),
        *_grid("entropy-threshold:{}", (0.1, 0.2, 0.4, 0.8)),
        *_grid("klass:{}", (0.7, 0.8, 0.9, 0.95)),
        *_grid("wino:{}", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        *_grid("wino:{},length=8", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        *(spec for length in _POWERS[1:5] for spec in _grid(f"blocks:{length}/confidence:{{}}", (1, 2, 4))),
        *_grid("blocks:8/threshold:{}", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)),
        "one-step",
        "autoregressive",
        *_APD,
        *_grid("apd:R={},rejection", _WEIGHTS),
        *_CHECKED,
        "checked:0.95,K=auto",
    ),
    # For tasks with random answers: finer grids of the fast strategies and of those that determine the reference accuracy.
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
        *_CHECKED,
        "checked:0.95,K=auto",
        "checked/entropy-bound:0.01",
    ),
    # A quick overview, in a minute.
    "few": (
        "apd:R=0.5",
        "apd:R=0.5,correction",
        "threshold:0.9",
        "confidence:4",
        "left-to-right:4",
        "one-step",
        "autoregressive",
        *_CHECKED,
    ),
}
