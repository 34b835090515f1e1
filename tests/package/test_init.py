"""The public names, and what importing them costs."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import apd


def test_every_public_name_can_be_imported():
    assert apd.__all__ == dir(apd)
    for name in apd.__all__:
        assert getattr(apd, name) is not None


def test_type_checkers_see_the_public_names():
    """They read the imports under `TYPE_CHECKING`, which never run."""
    [block] = [node for node in ast.parse(Path(apd.__file__).read_text()).body if isinstance(node, ast.If)]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        [alias] = node.names
        assert alias.asname == alias.name
        seen[alias.name] = getattr(importlib.import_module(node.module), alias.name)
    assert sorted(seen) == apd.__all__
    assert all(seen[name] is getattr(apd, name) for name in seen)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Sampler'"):
        _ = apd.Sampler


def test_help_does_not_wait_for_torch():
    code = "import sys; from apd.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "False"
