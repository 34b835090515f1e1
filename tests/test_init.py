"""The public names, and what importing them costs."""

import subprocess
import sys

import pytest

import apd


def test_every_public_name_can_be_imported():
    assert set(apd.__all__) == set(apd._HOMES) == set(dir(apd))
    for name in apd.__all__:
        assert getattr(apd, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'Sampler'"):
        _ = apd.Sampler


def test_help_does_not_wait_for_torch():
    code = "import sys; from apd.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nprint('torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "False"
