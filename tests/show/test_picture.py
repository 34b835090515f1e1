"""Pictures of a decode: what they hold, what they must not do, and, where a browser is found, what it shows."""

import ast
import html
import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import pytest

import apd
from apd import EXAMPLE_PROMPTS, APDSampler, RandomOrder
from apd.generation.output import APDOutput
from apd.show.rows import RowTrace, given_tokens
from apd.show.trace import Trace

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "input", "br"}


class Words:
    """A tokenizer that joins words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return "".join(self.words[i] for i in ids)


class Bytes:
    """A tokenizer of single bytes."""

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return bytes(ids).decode(errors="replace")


class Page(HTMLParser):
    """Elements by class, and that every tag is closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[tuple[str, str]] = []
        self.tags: list[str] = []
        self.rows: list[list[tuple[str, str, str]]] = []  # per row: class, text and title of each token
        self.sliders: list[dict[str, str | None]] = []
        self.feed(page)
        self.close()
        assert not self.stack, self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        if tag == "input":
            self.sliders.append(found)
        if tag not in VOID:
            self.stack.append((tag, found.get("class") or ""))
        if found.get("class") == "apd-tokens":
            self.rows.append([])
        elif self._in_tokens() and tag == "span":
            self.rows[-1].append((found["class"] or "", "", found["title"] or ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        if self._in_tokens() and self.rows[-1]:
            name, text, title = self.rows[-1][-1]
            self.rows[-1][-1] = (name, text + data, title)

    def _in_tokens(self) -> bool:
        return ("div", "apd-tokens") in self.stack


def row_of(steps: list[int], *, tokens: list[int] | None = None, drafts: list[list[int]] | None = None) -> RowTrace:
    """A row whose tokens are 0, 1, …, drafted right from the first undecided one on unless given otherwise."""
    tokens = list(range(len(steps))) if tokens is None else tokens
    num_steps = max(steps) + 1
    starts = [min(i for i, s in enumerate(steps) if s >= step) for step in range(num_steps)]
    return RowTrace(
        tokens=tokens,
        steps=steps,
        target_probs=[0.5] * len(steps),
        drafter_probs=[0.25] * len(steps),
        verifier_probs=[0.75] * len(steps),
        starts=starts,
        drafts=drafts or [tokens[start:] for start in starts],
        committed=[steps.count(step) for step in range(num_steps)],
        prompt=[0],
    )


@pytest.fixture(scope="module")
def sampler() -> APDSampler:
    return APDSampler.from_included()


@pytest.fixture(scope="module")
def output(sampler: APDSampler) -> APDOutput:
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[2:5], return_tensors="pt", padding=True)
    return sampler.generate(**inputs, max_new_tokens=32, return_dict_in_generate=True)


# ---------------------------------------------------------------- the trace as a sequence


def test_a_trace_is_a_sequence_of_rows(output: APDOutput) -> None:
    trace = output.trace
    assert len(trace) == len(list(trace)) == 3
    assert all(isinstance(row, RowTrace) for row in trace)
    assert trace[-1] == list(trace)[2] and trace.index(trace[1]) == 1
    assert isinstance(trace[1:], Trace) and list(trace[1:]) == list(trace)[1:]
    assert trace[1:].tokenizer is trace.tokenizer
    assert repr(trace).startswith("<Trace of 3 rows, ") and "\n" not in repr(trace)


def test_a_row_remembers_its_prompt_without_padding(sampler: APDSampler, output: APDOutput) -> None:
    assert [row.prompt for row in output.trace] == sampler.tokenizer(EXAMPLE_PROMPTS[2:5])["input_ids"]


def test_what_draws_is_imported_when_something_is_drawn() -> None:
    package = Path(apd.__file__).parent
    drawing = {package / "show" / f"{name}.py" for name in ("html", "plot", "terminal", "text")}
    for path in {*package.rglob("*.py")} - drawing - {*(package / "cli").glob("*.py")}:
        top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert not re.search(r"apd\.show\.(html|plot|text)|jinja2|matplotlib|rich", " ".join(map(ast.unparse, top))), (
            path
        )


# ---------------------------------------------------------------- HTML


def test_every_token_appears_once_in_its_row_with_its_step(sampler: APDSampler, output: APDOutput) -> None:
    page = Page(output.trace.to_html())
    assert len(page.rows) == 3
    for shown, row in zip(page.rows, output.trace, strict=True):
        assert "".join(text for _, text, _ in shown) == sampler.tokenizer.decode(row.tokens)
        assert [title.splitlines()[0] for *_, title in shown] == [f"step {step + 1}" for step in row.steps]
        assert [name for name, *_ in shown] == [f"apd-t apd-c{step % 6}" for step in row.steps]


def test_the_slider_reaches_every_step(output: APDOutput) -> None:
    (slider,) = Page(output.trace.to_html()).sliders
    assert (slider["min"], slider["max"]) == ("0", str(max(len(row.committed) for row in output.trace)))


def test_token_text_cannot_become_markup() -> None:
    words = Words("</script><script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "&lt;", "<!--")
    trace = Trace([row_of([0, 0, 1, 1], drafts=[[3, 1, 0, 2], [0, 3]])], words)
    page = Page(trace.to_html())
    assert page.tags.count("script") == 1 and "img" not in page.tags
    assert [text for _, text, _ in page.rows[0]] == list(words.words)


def test_a_page_loads_nothing(output: APDOutput) -> None:
    page = output.trace.to_html()
    assert not re.search(r"https?:|//\w|\bsrc=|\bhref=|url\(|@import|fetch\(", page)


def test_a_page_is_written_to_the_given_path(output: APDOutput, tmp_path: Path) -> None:
    page = output.trace.to_html(tmp_path / "decode.html")
    assert (tmp_path / "decode.html").read_text(encoding="utf-8") == page
    assert page.startswith("<!doctype html>")
    assert not output.trace._repr_html_().startswith("<!doctype")


def test_probabilities_are_shown_and_never_rounded_to_certainty() -> None:
    row = row_of([0, 0, 0, 0])
    row.target_probs = [1.0, 0.99999, 0.4567, 0.00001]
    titles = [title for *_, title in Page(Trace([row]).to_html()).rows[0]]
    assert [title.splitlines()[1] for title in titles] == ["p_T 1", "p_T > 0.999", "p_T 0.457", "p_T < 0.001"]
    assert titles[2].splitlines()[2:] == ["p_D drafter 0.250", "p_AR verifier 0.750"]


def test_without_a_verifier_no_verifier_is_shown(sampler: APDSampler) -> None:
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[0], return_tensors="pt")
    alone = sampler.generate(**inputs, max_new_tokens=8, mixture_weight=1.0, return_dict_in_generate=True)
    (row,) = Page(alone.trace.to_html()).rows
    assert len(row) == 8 and not any("verifier" in title for *_, title in row)


def test_without_a_tokenizer_ids_are_shown(output: APDOutput) -> None:
    trace = Trace(output.trace.rows)
    assert [text for _, text, _ in Page(trace.to_html()).rows[0]] == [f" {token}" for token in trace[0].tokens]
    assert str(trace[0].tokens[0]) in str(trace)


def test_any_order_is_drawn_in_the_order_of_positions(sampler: APDSampler) -> None:
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[0], return_tensors="pt")
    settings = {"max_new_tokens": 16, "return_dict_in_generate": True}
    trace = sampler.generate(**inputs, strategy=RandomOrder(2), seed=0, **settings).trace
    assert trace[0].steps != sorted(trace[0].steps)
    shown = Page(trace.to_html()).rows[0]
    assert "".join(text for _, text, _ in shown) == sampler.tokenizer.decode(trace[0].tokens)


