"""The command `apd`."""

from apd.cli.app import main

__all__ = ["main"]
