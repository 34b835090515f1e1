"""Contract and laws of drafters and verifiers of one's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apd.decoding.protocols import LimitingDrafter
from apd.decoding.returned import check_returned, check_session
from apd.decoding.state import DecodeState
from apd.decoding.strategy import OwnSession
from apd.decoding.window import Window
from apd.inspection.bed import Broken, Trial, answers, equal, prompts_of, state_of_rows
from apd.inspection.lent import Lent
from apd.kinds import WHOLE
from apd.sampler import APDSampler

Passes = Callable[[DecodeState, Window], Tensor]


def drafter_laws(trial: Trial, drafter: Any, new_tokens: int) -> None:
    """A drafter: attributes, sessions, logits, rows, and what else its session can do."""
    trial.law("attributes", "those of `Drafter`", lambda: _attributes(drafter, trial.part, mask=True), needed=True)
    if trial.is_over:
        return
    mask, device = drafter.mask_token_id, drafter.device
    prompts = prompts_of(drafter.vocab_size, mask)
    by = f"{trial.part}.logits"

    def state_of(rows: list[list[int]]) -> DecodeState:
        return state_of_rows(rows, mask, new_tokens, device)

    def window_of(state: DecodeState) -> Window:
        most = drafter.window_ends(state) if isinstance(drafter, LimitingDrafter) else state.layout.end
        return Window.of_rows(state, [min(pair) for pair in zip(state.layout.end, most, strict=True)])

    def logits(state: DecodeState, window: Window) -> Tensor:
        session = drafter.open(state)
        check_session(session, f"{trial.part}.open", "logits")
        lent = Lent(state=state, window=window)
        found = _read(session.logits(state, window), by, window, drafter.vocab_size)
        lent.check(by)
        return found

    _shared_laws(trial, prompts, state_of, window_of, logits, by)
    if trial.is_over:
        return
    state = state_of(prompts)
    window = window_of(state)
    if hasattr(drafter.open(state), "canvas_logits"):
        trial.law("canvases", "as `logits` gives them", lambda: _canvases(drafter, state, window_of, by, trial.part))
    attention = getattr(drafter, "attention", None)
    if (
        hasattr(drafter, "open_cached")
        and not getattr(attention, "is_final", False)
        and getattr(drafter, "keeps_keys", True)
    ):

        def cached() -> None:
            session = drafter.open_cached(state, state.width, None)
            found = _read(session.logits(state, window), by, window, drafter.vocab_size)
            where = "with a KV window as long as the row than without a cache"
            equal(f"{trial.part}.open_cached", found, logits(state, window), where, "Such a window is exact.")

        trial.law("wide KV window", "as without a cache", cached)
    sampler = APDSampler(drafter, mixture_weight=1.0)
    call = {"max_new_tokens": new_tokens, "window_size": 3, "eos_token_id": _stop(drafter.vocab_size, mask)}
    _batch_law(trial, sampler, prompts, call)


def verifier_laws(trial: Trial, verifier: Any, new_tokens: int) -> None:
    """A verifier: attributes, sessions, logits, and that it reads nothing but what is before a token."""
    trial.law("attributes", "those of `Verifier`", lambda: _attributes(verifier, trial.part, mask=False), needed=True)
    if trial.is_over:
        return
    drafter = _Counting(verifier.vocab_size)
    prompts = prompts_of(verifier.vocab_size, drafter.mask_token_id)
    scores = not hasattr(verifier.open(_start(prompts, drafter, new_tokens)), "logits")
    by = f"{trial.part}.{'score' if scores else 'logits'}"

    def read(state: DecodeState, window: Window, draft: Tensor) -> Tensor:
        session = verifier.open(state)
        check_session(session, f"{trial.part}.open", "logits", "score")
        lent = Lent(state=state, window=window, draft=draft)
        if scores:
            found = session.score(state, window, draft)
            check_returned(found, by, tuple(draft.shape), torch.float32)
            found = found[..., None].clone()
        else:
            found = _read(session.logits(state, window, draft), by, window, verifier.vocab_size, may_be_empty=True)
        lent.check(by)
        return found

    def state_of(rows: list[list[int]]) -> DecodeState:
        return _start(rows, drafter, new_tokens)

    def logits(state: DecodeState, window: Window) -> Tensor:
        return read(state, window, _draft(window, state, verifier.vocab_size))

    def window_of(state: DecodeState) -> Window:
        return Window.of_rows(state, state.layout.end)

    _shared_laws(trial, prompts, state_of, window_of, logits, by)

    def causal() -> None:
        state = state_of(prompts)
        window = Window.of_rows(state, state.layout.end)
        draft = _draft(window, state, verifier.vocab_size)
        at = window.columns.shape[1] // 2
        other = draft.clone()
        other[:, at:] = (other[:, at:] + 1) % verifier.vocab_size
        seen = at + (0 if scores else 1)  # the scores of the changed tokens themselves change
        before, after = read(state, window, draft)[:, :seen], read(state, window, other)[:, :seen]
        where = "where drafted tokens at or behind a position change"
        equal(by, after, before, where, "It must read only what is before the token that it predicts.")

    trial.law("causal", "reads what is before", causal)
    if not scores:
        sampler = APDSampler(drafter, verifier, mixture_weight=0.0)
        _batch_law(trial, sampler, prompts, {"max_new_tokens": new_tokens, "eos_token_id": 1, "correction": True})


def _attributes(model: Any, name: str, *, mask: bool) -> None:
    names = ("vocab_size", *(("mask_token_id",) if mask else ()))
    for attribute in names:
        value: Any = getattr(model, attribute, None)
        if not WHOLE.fits(value) or value < (0 if attribute == "mask_token_id" else 2):
            raise Broken(f"`{name}.{attribute}` must be a whole number, got {value!r}. Set it.")
    if not hasattr(model, "max_length"):
        raise Broken(f"`{name}.max_length` must be a whole number, or None for no limit; it is missing. Set it.")
    if mask and not isinstance(getattr(model, "device", None), torch.device):
        raise Broken(
            f"`{name}.device` must be a torch.device, got {getattr(model, 'device', None)!r}. Return that of its inputs."
        )
    if not callable(getattr(model, "open", None)):
        raise Broken(
            f"`{name}` must have a method `open(state)` that returns a session. Return `self` if it remembers nothing."
        )


def _read(logits: Any, by: str, window: Window, vocab_size: int, *, may_be_empty: bool = False) -> Tensor:
    """The logits of a window, checked more strictly than decoding does, which takes wider ones."""
    found: Tensor = logits[:, :] if not isinstance(logits, Tensor) and hasattr(logits, "__getitem__") else logits
    check_returned(found, by, (*window.columns.shape, None), torch.float32)
    if found.shape[2] != vocab_size:
        raise Broken(
            f"`{by}` must return a logit for each of its {vocab_size} ids (`vocab_size`), got {found.shape[2]}. Cut padding rows "
            "off, or set `vocab_size`."
        )
    inside = found[window.inside]
    if inside.isnan().any() or inside.isposinf().any():
        raise Broken(f"`{by}` must return numbers, got NaN or +∞ inside the window. −∞ excludes a token.")
    if not may_be_empty and inside.isneginf().all(-1).any():
        raise Broken(f"`{by}` must allow a token at every position of the window, got −∞ for all ids.")
    return found


def _shared_laws(
    trial: Trial,
    prompts: list[list[int]],
    state_of: Callable[[list[list[int]]], DecodeState],
    window_of: Callable[[DecodeState], Window],
    logits: Passes,
    by: str,
) -> None:
    """Laws of both kinds of models: shapes, repeatable, rows apart. Every call refuses that its arguments are written to."""
    state = state_of(prompts)
    window = window_of(state)
    kept: list[Tensor] = []

    def shape() -> str:
        kept.append(logits(state, window).clone())
        return f"shape {list(kept[0].shape)}"

    trial.law("logits", "b m v, finite", shape, needed=True)

    def repeatable() -> None:
        equal(
            by,
            logits(state, window),
            kept[0],
            "when it is asked again",
            "They must be a function of the rows: no `torch.rand`.",
            tolerance=0.0,
        )

    trial.law("same twice", "equal", repeatable, needed=True)

    def own() -> None:
        logits(state, window).fill_(-1.0)
        equal(
            by,
            logits(state, window),
            kept[0],
            "after the caller wrote to the result",
            "Return a new tensor, not one that you keep.",
        )

    trial.law("own result", "may be written to", own)

    def apart() -> None:
        for row, prompt in enumerate(prompts):
            single = state_of([prompt])
            alone = window_of(single)
            width = alone.columns.shape[1]
            equal(
                by, kept[0][row : row + 1, :width], logits(single, alone),
                f"for row {row} of a padded batch than for this row alone",
                "Compute along positions and ids, never along rows, and leave out the padding.",
            )  # fmt: skip

    trial.law("batch = single", "equal", apart)

    def later() -> None:
        column = torch.arange(state.width, device=state.tokens.device)
        further = torch.arange(len(state.rows), device=column.device)[:, None]
        decided = state.decided | (column < state.frontier[:, None] + further)
        moved = state.with_decided(torch.where(decided & ~state.decided, prompts[0][0], state.tokens), decided)
        after = window_of(moved)
        logits(moved, after)

    trial.law("ragged frontiers", "b m v, finite", later)


def _batch_law(trial: Trial, sampler: APDSampler, prompts: list[list[int]], call: dict[str, Any]) -> None:
    def changing() -> None:
        together = answers(sampler, prompts * 2, batch_size=3, **call)
        if together != answers(sampler, prompts * 2, batch_size=1, alone=True, **call):
            raise Broken(
                f"`{trial.part}` gives rows other tokens when rows leave and join the batch. `select` must keep the rows at the given "
                "indices, and `join` make room for new ones, in everything that the session remembers."
            )

    trial.law("rows come and go", "tokens as alone", changing)


def _canvases(
    drafter: Any, state: DecodeState, window_of: Callable[[DecodeState], Window], by: str, part: str
) -> None:
    rows = torch.tensor([0, 0, *range(1, len(state.rows))], device=state.tokens.device)
    canvases = state.select(rows)
    window = window_of(canvases)
    session = drafter.open(state)
    found = _read(session.canvas_logits(canvases, window, rows), f"{part}.canvas_logits", window, drafter.vocab_size)
    expected = _read(drafter.open(canvases).logits(canvases, window), by, window, drafter.vocab_size)
    remedy = "Where nothing is remembered, `return self.logits(state, window)`."
    found, expected = found[window.inside], expected[window.inside]
    equal(f"{part}.canvas_logits", found, expected, "than `logits` of these canvases", remedy)


def _stop(vocab_size: int, mask: int) -> int:
    return next(id for id in range(vocab_size) if id != mask)


def _start(rows: list[list[int]], drafter: Any, new_tokens: int) -> DecodeState:
    return state_of_rows(rows, drafter.mask_token_id, new_tokens, drafter.device)


def _draft(window: Window, state: DecodeState, vocab_size: int) -> Tensor:
    """Drafted tokens that depend on the position alone."""
    return ((window.columns - state.padding[:, None]) * 7 + 3) % vocab_size


class _Counting(OwnSession):
    """A drafter for verifiers: at position i it likes token 5 i best, then those around it."""

    max_length = None

    def __init__(self, vocab_size: int) -> None:
        # The mask is an id that the verifier has, too: undecided columns hold it.
        self.vocab_size, self.mask_token_id, self.device = vocab_size, vocab_size - 1, torch.device("cpu")

    def logits(self, state: DecodeState, window: Window) -> Tensor:
        best = ((window.columns - state.padding[:, None]) * 5)[..., None]
        away = (torch.arange(self.vocab_size) - best).remainder(self.vocab_size)
        return -away.float() / 4
