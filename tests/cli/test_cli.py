"""The command line: what is printed, what is written, how it continues, and how it complains."""

import io
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from paths import ROOT
from thinned import thinned

from apd import EXAMPLE_PROMPTS, APDSampler, Blocks, Confidence, LeftToRight, Threshold
from apd.cli import main
from apd.cli.demo import Comparison, Run, compare, play, summary, table
from apd.cli.results import BadLine, Part, part_path, read_results
from apd.config import KNOBS
from apd.decoding.strategy import Strategy
from apd.included import DRAFTER_DIR, VERIFIER_DIR
from apd.included.tasks import EXAMPLES
from apd.show.rows import number
from apd.show.terminal import console
from apd.show.text import legend, mark, pieces

ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def sampler() -> APDSampler:
    return APDSampler.from_included()


@pytest.fixture(scope="module")
def comparisons(sampler: APDSampler) -> list[Comparison]:
    return list(compare(sampler))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in EXAMPLE_PROMPTS[:5]))
    return path


def generate(prompts: Path, output: Path, *more: str) -> int:
    return main(["generate", "--input", str(prompts), "--output", str(output), "--max-new-tokens", "12", *more])


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# ---------------------------------------------------------------- display


def decode(ids: list[int]) -> str:
    """Bytes as tokens, as far as they are whole characters; id 0 is special."""
    return bytes(i for i in ids if i).decode(errors="replace")


def test_pieces_join_to_the_whole_text() -> None:
    tokens = [*b"one two three", 0]
    parts = pieces(tokens, [0] * 4 + [1] * 7 + [2] * 3, decode)
    assert parts == [(0, "one "), (1, "two thr"), (2, "ee")]


def test_a_character_over_two_steps_belongs_to_the_step_that_completes_it() -> None:
    assert pieces([*"aé".encode()], [0, 0, 1], decode) == [(0, "a"), (1, "é")]


def test_steps_of_any_order_are_cut_where_they_change() -> None:
    assert pieces([*b"abcd"], [1, 0, 0, 1], decode) == [(1, "a"), (0, "bc"), (1, "d")]
    assert pieces([], [], decode) == []


def test_plain_text_has_bars_and_no_escape_codes() -> None:
    parts = [(0, "ab"), (1, "c")]
    assert mark(parts, colour=False, rejected="xyz").plain == "ab|c"
    for colour, codes in (("never", 0), ("always", 3)):
        out = io.StringIO()
        console(out, colour).print(mark(parts, colour=colour == "always", rejected="xyz"), legend(colour=False))
        assert out.getvalue().count("\x1b[0m") == codes and ("\x1b" in out.getvalue()) == bool(codes)
    assert ANSI.sub("", out.getvalue()).startswith("abcxyz")


def test_colours_need_a_terminal_that_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def wants_colour(stream: io.StringIO, choice: str = "auto") -> bool:
        return console(stream, choice).color_system is not None

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert wants_colour(Terminal())
    assert not wants_colour(io.StringIO())
    assert wants_colour(io.StringIO(), "always")
    assert not wants_colour(Terminal(), "never")
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour(Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())
    assert wants_colour(Terminal(), "always")


@pytest.mark.parametrize("colour", ["always", "never"])
def test_lines_are_whole_in_a_file_and_wrapped_at_words_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, colour: str
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    terminal, file = Terminal(), io.StringIO()
    for stream in (terminal, file):
        console(stream, colour).print(" ".join(["word"] * 30))
    assert len(file.getvalue().splitlines()) == 1
    wrapped = terminal.getvalue().splitlines()
    assert len(wrapped) > 1 and max(map(len, wrapped)) <= 40
    assert {word for line in wrapped for word in line.split()} == {"word"}


# ---------------------------------------------------------------- demo


def test_demo_commits_three_tokens_per_forward_and_loses_at_most_one_answer(comparisons: list[Comparison]) -> None:
    tokens = sum(c.apd.tokens for c in comparisons)
    forwards = sum(c.apd.drafter_forwards for c in comparisons)
    lost = sum(c.single.right for c in comparisons) - sum(c.apd.right for c in comparisons)
    assert len(comparisons) == len(EXAMPLES)
    assert tokens >= 3 * forwards
    assert lost <= 1


def test_one_token_per_step_takes_one_forward_per_token(comparisons: list[Comparison]) -> None:
    for comparison in comparisons:
        assert comparison.single.drafter_forwards == comparison.single.tokens
        assert comparison.single.verifier_forwards == 0
        assert comparison.apd.drafter_forwards <= comparison.apd.tokens


