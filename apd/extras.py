"""How to install what an optional part needs, from a clone as well as from an installed wheel."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement

__all__ = ["install"]


def install(extra: str) -> str:
    """A command that installs an extra of this package: `pip install 'lm-eval<0.5,>=0.4.10'`.

    The packages are named, since the distribution may be on no index. Where this package is not installed but found on the path,
    the command is one for the clone.
    """
    try:
        needed = [Requirement(line) for line in requires("apd-decoding") or []]
    except PackageNotFoundError:
        needed = []
    packages = []
    for each in needed:  # those of this extra that this platform needs
        if each.marker and each.marker.evaluate({"extra": extra}) and not each.marker.evaluate({"extra": ""}):
            each.marker = None
            packages.append(f"'{each}'")
    if not packages:
        return f"pip install '.[{extra}]' in the folder that holds setup.py"
    return f"pip install {' '.join(packages)}"
