"""Pictures of a decode, drawn from its trace: a player in HTML, coloured text, bars. Imported only when one is drawn.

The HTML needs nothing from outside and no colour of the page around it: text keeps the page's own colour and steps are
tints behind it, so it reads on light and on dark. Without scripts the finished rows remain, with the numbers as
tooltips. The script finds its place by a hash of the data, so any number of players can stand on one page.
"""

from __future__ import annotations

import hashlib
import html
import json
import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch

from apd.generation.streaming import TextPieces
from apd.generation.text import whole_text
from apd.show import terminal as display

if TYPE_CHECKING:
    from apd.generation.output import RowTrace, Trace

NOTEBOOK_ROWS = 8  # more are left to `Trace.to_html`: an output cell is no place for a hundred rows

# As in a terminal: cyan, yellow, magenta, green, blue, red; neighbours differ.
_TINTS = ("0 170 190", "214 160 0", "200 70 200", "50 165 70", "70 110 245", "230 75 60")
_LONGEST_PROMPT = 600  # characters shown


def to_text(trace: Trace, *, colour: bool | None) -> str:
    """A header per row, then its text with the steps marked; `colour=None` asks standard output."""
    if colour is None:
        colour = display.wants_colour(sys.stdout)
    decode = _decoder(trace.tokenizer, skip_special_tokens=True)
    lines = [display.legend(colour=colour)] if len(trace) else []
    for number, row in enumerate(trace):
        parts = display.pieces(row.tokens, row.steps, decode)
        lines += [f"row {number}: {_counts(row)}", display.mark(parts, colour=colour)]
    return "\n".join(lines)


def to_page(trace: Trace) -> str:
    """A whole HTML page that plays the decode of every row."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>A decode, step by step</title>\n'
        "<style>:root { color-scheme: light dark } body { margin: 1.5rem auto; max-width: 62rem; padding: 0 1rem; "
        "background: Canvas; color: CanvasText; font-family: system-ui, sans-serif }</style>\n"
        f"</head>\n<body>\n{to_html(trace)}\n</body>\n</html>\n"
    )


def to_html(trace: Trace, *, most_rows: int | None = None) -> str:
    """The same as a fragment, of the first `most_rows` rows."""
    shown = trace if most_rows is None else trace[:most_rows]
    number_of: dict[int, int] = {}  # ids of drafted tokens, numbered as they come: short numbers make small pages
    rows = [
        {
            "steps": row.steps,
            "tokens": [number_of.setdefault(token, len(number_of)) for token in row.tokens],
            "starts": row.starts,
            "drafts": [[number_of.setdefault(token, len(number_of)) for token in draft] for draft in row.drafts],
        }
        for row in shown
    ]
    spell = _speller(trace.tokenizer, next((row.prompt[-1] for row in shown if row.prompt), None))
    labels = [_visible(spell(token)).replace("\n", "") or "·" for token in number_of]
    data = json.dumps({"rows": rows, "labels": labels}, separators=(",", ":")).replace("<", "\\u003c")
    key = hashlib.sha256(data.encode()).hexdigest()[:16]
    num_steps = max((len(row.committed) for row in shown), default=0)
    return "\n".join(
        [
            f'<div class="apd-trace" data-apd="{key}">',
            f"<style>{_STYLE}</style>",
            '<div class="apd-bar" hidden><button type="button">Play</button>'
            f'<input type="range" min="0" max="{num_steps}" value="{num_steps}" aria-label="step">'
            '<output aria-live="off"></output></div>',
            *(_row_html(number, row, trace.tokenizer) for number, row in enumerate(shown)),
            _more_rows(len(trace) - len(shown)),
            _legend_html(num_steps, has_corrections=any(any(_corrected(row)) for row in shown)),
            '<div class="apd-tip" role="tooltip" hidden></div>',
            "</div>",
            f'<script>(function (key, data) {{{_SCRIPT}}})("{key}", {data});</script>',
        ]
    )


def plot(trace: Trace, ax: Any = None) -> Any:
    """Bars of tokens committed at each step, before those of tokens drafted; means over the rows that made the step."""
    if ax is None:
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError(
                "`Trace.plot()` needs matplotlib: pip install matplotlib, or apd-decoding[notebook]."
            ) from error
        ax = plt.subplots(figsize=(7, 3), layout="constrained")[1]
    drafted, committed = [_mean_per_step(counts) for counts in zip(*map(_counts_per_step, trace), strict=True)]
    step = range(1, len(committed) + 1)
    ax.bar(step, drafted, width=0.9, color="0.85", label="drafted")
    ax.bar(step, committed, width=0.9, color="#1f77b4", label="committed")
    rows = "" if len(trace) == 1 else f", mean of {len(trace)} rows"
    ax.set(xlabel="step", ylabel=f"tokens{rows}")
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1))  # above, where no bar is
    return ax


def _counts_per_step(row: RowTrace) -> tuple[list[int], list[int]]:
    """Masks drafted and tokens committed at each step; any-order windows also hold columns that are decided."""
    step_of = dict(enumerate(row.steps))
    drafted = [
        sum(step_of.get(start + i, step) >= step for i in range(len(draft)))
        for step, (start, draft) in enumerate(zip(row.starts, row.drafts, strict=True))
    ]
    return drafted, row.committed


def _mean_per_step(counts: Sequence[Sequence[int]]) -> list[float]:
    longest = max(map(len, counts))
    of_step = [[row[step] for row in counts if step < len(row)] for step in range(longest)]
    return [sum(values) / len(values) for values in of_step]


def _counts(row: RowTrace) -> str:
    tokens, steps = len(row.tokens), len(row.committed)
    rate = f", {tokens / steps:.1f} per drafter forward" if steps else ""
    return f"{_number(tokens, 'token')} in {_number(steps, 'step')}{rate}"


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _decoder(tokenizer: Any, *, skip_special_tokens: bool) -> display.Decode:
    if tokenizer is None:
        return lambda ids: "".join(f" {token}" for token in ids)
    return partial(whole_text, tokenizer, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)


def _speller(tokenizer: Any, anchor: int | None) -> Any:
    """One token's text out of context, the space before it included; `anchor` is any token it may stand behind."""
    decode = _decoder(tokenizer, skip_special_tokens=False)
    before = [] if anchor is None else [anchor]
    num_before = len(decode(before))
    return lru_cache(maxsize=None)(lambda token: decode([*before, token])[num_before:])