def test_frames_grow_to_the_answer(comparisons: list[Comparison]) -> None:
    for run in (run for c in comparisons for run in (c.single, c.apd)):
        assert len(run.frames) == run.drafter_forwards
        texts = ["".join(text for _, text in parts) for parts, _ in run.frames]
        assert texts[-1] == run.text
        assert all(after.startswith(before) for before, after in pairwise(texts))


def test_demo_table_adds_up_and_fits_80_columns(comparisons: list[Comparison]) -> None:
    out = io.StringIO()
    console(out, "never").print(table(comparisons))
    lines = out.getvalue().splitlines()
    tasks = [c.instance.task for c in comparisons]
    assert max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[-len(tasks) - 1 :]] == [*tasks, "all"]
    *rows, total = [line.split()[1:] for line in lines[-len(tasks) - 1 :]]
    for column in (0, 1, 2, 4):
        assert int(total[column]) == sum(int(row[column]) for row in rows)
    assert [int(n) for n in total[-2:]] == [sum(row[i] == "yes" for row in rows) for i in (-2, -1)]
    assert f"{int(total[1]) - int(total[2])} of {total[1]} drafter forwards saved" in summary(comparisons)


def test_animation_ends_in_the_same_text_as_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apd.cli.demo.FRAME_SECONDS", 0)
    frames = [([(0, "a")], "xy xy"), ([(0, "a"), (1, "bc")], "")]
    run = Run("abc", frames, tokens=3, drafter_forwards=2, verifier_forwards=2, seconds=0.1, right=True)
    comparison = Comparison(EXAMPLES[0], run, run)
    for columns in ("200", "40"):
        monkeypatch.setenv("COLUMNS", columns)
        still, moving = Terminal(), Terminal()
        play(comparison, console(still, "always"), animate=False)
        play(comparison, console(moving, "always"), animate=True)
        assert "xy" in moving.getvalue() and "xy" not in still.getvalue()  # the rejected draft, on its way
        answers = ANSI.sub("", still.getvalue()).splitlines()[-2:]
        assert ANSI.sub("", moving.getvalue()).splitlines()[-2:] == answers
        assert "abc  (right)" in answers[-1]
        assert all(len(line) <= int(columns) for line in ANSI.sub("", moving.getvalue()).splitlines())


def test_demo_into_a_pipe_is_plain(capsys: pytest.CaptureFixture) -> None:
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert all(prompt in out for prompt in EXAMPLE_PROMPTS)
    assert "forwards saved" in out.splitlines()[-2] and out.splitlines()[-1].startswith("Seconds")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_demo_in_a_terminal_has_colours() -> None:
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "400", "PYTHONPATH": str(ROOT)}
    environment.pop("NO_COLOR", None)
    code = "import apd.cli.demo, apd.cli; apd.cli.demo.FRAME_SECONDS = 0; apd.cli.app.main(['demo'])"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 65536):
            shown += chunk
    except OSError:  # Linux: the other end is closed
        pass
    assert process.wait() == 0
    assert b"\x1b[36m" in shown and b"\x1b[1A" in shown


# ---------------------------------------------------------------- generate: one prompt


def test_the_answer_goes_to_stdout_and_the_counts_to_stderr(
    capsys: pytest.CaptureFixture, sampler: APDSampler
) -> None:
    assert main(["generate", "--prompt", EXAMPLE_PROMPTS[0], "--max-new-tokens", "32"]) == 0
    out, err = capsys.readouterr()
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[:1], return_tensors="pt")
    answer = sampler.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
    assert out.strip() == sampler.tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert re.search(r"\d+ tokens?, \d+ drafter forwards? \(.* tokens each\), \d+ verifier forwards?", err)
    assert main(["generate", "--prompt", EXAMPLE_PROMPTS[0], "--max-new-tokens", "32", "--show-steps"]) == 0
    assert capsys.readouterr().out.replace("|", "") == out
    assert (
        main(["generate", "--prompt", EXAMPLE_PROMPTS[0], "--show-steps", "--color", "always"]) == 0
    )  # 32 is the default
    coloured = capsys.readouterr().out
    assert ANSI.sub("", coloured) == out and coloured.startswith("\x1b[36m[")


