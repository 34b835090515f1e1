"""What someone who has the weights of a released checkpoint runs first: is it read as it was trained?

`check` makes a `Report` of `Finding`s: declarations (`declarations.py`), evidence from the weights (`evidence.py`) and laws
(`laws.py`). `costs.py` says, before there are weights, what a decode would cost.
"""

from apd.inspection.checking import check
from apd.inspection.report import Finding, Report

__all__ = ["Finding", "Report", "check"]
