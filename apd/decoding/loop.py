"""`DecodeLoop`, the one loop: rows join, make decode steps, and leave when they are done."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from apd.decoding.commit import DRAFTER_FAULT, VALID, VERIFIER_FAULT, StepInfo
from apd.decoding.pair import Kernels, ModelPair, Support
from apd.decoding.protocols import CachingDrafter, Drafter, DrafterSession, Verifier
from apd.decoding.request import Request
from apd.decoding.state import DecodeState
from apd.decoding.step import PLAIN, decode_step


class DecodeLoop:
    """Rows that are decoded together, and everything that belongs to one call.

    Args:
        drafter: the diffusion LM.
        verifier: the causal LM; may be `None` if the strategy needs none.
        request: the first rows, and the settings of the call.
        vocab_size: ids below it exist in both models.
        rows: `b` int64, numbers of the first rows; 0, 1, … if not given.
        record_probs: proposals hold the probabilities of their tokens.
        kernels: the pure functions of a step, as they are or compiled. Requests that call user code use the plain ones.

    Attributes:
        state: the rows as they are now.
    """

    def __init__(
        self,
        drafter: Drafter,
        verifier: Verifier | None,
        request: Request,
        *,
        vocab_size: int,
        rows: Tensor | None = None,
        record_probs: bool = True,
        kernels: Kernels = PLAIN,
    ) -> None:
        self.request = request
        self.mask_token_id = drafter.mask_token_id
        self.state = self._start(request, rows)
        strategy = request.strategy
        self.strategy = strategy.open(self.state)
        masks = [drafter.mask_token_id] if drafter.mask_token_id < vocab_size else []
        removed = torch.tensor(masks, dtype=torch.int64, device=drafter.device)
        self.pair = ModelPair(
            self._open(drafter) if strategy.needs_drafter else None,
            verifier.open(self.state) if verifier is not None and strategy.needs_verifier else None,
            Support(vocab_size, removed, request.processing),
            mask_token_id=drafter.mask_token_id,
            kernels=PLAIN if request.calls_user_code else kernels,
            record_probs=record_probs,
            record_scores=request.record_scores or request.record_logits,
        )
        self.newcomers: list[tuple[Request, Tensor]] = []

    def steps(self) -> Iterator[tuple[StepInfo, DecodeState]]:
        """Steps until every row is done: what happened in each, and the rows after it, finished ones included.

        Rows may `join` between two yields.

        Raises:
            FloatingPointError: a model gave no valid distribution where a token had to be decided.
        """
        while self.newcomers or not all(self.state.layout.done):
            self._drop_finished()
            self._admit_newcomers()
            request = self.request
            self.state, info = decode_step(
                self.state,
                strategy=self.strategy,
                pair=self.pair,
                sampling=request.sampling,
                policy=request.policy,
                stopping=request.stopping,
            )
            if any(self.state.layout.done):
                _refuse_broken(info)
            yield info, self.state

    @property
    def num_rows(self) -> int:
        """Rows that are not done, those that will join included."""
        return self.state.layout.done.count(False) + sum(len(rows) for _, rows in self.newcomers)

    def join(self, request: Request, rows: Tensor) -> None:
        """Add rows from the next step on; the rows that are here do not change by it.

        Args:
            request: only its rows count; the settings are those of the first request.
            rows: `n` int64, their numbers.
        """
        self.newcomers.append((request, rows))

    def _start(self, request: Request, rows: Tensor | None) -> DecodeState:
        return DecodeState.start(
            request.prompt,
            max_new_tokens=request.max_new_tokens,
            mask_token_id=self.mask_token_id,
            padding=request.padding,
            seeds=request.seeds,
            rows=rows,
        )

    def _open(self, drafter: Drafter) -> DrafterSession:
        if self.request.kv_window is None or not isinstance(drafter, CachingDrafter):
            return drafter.open(self.state)  # an exact drafter has no cache to limit
        return drafter.open_cached(self.state, self.request.kv_window, self.request.kv_refresh)

    def _admit_newcomers(self) -> None:
        for request, rows in self.newcomers:
            self.state = self.state.stack(self._start(request, rows), self.mask_token_id)
            self.pair.join(self.state)
            self.strategy.join(self.state)
        self.newcomers = []

    def _drop_finished(self) -> None:
        """Forget finished rows, and the columns that only they had."""
        if any(self.state.layout.done):
            unfinished = (~self.state.done).nonzero().squeeze(1)
            self.state = self.state.select(unfinished).narrowed()
            self.pair.select(unfinished)
            self.strategy.select(unfinished)


def _refuse_broken(info: StepInfo) -> None:
    if not info.broken.any():
        return
    row, proposal = int(info.broken.long().argmax()), info.proposal
    faults = proposal.fault[row][proposal.decisive[row]].tolist()
    fault = min(code for code in faults if code != VALID)
    model, gave = {
        DRAFTER_FAULT: (proposal.models[1], "NaN, infinite or no finite logits"),
        VERIFIER_FAULT: ("verifier", "NaN or infinite logits"),
    }.get(fault, ("mixture", "no token that both models allow, or the verifier none at all,"))
    raise FloatingPointError(
        f"The {model} gave {gave} at step {int(info.before.steps[row])} of row {int(info.before.rows[row])}, where a token "
        "had to be decided. Check its weights and dtype (float16 overflows where bfloat16 does not), and that the "
        "logits processors leave a token."
    )
