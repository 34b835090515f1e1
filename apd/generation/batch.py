"""`Batch`: rows that are decoded together, and come and go between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apd.decoding.loop import DecodeLoop
from apd.decoding.request import Request
from apd.generation.infilling import Hole, holes_of
from apd.generation.output import Recorder
from apd.show.rows import RowTrace
from apd.text import whole_text

#: (first request, its number, what to call for a row that fails) → loop, which further rows join.
OpenLoop = Callable[[Request, Tensor, Callable[[int, Exception], None]], DecodeLoop]


@dataclass(frozen=True)
class Generated:
    """The answer to one prompt of `generate_many`.

    Attributes:
        index: number of the prompt, from 0.
        tokens: ids of the new tokens, the stop token included.
        text: the decoded tokens, without special tokens and without a cut character at the end; `None` without a
            tokenizer.
        drafter_forwards: drafter passes until the row was done.
        verifier_forwards: verifier passes until the row was done.
        canvases: canvases of the row that the drafter computed: one per pass, several with `Checked`.
        finish: `"stop"` (a stop token, string or criterion) or `"length"`.
        trace: the decode step by step.
        holes: the masks of the prompt as they were filled; empty without one.
        sequence: number of the answer among those to its prompt, from 0.
    """

    index: int
    tokens: list[int]
    text: str | None
    drafter_forwards: int
    verifier_forwards: int
    canvases: int
    finish: str
    trace: RowTrace
    holes: list[Hole]
    sequence: int = 0

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per drafter forward; where the verifier decoded alone, per verifier forward."""
        return len(self.tokens) / (self.drafter_forwards or self.verifier_forwards)


@dataclass(frozen=True)
class Progress:
    """What one step did for a row. Positions count new tokens from 0.

    Attributes:
        row: number of the row.
        step: index of the row's step, from 0.
        start: position of the first drafted mask.
        draft: the drafted ids from there on; those not committed were rejected.
        settled: ids that became final with everything to the left of them. Over all steps they are the answer.
        logits: `v` float32 for each of `settled`, see `APDOutput`; empty if they are not recorded.
        drafter_forwards, verifier_forwards, canvases: of the row so far.
    """

    row: int
    step: int
    start: int
    draft: list[int]
    settled: list[int]
    logits: list[Tensor]
    drafter_forwards: int
    verifier_forwards: int
    canvases: int


@dataclass(frozen=True)
class Stepped:
    """What one step of a `Batch` left.

    Attributes:
        rows: numbers of the rows that took part.
        progress: what the step did for each row that is followed.
        ended: the answers of rows that are done.
        failed: the errors of rows that failed alone; they are done, too.
    """

    rows: list[int]
    progress: list[Progress] = field(default_factory=list)
    ended: list[Generated] = field(default_factory=list)
    failed: dict[int, Exception] = field(default_factory=dict)


class Batch:
    """Rows that are decoded together; each may be added or cancelled between two steps.

    A row's tokens do not depend on the others, and a row that fails does not end them.

    Args:
        open_loop: opens the loop with the first row's request. All rows are decoded with its settings; their own are
            their prompt, number of masks and seed.
        tokenizer: decodes answers; `None` leaves out their text.
        mask_token_id: finds the holes of a prompt.
        scores, logits: what to record of each position, see `Recorder`.

    Attributes:
        recorder: the record of each row that is being decoded.
    """

    def __init__(
        self, open_loop: OpenLoop, tokenizer: Any, mask_token_id: int, *, scores: bool = False, logits: bool = False
    ) -> None:
        self.open_loop, self.tokenizer, self.mask_token_id = open_loop, tokenizer, mask_token_id
        self.recorder = Recorder(scores=scores, logits=logits)
        self.loop: DecodeLoop | None = None
        self.failed: dict[int, Exception] = {}
        self.settled: dict[int, int] = {}  # of each row that is followed, its tokens so far

    @property
    def num_rows(self) -> int:
        """Number of rows that are not done."""
        return 0 if self.loop is None else self.loop.num_rows

    def add(self, request: Request, row: int, *, follow: bool = False) -> None:
        """Add a row from the next step on.

        Args:
            request: a request of one row.
            row: its number, another one than those of the present rows.
            follow: report its progress after every step.
        """
        if follow:
            self.settled[row] = 0
        number = torch.tensor([row], device=request.prompt.device)
        if self.loop is None:
            self.loop = self.open_loop(request, number, self.failed.__setitem__)
        else:
            self.loop.join(request, number)

    def cancel(self, rows: Sequence[int]) -> None:
        """Remove rows before the next step; numbers of rows that are done have no effect."""
        if self.loop is not None:
            self.loop.cancel(rows)
        for row in rows:
            self._forget(row)

    def _forget(self, row: int) -> None:
        self.recorder.rows.pop(row, None)
        self.settled.pop(row, None)

    def step(self) -> Stepped:
        """Make one step of all rows; there must be one.

        Raises:
            Exception: what is no single row's fault.
        """
        assert self.loop is not None
        info, after = self.loop.step()
        self.recorder.record(info, after)
        rows = after.rows.tolist()
        failed = dict(self.failed)
        self.failed.clear()
        for row in failed:
            self._forget(row)
        progress = [self._progress(row) for row in rows if row in self.settled] if self.settled else []
        of_rows = zip(rows, info.before.layout.done, after.layout.done, strict=True)
        ended = [is_done and not was_done and row not in failed for row, was_done, is_done in of_rows]
        if not any(ended):
            return Stepped(rows, progress, failed=failed)
        stopped = info.stopped.tolist()
        answers = [self._answer(row, stopped[i]) for i, row in enumerate(rows) if ended[i]]
        return Stepped(rows, progress, answers, failed)

    def _progress(self, number: int) -> Progress:
        row, known = self.recorder.rows[number], self.settled[number]
        end = known
        while end < row.num_tokens and end in row.entries:
            end += 1
        self.settled[number] = end
        return Progress(
            row=number,
            step=len(row.drafts) - 1,
            start=row.starts[-1],
            draft=row.drafts[-1],
            settled=[row.entries[position][0] for position in range(known, end)],
            logits=[row.logits.pop(position) for position in range(known, end)] if row.logits else [],
            drafter_forwards=row.num_drafted,
            verifier_forwards=row.num_verified,
            canvases=row.num_canvases,
        )

    def _answer(self, row: int, is_stopped: bool) -> Generated:
        trace, num_drafted, num_verified, num_canvases = self.recorder.pop(row)
        self.settled.pop(row, None)
        text = None
        if self.tokenizer is not None:
            text = whole_text(self.tokenizer, trace.tokens, skip_special_tokens=True)
        return Generated(
            index=row,
            tokens=trace.tokens,
            text=text,
            drafter_forwards=num_drafted,
            verifier_forwards=num_verified,
            canvases=num_canvases,
            finish="stop" if is_stopped else "length",
            trace=trace,
            holes=holes_of(trace, self.mask_token_id, self.tokenizer),
        )
