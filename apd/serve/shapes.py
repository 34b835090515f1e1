"""The shapes of responses: chat completions and text completions, whole and in chunks."""

from __future__ import annotations

from typing import Any

from apd.serve.chunks import Piece, chat_logprobs, text_logprobs
from apd.serve.engine.spelling import Spelling
from apd.serve.plans import Plan


class Kind:
    """The shape of chat completions."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first(self, plan: Plan, choice: int) -> dict[str, Any] | None:
        """The fields of a choice's first chunk; `None`: there is none before its text."""
        return {"delta": {"role": "assistant", "content": ""}}

    def chunk(self, plan: Plan, choice: int, piece: Piece, spelling: Spelling) -> dict[str, Any]:
        logprobs = chat_logprobs(piece.logprobs, spelling) if plan.job.top is not None else None
        return {"delta": {"content": piece.text}, "logprobs": logprobs}

    def last(self) -> dict[str, Any]:
        return {"delta": {}, "logprobs": None}

    def choice(self, plan: Plan, choice: int, piece: Piece, spelling: Spelling) -> dict[str, Any]:
        logprobs = chat_logprobs(piece.logprobs, spelling) if plan.job.top is not None else None
        return {"message": {"role": "assistant", "content": piece.text, "refusal": None}, "logprobs": logprobs}


class TextKind(Kind):
    """The shape of text completions."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def first(self, plan: Plan, choice: int) -> dict[str, Any] | None:
        echo = plan.choices[choice].echo
        return {"text": echo, "logprobs": None} if echo else None

    def chunk(self, plan: Plan, choice: int, piece: Piece, spelling: Spelling) -> dict[str, Any]:
        return {"text": piece.text, "logprobs": self._logprobs(plan, choice, piece, spelling)}

    def last(self) -> dict[str, Any]:
        return {"text": "", "logprobs": None}

    def choice(self, plan: Plan, choice: int, piece: Piece, spelling: Spelling) -> dict[str, Any]:
        logprobs = self._logprobs(plan, choice, piece, spelling)
        return {"text": plan.choices[choice].echo + piece.text, "logprobs": logprobs}

    def _logprobs(self, plan: Plan, choice: int, piece: Piece, spelling: Spelling) -> dict[str, Any] | None:
        if plan.job.top is None:
            return None
        start = len(plan.choices[choice].echo)
        offsets = [start + offset for offset in piece.offsets]
        return text_logprobs(piece.logprobs, [entry.token for entry in piece.logprobs], offsets, spelling)


CHAT, TEXT = Kind(), TextKind()
