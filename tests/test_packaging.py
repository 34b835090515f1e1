"""What is installed, and what the core must not drag in."""

import ast
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

import apd

ROOT = Path(__file__).parent.parent
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


@pytest.mark.parametrize("module", ["cli", "demo", "display", "harness", "jsonl", "picture"])
def test_the_core_imports_nothing_of_the_command_line(module: str) -> None:
    for path in PACKAGE.glob("*.py"):
        if path.stem in ("cli", "demo", "display", "harness", "jsonl", "picture", "__main__"):
            continue
        names = {
            name
            for node in ast.walk(ast.parse(path.read_text()))
            for name in (
                [node.module]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
                if isinstance(node, ast.Import)
                else []
            )
        }
        assert f"apd.{module}" not in names, path.name


def test_the_core_neither_prints_nor_reads_a_clock() -> None:
    for path in PACKAGE.glob("*.py"):
        if path.stem in ("cli", "demo", "__main__"):
            continue
        called = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "print" not in called, path.name
        assert "import time" not in path.read_text(), path.name


@pytest.mark.slow
def test_importing_the_library_changes_no_global_setting() -> None:
    code = (
        "import torch; before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled();"
        "import apd;"
        "assert (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
