"""`apd infill`: how holes are written, what comes back, and that a file's lines do not depend on their batch."""

import json
from pathlib import Path

import pytest

from apd import APDSampler, mix_seed
from apd.cli import main
from apd.cli.infill import checked, parts_of

LEFT, RIGHT = 'Reverse this list: ["Mia", "Leo", "Zoe"]. ["', '"]'
LINES = [
    {"text": f"{LEFT}<mask:5>{RIGHT}"},
    {"parts": ['Copy this list: ["Mia", "Leo"]. ["', {"range": [1, 3]}, '"]']},
    {"parts": ['Sort the names from A to Z: ["Mia", "Leo"]. ["', 1, '", "', 1, '"]']},
    {"parts": ['Copy this list: ["Zoe", "Leo"]. ["', 3, '"]']},
]


@pytest.fixture(scope="module")
def sampler() -> APDSampler:
    return APDSampler.from_included()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


def infill(source: Path, output: Path | str, *more: str) -> int:
    return main(["infill", "--input", str(source), "--output", str(output), *more])


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_holes_are_parts() -> None:
    assert parts_of("a <mask:3> b<mask:4-12><mask:1>") == ["a ", 3, " b", {"range": [4, 12]}, 1]
    assert checked(["a", {"range": [2, 4]}, 3]) == ["a", range(2, 5), 3]


def test_the_text_goes_to_stdout_and_the_counts_to_stderr(capsys: pytest.CaptureFixture, sampler: APDSampler) -> None:
    assert main(["infill", "--text", f"{LEFT}<mask:5>{RIGHT}"]) == 0
    out, err = capsys.readouterr()
    found = sampler.infill([LEFT, 5, RIGHT], max_new_tokens=0)
    assert out == found.text + "\n" and out.startswith(LEFT)
    assert err.startswith(f"5 tokens in 1 hole, {found.drafter_forwards} drafter forward")
    assert main(["infill", "--text", f"{LEFT}<mask:5>{RIGHT}", "--strategy", "left-to-right:1"]) == 0
    assert "5 drafter forwards (1.0 tokens each), 0 verifier forwards" in capsys.readouterr().err


@pytest.mark.parametrize("sampling", [(), ("--do-sample", "--temperature", "3", "--seed", "4", "-R", "0.2")])
def test_each_line_is_its_text_filled_alone(
    source: Path, tmp_path: Path, sampler: APDSampler, sampling: tuple
) -> None:
    output = tmp_path / "out.jsonl"
    assert infill(source, output, *sampling) == 0
    options = {"do_sample": True, "temperature": 3.0, "mixture_weight": 0.2} if sampling else {}
    found = rows(output)
    assert [row["index"] for row in found] == [0, 1, 2, 3]
    for i, row in enumerate(found):
        seed = mix_seed(4 if sampling else 0, i)
        parts = checked(row["given"])
        alone = sampler.infill(parts, seed=seed if i == 1 else [seed], **options)
        assert (row["text"], row["parts"], row["score"]) == (
            alone.text,
            alone.parts,
            pytest.approx(alone.score, abs=1e-4),
        )
        assert [hole["ids"] for hole in row["holes"]] == [hole.ids for hole in alone.holes]
        assert row["new_tokens"] == sum(len(hole["ids"]) for hole in row["holes"])
    assert found[0]["given"] == [LEFT, 5, RIGHT]
    small = tmp_path / "small.jsonl"
    assert infill(source, small, "--batch-size", "1", *sampling) == 0
    assert [row["text"] for row in rows(small)] == [row["text"] for row in found]


