"""Holds every family against what its published code computed: logits of every recorded layout, then greedy decodes.

python -m benchmarks.families                          # all folders, ten minutes
python -m benchmarks.families parity_sdar              # these
python -m benchmarks.families --only decodes           # or logits
"""

import argparse
from collections.abc import Sequence

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.families.decodes import RULES, report
from benchmarks.families.logits import LAYOUTS, NEWER, compare

IMPLEMENTATIONS = ("grouped_sdpa", "sdpa", "eager")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", help=f"of {', '.join(LAYOUTS)} (default: all)")
    parser.add_argument("--only", choices=("logits", "decodes"), help="print one of the two tables (default: both)")
    arguments = parser.parse_args()
    folders = arguments.folders or [*LAYOUTS]
    if unknown := [folder for folder in folders if folder not in LAYOUTS]:
        parser.error(f"{', '.join(unknown)} is none of {', '.join(LAYOUTS)}")
    disable_progress_bar()
    torch.set_num_threads(1)
    if arguments.only != "decodes":
        print_logits(folders)
    if arguments.only != "logits":
        print_decodes([folder for folder in folders if folder in RULES])


def print_logits(folders: Sequence[str]) -> None:
    """The largest difference between our logits and the recorded ones, of every layout."""
    print("| folder | layout | way | rows | largest logit | " + " | ".join(IMPLEMENTATIONS) + " |")
    print("|---|---|---|--:|--:|" + "--:|" * len(IMPLEMENTATIONS))
    for folder in folders:
        if folder in NEWER:
            print(f"| {folder} | needs transformers 5.24 | | | |" + " |" * len(IMPLEMENTATIONS))
            continue
        for found in zip(*(compare(folder, name) for name in IMPLEMENTATIONS), strict=True):
            one, gaps = found[0], " | ".join(f"{each.gap:.1e}" for each in found)
            rows = one.recorded.shape[:-1].numel()
            print(f"| {folder} | {one.layout} | {one.way} | {rows} | {one.largest:.1f} | {gaps} |")
    print()


def print_decodes(folders: Sequence[str]) -> None:
    """Decodes that are equal, and forward passes: ours, the published code's, and their ratio."""
    print("| folder | rule | equal | passes here | published | ratio |")
    print("|---|---|--:|--:|--:|--:|")
    for folder in folders:
        if folder in NEWER:
            print(f"| {folder} | needs transformers 5.24 | | | | |")
            continue
        for line in report(folder):
            print(line, flush=True)


if __name__ == "__main__":
    main()
