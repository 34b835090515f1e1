"""From committed tokens to the text that a client may see: whole characters, nothing of a stop string, nothing twice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from apd.serve.engine.logprobs import TokenLogprob
from apd.serve.engine.spelling import Spelling
from apd.text import REPLACEMENT, TextPieces

_CONTEXT = 8  # tokens of the prompt, behind which a completion is decoded


@dataclass(frozen=True)
class Piece:
    """Text that became final, and the tokens that are shown with it; `offsets` count characters from the answer's first."""

    text: str
    logprobs: list[TokenLogprob]
    offsets: list[int]


class Answer:
    """The growing text of one choice.

    Args:
        tokenizer: decodes.
        stops: strings that end the answer and are not shown.
        behind: ids of the prompt, where spaces at the answer's start depend on it.
        shows_special: the log-probabilities of stop tokens are shown, too, though they have no text.

    Attributes:
        tokens: ids so far, up to the one that completed a stop string.
        finish: `None` while the answer goes on.
    """

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str] = (),
        behind: Sequence[int] = (),
        shows_special: bool = False,
    ) -> None:
        self.pieces = TextPieces(tokenizer, skip_special_tokens=True)
        context = list(behind[-_CONTEXT:])
        before = tokenizer.decode(context, skip_special_tokens=True) if context else ""
        if before and not before.endswith(REPLACEMENT):
            self.pieces.context, self.pieces.num_returned = context, len(before)
        self.hidden = set() if shows_special else set(getattr(tokenizer, "all_special_ids", ()))
        self.stops = list(stops)
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.text = ""  # all of it
        self.num_shown = 0
        self.waiting: list[tuple[int, TokenLogprob]] = []  # tokens that are not shown yet, with their offset

    def add(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprob] = (), *, last: bool = False, finish: str = "length"
    ) -> Piece:
        """Append tokens, with the log-probability of each if asked for; with `last`, none follow, and `finish` says why."""
        if not self.stops and not logprobs:
            self._append(ids, logprobs, last=last)
        else:
            for i, token in enumerate(ids):
                self._append([token], logprobs[i : i + 1], last=last and i == len(ids) - 1)
                if self._cut_at_stop():
                    return self._show(len(self.text))
            if last and not ids:
                self._append([], (), last=True)
                if self._cut_at_stop():
                    return self._show(len(self.text))
        if last:
            self.finish = finish
            return self._show(len(self.text))
        return self._show(len(self.text) - self._num_held())

    def _append(self, ids: Sequence[int], logprobs: Sequence[TokenLogprob], *, last: bool) -> None:
        self.waiting += [(len(self.text), entry) for entry in logprobs if entry.token not in self.hidden]
        self.tokens += ids
        self.text += self.pieces.add(ids, last=last)

    def _cut_at_stop(self) -> bool:
        """End the answer before the first stop string, if there is one."""
        found = [at for stop in self.stops if (at := self.text.find(stop, self.num_shown)) >= 0]
        if not found:
            return False
        self.text, self.finish = self.text[: min(found)], "stop"
        self.waiting = [(offset, token) for offset, token in self.waiting if offset < len(self.text)]
        return True

    def _num_held(self) -> int:
        """Number of characters at the end that may be the beginning of a stop string."""
        longest = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(self.text) - self.num_shown), longest, -1):
                if self.text.endswith(stop[:length]):
                    longest = length
                    break
        return longest

    def _show(self, end: int) -> Piece:
        end = max(end, self.num_shown)
        text, self.num_shown = self.text[self.num_shown : end], end
        is_shown = [self.finish is not None or offset < end for offset, _ in self.waiting]
        shown = [entry for entry, now in zip(self.waiting, is_shown, strict=True) if now]
        self.waiting = [entry for entry, now in zip(self.waiting, is_shown, strict=True) if not now]
        return Piece(text, [token for _, token in shown], [offset for offset, _ in shown])


def chat_logprobs(entries: Sequence[TokenLogprob], spelling: Spelling) -> dict[str, Any]:
    """`logprobs` of a chat completion."""

    def shown(token: int, logprob: float) -> dict[str, Any]:
        return {"token": spelling.text(token), "logprob": logprob, "bytes": list(spelling.spelled(token))}

    content = [
        shown(entry.token, entry.logprob) | {"top_logprobs": [shown(*pair) for pair in entry.top]} for entry in entries
    ]
    return {"content": content, "refusal": None}


def text_logprobs(
    entries: Sequence[TokenLogprob | None], ids: Sequence[int], offsets: Sequence[int], spelling: Spelling
) -> dict[str, Any]:
    """`logprobs` of a text completion; an entry is `None` where nothing precedes the token."""
    top: list[dict[str, float] | None] = []
    for entry in entries:
        shown: dict[str, float] = {}
        for token, value in [*entry.top, (entry.token, entry.logprob)] if entry is not None else []:
            shown.setdefault(spelling.text(token), value)  # two tokens may have one spelling: the likelier one stays
        top.append(shown if entry is not None else None)
    return {
        "tokens": [spelling.text(token) for token in ids],
        "token_logprobs": [None if entry is None else entry.logprob for entry in entries],
        "top_logprobs": top,
        "text_offset": list(offsets),
    }


def offsets_of(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Where the text of each token begins, in characters."""
    pieces, length, offsets = TextPieces(tokenizer, skip_special_tokens=False), 0, []
    for i, token in enumerate(ids):
        offsets.append(length)
        length += len(pieces.add([token], last=i == len(ids) - 1))
    return offsets


def sse(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


DONE = sse("[DONE]")
