"""The output of `generate`: sequences, counts per row, and the trace."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from apd.decoding.commit import StepInfo
from apd.decoding.state import DecodeState
from apd.generation.infilling import Hole, holes_of
from apd.show.rows import RowTrace
from apd.show.trace import Trace
from apd.text import whole_text

#: Characters of a row's text, and rows, that the `repr` of an output shows.
_SHOWN, _ROWS_SHOWN = 60, 4


@dataclass
class APDOutput(ModelOutput):
    """The result of `APDSampler.generate(..., return_dict_in_generate=True)`.

    Attributes:
        sequences: `b l` int64, prompt included, as wide as the longest row; the pad token behind each stop token.
        new_tokens: `b` int64, tokens up to and including the first stop token.
        drafter_forwards: `b` int64, drafter passes while the row was not done.
        verifier_forwards: `b` int64, verifier passes while the row was not done.
        canvases: `b` int64, canvases of the row that the drafter computed: one per pass, several with `Checked`.
        tokens_per_forward: `b` float32, new tokens per *drafter* forward; per verifier forward where the verifier
            decoded alone.
        committed_per_step: per row, the number of tokens each of its steps committed.
        holes: per row, the masks of its prompt as they were filled, a `Hole` each; empty without one.
        text: per row, the new tokens as text, without prompt and special tokens; `None` without a tokenizer.
        trace: per row, a `RowTrace`; draws itself in a notebook, and printed to a terminal.
        scores: with `output_scores`, per new position `b v` float32: the processed and warped log scores that decided
            it, the drafter's at the first position of a step (with `first="judge"` the mixture's) and the mixture's at the
            others; −∞ in finished rows.
        logits: with `output_logits`, these scores before temperature and truncation.
    """

    sequences: Tensor = None  # type: ignore[assignment]
    new_tokens: Tensor = None  # type: ignore[assignment]
    drafter_forwards: Tensor = None  # type: ignore[assignment]
    verifier_forwards: Tensor = None  # type: ignore[assignment]
    canvases: Tensor = None  # type: ignore[assignment]
    tokens_per_forward: Tensor = None  # type: ignore[assignment]
    committed_per_step: list[list[int]] = None  # type: ignore[assignment]
    trace: Trace = None  # type: ignore[assignment]
    holes: list[list[Hole]] = None  # type: ignore[assignment]
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None

    @property
    def text(self) -> list[str] | None:
        """The new tokens of each row as text, without special tokens, as in `Generated.text`; `None` without a tokenizer."""
        tokenizer = self.trace.tokenizer
        if tokenizer is None:
            return None
        return [whole_text(tokenizer, row.tokens, skip_special_tokens=True) for row in self.trace]

    def __repr__(self) -> str:
        """The beginning of the first rows' text, if there is a tokenizer, and the fields that are set."""
        fields = [f"{name}={value!r}" for name, value in self.items()]
        if self.trace is not None and (text := self.text) is not None:
            begun = [row[:_SHOWN] + "…" * (len(row) > _SHOWN) for row in text[:_ROWS_SHOWN]]
            fields.insert(0, f"text={begun!r}" + f" (of {len(text)} rows)" * (len(text) > _ROWS_SHOWN))
        return f"{type(self).__name__}({', '.join(fields)})"


@dataclass
class _Row:
    """Record of a row that is being decoded; the dictionaries are keyed by the position of a new token."""

    prompt: list[int]
    starts: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    #: token, step, column, probabilities
    entries: dict[int, tuple[int, int, int, dict[str, float]]] = field(default_factory=dict)
    scores: dict[int, Tensor] = field(default_factory=dict)
    logits: dict[int, Tensor] = field(default_factory=dict)
    num_drafted: int = 0
    num_verified: int = 0
    num_canvases: int = 0
    num_tokens: int = 0


