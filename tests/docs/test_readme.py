"""README.md is true: every Python and bash block runs, and what it says about knobs and files holds.

- The first bash block holds the two commands for a fresh machine. `.ci/run` takes them from README and runs them word
  for word in an environment of its own; here only their shape is checked: the second one is this test run itself.
- All other blocks run here, from top to bottom. Where they name a 7B checkpoint, the directories of the included pair
  are put in its place: the drafter's is in Dream's format on disk, so the same code reads it, without a download.
- Bash blocks run in the same empty directory, one command after another. `apd` is `apd.cli.app.main` in this process, since
  each start of a process takes seconds.
"""

import re
import shlex
import subprocess
import warnings
from pathlib import Path

import pytest
from paths import ROOT

from apd import APDConfig
from apd.cli import main
from apd.config import KNOBS
from apd.included import DRAFTER_DIR, VERIFIER_DIR

README = (ROOT / "README.md").read_text(encoding="utf-8")
STAND_INS = {"Dream-org/Dream-v0-Instruct-7B": str(DRAFTER_DIR), "Qwen/Qwen2.5-0.5B": str(VERIFIER_DIR)}


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    for name, directory in STAND_INS.items():
        found = [block.replace(name, directory) for block in found]
    return found


def test_the_first_block_holds_the_two_commands() -> None:
    job, tests = blocks("bash")[0].splitlines()
    assert job.startswith("python3 -m venv .venv && ") and job.endswith("apd demo")
    assert '".[test]"' in tests and tests.endswith("-m pytest -q")
    assert all("pip install -q -c constraints.txt " in command for command in (job, tests))
    assert "README.md" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.compat
@pytest.mark.parametrize("block", blocks("python"))
def test_python_blocks_run_without_a_warning(block: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # The blocks' 7B names stand for the included pair here, which knows few words.
        warnings.filterwarnings("ignore", message="The prompt is none of those that the included pair was trained on")
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


def test_bash_blocks_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks("bash")[1:]:
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line)
            if words[0] != "apd":
                subprocess.run(["bash", "-euo", "pipefail", "-c", line], check=True)
                continue
            try:
                code = main(words[1:])
            except SystemExit as stop:  # argparse's, after --help
                code = stop.code
            assert not code, (line, capsys.readouterr().err)


def test_the_knob_table_follows_from_the_knobs() -> None:
    shown = re.findall(r"^\| `(\w+)` \| ([^|]*?) ?\| ([^|]+?) \| ([^|]+?) \|$", README, flags=re.MULTILINE)
    words = {"None": "none", "False": "off", "0.0": "0"}
    default = {name: str(getattr(APDConfig(), name)) for name in KNOBS}
    assert shown == [
        (name, knob.letter, words.get(default[name], default[name]), knob.help) for name, knob in KNOBS.items()
    ]


def test_files_that_are_named_exist() -> None:
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(
        r"`((?:apd|examples|docs|tests)/[\w/.]+)`", README
    )
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_first_screen_says_what_it_is_and_how_to_start() -> None:
    first = "\n".join(README.splitlines()[:30])
    assert "is not" in first
    assert "apd demo" in first and "pytest" in first
    assert "from apd import APDSampler" in first and "docs/step.svg" in first
