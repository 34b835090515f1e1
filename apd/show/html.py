"""A trace as an HTML player, for a notebook cell or a page of its own: templates, filled in by jinja2.

The player loads nothing. It keeps the page's text colour and tints the background of tokens by step, so it is readable
on light and on dark pages. Without scripts, the finished rows remain, with the numbers as tooltips. The script finds its
element by a hash of the data, so any number of players can share a page.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from apd.show.rows import RowTrace, corrected, counts, given_tokens, number
from apd.show.tokens import speller
from apd.text import TextPieces, decoder

NOTEBOOK_ROWS = 8  # more would make an output cell unreadable; `Trace.to_html` shows all

_NUM_TINTS = 6  # .apd-c0 … .apd-c5 in player.css, in the order of the terminal's colours
_MAX_PROMPT = 600  # characters shown

_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def page(rows: Sequence[RowTrace], tokenizer: Any) -> str:
    """A whole HTML page that plays the decode of every row."""
    return _TEMPLATES.get_template("page.html").render(player=Markup(player(rows, tokenizer)))


def player(rows: Sequence[RowTrace], tokenizer: Any, *, max_rows: int | None = None) -> str:
    """An HTML fragment that plays the decode of the first `max_rows` rows, of all by default."""
    shown = rows[:max_rows]
    num_steps = max((len(row.committed) for row in shown), default=0)
    data = _data(shown, tokenizer)
    return _TEMPLATES.get_template("player.html").render(
        key=hashlib.sha256(data.encode()).hexdigest()[:16],
        data=Markup(data),
        num_steps=num_steps,
        num_colours=min(num_steps, _NUM_TINTS),
        rows=[_shown(row, tokenizer) for row in shown],
        more_rows=number(len(rows) - len(shown), "more row") if len(rows) > len(shown) else "",
        has_corrections=any(any(corrected(row)) for row in shown),
    )


def _shown(row: RowTrace, tokenizer: Any) -> dict[str, Any]:
    """The values of player.html for one row."""
    given, texts = _texts(row, tokenizer)
    prompt = decoder(tokenizer, skip_special_tokens=True)(given_tokens(row)[0])
    probs = [row.target_probs, row.drafter_probs, *([row.verifier_probs] if row.verifier_probs else [])]
    between, rest = [_shortened(text) for text in given[:-1]], _shortened(given[-1])
    columns = zip(between, texts, row.steps, corrected(row), *probs, strict=True)
    return {
        "counts": counts(row),
        "prompt": prompt if len(prompt) <= _MAX_PROMPT else f"… {prompt[-_MAX_PROMPT:]}",
        "tokens": [
            {
                "given": before,
                "text": _visible(text) or "·",
                "classes": f"apd-t apd-c{step % _NUM_TINTS}{' apd-y' * is_corrected}",
                "tip": _tip(step, probabilities),
            }
            for before, text, step, is_corrected, *probabilities in columns
        ],
        "rest": rest,
    }


def _data(rows: Sequence[RowTrace], tokenizer: Any) -> str:
    """The data of player.js as JSON with every `<` escaped, so that no HTML element can end or begin in it."""
    number_of: dict[int, int] = {}  # ids of tokens, numbered as they come: short numbers make small pages

    def numbered(ids: Sequence[int]) -> list[int]:
        return [number_of.setdefault(token, len(number_of)) for token in ids]

    steps = [
        {
            "steps": row.steps,
            "tokens": numbered(row.tokens),
            "starts": row.starts,
            "drafts": list(map(numbered, row.drafts)),
        }
        for row in rows
    ]
    spell = speller(tokenizer, next((row.prompt[-1] for row in rows if row.prompt), None))
    labels = [_visible(spell(token)).replace("\n", "") or "·" for token in number_of]
    special = [number_of[token] for token in _special(tokenizer) if token in number_of]
    data = {"rows": steps, "labels": labels, "special": special}
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _special(tokenizer: Any) -> Sequence[int]:
    return getattr(tokenizer, "all_special_ids", None) or ()


def _texts(row: RowTrace, tokenizer: Any) -> tuple[list[str], list[str]]:
    """The texts of given tokens between holes and behind the last, and of each generated one.

    As `given_tokens`, but "" in the place of the prompt. A text is empty if its tokens only begin a character.
    """
    special = set(_special(tokenizer))
    pieces = None if tokenizer is None else TextPieces(tokenizer, clean_up_tokenization_spaces=False)

    def text(ids: Sequence[int]) -> str:
        return "".join(f" {token}" for token in ids) if pieces is None else pieces.add(ids, last=False)

    first, *rest = given_tokens(row)
    text(first)
    given, texts = [""], []
    for token, behind in zip(row.tokens, rest, strict=True):
        texts.append(text([token]))
        given.append(text([i for i in behind if i not in special]))
    return given, texts


def _shortened(text: str) -> str:
    """Both ends of a long text."""
    end = _MAX_PROMPT // 2
    return text if len(text) <= _MAX_PROMPT else f"{text[:end]} … {text[-end:]}"


def _visible(text: str) -> str:
    """Replace line breaks and control characters by visible signs."""
    signs = {code: chr(0x2400 + code) for code in range(32)} | {10: "↵\n", 9: "⇥\t", 0x7F: "␡"}
    return text.translate(signs)


def _tip(step: int, probs: Sequence[float]) -> str:
    names = ("p_T", "p_D drafter", "p_AR verifier")
    return "\n".join([f"step {step + 1}", *(f"{name} {_short(p)}" for name, p in zip(names, probs, strict=False))])


def _short(p: float) -> str:
    """A probability to three digits; "0" and "1" only for exactly 0 and 1."""
    if p in (0, 1):
        return f"{p:.0f}"
    return "< 0.001" if p < 0.0005 else "> 0.999" if p >= 0.9995 else f"{p:.3f}"
