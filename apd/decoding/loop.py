"""`DecodeLoop`: rows join, make decode steps, and leave when they are done."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from apd.decoding import step
from apd.decoding.commit import DRAFT_FAULT, NOT_REPLACED, TARGET_FAULT, VALID, StepInfo
from apd.decoding.pair import Kernels, ModelPair, Support
from apd.decoding.protocols import Drafter, Verifier
from apd.decoding.request import Request
from apd.decoding.returned import check_session, name_of
from apd.decoding.state import DecodeState
from apd.decoding.strategy import Strategy

P = ParamSpec("P")
T = TypeVar("T")


def without_gradients(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate `function` to run without gradients and outside of inference mode, in any mode of the caller.

    Tensors made in inference mode could not be written outside of it by a later step. A context inside the generator
    would not do: it would be closed at interpreter exit, when torch no longer exists.
    """
    return torch.inference_mode(False)(torch.no_grad()(function))


decode_step = without_gradients(step.decode_step)


class DecodeLoop:
    """The decode loop of one call, and the sessions of its models and strategy.

    Args:
        drafter: the diffusion LM.
        verifier: the causal LM; may be `None` if the strategy needs none.
        request: the first rows, and the settings of the call.
        vocab_size: number of ids that both models share.
        rows: `b` int64, numbers of the first rows; 0, 1, … if not given.
        record_probs: record the probabilities of proposed tokens.
        kernels: the pure functions of a step, plain or compiled. Requests that call user code use the plain ones.
        on_fault: called with the number of a row and the error, where a model or the strategy fails for that row; the row
            is then done. When not given, the error is raised.

    Attributes:
        state: the rows after the last step.

    Raises:
        TypeError: a model or the strategy opens no valid session.
    """

    @without_gradients
    def __init__(
        self,
        drafter: Drafter,
        verifier: Verifier | None,
        request: Request,
        *,
        vocab_size: int,
        rows: Tensor | None = None,
        record_probs: bool = True,
        kernels: Kernels = step.PLAIN,
        on_fault: Callable[[int, Exception], None] | None = None,
    ) -> None:
        self.request = request
        self.on_fault = on_fault
        self.mask_token_id = drafter.mask_token_id
        self.state = self._start(request, rows)
        strategy = request.strategy
        self.strategy = strategy.open(self.state)
        check_session(self.strategy, name_of(strategy, "open"), "propose")
        masks = [drafter.mask_token_id] if drafter.mask_token_id < vocab_size else []
        special = [id for id in getattr(drafter, "never_drawn", ()) if id < vocab_size]
        masks += [id for id in special if id not in request.stopping.token_ids]
        removed = torch.tensor(masks, dtype=torch.int64, device=drafter.device)
        self.pair = ModelPair(
            self._open(drafter) if strategy.needs_drafter else None,
            self._open(verifier) if verifier is not None and strategy.needs_verifier else None,
            Support(vocab_size, removed, request.processing),
            mask_token_id=drafter.mask_token_id,
            kernels=step.PLAIN if request.is_uncommon else kernels,
            policy=request.policy,
            record_probs=record_probs,
            record_scores=request.record_scores or request.record_logits,
        )
        self.newcomers: list[tuple[Request, Tensor]] = []
        self.idle = [0] * len(self.state.rows)  # per row, steps since its last committed token

    def steps(self) -> Iterator[tuple[StepInfo, DecodeState]]:
        """Make decode steps until every row is done. Yields the diagnostics and the rows after each step.

        Finished rows are still in the state that their last step yields. Rows may `join` between two yields.

        Raises:
            FloatingPointError: a model gave an invalid distribution at a decisive position.
            ValueError: a rule that judges the first token rejected one without a replacement.
            RuntimeError: the strategy committed no token of a row in as many steps as the row has masks.
        """
        while self.has_work:
            yield self.step()

    @property
    def has_work(self) -> bool:
        """True if a row is not done or will join."""
        return bool(self.newcomers) or not all(self.state.layout.done)

    def step(self) -> tuple[StepInfo, DecodeState]:
        """Make one decode step; there must be a row that is not done. Returns and raises what `steps` does."""
        self._prepare()
        self.state, info = decode_step(
            self.state,
            strategy=self.strategy,
            pair=self.pair,
            sampling=self.request.sampling,
            policy=self.request.policy,
            stopping=self.request.stopping,
        )
        faults = _broken(info, self.request.strategy) if any(self.state.layout.done) else {}
        faults |= self._stuck(info)
        if faults:
            self._report(faults)
        return info, self.state

    def cancel(self, rows: Sequence[int]) -> None:
        """Remove rows by their numbers before the next step. The tokens of the other rows do not depend on them."""
        self._prepare()
        self._finish(rows)

    def _prepare(self) -> None:
        """Let finished rows leave, and newcomers in."""
        if any(self.state.layout.done):
            self._drop_finished()
        if self.newcomers:
            self._admit_newcomers()

    @without_gradients
    def _finish(self, rows: Sequence[int]) -> None:
        numbers = torch.tensor(list(rows), dtype=torch.int64, device=self.state.rows.device)
        self.state = dataclasses.replace(self.state, done=self.state.done | torch.isin(self.state.rows, numbers))

    def _report(self, faults: dict[int, Exception]) -> None:
        if self.on_fault is None:
            raise next(iter(faults.values()))
        self._finish(list(faults))
        for row, error in faults.items():
            self.on_fault(row, error)

    def _stuck(self, info: StepInfo) -> dict[int, Exception]:
        """An error for each row that may never end. One token per step commits a row in as many steps as it has masks."""
        before, after = info.before.layout.decided, self.state.layout.decided
        rows = zip(self.idle, before, after, strict=True)
        self.idle = [idle + 1 if now == then else 0 for idle, then, now in rows]
        found: dict[int, Exception] = {}
        for row, idle in enumerate(self.idle):
            masks = self.state.width - after[row]
            if idle >= masks and not self.state.layout.done[row]:
                number = int(self.state.rows[row])
                found[number] = RuntimeError(
                    f"`{name_of(self.request.strategy)}` must commit a token of every row within as many steps as it has "
                    f"masks, got none in {idle} steps of row {number}, which has {masks}. Choose at "
                    "least one candidate of each row, the likeliest if none is good enough."
                )
        return found

    @property
    def num_rows(self) -> int:
        """Number of rows that are not done, including those that will join."""
        return self.state.layout.done.count(False) + sum(len(rows) for _, rows in self.newcomers)

    def join(self, request: Request, rows: Tensor) -> None:
        """Add rows from the next step on. The tokens of the present rows do not depend on them.

        Args:
            request: the new rows; its settings are ignored in favour of the first request's.
            rows: `n` int64, the numbers of the new rows.
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

    def _open(self, model: Any) -> Any:
        if self.request.kv_window is not None and hasattr(model, "open_cached"):
            session = model.open_cached(self.state, self.request.kv_window, self.request.kv_refresh)
        else:
            session = model.open(self.state)  # drafters without a cache, such as exact ones, ignore `kv_window`
        check_session(session, name_of(model, "open"), "logits", "score")
        return session

    @without_gradients
    def _admit_newcomers(self) -> None:
        for request, rows in self.newcomers:
            if request.processing.has_holes and not self.pair.support.processing.has_holes:
                processing = dataclasses.replace(self.pair.support.processing, has_holes=True)
                self.pair.support = dataclasses.replace(self.pair.support, processing=processing)
                self.pair.kernels = step.PLAIN
                stopping = dataclasses.replace(self.request.stopping, has_holes=True)
                self.request = dataclasses.replace(self.request, stopping=stopping)
            self.state = self.state.stack(self._start(request, rows), self.mask_token_id)
            self.pair.join(self.state)
            self.strategy.join(self.state)
            self.idle += [0] * len(rows)
        self.newcomers = []

    @without_gradients
    def _drop_finished(self) -> None:
        """Drop finished rows, and the columns that only they had."""
        self.idle = [idle for idle, done in zip(self.idle, self.state.layout.done, strict=True) if not done]
        unfinished = (~self.state.done).nonzero().squeeze(1)
        self.state = self.state.select(unfinished).narrowed()
        self.pair.select(unfinished)
        self.strategy.select(unfinished)


def _broken(info: StepInfo, strategy: Strategy) -> dict[int, Exception]:
    """An error for each row with an invalid distribution at a decisive position: FloatingPointError, which names the model, or
    ValueError, which names the rule, if it rejected the row's first token without another in its place."""
    if not info.broken.any():
        return {}
    rows = info.broken.nonzero().flatten().tolist()
    return {int(info.before.rows[row]): _fault(info, row, strategy) for row in rows}


def _fault(info: StepInfo, row: int, strategy: Strategy) -> Exception:
    proposal = info.proposal
    faults = proposal.fault[row][proposal.decisive[row]].tolist()
    where = f"at step {int(info.before.steps[row])} of row {int(info.before.rows[row])}"
    if set(faults) <= {VALID, NOT_REPLACED}:
        return ValueError(
            f"`rule` must replace every first token that it rejects with first='judge', got no replacement {where} from "
            f"{getattr(strategy, 'rule', strategy)}. Give its `Judgement` a `replacement` that may be used at the first "
            "position, or take first='draft'."
        )
    if any(fault & DRAFT_FAULT for fault in faults):
        model, gave = proposal.models[1], "NaN, infinite or no finite logits"
    elif any(fault & ~NOT_REPLACED == TARGET_FAULT for fault in faults):
        model, gave = "verifier", "NaN or infinite logits"
    else:
        model, gave = "mixture", "no token that both models allow, or the verifier none at all,"
    return FloatingPointError(
        f"The {model} gave {gave} {where}, where a token had to be decided. Check its weights and "
        "dtype (float16 overflows where bfloat16 does not), and that the "
        "logits processors leave a token."
    )