def _spellings(row: RowTrace, tokenizer: Any) -> list[str]:
    """Each token's share of the text; empty for one that only begins a character."""
    if tokenizer is None:
        return [f" {token}" for token in row.tokens]
    pieces = TextPieces(tokenizer, clean_up_tokenization_spaces=False)
    pieces.add(torch.tensor(row.prompt, dtype=torch.int64), last=False)
    return [pieces.add(torch.tensor([token]), last=False) for token in row.tokens]


def _visible(text: str) -> str:
    """Line breaks and control characters as signs, so that no token is invisible."""
    signs = {code: chr(0x2400 + code) for code in range(32)} | {10: "↵\n", 9: "⇥\t", 0x7F: "␡"}
    return text.translate(signs)


def _row_html(number: int, row: RowTrace, tokenizer: Any) -> str:
    texts = [_visible(text) or "·" for text in _spellings(row, tokenizer)]
    numbers = [row.target_probs, row.drafter_probs, *([row.verifier_probs] if row.verifier_probs else [])]
    tokens = "".join(
        f'<span class="apd-t apd-c{step % len(_TINTS)}{" apd-y" * is_corrected}" '
        f'title="{html.escape(_tip(step, probs))}">{html.escape(text)}</span>'
        for text, step, is_corrected, *probs in zip(texts, row.steps, _corrected(row), *numbers, strict=True)
    )
    prompt = _decoder(tokenizer, skip_special_tokens=True)(row.prompt)
    if len(prompt) > _LONGEST_PROMPT:
        prompt = "… " + prompt[-_LONGEST_PROMPT:]
    return (
        f'<div class="apd-row"><div class="apd-head">row {number}: <span>{_counts(row)}</span></div>'
        f'<div class="apd-prompt">{html.escape(prompt)}</div><div class="apd-tokens">{tokens}</div></div>'
    )


def _corrected(row: RowTrace) -> list[bool]:
    """Whether each token was committed in place of another one that was drafted."""
    return [
        row.drafts[step][position - row.starts[step]] != token
        for position, (token, step) in enumerate(zip(row.tokens, row.steps, strict=True))
    ]


def _tip(step: int, probs: Sequence[float]) -> str:
    names = ("p_T", "p_D drafter", "p_AR verifier")
    return "\n".join([f"step {step + 1}", *(f"{name} {_short(p)}" for name, p in zip(names, probs, strict=False))])


def _short(p: float) -> str:
    """Three digits, and never a 1 or a 0 that is none."""
    if p in (0, 1):
        return f"{p:.0f}"
    return "< 0.001" if p < 0.0005 else "> 0.999" if p >= 0.9995 else f"{p:.3f}"


def _more_rows(count: int) -> str:
    return f'<div class="apd-head">{_number(count, "more row")}: trace.to_html(path) draws all.</div>' if count else ""


