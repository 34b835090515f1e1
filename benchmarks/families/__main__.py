"""Prints, for every recorded layout of every family, the largest difference between our logits and the recorded ones.

python -m benchmarks.families                # all folders
python -m benchmarks.families parity_sdar    # these
"""

import argparse

from transformers.utils.logging import disable_progress_bar

from benchmarks.families.logits import LAYOUTS, NEWER, compare

IMPLEMENTATIONS = ("grouped_sdpa", "sdpa", "eager")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="*", help=f"of {', '.join(LAYOUTS)} (default: all)")
    folders = parser.parse_args().folders or [*LAYOUTS]
    if unknown := [folder for folder in folders if folder not in LAYOUTS]:
        parser.error(f"{', '.join(unknown)} is none of {', '.join(LAYOUTS)}")
    disable_progress_bar()
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


if __name__ == "__main__":
    main()
