"""`Batch`: rows that are decoded together, and come and go between steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from apd.decoding.loop import DecodeLoop
from apd.decoding.request import Request
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
    """

    index: int
    tokens: list[int]
    text: str | None
    drafter_forwards: int
    verifier_forwards: int
    canvases: int
    finish: str
    trace: RowTrace

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per drafter forward; where the verifier decoded alone, per verifier forward."""
        return len(self.tokens) / (self.drafter_forwards or self.verifier_forwards)


@dataclass(frozen=True)
class Stepped:
    """What one step of a `Batch` left.

    Attributes:
        rows: numbers of the rows that took part.
        ended: the answers of rows that are done.
        failed: the errors of rows that failed alone; they are done, too.
    """

    rows: list[int]
    ended: list[Generated] = field(default_factory=list)
    failed: dict[int, Exception] = field(default_factory=dict)


class Batch:
    """Rows that are decoded together; each may be added or cancelled between two steps.

    A row's tokens do not depend on the others, and a row that fails does not end them.

    Args:
        open_loop: opens the loop with the first row's request. All rows are decoded with its settings; their own are
            their prompt, number of masks and seed.
        tokenizer: decodes answers; `None` leaves out their text.
        scores, logits: what to record of each position, see `Recorder`.

    Attributes:
        recorder: the record of each row that is being decoded.
    """

    def __init__(self, open_loop: OpenLoop, tokenizer: Any, *, scores: bool = False, logits: bool = False) -> None:
        self.open_loop, self.tokenizer = open_loop, tokenizer
        self.recorder = Recorder(scores=scores, logits=logits)
        self.loop: DecodeLoop | None = None
        self.failed: dict[int, Exception] = {}

    @property
    def num_rows(self) -> int:
        """Number of rows that are not done."""
        return 0 if self.loop is None else self.loop.num_rows

    def add(self, request: Request, row: int) -> None:
        """Add a row from the next step on.

        Args:
            request: a request of one row.
            row: its number, another one than those of the present rows.
        """
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
            self.recorder.rows.pop(row, None)

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
            self.recorder.rows.pop(row, None)
        of_rows = zip(rows, info.before.layout.done, after.layout.done, strict=True)
        ended = [is_done and not was_done and row not in failed for row, was_done, is_done in of_rows]
        if not any(ended):
            return Stepped(rows, failed=failed)
        stopped = info.stopped.tolist()
        answers = [self._answer(row, stopped[i]) for i, row in enumerate(rows) if ended[i]]
        return Stepped(rows, answers, failed)

    def _answer(self, row: int, is_stopped: bool) -> Generated:
        trace, num_drafted, num_verified, num_canvases = self.recorder.pop(row)
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
        )
