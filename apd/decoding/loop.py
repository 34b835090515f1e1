"""The one loop: rows come in, make steps, and leave when they are done."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from apd.config import APDConfig
from apd.decoding.state import FIRST_PACE, DecodeState, StepInfo
from apd.decoding.step import Fused, Models, Strategy, as_it_is, decode_step
from apd.generation.arguments import Request
from apd.models.drafter import Drafter
from apd.models.verifier import Verifier


@dataclass(frozen=True)
class Call:
    """What is asked of the models: the rows and how to decode them, all checked."""

    request: Request
    config: APDConfig
    strategy: Strategy


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
    """

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
    ) -> None:
        self.call = call
        self.mask_token_id = drafter.mask_token_id
        self.state = lay_out(call.request, drafter.mask_token_id, rows)
        self.strategy = call.strategy.open(self.state)
        masks = [drafter.mask_token_id] if drafter.mask_token_id < vocab_size else []
        self.models = Models(
            drafter=drafter.open(self.state, call.config.kv_window, call.config.kv_refresh),
            verifier=verifier.open(self.state) if verifier is not None and call.strategy.needs_verifier else None,
            removed=torch.tensor(masks, dtype=torch.int64, device=drafter.device),
            mask_token_id=drafter.mask_token_id,
            vocab_size=vocab_size,
            processing=call.request.processing,
            keeps_probs=keeps_probs,
            keeps_scores=bool(call.request.generation.output_scores or call.request.generation.output_logits),
            fused=as_it_is if call.request.asks_the_caller else fused,
        )
        self.newcomers: list[tuple[Request, Tensor]] = []

    def steps(self) -> Iterator[tuple[StepInfo, DecodeState]]:
        """Step by step until every row is done: what happened, and the rows after it, finished ones included.

        Rows may `join` between two yields.
        """
        while self.newcomers or not all(self.state.layout.done):
            self._let_go()
            self._let_in()
            self.state, info = decode_step(
                self.state,
                strategy=self.strategy,
                models=self.models,
                sampling=self.call.request.sampling,
                window_size=self.call.config.window_size,
                stopping=self.call.request.stopping,
            )
            if any(self.state.layout.done):
                _refuse_broken(info)
            yield info, self.state

    @property
    def num_rows(self) -> int:
        """Rows that are not done."""
        return self.state.layout.done.count(False) + sum(len(rows) for _, rows in self.newcomers)

    def join(self, request: Request, rows: Tensor) -> None:
        """Let more rows in. They take part in the next step; the rows that are here do not notice.

        Args:
            request: only its rows count; the rest is that of the call.
            rows: `n` int64, their numbers.
        """
        self.newcomers.append((request, rows))

    def _let_in(self) -> None:
        """Rows that were told to join."""
        for request, rows in self.newcomers:
            self.state = stack(self.state, lay_out(request, self.mask_token_id, rows), self.mask_token_id)
            self.models.join(self.state)
            self.strategy.join(self.state)
        self.newcomers = []

    def _let_go(self) -> None:
        """Forget the rows that are done, and the columns that only they had."""
        if any(self.state.layout.done):
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
