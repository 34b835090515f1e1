"""ParallelBench (arXiv 2510.04767), implemented independently: theory, tasks, scorers.

Start with `theory.py` and `score.py`.

python -m benchmarks.parallelbench theory        closed forms beside measurements of the strategies on exact models
python -m benchmarks.parallelbench cases FILE    our scores compared with recorded outputs of the official scorers
python -m benchmarks.parallelbench run ...        a pair and many strategies on the tasks, resumable
python -m benchmarks.parallelbench report DIR     tables, plots and an HTML page of a run
python -m benchmarks.parallelbench knobs DIR      effect of R, tau and M on exact Shuffle
"""

from benchmarks.parallelbench.score import score

__all__ = ["score"]
