"""The included pair: a tiny drafter and a tinier verifier that ship with the package.

`examples/train_pair.py` trains them on the tasks of `apd.included.tasks`. With them, every part of the library can be
tried, tested and measured on a CPU within seconds, without a download. `BLOCK_DRAFTER_DIR` has a block-causal drafter for the
same verifier, in the format of Fast-dLLM v2 with blocks of 8: its cache is exact.
"""

from pathlib import Path

__all__ = ["BLOCK_DRAFTER_DIR", "DRAFTER_DIR", "VERIFIER_DIR"]

DRAFTER_DIR = Path(__file__).parent / "drafter"
VERIFIER_DIR = Path(__file__).parent / "verifier"
BLOCK_DRAFTER_DIR = Path(__file__).parent / "block_drafter"
