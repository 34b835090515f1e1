"""How to install what an optional part needs, from a clone as well as from an installed wheel."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires

__all__ = ["install"]


def install(extra: str) -> str:
    """A command that installs an extra of this package: `pip install 'lm-eval<0.5,>=0.4.10'`.

    The packages are named, since the distribution may be on no index. Where this package is not installed but found on the path,
    the command is one for the clone.
    """
    try:
        needed = requires("apd-decoding") or []
    except PackageNotFoundError:
        needed = []
    marks = (f'extra == "{extra}"', f"extra == '{extra}'")
    packages = [line.split(";")[0].strip() for line in needed if any(mark in line for mark in marks)]
    if not packages:
        return f"pip install '.[{extra}]' in the folder that holds setup.py"
    return "pip install " + " ".join(f"'{package}'" for package in packages)