def test_a_run_is_continued_and_goes_to_stdout_alike(
    source: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture
) -> None:
    output = tmp_path / "out.jsonl"
    assert infill(source, output, "--batch-size", "1") == 0
    whole = output.read_bytes()
    output.write_bytes(b"".join(whole.splitlines(keepends=True)[:2]))
    capsysbinary.readouterr()
    assert infill(source, output, "--batch-size", "1") == 0
    assert (
        b"2 answered before and taken over, 2 to do" in capsysbinary.readouterr().err and output.read_bytes() == whole
    )
    assert infill(source, "-", "--batch-size", "1") == 0
    assert capsysbinary.readouterr().out == whole
    assert infill(source, output, "--max-new-tokens", "2") == 1
    assert b"results of another run" in capsysbinary.readouterr().err


def test_what_is_appended_counts(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    assert infill(source, output, "--max-new-tokens", "2") == 0
    for row in rows(output):
        assert 1 <= row["new_tokens"] - sum(len(hole["ids"]) for hole in row["holes"]) <= 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": "a"}', "expected"),
        ('{"text": "a <mask:1>", "parts": ["a", 1]}', "expected"),
        ('{"text": 3}', "expected"),
        ('["a", 1]', "expected"),
        ("no JSON", "expected"),
        ('{"text": "a b"}', "A text must have a hole, such as <mask:8>"),
        ('{"text": "a <mask:x>"}', "A hole must be written <mask:8> or <mask:4-12>, got '<mask:x>'"),
        ('{"text": "a <mask:5-3>"}', "with 1 ≤ least ≤ most, got"),
        ('{"parts": ["a", {"range": [0, 3]}]}', "with 1 ≤ least ≤ most, got"),
        ('{"parts": ["a", {"mask": 3}]}', "with 1 ≤ least ≤ most, got"),
        ('{"parts": ["a", 0]}', "A hole must have at least 1 mask, got 0"),
        ('{"parts": ["a", {"range": [1, 99]}]}', "may have 64 combinations of lengths, got 99"),
        ('{"parts": [3]}', "`parts` must have a string"),
        ('{"parts": [["a", 3]]}', "A part must be a string"),
        ('{"parts": ["a", 600]}', "must fit the drafter's 512 positions"),
        ('{"parts": ["a <mask> b", 1]}', "must not hold the tokenizer's mask token"),
    ],
)
def test_a_bad_line_is_named_and_can_be_skipped(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture, line: str, told: str
) -> None:
    good = json.dumps(LINES[2])
    source.write_text(f"{good}\n{line}\n{good}\n")
    output = tmp_path / "out.jsonl"
    assert infill(source, output) == 1
    err = capsys.readouterr().err
    assert "texts.jsonl, line 2: " in err and told in err
    assert infill(source, output, "--on-error", "skip") == 0
    assert [row["index"] for row in rows(output)] == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--text", "a"], "--text: A text must have a hole"),
        (["--text", "<mask:3>"], "--text: `parts` must have a string"),
        (["--text", "caf\udce9 <mask:3>"], "--text: A part must be text that UTF-8 can write"),
        (["--text", "a <mask:3>", "--max-new-tokens", "-1"], "--max-new-tokens must be at least 0, got -1"),
        (["--text", "a <mask:3>", "--output", "o.jsonl"], "--input and --output go together"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture, arguments: list[str], told: str
) -> None:
    assert main(["infill", *arguments]) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1


@pytest.mark.parametrize("hole", ["<mask:3>", "<mask:1-2>", "<mask>"])
def test_generate_says_where_holes_go(tmp_path: Path, capsys: pytest.CaptureFixture, hole: str) -> None:
    told = f"A prompt must have no hole, got '{hole}'. Use `apd infill`."
    assert main(["generate", "--prompt", f"a {hole} b"]) == 1
    assert told in capsys.readouterr().err
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (f"a {hole}", "Copy this list")))
    arguments = ["generate", "--input", str(source), "--output", str(output), "--max-new-tokens", "2"]
    assert main([*arguments, "--on-error", "skip"]) == 0
    assert f"line 1: {told}" in capsys.readouterr().err and [row["index"] for row in rows(output)] == [1]


def test_help_fits_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["infill", "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