class Recorder:
    """Records the steps of rows, for their traces, counts and scores.

    Args:
        scores: keep the scores that decided each position, `v` floats per token.
        logits: keep these scores before temperature and truncation too.
    """

    def __init__(self, *, scores: bool = False, logits: bool = False) -> None:
        self.keeps = {name for name, kept in (("scores", scores), ("logits", logits)) if kept}
        self.rows: dict[int, _Row] = {}

    def expect(self, state: DecodeState) -> None:
        """Rows that will be recorded, or are done without a step."""
        for row, tokens, start, end in zip(
            state.rows.tolist(), state.tokens, state.layout.padding, state.layout.prompt_end, strict=True
        ):
            self.rows.setdefault(row, _Row(tokens[start:end].tolist()))

    def record(self, info: StepInfo, after: DecodeState) -> None:
        """Record a step; its proposal must have `probs`."""
        proposal, before = info.proposal, info.before
        # One transfer of whole numbers and one of probabilities.
        places = info.window.gather(before.places)
        of_row = torch.stack([before.rows, info.window.inside.sum(1), after.num_new_tokens], 1)
        by_position = [
            info.committed.long(),
            info.window.gather(before.is_new).long(),
            places,
            info.window.columns - before.padding[:, None],
            proposal.tokens,
            proposal.draft,
        ]
        assert proposal.probs is not None  # the loop records them (`record_probs`)
        numbers, probs = torch.cat([of_row, *by_position], 1).tolist(), proposal.probs.tolist()
        width = proposal.tokens.shape[1]
        extra = [0] * len(numbers) if info.extra_canvases is None else info.extra_canvases.tolist()
        for i, (row_id, num_drafted, num_tokens, *positions) in enumerate(numbers):
            if row_id not in self.rows:
                self.rows[row_id] = _Row(before.tokens[i, before.padding[i] : before.prompt_end[i]].tolist())
            row = self.rows[row_id]
            committed, is_new, place, column, tokens = (positions[k * width : (k + 1) * width] for k in range(5))
            draft = positions[5 * width :][:num_drafted]
            kept = [j for j, is_kept in enumerate(committed) if is_kept]
            row.entries |= {
                place[j]: (tokens[j], len(row.drafts), column[j], dict(zip(proposal.models, probs[i][j], strict=True)))
                for j in kept
            }
            row.starts.append(place[0])
            row.drafts.append([token for j, token in enumerate(draft) if is_new[j]])
            row.num_tokens = num_tokens
            row.num_drafted += info.drafter_forwards
            row.num_verified += info.verifier_forwards
            row.num_canvases += info.drafter_forwards + extra[i]
            for name in self.keeps:
                deciding = getattr(proposal, name)
                getattr(row, name).update({place[j]: deciding[i, j].clone() for j in kept})

    def trace(self, row_id: int) -> RowTrace:
        """The trace of a row, its tokens in the order of their positions."""
        row = self.rows[row_id]
        steps = len(row.drafts)
        trace = RowTrace(starts=row.starts, drafts=row.drafts, committed=[0] * steps, prompt=row.prompt)
        # Any-order strategies may decide tokens behind a later stop token; those do not count.
        for position in range(row.num_tokens):
            token, step, column, probs = row.entries[position]
            trace.tokens.append(token)
            trace.columns.append(column)
            trace.steps.append(step)
            for name, p in probs.items():
                getattr(trace, f"{name}_probs").append(p)
            trace.committed[step] += 1
        return trace

    def pop(self, row_id: int) -> tuple[RowTrace, int, int, int]:
        """Remove a finished row; returns its trace, drafter passes, verifier passes and canvases."""
        trace, row = self.trace(row_id), self.rows.pop(row_id)
        return trace, row.num_drafted, row.num_verified, row.num_canvases

    def output(self, sequences: Tensor, tokenizer: Any = None, *, mask_token_id: int) -> APDOutput:
        """The output for rows 0, 1, … with the ids `sequences`, `b l` int64; `tokenizer` decodes trace and holes."""
        rows = [self.rows[row] for row in sorted(self.rows)]
        traces = [self.trace(row) for row in sorted(self.rows)]
        new_tokens, drafted, verified, canvases = torch.tensor(
            [(row.num_tokens, row.num_drafted, row.num_verified, row.num_canvases) for row in rows],
            device=sequences.device,
        ).T
        return APDOutput(
            sequences=sequences,
            new_tokens=new_tokens,
            drafter_forwards=drafted,
            verifier_forwards=verified,
            canvases=canvases,
            tokens_per_forward=new_tokens / torch.where(drafted > 0, drafted, verified).clamp(min=1),
            committed_per_step=[trace.committed for trace in traces],
            trace=Trace(traces, tokenizer),
            holes=[holes_of(trace, mask_token_id, tokenizer) for trace in traces],
            scores=self._per_position("scores"),
            logits=self._per_position("logits"),
        )

    def _per_position(self, name: str) -> tuple[Tensor, ...] | None:
        if name not in self.keeps:
            return None
        rows = [self.rows[row] for row in sorted(self.rows)]
        if not any(row.num_tokens for row in rows):
            return ()
        nothing = torch.full_like(next(getattr(row, name)[0] for row in rows if row.num_tokens), -torch.inf)
        return tuple(
            torch.stack([getattr(row, name)[i] if i < row.num_tokens else nothing for row in rows])
            for i in range(max(row.num_tokens for row in rows))
        )


class Sequences:
    """The rows of one call as a rectangle.

    Args:
        state: the rows before the first step, numbered 0, 1, …
        pad_token_id: fills the columns behind a stop token.
    """

    def __init__(self, state: DecodeState, pad_token_id: int) -> None:
        self.tokens = state.tokens.clone()
        self.ends = state.prompt_end.clone()
        self.pad_token_id = pad_token_id

    def take(self, state: DecodeState) -> None:
        """Copy the current rows; later calls overwrite unfinished ones."""
        self.tokens.index_copy_(0, state.rows, state.tokens)
        self.ends.index_copy_(0, state.rows, state.frontier)

    def ids(self) -> Tensor:
        """All rows, as wide as the longest: `b l` int64."""
        width = int(self.ends.max())
        column = torch.arange(width, device=self.tokens.device)
        return self.tokens[:, :width].masked_fill(column >= self.ends[:, None], self.pad_token_id)
