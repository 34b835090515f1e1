"""The pages of docs/ are complete and true. That they build as a site is checked by .ci/run."""

import re
import runpy
import shlex

import pytest
from paths import ROOT

import apd
from apd.cli import main
from apd.cli.app import parser
from apd.strategies.registry import parse

PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES["CONTRIBUTING.md"] = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_every_public_name_is_in_the_reference() -> None:
    shown = re.findall(r"^::: apd[\w.]*\.(\w+)$", PAGES["api.md"] + PAGES["api-decoding.md"], flags=re.MULTILINE)
    assert not set(apd.__all__) - set(shown)
    assert len(shown) == len(set(shown))


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1].split("\n\n")[0]
    listed = set(re.findall(r": ([\w-]+\.md)$", navigation, flags=re.MULTILINE))
    assert listed == PAGES.keys() - {"CONTRIBUTING.md"} | {"index.md", "contributing.md"}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    named = re.findall(r"`((?:apd|benchmarks|docs|examples|tests)/[\w/.-]+)`", PAGES[page])
    folder = ROOT if page == "CONTRIBUTING.md" else ROOT / "docs"
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGES[page])
    assert not [name for name in named if not (ROOT / name).exists()]
    assert not [link for link in links if not (folder / link).exists()]


def test_the_page_for_who_comes_from_elsewhere_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGES["coming-from.md"], flags=re.MULTILINE | re.DOTALL)
    namespace: dict[str, object] = {"__name__": "coming_from"}
    for block in blocks:
        exec(compile(block, "docs/coming-from.md", "exec"), namespace)
    assert len(blocks) == 6 and '["Zoe", "Leo", "Mia"]' in capsys.readouterr().out


def test_the_strategies_that_pages_name_exist() -> None:
    named = re.findall(r'strategy="([^"…]+)"', PAGES["coming-from.md"])
    assert len(named) > 8
    for spec in named:
        parse(re.sub(r"\b[KB]\b", "4", spec).replace("γ", "0.9").replace(":f", ":1"))


def test_the_estimate_on_the_page_is_the_one_that_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    command, printed = re.search(
        r"```bash\n(apd estimate.*?)```\n\n```text\n(.*?)```", PAGES["cost.md"], re.DOTALL
    ).groups()
    assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
    assert capsys.readouterr().out == printed


def test_the_table_of_commands_has_every_command() -> None:
    listed = [row[0].strip("`") for row in table(PAGES["cli.md"].split("\n## ")[0])[1:]]
    assert sorted(listed) == sorted(f"apd {name}" for name in parser().commands)


def test_what_measure_prints_on_the_page_is_what_it_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = PAGES["evaluation.md"].split("\n## Prompts and answers of your own\n")[1]
    command, printed = re.search(r"```sh\n(.*?)\n```\n\n```text\n(.*?)```", section, re.DOTALL).groups()
    python, script, slow, *settings = shlex.split(command)
    monkeypatch.setattr("sys.argv", [script, *settings])
    monkeypatch.syspath_prepend(ROOT / "examples")
    runpy.run_path(str(ROOT / script), run_name="__main__")
    lines = [line for line in printed.splitlines() if not line.startswith(slow)]
    assert python == "python" and capsys.readouterr().out.splitlines() == lines


def test_the_check_of_a_part_on_the_page_is_the_one_that_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    section = PAGES["check.md"].split("## A part of your own")[1]
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", section, re.DOTALL).groups()
    exec(compile(code, "docs/check.md", "exec"), {"__name__": "check"})
    assert printed in capsys.readouterr().out


def test_the_blocks_on_the_page_about_extending_run(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGES["extending.md"], flags=re.MULTILINE | re.DOTALL)
    for block in blocks:
        exec(compile(block, "docs/extending.md", "exec"), {"__name__": "extending"})
    assert len(blocks) == 2 and "no problem in" in capsys.readouterr().out


def test_every_skeleton_is_on_the_page_about_extending() -> None:
    skeletons = {path.name for path in (ROOT / "examples").glob("extend_*.py")}
    listings = re.findall(r"^\[examples/(\w+\.py)\]\(\.\./examples/\1\)$", PAGES["extending.md"], flags=re.MULTILINE)
    assert set(listings) == skeletons and skeletons


def test_the_step_that_is_explained_is_the_step_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["one_step.py"])
    runpy.run_path(str(ROOT / "examples/one_step.py"), run_name="__main__")
    ran, shown = capsys.readouterr().out, re.findall(r"```text\n(.*?)```", PAGES["how-a-step-works.md"], re.DOTALL)[0]
    number = r"\d\.\d{3}"
    assert re.sub(number, "#", ran).strip() == re.sub(number, "#", shown).strip()
    # The last digit may differ between versions of torch.
    assert [float(p) for p in re.findall(number, ran)] == pytest.approx(
        [float(p) for p in re.findall(number, shown)], abs=0.002
    )


def test_the_numbers_about_families_are_those_of_the_results() -> None:
    """Of each recording: layouts, largest logit, largest differences, equal decodes, and passes."""
    of = {
        "SDAR": ["parity_sdar"],
        "SDAR-MoE": ["parity_sdar_moe"],
        "Fast-dLLM v2": ["parity_fast_dllm_v2"],
        "WeDLM (Qwen2)": ["parity_wedlm"],
        "WeDLM (Qwen3)": ["parity_wedlm_qwen3"],
        "LLaDA2": ["decode_llada2_moe", "parity_llada2_moe"],
        "LLaDA-MoE": ["parity_llada_moe"],
        "SDLM": ["parity_sdlm"],
        "Nemotron-Labs-Diffusion": ["parity_nemotron"],
    }
    results = table((ROOT / "benchmarks/results/families.md").read_text(encoding="utf-8"))
    assert {row[0] for row in results[1:]} - {"folder"} == {folder for folders in of.values() for folder in folders}
    shown = {row[0]: row[1:] for row in table(PAGES["models.md"]) if row[0] in of and len(row) == 7}
    assert shown.keys() == of.keys()
    for name, folders in of.items():
        logits = [row for row in results if row[0] in folders and len(row) == 8]
        largest, grouped, sdpa, eager = ([float(row[i]) for row in logits] for i in (4, 5, 6, 7))
        numbers = [f"{max(largest):.1f}", f"{max(grouped + sdpa):.1e}", f"{max(eager):.1e}"]
        decodes = [[row[2], f"{row[3]} / {row[4]}"] for row in results if row[0] in folders and row[1] == "**all**"]
        assert shown[name] == [str(len(logits)), *numbers, *(decodes or [["–", "–"]])[0]], name


def test_each_familys_own_rule_is_a_strategy() -> None:
    rows = [row for row in table(PAGES["models.md"].split("## Each family's own rule")[1]) if len(row) == 3]
    assert rows[0] == ["family", "published rule", "`strategy`"] and len(rows) > 1
    for *_, spec in rows[1:]:
        parse(spec.strip("`"))


def table(page: str) -> list[list[str]]:
    """The cells of every row of the page's tables, the lines under the heads left out."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