def _legend_html(num_steps: int, *, has_corrections: bool) -> str:
    chips = "".join(f'<span class="apd-t apd-c{i}">step {i + 1}</span> ' for i in range(min(num_steps, len(_TINTS))))
    again = "and again from the first colour; " if num_steps > len(_TINTS) else ""
    corrected = '<span class="apd-y">committed in place of the draft</span> ' if has_corrections else ""
    return (
        f'<div class="apd-legend">{chips}{again}{corrected}<span class="apd-d">drafted, not committed</span> '
        '<span class="apd-m">▢</span> mask</div>'
    )


_STYLE = """
.apd-trace { position: relative; line-height: 1.75; max-width: 62rem }
.apd-trace [hidden] { display: none !important }
.apd-trace .apd-bar { display: flex; gap: .75rem; align-items: center; margin: .25rem 0 .5rem }
.apd-trace .apd-bar button { min-width: 5rem; padding: .2rem .7rem; font: inherit; line-height: 1.5; cursor: pointer;
  color: inherit; background: rgb(128 128 128 / .18); border: 1px solid rgb(128 128 128 / .6); border-radius: 5px }
.apd-trace .apd-bar input { flex: 1; min-width: 6rem; max-width: 26rem; accent-color: rgb(70 110 245) }
.apd-trace .apd-bar output { min-width: 8rem; font-variant-numeric: tabular-nums; color: inherit }
.apd-trace .apd-row { margin: 0 0 .9rem }
.apd-trace .apd-head, .apd-trace .apd-legend { font-size: .85em; font-variant-numeric: tabular-nums }
.apd-trace .apd-head { opacity: .8 }
.apd-trace .apd-prompt { white-space: pre-wrap; overflow-wrap: anywhere; opacity: .75 }
.apd-trace .apd-tokens, .apd-trace .apd-legend { white-space: pre-wrap; overflow-wrap: anywhere }
.apd-trace .apd-tokens { min-height: 1.75em; font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .95em }
.apd-trace .apd-t, .apd-trace .apd-d, .apd-trace .apd-m { unicode-bidi: isolate; padding: .1em 0; border-radius: 3px }
.apd-trace .apd-t { background: rgb(var(--apd) / .25); box-shadow: inset -1px 0 0 rgb(128 128 128 / .45);
  border-bottom: 2px solid transparent }
.apd-trace .apd-new { background: rgb(var(--apd) / .42); border-bottom-color: rgb(var(--apd)) }
.apd-trace .apd-d { opacity: .66; box-shadow: inset -1px 0 0 rgb(128 128 128 / .45); text-decoration: line-through; text-decoration-thickness: 1px }
.apd-trace .apd-y { text-decoration: underline dotted 2px; text-underline-offset: .2em }
.apd-trace .apd-m { opacity: .6 }
.apd-trace .apd-tokens > span:hover, .apd-trace .apd-on { outline: 2px solid currentColor; outline-offset: -1px }
.apd-trace .apd-tip { position: absolute; z-index: 10; max-width: 22rem; padding: .4rem .6rem; border-radius: 5px;
  background: #1f2933; color: #fff; border: 1px solid #8895a2; font-size: .82em; line-height: 1.45;
  white-space: pre-wrap; overflow-wrap: anywhere; pointer-events: none }
""" + "".join(f".apd-trace .apd-c{i} {{ --apd: {tint} }}\n" for i, tint in enumerate(_TINTS))