def test_a_directory_in_dream_format_is_read(capsys: pytest.CaptureFixture) -> None:
    ask = ["generate", "--prompt", EXAMPLE_PROMPTS[1], "--max-new-tokens", "32"]
    assert main([*ask, "--drafter", str(DRAFTER_DIR), "--verifier", str(VERIFIER_DIR)]) == 0
    given = capsys.readouterr().out
    assert main(ask) == 0
    assert capsys.readouterr().out == given
    assert main([*ask, "--drafter", str(DRAFTER_DIR), "-R", "1"]) == 0  # the drafter alone


def test_knobs_reach_the_sampler(capsys: pytest.CaptureFixture, sampler: APDSampler) -> None:
    ask = ["generate", "--prompt", EXAMPLE_PROMPTS[3], "--max-new-tokens", "8"]
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[3:4], return_tensors="pt")
    for flags, knobs in {
        ("-R", "1"): {"mixture_weight": 1},
        ("-M", "2", "--correction"): {"window_size": 2, "correction": True},
        ("--acceptance-threshold", "0.9", "-W", "4"): {"acceptance_threshold": 0.9, "kv_window": 4},
        ("-M", "auto", "-R", "0.9"): {"window_size": "auto", "mixture_weight": 0.9},
        ("-W", "1", "--kv-refresh", "1", "-M", "4"): {"kv_window": 1, "kv_refresh": 1, "window_size": 4},
        ("-M", "none", "--acceptance", "rejection", "--noise", "step", "--no-correction"): {"acceptance": "rejection"},
        ("-R", "0", "--correction", "--first", "judge"): {"mixture_weight": 0, "correction": True, "first": "judge"},
    }.items():
        output = sampler.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True, **knobs)
        assert main([*ask, *flags]) == 0
        counts = f"{number(int(output.new_tokens), 'token')}, {int(output.drafter_forwards)} drafter forward"
        assert counts in capsys.readouterr().err


# ---------------------------------------------------------------- generate: a file


