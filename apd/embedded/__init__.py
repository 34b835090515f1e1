"""The path of `apd.included` in release 0.1.0, kept for scripts that import it."""

from apd.included import BLOCK_DRAFTER_DIR, DRAFTER_DIR, VERIFIER_DIR

__all__ = ["BLOCK_DRAFTER_DIR", "DRAFTER_DIR", "VERIFIER_DIR"]