# Slider position k is the row after k steps: what they committed, and what step k drafted besides.
_SCRIPT = """
"use strict";
document.querySelectorAll('.apd-trace[data-apd="' + key + '"]:not([data-ready])').forEach(function (root) {
  root.setAttribute("data-ready", "");
  var bar = root.querySelector(".apd-bar"), tip = root.querySelector(".apd-tip"), timer = null;
  var button = bar.querySelector("button"), slider = bar.querySelector("input"), shown = bar.querySelector("output");
  var last = Number(slider.max);

  var rows = data.rows.map(function (row, r) {
    var box = root.querySelectorAll(".apd-tokens")[r], spans = Array.from(box.children), width = spans.length;
    var view = {
      row: row, box: box, spans: spans, numSteps: row.drafts.length,
      head: root.querySelectorAll(".apd-row .apd-head span")[r],
      classes: spans.map(function (span) { return span.className; }),
      texts: spans.map(function (span) { return span.textContent; }),
      tips: spans.map(function (span) { var text = span.title; span.removeAttribute("title"); return text; })
    };
    view.summary = view.head.textContent;
    row.drafts.forEach(function (draft, s) { width = Math.max(width, row.starts[s] + draft.length); });
    while (spans.length < width) spans.push(box.appendChild(document.createElement("span")));
    spans.forEach(function (span, i) { span.apdPlace = [view, i]; });
    return view;
  });

  function drafted(view, step, i) {  // label of the token that a step drafted at a position, or undefined
    var label = view.row.drafts[step][i - view.row.starts[step]];
    return i < view.row.starts[step] ? undefined : label;
  }

  function at(view, i, k) {  // [class, text] of a position after k steps
    var step = view.row.steps[i];
    if (step < k) return [view.classes[i] + (step === k - 1 && k < last ? " apd-new" : ""), view.texts[i]];
    if (k >= view.numSteps) return ["", ""];
    var label = drafted(view, Math.max(k - 1, 0), i);
    if (label === undefined) return ["", ""];
    return k ? ["apd-d", data.labels[label]] : ["apd-m", "▢"];
  }

  function draw() {
    var k = Number(slider.value);
    tip.hidden = true;
    shown.textContent = "step " + k + " of " + last;
    rows.forEach(function (view) {
      var now = view.spans.map(function (_, i) { return at(view, i, k); });
      for (var i = 0, j; i < now.length; i = j) {  // a tail of stop tokens is told once: <eos> ×20
        for (j = i + 1; j < now.length && now[j][0] === "apd-d" && now[j].join() === now[i].join();) j++;
        if (j - i < 4) continue;
        now[i][1] += " ×" + (j - i);
        now.fill(["", ""], i + 1, j);
      }
      view.spans.forEach(function (span, i) {
        if (span.className !== now[i][0]) span.className = now[i][0];
        if (span.textContent !== now[i][1]) span.textContent = now[i][1];
      });
      var done = view.row.steps.filter(function (step) { return step < k; }).length;
      view.head.textContent = k >= view.numSteps ? view.summary
        : done + " of " + view.row.steps.length + " tokens after " + k + " of " + view.numSteps + " steps";
    });
  }

  function story(view, i) {  // what the tip says
    var k = Math.min(Number(slider.value), view.numSteps), step = view.row.steps[i], lines = [], runs = [];
    var isCommitted = step < k, until = isCommitted ? step : k;
    if (isCommitted) {
      lines.push(view.tips[i]);
      var own = drafted(view, step, i);
      if (own !== view.row.tokens[i] && own !== undefined) lines.push("in place of the draft “" + data.labels[own] + "”");
    } else if (k) lines.push("drafted at step " + k + ", not committed");
    else lines.push("mask");
    for (var s = 0; s < until - (isCommitted ? 0 : 1); s++) {
      var label = drafted(view, s, i), before = runs[runs.length - 1];
      if (label === undefined) continue;
      if (before && before.label === label && before.to === s - 1) before.to = s;
      else runs.push({ label: label, from: s, to: s });
    }
    if (runs.length) lines.push("drafted before, not committed:");
    if (runs.length > 6) lines.push("…");
    runs.slice(-6).forEach(function (run) {
      lines.push("  “" + data.labels[run.label] + "” step " + (run.from + 1) + (run.to > run.from ? "–" + (run.to + 1) : ""));
    });
    return lines.join("\\n");
  }

  function tell(event) {
    var place = event.target.apdPlace;
    root.querySelectorAll(".apd-on").forEach(function (span) { span.classList.remove("apd-on"); });
    tip.hidden = !(place && event.target.textContent);
    if (tip.hidden) return;
    if (event.type === "click") event.target.classList.add("apd-on");
    tip.textContent = story(place[0], place[1]);
    var frame = root.getBoundingClientRect(), box = event.target.getClientRects()[0];
    tip.style.left = Math.max(0, Math.min(box.left - frame.left, frame.width - tip.offsetWidth)) + "px";
    var below = box.bottom - frame.top + 4, above = box.top - frame.top - 4 - tip.offsetHeight;
    tip.style.top = (below + tip.offsetHeight > frame.height && above > 0 ? above : below) + "px";
  }

  function stop() { clearInterval(timer); timer = null; button.textContent = "Play"; }
  function play() {
    if (Number(slider.value) >= last) slider.value = 0;
    button.textContent = "Pause";
    draw();
    timer = setInterval(function () {
      slider.value = Number(slider.value) + 1;
      draw();
      if (Number(slider.value) >= last || !root.isConnected) stop();
    }, Math.max(60, Math.min(700, 12000 / last)));
  }
  button.addEventListener("click", function () { if (timer) stop(); else play(); });
  slider.addEventListener("input", function () { stop(); draw(); });
  root.addEventListener("mouseover", tell);
  root.addEventListener("click", tell);
  root.addEventListener("mouseleave", function () { tip.hidden = true; });
  bar.hidden = last < 1;
  draw();
});
"""