def test_each_prompt_gets_one_line(prompts: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert generate(prompts, output, "--batch-size", "2") == 0
    results = rows(output)
    assert [row["index"] for row in results] == [0, 1, 2, 3, 4]
    assert [row["prompt"] for row in results] == EXAMPLE_PROMPTS[:5]
    for row in results:
        assert row["tokens_per_forward"] == pytest.approx(row["new_tokens"] / row["drafter_forwards"], abs=1e-3)
        assert row["finish"] == "length" or row["new_tokens"] <= 12
        assert row["finish"] == "stop" or row["new_tokens"] == 12


@pytest.mark.parametrize("kept", thinned([0, 1, 50, 0.5, 0.35, 0.99, 1.0]))
def test_a_run_continues_after_a_kill_at_any_byte(prompts: Path, tmp_path: Path, kept: float) -> None:
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    sampling = ("--do-sample", "--temperature", "2", "--seed", "3")
    assert generate(prompts, whole, *sampling) == 0
    data = whole.read_bytes()
    torn.write_bytes(data[: kept if isinstance(kept, int) else int(kept * len(data))])
    assert generate(prompts, torn, "--batch-size", "1", *sampling) == 0
    assert torn.read_bytes() == data


def test_an_interrupted_run_says_how_to_continue(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out.jsonl"
    write = Part.write

    def interrupted(part: Part, row: dict) -> None:
        if len(part.path.read_bytes().splitlines()) == 2:
            raise KeyboardInterrupt
        write(part, row)

    with monkeypatch.context() as patch:
        patch.setattr(Part, "write", interrupted)
        assert generate(prompts, output, "--batch-size", "2") == 130
    said = f"interrupted: 2 of 5 answered in {part_path(output, 0)}; the same command continues"
    assert said in capsys.readouterr().err
    assert not output.exists()
    assert len(rows(part_path(output, 0))) == 2
    monkeypatch.chdir(tmp_path)
    assert generate(prompts, output) == 0
    err = capsys.readouterr().err
    assert "prompts.jsonl: 5 prompts, 2 answered before and taken over, 3 to do\n" in err
    assert re.search(r"^5 answers, 3 of them new, [\d.]+ tokens per forward, \d+ s → out.jsonl$", err, re.MULTILINE)
    assert [row["index"] for row in rows(output)] == [0, 1, 2, 3, 4]
    assert list(tmp_path.glob("out.jsonl.*")) == []
    before = output.read_bytes()
    capsys.readouterr()
    assert generate(prompts, output) == 0
    assert "nothing left to do" in capsys.readouterr().err
    assert output.read_bytes() == before


def test_texts_are_those_of_generate_many(prompts: Path, tmp_path: Path, sampler: APDSampler) -> None:
    output = tmp_path / "out.jsonl"
    assert generate(prompts, output, "--do-sample", "--seed", "3", "--stop-string", ",", "--stop-string", "x") == 0
    wanted = sampler.generate_many(
        EXAMPLE_PROMPTS[:5], max_new_tokens=12, do_sample=True, seed=3, stop_strings=[",", "x"]
    )
    assert [row["text"] for row in rows(output)] == [answer.text for answer in wanted]
    assert max(row["text"].count(",") for row in rows(output)) == 1


@pytest.mark.parametrize(
    ("flag", "strategy"),
    [
        ("left-to-right", LeftToRight(1)),
        ("left-to-right:3", LeftToRight(3)),
        ("confidence:2", Confidence(2)),
        ("blocks:4/threshold", Blocks(Threshold(), 4)),
    ],
)
def test_another_strategy_can_be_compared(
    tmp_path: Path, prompts: Path, sampler: APDSampler, flag: str, strategy: Strategy
) -> None:
    output = tmp_path / "out.jsonl"
    assert generate(prompts, output, "--strategy", flag) == 0
    wanted = list(sampler.generate_many(EXAMPLE_PROMPTS[:5], max_new_tokens=12, strategy=strategy))
    assert [row["drafter_forwards"] for row in rows(output)] == [answer.drafter_forwards for answer in wanted]
    assert [row["text"] for row in rows(output)] == [answer.text for answer in wanted]
    assert generate(prompts, output) == 1  # APD is another run


def test_results_of_two_runs_are_never_mixed(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    output = tmp_path / "out.jsonl"
    assert generate(prompts, output) == 0
    before = output.read_bytes()
    assert generate(prompts, output, "-R", "0.9") == 1
    assert "Choose another --output" in capsys.readouterr().err
    prompts.write_text(prompts.read_text().replace("list", "lists"))
    assert generate(prompts, output) == 1
    assert output.read_bytes() == before


@pytest.mark.parametrize(
    "bad",
    ["not json", "[1]", '{"text": "a"}', '{"prompt": ""}', '{"prompt": 3}', r'{"prompt": "\ud800"}', "[" * 100_000],
)
def test_a_bad_line_is_named_and_can_be_skipped(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture, bad: str
) -> None:
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join([lines[0], bad, "", lines[1]]))
    output = tmp_path / "out.jsonl"
    assert generate(prompts, output) == 1
    assert "prompts.jsonl, line 2: expected" in capsys.readouterr().err
    assert not output.exists()
    assert generate(prompts, output, "--on-error", "skip") == 0
    err = capsys.readouterr().err
    assert "prompts.jsonl, line 2: expected" in err and "2 answers, 1 skipped, " in err
    assert (
        generate(prompts, Path("-"), "--on-error", "skip") == 0 and "2 answers, 1 skipped" in capsys.readouterr().err
    )
    assert [row["index"] for row in rows(output)] == [0, 3]  # lines keep their numbers


def test_a_prompt_that_cannot_be_decoded_is_named_and_can_be_skipped(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    lines = prompts.read_text().splitlines()
    prompts.write_text("\n".join([lines[0], json.dumps({"prompt": "Ada " * 600}), lines[1]]))
    output = tmp_path / "out.jsonl"
    assert generate(prompts, output) == 1
    assert "line 2: Prompt and new tokens must fit" in capsys.readouterr().err
    assert generate(prompts, output, "--on-error", "skip") == 0
    assert [row["index"] for row in rows(output)] == [0, 2]
    assert generate(prompts, tmp_path / "chat.jsonl", "--chat", "--on-error", "skip") == 1
    assert "A chat needs a chat template" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b'{"text": "Hello"}\n', '{"prompt": "Hello"}\n'.encode("utf-16"), b'{"prompt": ""}']
)
@pytest.mark.parametrize("to_stdout", [False, True])
def test_a_run_that_answers_nothing_is_no_success(
    tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes, to_stdout: bool
) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(content)
    assert generate(source, Path("-") if to_stdout else output, "--on-error", "skip") == 1
    out, err = capsys.readouterr()
    assert "in.jsonl, line 1: expected" in err and "every prompt was skipped" in err.splitlines()[-1]
    assert out == "" and list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_no_prompts_make_an_empty_output(tmp_path: Path, capsys: pytest.CaptureFixture, content: str) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(content)
    for _ in range(2):
        assert generate(source, output) == 0
        assert output.read_bytes() == b""
        assert "in.jsonl holds no prompts" in capsys.readouterr().err
    assert generate(source, Path("-")) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "text", ["precious notes", "{}\n", '{"index": 0}\n{"index": 0}\n', '{"index": 0, "a": ' + "[" * 100_000 + "\n"]
)
def test_a_file_that_is_no_result_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(BadLine, match=r"notes\.txt, line \d"):
        list(read_results(path))
    assert path.read_text() == text


