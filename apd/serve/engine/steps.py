"""One decode as a stream of events, one per step: what the page draws, and what `POST /watch` sends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from apd.decoding.loop import DecodeLoop
from apd.generation.output import Recorder
from apd.show.tokens import speller, token_texts
from apd.text import TextPieces, whole_text

#: A step, the end, or an error, as JSON.
Event = dict[str, Any]

_MODELS = ("target", "drafter", "verifier")


def events(loop: DecodeLoop, tokenizer: Any, *, clock: Callable[[], float] = time.perf_counter) -> Iterator[Event]:
    """Decode a loop's only row and yield an event per step, then one with `done`.

    Positions count new tokens from 0. A step has

    - `tokens`: what it committed, each with `position`, `text` and, where the target token replaced the drafter's, `draft`, the
      text of that;
    - `rejected`: what it drafted besides, `[position, text]`; drafts at decided positions are left out;
    - `length`: the number of tokens that the row has at most, where a stop token is committed; else `None`. Positions behind it do
      not count;
    - `drafter_forwards`, `verifier_forwards`, `canvases` and `seconds` so far.

    The text of a token that is committed behind the frontier is its text out of context. The last event has the `texts` of all
    tokens that count, in context, stop token included: they join to the decoded row. It also has their `probs` before temperature
    and truncation, by model, the answer's `text` without special tokens, and `finish`, `"stop"` or `"length"`.

    Args:
        loop: of one row, before its first step.
        tokenizer: decodes.
        clock: seconds; what passes between two steps is not counted.

    Raises:
        what `DecodeLoop.steps` raises.
    """
    recorder = Recorder()
    recorder.expect(loop.state)
    row = recorder.rows[0]
    pieces, settled = TextPieces(tokenizer, clean_up_tokenization_spaces=False), 0
    pieces.add(row.prompt, last=False)
    spell = speller(tokenizer, row.prompt[-1] if row.prompt else None)
    stops = set(loop.request.stopping.token_ids.tolist())
    steps, seconds, finish, length = loop.steps(), 0.0, "length", None

    def counts() -> Event:
        return {
            "drafter_forwards": row.num_drafted,
            "verifier_forwards": row.num_verified,
            "canvases": row.num_canvases,
            "seconds": seconds,
        }

    while True:
        start = clock()
        if (made := next(steps, None)) is None:
            break
        info, after = made
        recorder.record(info, after)  # waits for the device
        seconds += clock() - start
        if after.layout.done[0] and bool(info.stopped[0]):
            finish = "stop"
        in_context: dict[int, str] = {}
        while settled in row.entries:
            in_context[settled] = pieces.add([row.entries[settled][0]], last=False)
            settled += 1
        start_of, drafts, step = row.starts[-1], row.drafts[-1], len(row.drafts) - 1
        drafted = dict(enumerate(drafts, start_of))
        tokens = []
        for position, (token, of_step, *_) in sorted(row.entries.items()):
            if of_step != step:
                continue
            if token in stops and (length is None or position < length):
                length = position + 1
            text = in_context[position] if position in in_context else spell(token)
            found: Event = {"position": position, "text": text}
            if drafted.get(position, token) != token:
                found["draft"] = spell(drafted[position])
            tokens.append(found)
        free = ((place, token) for place, token in drafted.items() if place not in row.entries)
        rejected = [[place, spell(token)] for place, token in free if token != loop.mask_token_id]
        yield {"step": step, "tokens": tokens, "rejected": rejected, "length": length, **counts()}
    trace = recorder.trace(0)
    yield {
        "done": True,
        "finish": finish,
        "texts": token_texts(trace, tokenizer),
        "probs": {name: probs for name in _MODELS if (probs := getattr(trace, f"{name}_probs"))},
        "text": whole_text(tokenizer, trace.tokens, skip_special_tokens=True),
        **counts(),
    }
