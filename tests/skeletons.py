"""The skeletons of `examples/extend_*.py` as modules."""

import functools
import importlib.util
import sys
from types import ModuleType

from paths import ROOT

EXAMPLES = ROOT / "examples"


@functools.cache
def skeleton(name: str) -> ModuleType:
    """`examples/extend_<name>.py`, imported."""
    spec = importlib.util.spec_from_file_location(f"extend_{name}", EXAMPLES / f"extend_{name}.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