# ---------------------------------------------------------------- generate: what an output may be


def test_standard_input_and_output(
    prompts: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out.jsonl"
    assert generate(prompts, output) == 0
    capsysbinary.readouterr()
    for given in (str(prompts), "-"):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(prompts.open("rb")))
        assert (
            main(["generate", "--input", given, "--output", "-", "--max-new-tokens", "12", "--batch-size", "2"]) == 0
        )
        assert capsysbinary.readouterr().out == output.read_bytes()
    before = output.stat().st_mtime_ns
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(prompts.open("rb")))
    assert generate(Path("-"), output) == 0  # continues what a file has begun
    assert b"nothing left to do" in capsysbinary.readouterr().err
    assert output.stat().st_mtime_ns == before
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"not json\n")))
    assert generate(Path("-"), output) == 1
    assert b"standard input, line 1: expected" in capsysbinary.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="links and modes of POSIX")
def test_a_link_is_written_through_and_mode_and_owner_stay(prompts: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    real = tmp_path / "real" / "out.jsonl"
    links = [tmp_path / "link.jsonl", tmp_path / "chain.jsonl"]
    links[0].symlink_to(real)  # which is not there yet
    links[1].symlink_to("link.jsonl")
    plain = tmp_path / "plain.jsonl"
    assert generate(prompts, plain) == 0
    for kept in (None, 0):
        if kept is not None:
            real.write_bytes(real.read_bytes()[:kept])
            real.chmod(0o640)
            if os.geteuid() == 0:
                os.chown(real, 1234, 4321)
        before = real.stat() if real.exists() else None
        assert generate(prompts, links[1]) == 0
        assert all(link.is_symlink() for link in links)
        assert real.read_bytes() == plain.read_bytes()
        assert [path.name for path in (tmp_path / "real").iterdir()] == ["out.jsonl"]
        if before is not None:
            after = real.stat()
            assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _null_device(path: Path) -> None:
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("device nodes are the superuser's to make")


def _link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


@pytest.mark.skipif(sys.platform == "win32", reason="pipes and devices of POSIX")
@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (_pipe, "The output must be a regular file"),
        (_null_device, "The output must be a regular file"),
        (_link_to_pipe, "The output must be a regular file"),
        (Path.mkdir, "The output must be a file, got the folder"),
        (lambda path: path.symlink_to(path), "a link that leads to itself"),
        (lambda path: path.symlink_to(path.parent / "absent" / "out.jsonl"), "must be in a folder that exists"),
    ],
    ids=["pipe", "device", "link to a pipe", "folder", "link to itself", "link into a missing folder"],
)
def test_an_output_that_is_no_file_is_refused_and_left_as_it_is(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture, make: Callable[[Path], None], complaint: str
) -> None:
    output = tmp_path / "out.jsonl"
    make(output)
    before = {path.name: path.lstat() for path in tmp_path.iterdir()}
    assert generate(prompts, output) == 1
    assert complaint in capsys.readouterr().err
    after = {path.name: path.lstat() for path in tmp_path.iterdir()}
    assert {name: (s.st_mode, s.st_ino, s.st_rdev) for name, s in after.items()} == {
        name: (s.st_mode, s.st_ino, s.st_rdev) for name, s in before.items()
    }


