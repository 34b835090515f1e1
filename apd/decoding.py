"""The one loop: rows come in, make steps, and leave when they are done."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from apd.arguments import Request
from apd.config import APDConfig
from apd.drafter import Drafter
from apd.returned import check_session, name_of
from apd.state import FIRST_PACE, DecodeState, Reach, StepInfo, Window
from apd.step import Fused, Models, Strategy, as_it_is, decode_step
from apd.verifier import Verifier

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """What is asked of the models: the rows and how to decode them, all checked."""

    request: Request
    config: APDConfig
    strategy: Strategy


def without_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """Compute without gradients, and with tensors that any later step may write to, whatever mode the caller is in.

    Not a context of a generator: it would be left when the interpreter ends and torch is gone.
    """
    return torch.inference_mode(False)(torch.no_grad()(function))


class Decoding:
    """Rows that are being decoded together. Holds all that belongs to one call.

    Args:
        drafter: the models, and the ids they share, below `vocab_size`.
        verifier: may be `None` when the strategy needs none.
        vocab_size: see `Models`.
        call: its request has the first rows.
        rows: their numbers; 0, 1, … when not given.
        keeps_probs: see `Models`.
        fused: see `Models`; functions of the caller stay as they are.
        ahead: launch a step before the host knows where the one before it left the rows, as long as that takes no wider
            passes. Rows that are done are in one more step then, which changes nothing, and others join behind it.
    """

    @without_gradients
    def __init__(
        self,
        drafter: Drafter,
        verifier: Verifier | None,
        *,
        vocab_size: int,
        call: Call,
        rows: Tensor | None = None,
        keeps_probs: bool = True,
        fused: Fused = as_it_is,
        ahead: bool = False,
    ) -> None:
        self.call = call
        self.mask_token_id = drafter.mask_token_id
        self.state = lay_out(call.request, drafter.mask_token_id, rows)
        self.strategy = call.strategy.open(self.state)
        check_session(self.strategy, name_of(call.strategy, "open"), "propose")
        drafting = drafter.open(self.state, call.config.kv_window, call.config.kv_refresh)
        check_session(drafting, name_of(drafter, "open"), "logits")
        verifying = None
        if verifier is not None and call.strategy.needs_verifier:
            verifying = verifier.open(self.state)
            check_session(verifying, name_of(verifier, "open"), "logits")
        masks = [drafter.mask_token_id] if drafter.mask_token_id < vocab_size else []
        self.models = Models(
            drafter=drafting,
            verifier=verifying,
            removed=torch.tensor(masks, dtype=torch.int64, device=drafter.device),
            mask_token_id=drafter.mask_token_id,
            vocab_size=vocab_size,
            processing=call.request.processing,
            keeps_probs=keeps_probs,
            keeps_scores=bool(call.request.generation.output_scores or call.request.generation.output_logits),
            fused=as_it_is if call.request.asks_the_caller else fused,
        )
        self.upcoming: tuple[DecodeState, StepInfo] | None = None  # a step that is launched and not told of
        self.newcomers: list[tuple[Request, Tensor]] = []
        self.idle = [0] * len(self.state.rows)  # steps of each row since a token of it was committed
        self.is_ahead = ahead and self.models.fused is not as_it_is and call.config.window_size != "auto"

    def steps(self) -> Iterator[tuple[StepInfo, DecodeState]]:
        """Step by step until every row is done: what happened, and the rows after it, finished ones included.

        Others may `join` whenever a step is told of.
        """
        while self.newcomers or not all(self.state.layout.done):
            if self.upcoming is None or all(self.state.layout.done):  # then it was launched in vain
                self._let_go()
                self._let_in()
                self.upcoming = self._step(self.state)
            after, info = self.upcoming
            self.upcoming = self._step_ahead(after) if self.is_ahead else None
            self.state = after
            if any(after.layout.done):
                _refuse_broken(info)
            self._check_progress(info, after)
            yield info, after

    @without_gradients
    def _step(self, state: DecodeState, ahead: Window | None = None) -> tuple[DecodeState, StepInfo]:
        return decode_step(
            state,
            strategy=self.strategy,
            models=self.models,
            sampling=self.call.request.sampling,
            window_size=self.call.config.window_size,
            stopping=self.call.request.stopping,
            ahead=ahead,
        )

    def _step_ahead(self, after: DecodeState) -> tuple[DecodeState, StepInfo] | None:
        """The next step, made before the host knows where this one has left the rows; `None` where it has to know."""
        window_size, before = self.call.config.window_size, self.state.layout
        assert window_size != "auto"
        is_last = max(map(operator.sub, before.end, before.frontier)) == 1
        if is_last or self.newcomers or any(before.done):
            return None
        reach = Reach.of(before, window_size)
        if not self.models.fit(reach):
            return None
        after.send_layout(before)
        then, info = self._step(after, Window.ahead(after, window_size, reach))
        return dataclasses.replace(then, done=after.done | then.done), info

    @property
    def num_rows(self) -> int:
        """Rows that are not done."""
        return self.state.layout.done.count(False) + sum(len(rows) for _, rows in self.newcomers)

    def _check_progress(self, info: StepInfo, after: DecodeState) -> None:
        """Refuse a strategy that would go on for ever.

        It may keep back what it is not sure of, but not for as many steps as the row has masks: one token each is enough.
        """
        of_rows = zip(self.idle, info.before.layout.decided, after.layout.decided, strict=True)
        self.idle = [idle + 1 if decided == before else 0 for idle, before, decided in of_rows]
        for row, idle in enumerate(self.idle):
            masks = after.width - after.layout.decided[row]
            if idle >= masks and not after.layout.done[row]:
                raise RuntimeError(
                    f"`{name_of(self.call.strategy)}` must commit a token of every row within as many steps as it has "
                    f"masks, got none in {idle} steps of row {int(after.rows[row])}, which has {masks}. Choose at least "
                    "one candidate of each row, the likeliest if none is good enough."
                )

    def join(self, request: Request, rows: Tensor) -> None:
        """Let more rows in. They take part in the next step that is launched; the rows that are here do not notice.

        Args:
            request: only its rows count; the rest is that of the call.
            rows: `n` int64, their numbers.
        """
        self.newcomers.append((request, rows))

    @without_gradients
    def _let_in(self) -> None:
        """Rows that were told to join."""
        for request, rows in self.newcomers:
            self.state = stack(self.state, lay_out(request, self.mask_token_id, rows), self.mask_token_id)
            self.models.join(self.state)
            self.strategy.join(self.state)
            self.idle += [0] * len(rows)
        self.newcomers = []

    @without_gradients
    def _let_go(self) -> None:
        """Forget the rows that are done, and the columns that only they had."""
        if any(self.state.layout.done):
            self.idle = [idle for idle, done in zip(self.idle, self.state.layout.done, strict=True) if not done]
            going_on = (~self.state.done).nonzero().squeeze(1)
            self.state = self.state.select(going_on).narrowed()
            self.models.select(going_on)
            self.strategy.select(going_on)


def lay_out(request: Request, mask_token_id: int, rows: Tensor | None = None) -> DecodeState:
    """Rows before their first step: the prompt decided, masks behind it."""
    prompt = request.prompt
    masks = prompt.new_full((len(prompt), request.max_new_tokens), mask_token_id)
    decided = torch.cat([torch.ones_like(prompt), torch.zeros_like(masks)], 1).bool()
    return DecodeState(
        tokens=torch.cat([prompt, masks], 1),
        decided=decided,
        frontier=torch.full_like(request.padding, prompt.shape[1]),
        done=torch.zeros_like(request.padding, dtype=torch.bool),
        padding=request.padding,
        start=torch.full_like(request.padding, prompt.shape[1]),
        end=torch.full_like(request.padding, decided.shape[1]),
        seeds=request.seeds,
        steps=torch.zeros_like(request.padding),
        rows=torch.arange(len(prompt), device=prompt.device) if rows is None else rows,
        pace=torch.full_like(request.padding, FIRST_PACE, dtype=torch.float32),
    )


def stack(above: DecodeState, below: DecodeState, mask_token_id: int) -> DecodeState:
    """Both batches as one, the narrower widened by columns that are behind the end of its rows."""
    width = max(above.width, below.width)
    above, below = (_widened(state, width, mask_token_id) for state in (above, below))
    return DecodeState(
        *(torch.cat([getattr(above, f.name), getattr(below, f.name)]) for f in dataclasses.fields(DecodeState))
    )


def _widened(state: DecodeState, width: int, mask_token_id: int) -> DecodeState:
    more = (0, width - state.width)
    return dataclasses.replace(
        state,
        tokens=torch.nn.functional.pad(state.tokens, more, value=mask_token_id),
        decided=torch.nn.functional.pad(state.decided, more, value=True),
    )


def _refuse_broken(info: StepInfo) -> None:
    if not info.broken.any():
        return
    row, proposal = int(info.broken.long().argmax()), info.proposal
    best = [of[row][proposal.decisive[row]] for of in proposal.best]
    model, gave = proposal.models[1], "NaN, infinite or no finite logits"
    if best[0].isfinite().all():
        # The draft is sound, so it is what the verifier makes of it.
        model, gave = "mixture", "no token that both models allow, or the verifier none at all,"
        if (best[-1].isnan() | best[-1].isposinf()).any():
            model, gave = "verifier", "NaN or infinite logits"
    raise FloatingPointError(
        f"The {model} gave {gave} at step {int(info.before.steps[row])} of row {int(info.before.rows[row])}, where a token "
        "had to be decided. Check its weights and dtype (float16 overflows where bfloat16 does not), and that the "
        "logits processors leave a token."
    )
