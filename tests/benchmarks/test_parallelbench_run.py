"""The runner of the benchmark and its report: names of strategies, resuming, and numbers worked out by hand."""

import csv
import dataclasses
import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from paths import ROOT

from apd.included import DRAFTER_DIR, VERIFIER_DIR
from apd.models.families import FAMILIES
from benchmarks.parallelbench import knobs
from benchmarks.parallelbench import report as reporting
from benchmarks.parallelbench.__main__ import main
from benchmarks.parallelbench.metrics import (
    Paired,
    Point,
    aup,
    oracle,
    paired,
    parallelisability,
    pbx,
    slope,
    summarise,
    wilson,
)
from benchmarks.parallelbench.models import causal_lm, included_pair
from benchmarks.parallelbench.page import write_page
from benchmarks.parallelbench.pictures import spots, write_pictures
from benchmarks.parallelbench.publish import write_csv
from benchmarks.parallelbench.records import NAME, appending, key, read
from benchmarks.parallelbench.run import Plan, run
from benchmarks.parallelbench.specs import KINDS, PRESETS, expand, parse
from benchmarks.parallelbench.summary import refresh, tables

SETTINGS = {"pair": "included", "drafter": "d", "verifier": "v", "seed": 0, "temperature": 0.0, "max_new_tokens": 32}
MADE_WITH = {"date": "2026-01-01", "python": "3", "torch": "2", "transformers": "5"}


def record(strategy="threshold:0.9", task="copy", index=0, *, score=1.0, forwards=2, verifier=0, tokens=8, **more):
    """A record of the time before `canvases`, which `more` may hold."""
    return {
        "strategy": strategy,
        "task": task,
        "index": index,
        "prompt": "?",
        "text": "!",
        "score": score,
        "score_strict": score,
        "exact": score,
        "drafter_forwards": forwards,
        "verifier_forwards": verifier,
        "new_tokens": tokens,
        "max_new_tokens": 32,
        "finish": "stop",
        "seconds": 0.5,
        **more,
    }


def point(spec, accuracy, tpf):
    """A setting with this mean accuracy (in percent, of 100 samples) and 8 tokens per sample."""
    right = round(accuracy)
    cell = summarise([record(spec, index=i, score=float(i < right), forwards=8 / tpf) for i in range(100)])
    return Point(parse(spec), {"copy": cell}, cell)


# --- Names of strategies


def test_presets_hold_every_kind_once():
    for name in ("all", "dependent"):
        settings = expand([name, name])
        assert len({setting.spec for setting in settings}) == len(settings) == len(PRESETS[name])
    assert {setting.spec.partition(":")[0] for setting in expand(["all"])} == {*KINDS, "blocks"}


