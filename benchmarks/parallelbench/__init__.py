"""ParallelBench (arXiv 2510.04767), written anew: theory, tasks, scorers. Start with `theory.py` and `score.py`.

python -m benchmarks.parallelbench theory        closed forms beside what the strategies do on exact models
python -m benchmarks.parallelbench cases FILE    recorded outputs of the official scorers against ours
python -m benchmarks.parallelbench run ...        a pair and many strategies on the tasks, resumable
python -m benchmarks.parallelbench report DIR     tables, plots and a page of what was run
python -m benchmarks.parallelbench knobs DIR      what R, tau and M do on exact Shuffle
"""

from benchmarks.parallelbench.score import score

__all__ = ["score"]
