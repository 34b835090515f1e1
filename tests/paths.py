"""Where the files lie that tests read."""

from pathlib import Path

ROOT = Path(__file__).parents[1]  # of the repository
FIXTURES = ROOT / "tests" / "fixtures"
SHARED = ROOT.parent / "shared"  # files without a licence, which are not in the repository; tests of them are skipped
