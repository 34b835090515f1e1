"""The pages of docs/ are complete and true. That they build as a site is checked by .ci/run."""

import re
import runpy

import pytest
from paths import ROOT

import apd

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


def test_every_skeleton_is_on_the_page_about_extending() -> None:
    skeletons = {path.name for path in (ROOT / "examples").glob("extend_*.py")}
    listings = re.findall(r"^\[examples/(\w+\.py)\]\(\.\./examples/\1\)$", PAGES["extending.md"], flags=re.MULTILINE)
    assert set(listings) == skeletons and skeletons


def test_the_step_that_is_explained_is_the_step_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples/one_step.py"), run_name="__main__")
    ran, shown = capsys.readouterr().out, re.findall(r"```text\n(.*?)```", PAGES["how-a-step-works.md"], re.DOTALL)[0]
    number = r"\d\.\d{3}"
    assert re.sub(number, "#", ran).strip() == re.sub(number, "#", shown).strip()
    # The last digit may differ between versions of torch.
    assert [float(p) for p in re.findall(number, ran)] == pytest.approx(
        [float(p) for p in re.findall(number, shown)], abs=0.002
    )