def test_a_missing_folder_and_the_current_one_are_named(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert generate(prompts, tmp_path / "absent" / "deeper" / "out.jsonl") == 1
    assert f"there is no folder {(tmp_path / 'absent' / 'deeper').resolve()}" in capsys.readouterr().err
    assert generate(prompts, Path(".")) == 1
    assert "got the folder ." in capsys.readouterr().err


# ---------------------------------------------------------------- complaints


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["-R", "1.5"], "`mixture_weight` must be in [0, 1], got 1.5"),
        (["-M", "0"], "`window_size` must be at least 1, got 0"),
        (["--acceptance", "rejection", "--correction"], "`correction` must be False"),
        (["--first", "judge"], "`correction` must be True with first='judge'"),
        (["--temperature", "0.5"], "--temperature without --do-sample"),
        (["--verifier", "somewhere"], "--verifier without --drafter"),
        (["--block-size", "8"], "--block-size without --drafter"),
        (["--do-sample", "--top-p", "1.5"], "`top_p` must be in (0, 1], got 1.5"),
        (["--do-sample", "--temperature", "-1"], "`temperature` must be at least 0 and finite, got -1"),
        (["--drafter", "somewhere"], "--drafter needs --verifier, or -R 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--output", "out.jsonl"], "--input and --output go together"),
        (["--num-return-sequences", "2"], "--num-return-sequences 2 needs --do-sample"),
        (["--spec", "dream"], "--spec without --drafter"),
        (["--quantization", "8bit"], "--quantization without --drafter"),
        (["--stop-string", ""], "--stop-string must not be empty"),
        (["--stop-string", "caf\udce9"], "--stop-string must be text that UTF-8 can write"),
        (["--prompt", "caf\udce9"], "--prompt must be text that UTF-8 can write, got '\\udce9' at character 4"),
        (["--strategy", "confidence:2", "-R", "1", "--correction"], "`correction` has no effect beside `strategy`"),
        (
            ["--strategy", "confidence", "-M", "auto"],
            "`window_size` must be a number or None with Confidence(tokens_per_step=1), got 'auto'",
        ),
        (["--strategy", "confidence", "-W", "4"], "`kv_window` must be None with Confidence(tokens_per_step=1)"),
        (["--strategy", "apd:R=0.3", "-R", "0.5"], "`mixture_weight` must be given once, got 0.5 and 'apd:R=0.3'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture, arguments: list[str], complaint: str
) -> None:
    assert main(["generate", "--prompt", "a", *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("apd: error: ") and complaint in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generate", "--prompt", "a", "-M", "few"],
        ["generate", "--prompt", "a", "--strategy", "confidence:0"],
        ["generate", "--prompt", "a", "--strategy", "rand"],
        ["demo", "--fast"],
    ],
)
def test_what_cannot_be_parsed_is_exit_code_2(capsys: pytest.CaptureFixture, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert re.search(r"^apd( demo| generate)?: error: ", capsys.readouterr().err, re.MULTILINE)


def test_what_fails_on_the_way_is_one_line_and_exit_code_1(
    tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture
) -> None:
    assert generate(tmp_path / "absent.jsonl", tmp_path / "out.jsonl") == 1
    assert generate(prompts, tmp_path / "absent" / "out.jsonl") == 1
    assert main(["generate", "--prompt", "a", "--drafter", str(tmp_path), "-R", "1"]) == 1
    assert main(["generate", "--prompt", "a", "--chat"]) == 1  # the included pair has no chat template
    lines = capsys.readouterr().err.splitlines()
    assert [line.startswith("apd: error: ") for line in lines] == [True] * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", "--prompt", "a", "--drafter", str(DRAFTER_DIR), "-R", "1", "--device-map", "cuda"]) == 2
    assert "--device-map must be a device of this machine, got cuda" in capsys.readouterr().err


def test_input_and_output_must_differ(prompts: Path, capsys: pytest.CaptureFixture) -> None:
    before = prompts.read_text()
    assert generate(prompts, prompts) == 2
    assert prompts.read_text() == before


@pytest.mark.parametrize("wanted", ["0", "many"])
def test_a_wrong_number_of_threads_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, wanted: str
) -> None:
    monkeypatch.setenv("APD_NUM_THREADS", wanted)
    assert main(["generate", "--prompt", "a"]) == 2
    assert "APD_NUM_THREADS must be" in capsys.readouterr().err


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("command", ["", "demo", "generate", "infill", "check", "chat", "serve", "estimate"])
def test_help_fits_a_terminal_and_names_every_knob(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, command: str, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= columns
    if command not in ("", "check"):
        assert all(f"--{name.replace('_', '-')}" in out for name in KNOBS)


@pytest.mark.slow
def test_a_reader_that_stops_early_gets_no_traceback() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "apd", "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read().decode()
    process.wait()
    assert "Traceback" not in err