def test_a_character_of_several_tokens_is_shown_once_complete() -> None:
    tokens = list("n✓é".encode())
    shown = Page(Trace([row_of([0] * 6, tokens=tokens)], Bytes()).to_html()).rows[0]
    assert [text for _, text, _ in shown] == ["n", "·", "·", "✓", "·", "é"]


def test_a_correction_is_marked_and_explained() -> None:
    drafted, corrected = row_of([0, 0]), row_of([0, 0], drafts=[[0, 7]])
    page = Trace([corrected]).to_html()
    assert [name for name, *_ in Page(page).rows[0]] == ["apd-t apd-c0", "apd-t apd-c0 apd-y"]
    assert "in place of the draft</span>" in page
    assert "in place of the draft</span>" not in Trace([drafted]).to_html()


def test_white_space_is_visible() -> None:
    shown = Page(Trace([row_of([0, 0, 1, 1])], Words("\n", "\t", " ", "\x1b[31m")).to_html()).rows[0]
    assert [text for _, text, _ in shown] == ["↵\n", "⇥\t", " ", "␛[31m"]


def test_long_rows_stay_small() -> None:
    steps = [i * 2 // 5 for i in range(500)]
    trace = Trace([row_of(steps)])
    assert len(trace[0].committed) == 200
    assert len(trace.to_html().encode()) < 1_000_000


def test_a_notebook_shows_the_first_rows_and_says_so() -> None:
    trace = Trace([row_of([0, 1])] * 30)
    cell, page = trace._repr_html_(), trace.to_html()
    assert len(Page(cell).rows) < 10 and f"{30 - len(Page(cell).rows)} more rows" in cell
    assert len(Page(page).rows) == 30 and "more row" not in page


def test_an_empty_trace_can_be_drawn() -> None:
    assert Page(Trace([]).to_html()).rows == [] and str(Trace([])) == ""


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
def test_a_browser_shows_every_step(tmp_path: Path) -> None:
    """The same rows twice on one page, moved to every step by a script; the page is then printed as the browser has it."""
    words = Words("a", "b", "c", "d", "x", "<eos>", " ")
    left_to_right = row_of([0, 0, 1, 2], drafts=[[0, 1, 4, 3], [2, 4], [3]])
    any_order = row_of([1, 0, 1, 0], drafts=[[4, 1, 4, 3], [0, 1, 2, 3]])
    long_tail = row_of([0, 1], tokens=[0, 5], drafts=[[0] + [5] * 6, [5] * 6])
    words.all_special_ids = [5]
    stops = row_of([0, 1, 1, 2, 2, 2, 1], tokens=[0, 5, 5, 5, 5, 1, 1])
    one_word = row_of([0] * 400, tokens=[0, 6] + [4] * 398)
    trace = Trace([left_to_right, any_order, long_tail, stops, one_word], words)
    script = """<script>
      var shown = Array.from(document.querySelectorAll(".apd-trace")).map(function (root) {
        var slider = root.querySelector("input"), steps = [];
        for (var k = 0; k <= Number(slider.max); k++) {
          slider.value = k;
          slider.dispatchEvent(new Event("input"));
          steps.push(Array.from(root.querySelectorAll(".apd-tokens")).map(function (row) {
            return Array.from(row.children).filter(function (span) { return span.textContent; })
              .map(function (span) { return (span.className[4] || "?") + span.textContent; }).join(" ");
          }));
        }
        slider.value = 2;
        slider.dispatchEvent(new Event("input"));
        function told(row, i) {
          root.querySelectorAll(".apd-tokens")[row].children[i].click();
          return root.querySelector(".apd-tip").textContent.split("\\n");
        }
        var tip = told(0, 2), run = root.querySelectorAll(".apd-tokens")[4].children;
        slider.value = slider.max;
        slider.dispatchEvent(new Event("input"));
        return [steps, tip, told(3, 1), run[0].offsetTop === run[20].offsetTop, run[20].offsetTop < run[399].offsetTop];
      });
      document.body.textContent = JSON.stringify(shown);
    </script>"""
    page = tmp_path / "page.html"
    page.write_text(f'<!doctype html><meta charset="utf-8"><body>{trace.to_html()}{trace._repr_html_()}{script}')
    quiet = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-sync"
    done = subprocess.run(
        [
            BROWSER,
            *quiet.split(),
            "--disable-component-update",
            f"--user-data-dir={tmp_path}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    body = re.search(r"<body>(.*)</body>", done.stdout, flags=re.DOTALL)
    assert body, done.stderr
    first, second = json.loads(body[1].replace("&lt;", "<").replace("&gt;", ">"))
    assert first == second
    steps, tip, folded, *lines = first
    # m: mask, t: committed, d: drafted and not committed
    assert [row[0] for row in steps] == ["m▢ m▢ m▢ m▢", "ta tb dx dd", "ta tb tc dx", "ta tb tc td"]
    assert [row[1] for row in steps] == ["m▢ m▢ m▢ m▢", "dx tb dx td", "ta tb tc td", "ta tb tc td"]
    assert [row[2] for row in steps] == ["m▢ " * 6 + "m▢", "ta d<eos> ×6", "ta t<eos>", "ta t<eos>"]
    # a run of stop tokens is told once, whichever steps committed it; other tokens are told each
    shown = [row[3] for row in steps[1:]]
    assert shown == ["ta d<eos> ×4 db db", "ta t<eos> t<eos> d<eos> d<eos> db tb", "ta t<eos> ×4 tb tb"]
    assert folded[:3] == ["4 of them, step 2–3; the first:", "step 2", "p_T 0.500"]
    assert lines == [True, True]  # a word longer than a line begins on the line that it follows
    assert tip[:4] == ["step 2", "p_T 0.500", "p_D drafter 0.250", "p_AR verifier 0.750"]
    assert tip[4:] == ["drafted before, not committed:", "  “x” step 1"]


# ---------------------------------------------------------------- text


def test_text_has_no_colours_by_default(output: APDOutput) -> None:
    plain, coloured = output.trace.to_text(colour=False), output.trace.to_text(colour=True)
    assert "\x1b" not in plain and "\x1b[36m" in coloured
    assert "\x1b" not in str(output.trace)  # pytest's standard output is no terminal
    for number, row in enumerate(output.trace):
        assert f"row {number}: {len(row.tokens)} tokens in {len(row.committed)} step" in plain


def test_a_bar_separates_steps() -> None:
    text = Trace([row_of([0, 0, 1])], Words("Ada", " and", " Ben")).to_text(colour=False)
    assert text.splitlines()[-2:] == ["row 0: 3 tokens in 2 steps, 1.5 per drafter forward", "Ada and| Ben"]


@pytest.mark.parametrize(
    "text", ["{|j |tsas|}", "a~b|", "|~^", "|~^" + "".join(map(chr, range(0x2500, 0x2600))), "ab"]
)
def test_steps_can_be_told_whatever_signs_the_text_has(text: str) -> None:
    """A step for each character: the text, cut at the sign that the legend names, is these characters again."""
    shown = str(Trace([row_of(list(range(len(text))))], Words(*text))).split("\n", 1)
    bar = re.search(r"(.) separates two steps", shown[0])[1]
    assert shown[1].split("per drafter forward\n")[1].split(bar) == list(text)
    assert (bar == "|") == ("|" not in text)


def test_answers_of_the_included_pair_have_no_bar(sampler: APDSampler) -> None:
    """`apd demo` explains its bars before it knows the answers."""
    ids = range(len(sampler.tokenizer))
    assert not any("|" in sampler.tokenizer.decode([i], skip_special_tokens=True) for i in ids)


# ---------------------------------------------------------------- plot


def heights(axes: object) -> dict[str, list[float]]:
    return {bars.get_label(): [bar.get_height() for bar in bars] for bars in axes.containers}  # type: ignore[attr-defined]


@pytest.fixture
def pyplot():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def test_bars_count_what_was_drafted_and_committed(pyplot) -> None:
    axes = Trace([row_of([0, 0, 1, 2])]).plot()
    assert heights(axes) == {"drafted": [4, 2, 1], "committed": [2, 1, 1]}


def test_bars_are_means_over_all_rows_and_do_not_rise_when_one_ends(pyplot) -> None:
    axes = Trace([row_of([0, 0, 1, 2]), row_of([0, 0, 0, 0])]).plot()
    assert heights(axes) == {"drafted": [4, 1, 0.5], "committed": [3, 0.5, 0.5]}
    assert axes.get_ylabel() == "tokens, mean of 2 rows"


def test_decided_columns_of_a_window_are_not_drafted(pyplot) -> None:
    axes = Trace([row_of([1, 0, 2])]).plot()  # step 1 drafts positions 0 and 2; 1 is decided
    assert heights(axes)["drafted"] == [3, 2, 1]


def test_the_callers_axes_are_used(pyplot, output: APDOutput) -> None:
    _, axes = pyplot.subplots()
    assert output.trace.plot(axes) is axes


def test_a_missing_matplotlib_is_named(monkeypatch: pytest.MonkeyPatch, output: APDOutput) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"needs matplotlib: pip install"):
        output.trace.plot()


def test_given_tokens_between_two_holes_are_told_by_dots() -> None:
    sampler = APDSampler.from_included()
    ids = sampler.tokenizer('Copy this list: ["Mia", "Leo", "Zoe"]. ["<mask>", "Leo", "<mask>"]', return_tensors="pt")
    output = sampler.generate(**ids, strategy="left-to-right:1", return_dict_in_generate=True)
    assert output.trace.to_text(colour=False).splitlines()[-1] == "Mia … |Zoe"
    assert output.trace[0].columns == [hole.start for hole in output.holes[0]]
    together = sampler.generate(**ids, strategy="left-to-right:2", return_dict_in_generate=True)
    assert together.trace.to_text(colour=False).splitlines()[-1] == "Mia … Zoe"


def test_the_player_and_the_plot_show_what_is_given_between_holes_and_behind_them(pyplot) -> None:
    sampler = APDSampler.from_included()
    text = 'Copy this list: ["Mia", "Leo", "Zoe"]. ["<mask>", "Leo", "<mask>'
    ids = sampler.tokenizer([f'{text}"]', f"{text}<mask><mask><mask>"], return_tensors="pt", padding=True)
    trace = sampler.generate(**ids, strategy="confidence:1", return_dict_in_generate=True).trace
    filled = text.replace("<mask>", "Mia", 1).replace("<mask>", "Zoe")
    assert shown_texts(trace.to_html()) == [f'{filled}"]', f'{filled}"]<eos>']  # and no mask behind the stop token
    assert heights(trace[:1].plot()) == {"drafted": [2, 1], "committed": [1, 1]}
    assert heights(trace[1:].plot()) == {"drafted": [5, 4, 3, 2], "committed": [1, 1, 1, 1]}


def test_given_tokens_lie_between_the_generated_ones() -> None:
    row = RowTrace(tokens=[1, 2, 3], prompt=[5, 9, 9, 6, 7, 9, 9], columns=[1, 2, 5])  # a stop token left a mask over
    assert given_tokens(row) == [[5], [], [6, 7], []]
    assert given_tokens(RowTrace(tokens=[1], prompt=[5, 6])) == [[5, 6], []]
    assert given_tokens(RowTrace(tokens=[1], prompt=[9, 5, 6], columns=[0])) == [[], [5, 6]]


def shown_texts(page: str) -> list[str]:
    """The text of each row, prompt included, as the page shows it."""
    rows = re.findall(r'<div class="apd-prompt">(.*?)</div><div class="apd-tokens">(.*?)</div>', page, re.S)
    return [html.unescape(re.sub(r"<[^>]*>", "", "".join(row))) for row in rows]