# --- Running and going on


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A finished run of two settings, two tasks, two samples."""
    out = tmp_path_factory.mktemp("run")
    plan = Plan(["copy", "arithmetic"], expand(["apd:R=0.5", "one-step"]), count=2)
    assert run(included_pair(), plan, out, progress=False) == 8
    return out


def test_holes_give_both_sides_of_the_answer_and_count_what_is_filled(tmp_path, capsys):
    arguments = ["run", "--tasks", "copy", "shuffle", "--holes", "third", "--count", "3", "--out", str(tmp_path)]
    specs = ["left-to-right:1", "checked"]
    assert main([*arguments, "--strategies", *specs]) == 0
    log = read(tmp_path / NAME)
    assert log.settings["holes"] == "third"
    alone, checked = ([row for row in log.records if row["strategy"].startswith(name[:7])] for name in specs)
    assert len(alone) == len(checked) == 6
    for one, other in zip(sorted(alone, key=key), sorted(checked, key=key), strict=True):
        assert one["text"] == other["text"] and one["exact"] == 1
        # A list of 3 to 6 names has two tokens a name, and one more.
        assert 2 <= one["new_tokens"] == one["drafter_forwards"] == one["max_new_tokens"] <= 4
        assert other["new_tokens"] == one["new_tokens"]
    assert sum(row["drafter_forwards"] for row in checked) < sum(row["drafter_forwards"] for row in alone)
    assert main([*arguments, "--strategies", "few", "--max-new-tokens", "8"]) == 2
    assert "left out, since they fill no holes: autoregressive" in capsys.readouterr().err
    for refused in (["wino:0.6"], ["left-to-right:1", "autoregressive"]):
        with pytest.raises(ValueError, match="must run the drafter and take nothing back with `holes`"):
            Plan(["copy"], expand(refused), count=1, holes="third")
    plan = Plan(["waiting_line/copy"], expand(["threshold:0.9"]), count=1, holes="third")
    with pytest.raises(ValueError, match="`holes` must be left out for somewhere: it sees nothing"):
        run(causal_lm("somewhere"), plan, tmp_path / "alone", progress=False)


def test_every_sample_has_one_record_and_a_second_run_adds_none(directory):
    log = read(directory / NAME)
    assert len({key(row) for row in log.records}) == len(log.records) == 8
    assert all(row["drafter_forwards"] >= 1 and row["finish"] in ("stop", "length") for row in log.records)
    assert all(row["canvases"] == row["drafter_forwards"] for row in log.records)
    plan = Plan(["copy"], expand(["one-step"]), count=2)
    assert run(included_pair(), plan, directory, progress=False) == 0


def test_checked_strategies_compute_several_canvases_per_pass(tmp_path):
    plan = Plan(["arithmetic"], expand(["checked", "left-to-right:1"]), count=2)
    assert run(included_pair(), plan, tmp_path, progress=False) == 4
    rows = {(row["strategy"], row["index"]): row for row in read(tmp_path / NAME).records}
    for index in range(2):
        checked, plain = rows["checked:1", index], rows["left-to-right:1", index]
        assert checked["text"] == plain["text"]
        assert checked["drafter_forwards"] < plain["drafter_forwards"] == plain["canvases"] <= checked["canvases"]


def test_a_torn_line_is_cut_and_decoded_again(directory, tmp_path):
    whole = (directory / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole[:-20])
    plan = Plan(["copy", "arithmetic"], expand(["apd:R=0.5", "one-step"]), count=2)
    assert run(included_pair(), plan, tmp_path, progress=False) == 1

    def answers(path):
        return {key(row): (row["text"], row["drafter_forwards"]) for row in read(path).records}

    assert answers(tmp_path / NAME) == answers(directory / NAME)


def test_a_torn_header_is_rewritten(tmp_path):
    (tmp_path / NAME).write_text('{"settings": {"pa')
    with appending(tmp_path / NAME, SETTINGS, MADE_WITH) as (part, log):
        assert log.records == []
        part.write(record())
    assert read(tmp_path / NAME).records == [record()]


def test_other_settings_are_refused_and_named(directory, tmp_path, capsys):
    before = (directory / NAME).read_bytes()
    arguments = ["run", "--strategies", "one-step", "--count", "1", "--seed", "7", "--out", str(directory)]
    assert main(arguments) == 2
    assert "seed 0 there and 7 here" in capsys.readouterr().err
    assert (directory / NAME).read_bytes() == before


def test_a_duplicate_record_is_refused(tmp_path):
    lines = [{"settings": SETTINGS, "made_with": MADE_WITH}, record(), record()]
    (tmp_path / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="1 records twice"):
        read(tmp_path / NAME)


def test_another_pair_answers_our_tasks_as_chats(tmp_path, monkeypatch):
    shutil.copytree(DRAFTER_DIR, tmp_path / "drafter")
    config = json.loads((tmp_path / "drafter" / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"
    (tmp_path / "drafter" / "tokenizer_config.json").write_text(json.dumps(config))
    arguments = f"run --drafter {tmp_path}/drafter --verifier {VERIFIER_DIR} --out {tmp_path} --count 1"
    tasks = ["--tasks", "waiting_line/copy", "puzzle/sudoku_n4_12", "--max-new-tokens", "4", "--strategies", "apd"]
    assert main([*arguments.split(), *tasks]) == 0
    log = read(tmp_path / NAME)
    assert [row["task"] for row in log.records] == ["waiting_line/copy", "puzzle/sudoku_n4_12"]
    assert all(row["score"] == 0 and row["prompt"][-1]["role"] == "user" for row in log.records)
    assert "verifier passes" in tables(reporting.build(log))["main"]

    monkeypatch.setitem(FAMILIES, "dream", dataclasses.replace(FAMILIES["dream"], reads_causally=True))
    arguments = f"run --drafter {tmp_path}/drafter --verifier self --out {tmp_path}/own --count 1"
    tasks = [*tasks[:2], "--max-new-tokens", "4", "--strategies", "apd:R=0,first=judge,correction", "autoregressive"]
    assert main([*arguments.split(), *tasks]) == 0
    log = read(tmp_path / "own" / NAME)
    assert log.settings["verifier"] == "self"
    assert len({row["text"] for row in log.records}) == 1 and len(log.records) == 2


@pytest.mark.parametrize(
    ("argument", "told"),
    [
        (["--count", "0"], "count"),
        (["--tasks", "swap"], "swap"),
        (["--verifier", "v"], "drafter"),
        (
            ["--drafter", str(DRAFTER_DIR), "--verifier", "self"],
            "got 'self', but the family 'dream' was never trained",
        ),
    ],
)
def test_wrong_arguments_of_a_run_are_reported(argument, told, tmp_path, capsys):
    assert main(["run", "--strategies", "one-step", "--out", str(tmp_path), *argument]) == 2
    assert told in capsys.readouterr().err


# --- Numbers


def test_three_ways_to_count_tokens():
    cell = summarise([record(forwards=1, tokens=4), record(index=1, forwards=3, tokens=12, verifier=3, score=0.0)])
    assert cell.tpf == 16 / 4
    assert cell.tps_mean_ratio == pytest.approx((32 / 1 + 32 / 3) / 2)
    assert cell.tps_ratio_of_means == 32 / 2
    assert (cell.accuracy, cell.drafter_forwards, cell.verifier_forwards) == (50, 2, 1.5)


def test_where_the_verifier_decodes_alone_its_passes_count():
    assert summarise([record(forwards=0, verifier=8, tokens=8)]).tpf == 1


def test_canvases_per_pass():
    old, new = record(forwards=2), record(index=1, forwards=6, canvases=30)
    assert summarise([old]).canvases_per_pass == 1  # old records do not tell
    assert summarise([old, new]).canvases_per_pass == 32 / 8
    alone = [record(forwards=0, verifier=8), record(index=1, forwards=0, verifier=8, canvases=0)]
    assert summarise(alone).canvases_per_pass == 1  # no drafter pass


def test_interval_of_a_share():
    low, high = wilson(8, 10)
    assert (low, high) == pytest.approx((49.0, 94.3), abs=0.05)  # (.8 + .1921 ± √(.3841·.16 + .1476/4)) / 1.3841
    assert wilson(10, 10)[1] == pytest.approx(100)


def test_pbx_interpolates_thresholds_but_not_numbers_of_tokens():
    thresholds = [point("threshold:0.5", 60, 8), point("threshold:0.7", 80, 4), point("threshold:0.9", 100, 2)]
    # Half way from 80 % at 4 to 100 % at 2, and half way from 60 % at 8 to 80 % at 4.
    assert pbx(thresholds, 90) == pytest.approx(3)
    assert pbx(thresholds, 70) == pytest.approx(6)
    assert pbx(thresholds, 60) == pytest.approx(8)
    counts = [point("confidence:1", 100, 1), point("confidence:2", 80, 2), point("confidence:4", 60, 4)]
    assert pbx(counts, 90) == pytest.approx(1)
    assert pbx(counts, 70) == pytest.approx(2)
    assert pbx(counts[1:], 90) is None


def test_aup_leaves_out_what_falls_below_the_floor():
    # Best 100: the first term is 2·100; then (3 − 2)·(100 + 96·e^(−3·0.04)) / 2; 60 % is more than 5 points below.
    by_hand = 200 + (100 + 96 * math.exp(-0.12)) / 2
    assert aup([(9, 60), (3, 96), (2, 100)], best=100) == pytest.approx(by_hand)
    assert aup([(4, 50)], best=100) == 200


def test_oracle_takes_the_fastest_right_answer_of_each_sample():
    rows = [
        record("threshold:0.5", index=0, forwards=1),
        record("threshold:0.9", index=0, forwards=4),
        record("threshold:0.5", index=1, forwards=1, score=0.0),
        record("threshold:0.9", index=1, forwards=4),
        record("threshold:0.5", index=2, forwards=1, score=0.0),  # nobody is right: the fastest
        record("threshold:0.9", index=2, forwards=4, score=0.0),
    ]
    cell = oracle(rows)
    assert cell.accuracy == pytest.approx(200 / 3)
    assert cell.drafter_forwards == pytest.approx((1 + 4 + 1) / 3)
    assert cell.tpf == pytest.approx(24 / 6)


def test_task_map_by_hand():
    assert parallelisability([(1, 100), (2, 50), (4, 0)]) == pytest.approx((100 + 100) / 150)
    assert parallelisability([(1, 0)]) == 0
    assert slope([(2, 100), (4, 90), (8, 80)]) == pytest.approx(-10)
    assert [(spot.x, spot.y) for spot in spots({"copy": (4, -2.0), "sort": (1, None)})] == [
        (4, -2.0)
    ]  # not drawn at 0


# --- The report


def made_up(tmp_path, first="copy", drafter="d"):
    """Three strategies on two tasks: APD is right everywhere with 4 tokens per forward, its rival with 2."""
    rows = []
    for task in (first, "shuffle"):
        for i in range(4):
            rows.append(record("apd:R=0.5", task, i, forwards=2, verifier=2))
            rows.append(record("apd:R=0.9", task, i, forwards=1, verifier=1, score=float(task == first)))
            rows.append(record("threshold:0.9", task, i, forwards=4))
            rows.append(record("confidence:1", task, i, forwards=8))
    rows.append(record("one-step", first, 0, forwards=1))
    lines = [{"settings": SETTINGS | {"drafter": drafter}, "made_with": MADE_WITH}, *rows]
    (tmp_path / NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return reporting.build(reporting.load(tmp_path))


def test_report_of_a_made_up_run(tmp_path):
    report = made_up(tmp_path)
    assert report.left_out == ["one-step"]
    assert report.count == 4
    mean = report.equal[-1]
    assert (mean.task, mean.reference) == ("average", 100)
    assert mean.apd[0] == "apd:R=0.5" and mean.rival[0] == "threshold:0.9"
    assert mean.ratio == pytest.approx(2)
    family = next(family for family in report.families if family.name == "apd")
    assert family.best.setting.spec == report.pick(family).setting.spec == "apd:R=0.5"
    # From 100 % at 4 tokens to 50 % at 8: 90 % is a fifth of the way.
    assert family.pbx == pytest.approx({90: 4.8, 80: 5.6, 70: 6.4, 60: 7.2})
    # Per sample the fastest setting that is right: 8 on copy, 4 on shuffle.
    assert report.oracles["apd"]["average"].tpf_mean == pytest.approx(6)
    assert report.oracles["apd"]["average"].tpf == pytest.approx((8 + 8) / (1 + 2))  # pooled
    assert report.oracles["apd"]["average"].accuracy == 100


def with_checked(tmp_path, specs=("checked:1/threshold:0.9",), canvases=(5,)):
    """The made-up run, and checked threshold decoding: as right as the rival, at 8 tokens and 5 canvases per pass."""
    made_up(tmp_path)
    rows = [
        record(spec, task, i, forwards=1, verifier=1, canvases=number)
        for spec, number in zip(specs, canvases, strict=True)
        for task in ("copy", "shuffle")
        for i in range(4)
    ]
    with (tmp_path / NAME).open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return reporting.build(reporting.load(tmp_path))


def test_settings_are_paired_sample_by_sample():
    reference = [record("confidence:1", index=i) for i in range(400)]
    rows = [record("threshold:0.9", index=i, score=float(i >= 4)) for i in range(401)]
    found = paired(rows, reference)
    assert (found.lost, found.gained, found.n) == (4, 0, 400)  # the last sample has no partner
    assert found.change == -1
    # By hand: (0.5 − 4.5) / 402, give or take 1.96 · √(5 − 16 / 402) / 402.
    assert found.interval == pytest.approx((-2.081, 0.091), abs=1e-3)
    assert [Paired(0, 0, n).interval[0] >= -1 for n in (193, 194)] == [False, True]


def test_a_ratio_is_stated_only_where_the_samples_tell_that_both_sides_are_within_a_point(tmp_path):
    few = made_up(tmp_path)
    assert few.equal[0].beside["apd:R=0.9"] == Paired(0, 0, 4)
    assert not few.equal[0].is_told(few.equal[0].apd) and not few.equal[0].is_told(None)
    assert "| (4.00) |" in tables(few)["equal"]
    assert "`threshold:0.9` 100 @ 2.00; −0 +0 of 4, −32.7 to +32.7 |" in tables(few)["equal"]
    rows = [
        record(spec, "copy", i, forwards=forwards, verifier=verifier)
        for spec, forwards, verifier in (("apd:R=0.5", 2, 2), ("threshold:0.9", 4, 0), ("confidence:1", 8, 0))
        for i in range(195)
    ]
    header = {"settings": SETTINGS | {"drafter": "d"}, "made_with": MADE_WITH}
    (tmp_path / NAME).write_text("".join(json.dumps(line) + "\n" for line in (header, *rows)))
    many = reporting.build(reporting.load(tmp_path))
    assert many.equal[0].is_told(many.equal[0].apd) and "| 2.00 |" in tables(many)["equal"]


def test_checked_is_no_rival(tmp_path):
    plain, report = made_up(tmp_path), with_checked(tmp_path)
    mean = report.equal[-1]
    assert (mean.checked[0], mean.checked[1].canvases_per_pass) == ("checked:1/threshold:0.9", 5)
    assert mean.checked_ratio == pytest.approx(4)
    assert plain.equal[-1].checked is plain.equal[-1].checked_ratio is None
    assert (mean.apd, mean.rival, mean.ratio) == (plain.equal[-1].apd, plain.equal[-1].rival, plain.equal[-1].ratio)
    assert report.oracles == plain.oracles


def test_of_equally_fast_settings_the_one_with_the_fewest_canvases_is_reported(tmp_path):
    report = with_checked(tmp_path, specs=("checked:1", "checked:0.9", "checked:0.8"), canvases=(6, 2, 3))
    assert {equal.checked[0] for equal in report.equal} == {"checked:0.9"}


def test_canvases_stand_beside_the_speeds_of_checked_alone(tmp_path):
    plain, report = tables(made_up(tmp_path)), tables(with_checked(tmp_path))
    for name in ("main", "tasks", "equal", "families"):
        assert "checked" not in plain[name] and "canvases" not in plain[name]
        (*_, last) = [line for line in report[name].splitlines() if "`checked" in line]
        assert "8.00 (5.0 canvases)" in last
        assert all("`checked" in line for line in report[name].splitlines() if "canvases" in line)
    write_csv(with_checked(tmp_path), tmp_path)
    with (tmp_path / "equal.csv").open(newline="", encoding="utf-8") as file:
        *_, mean = csv.DictReader(file)
    assert (mean["checked_tpf"], mean["checked_canvases"], mean["checked_ratio"]) == ("8", "5", "4")
    assert (mean["rival_tpf"], mean["rival_canvases"]) == ("2", "1")
    with (tmp_path / "results.csv").open(newline="", encoding="utf-8") as file:
        canvases = {row["strategy"]: row["canvases_per_pass"] for row in csv.DictReader(file)}
    assert canvases.pop("checked:1/threshold:0.9") == "5" and set(canvases.values()) == {"1"}


def test_files_of_a_report(tmp_path):
    report = made_up(tmp_path)
    write_csv(report, tmp_path)
    header, first, *_ = (tmp_path / "curves.csv").read_text().splitlines()
    assert header.endswith("task,tps,accuracy") and first == "apd:R=0.5,copy,16,100"
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 4 * 3
    write_page(report, tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert all(point.setting.spec in page for point in report.points)
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is fetched


def test_the_page_says_where_apd_is_not_as_accurate_and_that_few_samples_tell_little(tmp_path):
    def page_of(report):
        write_page(report, tmp_path)
        return json.loads(
            re.search(r'type="application/json">(.*)</script>', (tmp_path / "index.html").read_text())[1]
        )

    few = made_up(tmp_path)
    page = page_of(few)
    assert page["run"].endswith(
        "One answer is 25.0 points of a task: what is within one point here may be so by chance."
    )
    assert page["facts"][0][1].startswith("tokens per forward, pooled: APD")
    without = [dataclasses.replace(equal, apd=None) for equal in few.equal]
    page = page_of(dataclasses.replace(few, count=100, equal=[without[0], few.equal[1], without[2]]))
    assert "One answer" not in page["run"]
    assert page["facts"][0] == ["none", "of the APD settings is as accurate as one token per step"]
    assert page["facts"][-1] == ["1", "of 2 tasks have no APD setting as accurate: copy"]


HOSTILE = "<!--<script></script><img src=x onerror=alert(1)>\"'&|`$\\frac$\n<!-- end -->, [x](y)"
SCRIPT = Path(reporting.__file__).with_name("page.js")


class Tags(HTMLParser):
    """The elements of a page."""

    def __init__(self, page):
        super().__init__()
        self.found = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, attrs))


@pytest.mark.parametrize("names", [{"first": HOSTILE}, {"drafter": HOSTILE}])
def test_a_name_is_text_in_the_page_whatever_it_is(names, tmp_path):
    report = made_up(tmp_path, **names)
    write_page(report, tmp_path)
    page = (tmp_path / "index.html").read_text()
    write_page(made_up(tmp_path), tmp_path)
    assert Tags(page).found == Tags((tmp_path / "index.html").read_text()).found
    (data,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', page, flags=re.DOTALL)
    assert "<" not in data  # nothing that an HTML parser would take for the beginning of anything
    shown = json.loads(data)
    assert HOSTILE in (*shown["tasks"], *re.findall(r"drafter (.*), verifier", shown["run"], flags=re.DOTALL))


def test_the_page_writes_names_as_text():
    """All markup is made by html`…`, which escapes its values, and goes through put(), which escapes the rest."""
    script = SCRIPT.read_text(encoding="utf-8")
    for sink, uses in {"innerHTML": 1, "new Markup(": 1}.items():
        assert script.count(sink) == uses
    assert "element.innerHTML = markup instanceof Markup ? markup.text : escape(markup)" in script
    assert "const written = v => v instanceof Markup ? v.text : Array.isArray(v) ? v.map(written).join" in script
    others = (
        r"outerHTML|insertAdjacentHTML|document\.write|createContextualFragment|srcdoc|setHTML|\beval\(|Function\("
    )
    assert not re.search(others, script)
    (escaped,) = re.findall(r"escape = .*?replace\(/\[(.*?)\]/g", script)
    assert set(escaped) == set("&<>\"'")


def test_a_name_is_text_in_tables_whatever_it_is(tmp_path):
    report, plain = made_up(tmp_path, first=HOSTILE, drafter=HOSTILE), made_up(tmp_path)
    cell_ends, markup = r"(?<!\\)\|", r"(?<!\\)[<>`]"
    for name, table in tables(report).items():
        same = tables(plain)[name]
        assert [len(re.findall(cell_ends, line)) for line in table.splitlines()] == [
            line.count("|") for line in same.splitlines()
        ]
        assert len(re.findall(markup, table)) == len(re.findall(markup, same))
    page = tmp_path / "page.md"
    page.write_text("<!-- table here/run -->\n<!-- end -->\nkept\n")
    for _ in range(2):
        refresh(page, report, "here")
    assert page.read_text() == f"<!-- table here/run -->\n{tables(report)['run']}\n<!-- end -->\nkept\n"
    write_csv(report, tmp_path)
    with (tmp_path / "equal.csv").open(newline="", encoding="utf-8") as file:
        assert [row["task"] for row in csv.DictReader(file)] == [HOSTILE, "shuffle", "average"]


def test_a_name_is_text_in_pictures_whatever_it_is(tmp_path, monkeypatch):
    """`$` would begin a formula, which need not be one. Nothing is drawn here, which takes seconds."""
    figure = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.append(self))
    report = made_up(tmp_path, first="$\\frac$")
    write_pictures(dataclasses.replace(report, task_map={"$\\frac$": (4, -1.0)}), tmp_path)
    texts = [text for each in drawn for text in each.findobj(lambda artist: hasattr(artist, "get_parse_math"))]
    named = [text for text in texts if "$\\frac$" in text.get_text()]
    assert len(drawn) == 3 and len(named) == 2
    assert not any(text.get_parse_math() for text in named)


@pytest.mark.parametrize("name", [3, None, "half \ud83d"])
def test_a_name_that_is_no_text_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match="does not hold the records of a run"):
        made_up(tmp_path, first=name)


def test_tables_of_a_page_are_renewed_in_place(tmp_path):
    report = made_up(tmp_path)
    page = tmp_path / "page.md"
    other = "<!-- table other/equal -->\nkept\n<!-- end -->\n"
    page.write_text(f"before\n<!-- table here/equal -->\nold\n<!-- end -->\n{other}")
    refresh(page, report, "here")
    table = tables(report)["equal"]
    assert page.read_text() == f"before\n<!-- table here/equal -->\n{table}\n<!-- end -->\n{other}"
    page.write_text("<!-- table here/nothing -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="'nothing'"):
        refresh(page, report, "here")


COMMITTED = ROOT / "benchmarks" / "results" / "parallelbench-embedded"


@pytest.mark.parametrize("run", ["parallelbench-embedded", "dependent", "shuffle"])
def test_tables_of_the_docs_are_those_of_the_committed_records(run, tmp_path):
    directory = COMMITTED if run == COMMITTED.name else COMMITTED / run
    report = reporting.build(reporting.load(directory))
    for page in (ROOT / "docs" / "parallelbench.md", COMMITTED / "README.md"):
        copy = tmp_path / page.name
        copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
        refresh(copy, report, run)
        assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")


@pytest.mark.parametrize(("column", "spec"), [("APD, R = 0.5", "apd:R=0.5"), ("threshold 0.9", "threshold:0.9")])
def test_readme_and_the_report_mean_the_same_by_tokens_per_forward_over_all_tasks(column, spec) -> None:
    """The README has 100 instances per task, the report 48; the mean over tasks is off by a third and more."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    cells = lambda line: [cell.strip(" *") for cell in line.strip("|").split("|")]  # noqa: E731
    header = next(line for line in lines if line.startswith("| task |"))
    readme = float(
        dict(zip(cells(header), cells(next(x for x in lines if x.startswith("| **all**"))), strict=True))[
            column
        ].split("@")[1]
    )
    report = reporting.build(reporting.load(COMMITTED))
    mean = next(point.mean for point in report.points if point.setting.spec == spec)
    assert mean.tpf == pytest.approx(readme, rel=0.05)
    assert mean.tpf_mean > 1.2 * readme


def test_a_report_without_records_is_refused(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no records" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["report", "knobs"])
def test_without_matplotlib_all_but_the_pictures_is_written(command, tmp_path, monkeypatch, capsys):
    """One line says which package they need."""
    made_up(tmp_path)
    found = [knobs.Point(0.5, tau, m, False, 1.0, 2.0) for tau in knobs.THRESHOLDS for m in knobs.WINDOWS]
    monkeypatch.setattr(knobs, "points", lambda rows: iter(found))
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main([command, str(tmp_path)]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("no picture") and line.endswith("Pictures need matplotlib: pip install matplotlib")
    wanted = {"report": ("index.html", "results.csv", "task_map.csv"), "knobs": ("shuffle-knobs.csv",)}
    assert all((tmp_path / name).stat().st_size for name in wanted[command]) and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [(["--count", "0"], "`count` must be at least 1, got 0"), (["--docs", "none.md"], "none.md")],
    ids=["count", "page"],
)
def test_wrong_arguments_of_a_report_are_one_line(arguments, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made_up(tmp_path)
    assert main(["report", str(tmp_path), *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and told in line
