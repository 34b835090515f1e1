"""Everything in `examples/` that runs on the included pair does run, and shows what its text says.

Notebooks need jupyter and matplotlib (the extra `notebook`) and are skipped where these are missing.
"""

import json
import os
import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from paths import ROOT
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from apd import APDSampler, load_drafter, load_verifier
from apd.included import DRAFTER_DIR, VERIFIER_DIR
from apd.included.tasks import instances
from apd.models.loading import load_tokenizer
from benchmarks.parallelbench.metrics import wilson

EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path for path in EXAMPLES.glob("*.py") if path.name not in ("train_pair.py", "antibody.py"))
ANTIBODY = EXAMPLES / "4_antibody.ipynb"  # needs a package of 100 MB, so what it prints is stored with it
NOTEBOOKS = sorted(path for path in EXAMPLES.glob("*.ipynb") if path != ANTIBODY)
MOST_BYTES = 200_000  # of a notebook with its outputs
SECONDS_PER_CELL = 180  # on a machine that does other things as well; alone, a whole notebook takes less than 60


def run(name: str, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    # A script finds what lies beside it.
    with patch("sys.argv", [f"{name}.py", *arguments]), patch("sys.path", [str(EXAMPLES), *sys.path]):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_batch(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("batch", capsys)
    assert lines[-1] == "The last row, decoded alone with its seed, is the same."
    saved = re.fullmatch(r"(\d+) tokens in (\d+) drafter forwards", lines[-2])
    assert saved and int(saved[1]) > int(saved[2])


def test_streaming(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("streaming", capsys)
    assert lines[1].startswith("Put the names in a new random order: ")
    assert sum(", done: " in line for line in lines) == 3
    pieces: dict[str, str] = {}
    for row, text in re.findall(r"^step \d+, row (\d): .* tokens(?:, done)?: (['\"].*['\"])$", "\n".join(lines), re.M):
        pieces[row] = pieces.get(row, "") + eval(text)
    assert [line[line.index(".") + 1 :] for line in lines[-3:]] == [pieces[row] for row in "012"]


def test_chat(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("chat", capsys)
    assert [line.split(":")[0].strip() for line in lines] == ["user", "assistant"] * 4
    answers = [line.split(": ", 1)[1] for line in lines[1::2]]
    for question, answer in zip(lines[2::2], answers[:3], strict=True):
        assert question.endswith(f": {answer}.")  # every turn builds on the answer before


def test_constrained(capsys: pytest.CaptureFixture[str]) -> None:
    free, grammar = run("constrained", capsys)
    assert grammar.startswith("grammar: 200 of 200 outputs obey it")
    obeying = re.match(r"free: (\d+) of 200", free)
    assert obeying and int(obeying[1]) < 200


def test_extend_rule(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run("extend_rule", capsys)
    speeds = [float(re.search(r"(\d+\.\d) tokens per drafter forward", line)[1]) for line in lines[::2]]
    assert len(speeds) == 2 and min(speeds) > 2


def test_extend_strategy(capsys: pytest.CaptureFixture[str]) -> None:
    pattern = r"(\w+)\(.*\): (\d+) tokens in (\d+) steps and (\d+) drafter forwards"
    found = [re.fullmatch(pattern, line) for line in run("extend_strategy", capsys)]
    (_, prefix), (tokens, once), (same_tokens, twice) = [(int(m[2]), (int(m[3]), int(m[4]))) for m in found if m]
    assert prefix[0] == prefix[1] < tokens == same_tokens
    assert once[0] == once[1] and twice[1] == 2 * twice[0] and twice[0] < once[0] <= twice[1]


def test_extend_window(capsys: pytest.CaptureFixture[str]) -> None:
    found = [re.search(r"(\d+) drafter forwards, (\d+) masks", line) for line in run("extend_window", capsys)]
    everything, eight, half = [(int(m[1]), int(m[2])) for m in found if m]
    assert everything[0] <= half[0] <= eight[0] and eight[1] < half[1] < everything[1]


def test_extend_proposer(capsys: pytest.CaptureFixture[str]) -> None:
    same, *counts = run("extend_proposer", capsys)
    assert same == "the same tokens: True"
    alone, checked = [[int(n) for n in re.findall(r"(\d+) ", line)] for line in counts]
    assert alone[0] == alone[1] == alone[2] == checked[0] and checked[1] * 2 < alone[1] and checked[2] >= checked[1]


def test_extend_model(capsys: pytest.CaptureFixture[str]) -> None:
    """Two exact models of a chain sample the chain: 16,000 transitions, each share within .05 of the exact one."""
    lines = run("extend_model", capsys)
    assert float(lines[0].split()[0]) > 2
    for line in lines[1:]:
        sampled, exact = (eval(numbers) for numbers in re.findall(r"\[.*?\]", line))
        assert all(abs(p - q) < 0.05 for p, q in zip(sampled, exact, strict=True))


def test_extend_family(capsys: pytest.CaptureFixture[str]) -> None:
    [row] = eval(run("extend_family", capsys)[-1])
    assert row[:3] == [1, 2, 3] and len(row) == 11 and all(0 <= token < 19 for token in row)


@pytest.mark.slow
@pytest.mark.parametrize("start", [None, str(VERIFIER_DIR)], ids=["from nothing", "from a trained model"])
def test_a_verifier_is_made_of_the_drafters_own_answers(start: str | None) -> None:
    """In miniature: its loss on them falls, and the pair decodes. From the included verifier the vocabulary is the same."""
    script = runpy.run_path(str(EXAMPLES / "make_verifier.py"))
    torch.manual_seed(0)
    drafter, tokenizer = load_drafter(DRAFTER_DIR), load_tokenizer(DRAFTER_DIR)
    prompts = [instance.prompt for instance in instances("copy", 8, seed=0, split="train")]
    alone = APDSampler(drafter, tokenizer=tokenizer, strategy="left-to-right:1")
    answers = list(alone.generate_many(prompts, max_new_tokens=16))
    before = script["small"](tokenizer) if start is None else script["transplanted"](start, tokenizer)
    after = script["make"](drafter, tokenizer, prompts, start, epochs=8, rows=4, new_tokens=16)
    losses = [
        sum(_loss(model, tokenizer, each) for each in zip(prompts, answers, strict=True)) for model in (before, after)
    ]
    assert losses[1] < 0.9 * losses[0]
    [answer] = APDSampler(drafter, after, tokenizer).generate_many(prompts[:1], max_new_tokens=16)
    assert answer.verifier_forwards


def _loss(model: Any, tokenizer: Any, pair: Any) -> float:
    ids = torch.tensor([tokenizer(pair[0]).input_ids + pair[1].tokens])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


def test_an_exchanged_vocabulary_keeps_what_a_model_says() -> None:
    """The included verifier, moved to its own vocabulary, is itself; moved to a smaller one, it has that size."""
    transplanted = runpy.run_path(str(EXAMPLES / "make_verifier.py"))["transplanted"]
    moved = transplanted(str(VERIFIER_DIR), load_tokenizer(DRAFTER_DIR))
    model, ids = load_verifier(VERIFIER_DIR).model, torch.arange(4, 30)[None]
    with torch.no_grad():
        torch.testing.assert_close(moved(input_ids=ids).logits, model(input_ids=ids).logits)
    fewer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "Mia": 1, " Leo": 2}, "<unk>")))
    moved = transplanted(str(VERIFIER_DIR), fewer)
    table, names = model.get_input_embeddings().weight, load_tokenizer(DRAFTER_DIR)(["Mia", " Leo"]).input_ids
    assert torch.equal(moved.get_input_embeddings().weight[1:], table[[ids[0] for ids in names]])
    assert moved(input_ids=torch.tensor([[1, 2]])).logits.shape == (1, 2, 3)


def test_measure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": each.prompt, "answer": each.answer} for each in instances("copy", 3, seed=1)]
    (tmp_path / "lines.jsonl").write_text(
        "\n".join(map(json.dumps, [*lines, {**lines[0], "answer": "none"}])), "utf-8"
    )
    arguments = ["--data", str(tmp_path / "lines.jsonl"), "apd:R=0.5", "left-to-right:1", "autoregressive"]
    heading, parallel, *single = run("measure", capsys, *arguments)
    assert "of 4" in heading
    shown = ["75.0%", *(f"{end:.1f}%" for end in wilson(3, 4))]  # no certainty from four lines
    assert [re.findall(r"[\d.]+%", line) for line in (parallel, *single)] == [shown] * 3
    assert float(parallel.split()[-1]) > 5 and [line.split()[-1] for line in single] == ["1.00"] * 2


@pytest.mark.parametrize(
    ("line", "arguments", "told"),
    [
        ('{"question": "a", "answer": "b"}', [], 'hold one {"prompt": "...", "answer": "..."} per line, got line 1'),
        ('{"prompt": "a", "answer": ""}', [], "texts that are not empty, got line 1"),  # every text ends with ""
        ("", [], "per line, got line 1"),
        (None, [], "No such file"),
        ('{"prompt": "a", "answer": "b"}', ["apd:R=0.5", "thresold:0.9"], "Did you mean `threshold`?"),
        ('{"prompt": "a", "answer": "b"}', ["--max-new-tokens", "0"], "must be at least 1, got"),
    ],
)
def test_measure_refuses_in_one_line_before_weights_are_read(
    line: str | None, arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "lines.jsonl"
    if line is not None:
        data.write_text(line, "utf-8")
    with patch.object(APDSampler, "from_pretrained", side_effect=AssertionError), pytest.raises(SystemExit) as ended:
        run("measure", capsys, "--data", str(data), *arguments)
    message = str(ended.value.code)
    assert message.startswith("measure.py: error: ") and told in message and "\n" not in message


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_scripts_print_their_help_and_do_not_run(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        run(path.stem, capsys, "--help")
    shown, text = capsys.readouterr().out, path.read_text("utf-8").split('"""')[1]
    assert ended.value.code == 0
    assert shown.startswith(f"usage: {path.name} [-h]")
    assert text.replace("\\\\", "\\").strip() in shown  # all that it says about itself
    assert max(map(len, shown.splitlines())) <= 80
    assert shown.splitlines()[-1].startswith("  ")  # the last option: nothing ran


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_scripts_are_short_and_say_how_to_run_them(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 64
    assert f"python examples/{path.name}" in text.split('"""')[1]


def read(path: Path) -> Any:
    return pytest.importorskip("nbformat").read(path, as_version=4)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_stored_with_light_outputs_of_their_code_and_state_their_needs(path: Path) -> None:
    """Renewed by `python docs/renew.py notebooks`; on the web their outputs are all that is seen."""
    notebook = read(path)
    pytest.importorskip("nbformat").validate(notebook)
    renew = runpy.run_path(str(ROOT / "docs" / "renew.py"))
    assert notebook.metadata["outputs_of"] == renew["sources"](notebook), "run: python docs/renew.py notebooks"
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert outputs and not [
        output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"
    ]
    assert path.stat().st_size < MOST_BYTES
    first = notebook.cells[0].source
    assert first.startswith(f"# {path.name[0]} ")
    assert "**Needs**" in first and re.search(r"\*\*Takes\*\* about \d+ seconds", first)


def test_the_antibody_notebook_is_stored_with_light_outputs() -> None:
    notebook = read(ANTIBODY)
    pytest.importorskip("nbformat").validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not any(output.get("name") == "stderr" or output.output_type == "error" for output in outputs)
    assert ANTIBODY.stat().st_size < 80_000
    first = notebook.cells[0].source
    assert (
        "**Needs**" in first and "antiberty==0.1.3" in first and re.search(r"\*\*Takes\*\* about \d+ seconds", first)
    )


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem != "2_knobs"], ids=lambda path: path.stem)
def test_cells_of_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process: a kernel takes seconds to start. The slow test below has one."""
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    run_cells(path)


@pytest.mark.real
def test_cells_of_the_antibody_notebook_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With fewer variants than the notebook draws."""
    if find_spec("antiberty") is None:
        pytest.skip("the package antiberty is absent: pip install --no-deps antiberty==0.1.3")
    pytest.importorskip("matplotlib").use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.syspath_prepend(EXAMPLES)
    run_cells(ANTIBODY, ("count = 24", "count = 4"))
    assert "4 variants in 11 passes, 4 of them different" in capsys.readouterr().out
    assert (tmp_path / "variants.fasta").read_text().count(">") == 4


def run_cells(path: Path, *changes: tuple[str, str]) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for number, cell in enumerate(read(path).cells):
        if cell.cell_type == "code":
            source = cell.source
            for old, new in changes:
                source = source.replace(old, new)
            exec(compile(source, f"{path.name}, cell {number}", "exec"), namespace)


@pytest.mark.slow
@pytest.mark.parametrize("path", [NOTEBOOKS[0], EXAMPLES / "2_knobs.ipynb"], ids=lambda path: path.stem)
def test_notebooks_run_in_a_kernel(path: Path, tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    for module in ("ipykernel", "matplotlib"):
        pytest.importorskip(module)
    notebook = read(path)
    environment = {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    client = nbclient.NotebookClient(
        notebook, timeout=SECONDS_PER_CELL, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env={**os.environ, **environment})
    shown = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("text/html" in data or "image/png" in data for data in shown)
    assert printed(notebook) == printed(read(path)), "out of date: python docs/renew.py notebooks"


def printed(notebook: Any) -> str:
    """What the cells print, numbers left out: their last digits may differ between versions of torch."""
    texts = [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stdout"
    ]
    return re.sub(r"[\d.]+", "#", "".join(texts))
