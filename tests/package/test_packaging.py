"""What is installed, and what the core must not drag in."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from paths import ROOT

import apd
from apd.extras import install

PACKAGE = ROOT / "apd"


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of `setup()`, without building anything."""
    given: dict[str, Any] = {}
    stand_in = types.SimpleNamespace(setup=given.update, find_packages=lambda include: include)
    monkeypatch.setitem(sys.modules, "setuptools", stand_in)
    script = ROOT / "setup.py"
    exec(compile(script.read_text(), str(script), "exec"), {"__file__": str(script)})
    return given


def test_what_is_supported_includes_what_was_tested(metadata: dict[str, Any]) -> None:
    """Each direct dependency has a release in `constraints.txt`, and it is in the range of `setup.py`."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {pin.name: pin for pin in (Requirement(line) for line in lines if line[0] != "#")}
    extras = metadata["extras_require"]
    installed = ("test", "eval", "bench", "serve", "grammar", "clients", "docs")
    for line in [*metadata["install_requires"], *(line for extra in installed for line in extras[extra])]:
        asked = Requirement(line)
        if asked.name == metadata["name"]:
            continue
        [pin] = pinned[asked.name].specifier
        assert pin.operator == "==" and "+" not in pin.version, pin
        assert asked.specifier.contains(pin.version), line


@pytest.mark.slow
def test_a_script_beside_an_editable_clone_imports_the_package(tmp_path: Path) -> None:
    """A clone has the package's name: its folder was imported in the package's place, as a namespace."""
    pytest.importorskip("setuptools", minversion="77")
    clone, site = tmp_path / "apd", tmp_path / "site"
    shutil.copytree(PACKAGE, clone / "apd")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    site.mkdir()
    build = "import sys; from setuptools.build_meta import build_editable; build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(site)], cwd=clone, check=True, capture_output=True)
    [wheel] = site.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(site)
    script = tmp_path / "script.py"
    script.write_text(
        "import site, sys; site.addsitedir(sys.argv[1]);"
        "from importlib.util import find_spec; print(find_spec('apd').origin)"
    )
    # Without the test run's own packages (-S), of which `apd` may be one.
    found = subprocess.run(
        [sys.executable, "-E", "-S", script, site], capture_output=True, text=True, check=True
    ).stdout
    assert found.strip() == str(clone / "apd" / "__init__.py")


@pytest.mark.slow
def test_the_source_distribution_is_the_repository(tmp_path: Path) -> None:
    """Docs, examples, tests and benchmarks: docstrings name them, and a packager runs them."""
    pytest.importorskip("setuptools", minversion="77")
    clone, folders = tmp_path / "clone", ("apd", "docs", "examples", "tests", "benchmarks")
    for folder in folders:
        shutil.copytree(ROOT / folder, clone / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    files = [path for path in ROOT.iterdir() if path.is_file() and not path.name.startswith(".")]
    for path in files:
        shutil.copy(path, clone)
    kept = {path.relative_to(clone).as_posix() for path in clone.rglob("*") if path.is_file()}
    (clone / "tests" / "__pycache__").mkdir()
    (clone / "tests" / "__pycache__" / "x.pyc").touch()
    build = "import sys; from setuptools.build_meta import build_sdist; print(build_sdist(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=clone, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    assert kept <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


@pytest.mark.parametrize(
    ("needed", "command"),
    [
        (
            [
                "torch>=2.9",
                'lm-eval<0.5,>=0.4.10; extra == "eval"',
                'openai>=1; extra == "bench"',
                'uvloop>=0.20; sys_platform == "elsewhere" and extra == "eval"',
            ],
            "pip install 'lm-eval<0.5,>=0.4.10'",
        ),
        (['matplotlib>=3; extra == "bench"'], "pip install '.[eval]' in the folder that holds setup.py"),
        (None, "pip install '.[eval]' in the folder that holds setup.py"),
    ],
)
def test_advice_to_install_can_be_followed(
    needed: list[str] | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`pip install 'apd-decoding[eval]'` was advised, and the distribution was on no index."""

    def requires(name: str) -> list[str]:
        if needed is None:
            raise PackageNotFoundError(name)
        return needed

    monkeypatch.setattr("apd.extras.requires", requires)
    assert install("eval") == command


def test_no_text_advises_to_install_the_distribution_by_its_name() -> None:
    for folder in ("apd", "benchmarks", "docs", "examples"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".md", ".ipynb"):
                assert "apd-decoding[" not in path.read_text("utf-8"), path


def test_every_data_file_is_packaged(metadata: dict[str, Any]) -> None:
    packaged = {path for pattern in metadata["package_data"]["apd"] for path in PACKAGE.glob(pattern)}
    files = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files == packaged
    assert PACKAGE / "py.typed" in packaged
    assert any(path.suffix == ".safetensors" for path in packaged)


def test_the_command_exists(metadata: dict[str, Any]) -> None:
    from apd.cli import main

    assert metadata["entry_points"]["console_scripts"] == ["apd = apd.cli:main"]
    assert callable(main)


def test_the_included_pair_stays_small() -> None:
    assert sum(path.stat().st_size for path in PACKAGE.rglob("*.safetensors")) < 12 * 2**20


def test_the_package_says_its_version(metadata: dict[str, Any]) -> None:
    assert getattr(apd, "__version__", metadata["version"]) == metadata["version"]


def test_only_the_command_line_imports_itself_prints_and_reads_a_clock() -> None:
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name in ("cli", "integrations") or path.name == "__main__.py":
            continue
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        imported |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        has_clock = {"inspection", "serve"} & {*path.parts}  # a report has seconds, a server latencies
        unwanted = ("apd.cli.",) if has_clock else ("apd.cli.", "time.")
        assert not any(f"{name}.".startswith(unwanted) for name in imported if name), path
        assert not any(isinstance(node, ast.Name) and node.id == "print" for node in nodes), path


@pytest.mark.slow
def test_importing_the_library_changes_no_global_setting() -> None:
    code = (
        "import torch; before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled();"
        "import apd;"
        "assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
