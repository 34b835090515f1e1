"""The included pair: a tiny drafter and a tinier verifier that ship with the package.

`examples/train_pair.py` trains them on the tasks of `apd.embedded.tasks`. With them, every part of the library can be
tried, tested and measured on a CPU within seconds, without a download.
"""

from pathlib import Path

__all__ = ["DRAFTER_DIR", "VERIFIER_DIR"]

DRAFTER_DIR = Path(__file__).parent / "drafter"
VERIFIER_DIR = Path(__file__).parent / "verifier"
