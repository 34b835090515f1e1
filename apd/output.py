"""What `generate` returns: sequences, counts per row, and the trace from which pictures are drawn."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from apd.state import DecodeState, StepInfo


@dataclass
class RowTrace:
    """How one row came about, step by step. Positions count new tokens from 0.

    Attributes:
        tokens: ids of the new tokens, the stop token included.
        steps: the step, from 0, that committed each of them.
        target_probs: untempered p_T of each.
        drafter_probs: untempered p_D of each.
        verifier_probs: untempered p_AR of each; empty when no verifier ran.
        starts: per step, the position of the first drafted mask.
        drafts: per step, the drafted ids from there on; what was not committed was rejected.
        committed: per step, how many tokens were committed.
    """

    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    target_probs: list[float] = field(default_factory=list)
    drafter_probs: list[float] = field(default_factory=list)
    verifier_probs: list[float] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)


@dataclass
class APDOutput(ModelOutput):
    """The result of `APDSampler.generate(..., return_dict_in_generate=True)`.

    Attributes:
        sequences: `b l` int64, prompt included, as wide as the longest row; the pad token behind each stop token.
        new_tokens: `b` int64, tokens up to and including the first stop token.
        drafter_forwards: `b` int64, drafter passes while the row was not done.
        verifier_forwards: `b` int64, likewise.
        tokens_per_forward: `b` float32, new tokens per *drafter* forward; verifier passes stand beside it.
        committed_per_step: per row, the number of tokens each of its steps committed.
        trace: per row, a `RowTrace`.
    """

    sequences: Tensor = None  # type: ignore[assignment]
    new_tokens: Tensor = None  # type: ignore[assignment]
    drafter_forwards: Tensor = None  # type: ignore[assignment]
    verifier_forwards: Tensor = None  # type: ignore[assignment]
    tokens_per_forward: Tensor = None  # type: ignore[assignment]
    committed_per_step: list[list[int]] = None  # type: ignore[assignment]
    trace: list[RowTrace] = None  # type: ignore[assignment]


class Recorder:
    """Collects finished rows and the steps that made them, and puts the output together.

    Args:
        state: the rows before the first step.
        pad_token_id: what stands behind a stop token.
    """

    def __init__(self, state: DecodeState, pad_token_id: int) -> None:
        self.prompt_width = state.prompt_width
        self.pad_token_id = pad_token_id
        self.tokens = state.tokens.clone()
        self.new_tokens = torch.zeros_like(state.rows)
        self.steps: list[StepInfo] = []

    def record(self, info: StepInfo) -> None:
        self.steps.append(info)

    def finish(self, state: DecodeState) -> None:
        """Take over these rows as they are."""
        self.tokens[state.rows] = state.tokens
        self.new_tokens[state.rows] = state.num_new_tokens

    def sequences(self) -> Tensor:
        """All rows, as wide as the longest, the pad token behind each stop token: `b l` int64."""
        width = self.prompt_width + int(self.new_tokens.max())
        column = torch.arange(width, device=self.tokens.device)
        behind = column >= self.prompt_width + self.new_tokens[:, None]
        return self.tokens[:, :width].masked_fill(behind, self.pad_token_id)

    def output(self) -> APDOutput:
        traces = self._traces()
        forwards = torch.tensor([len(row.committed) for row in traces], device=self.tokens.device)
        verified = any(info.proposal.verifier_probs is not None for info in self.steps)
        return APDOutput(
            sequences=self.sequences(),
            new_tokens=self.new_tokens,
            drafter_forwards=forwards,
            verifier_forwards=forwards.clone() if verified else torch.zeros_like(forwards),
            tokens_per_forward=self.new_tokens / forwards,
            committed_per_step=[row.committed for row in traces],
            trace=traces,
        )

    def _traces(self) -> list[RowTrace]:
        traces = [RowTrace() for _ in self.new_tokens]
        entries: list[list[tuple]] = [[] for _ in self.new_tokens]
        for info in self.steps:
            proposal = info.proposal
            evidence = [proposal.tokens, proposal.target_probs, proposal.drafter_probs]
            if proposal.verifier_probs is not None:
                evidence.append(proposal.verifier_probs)
            columns = [values.tolist() for values in evidence]
            starts = (info.window.columns[:, 0] - self.prompt_width).tolist()
            widths = info.window.inside.sum(1).tolist()
            for i, (row, committed) in enumerate(zip(info.rows.tolist(), info.committed.tolist(), strict=True)):
                kept = [j for j, is_kept in enumerate(committed) if is_kept]
                step = len(traces[row].committed)
                entries[row] += [(starts[i] + j, step, *(values[i][j] for values in columns)) for j in kept]
                traces[row].starts.append(starts[i])
                traces[row].drafts.append(proposal.draft[i, : widths[i]].tolist())
                traces[row].committed.append(len(kept))
        for trace, row_entries in zip(traces, entries, strict=True):
            for _, step, token, p_target, p_drafter, *p_verifier in sorted(row_entries):
                trace.tokens.append(token)
                trace.steps.append(step)
                trace.target_probs.append(p_target)
                trace.drafter_probs.append(p_drafter)
                trace.verifier_probs += p_verifier
        return traces
