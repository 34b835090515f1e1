"""A window policy of your own.
Runs on the included pair in seconds: python examples/extend_window.py

A policy says how many masks a step drafts. It holds no state of a call: what
it follows is in `DecodeState`, so that a row has the same windows alone and in
any batch.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from apd import EXAMPLE_PROMPTS, APDSampler
from apd.decoding.state import DecodeState
from apd.decoding.window import WindowPolicy


@dataclass(frozen=True)
class Share(WindowPolicy):
    """A share of the masks that are left, rounded up: long windows first, short ones near the end."""

    share: float = 0.5

    def ends(self, state: DecodeState) -> Sequence[int]:
        rows = zip(state.layout.frontier, state.layout.end, strict=True)  # numbers on the host
        return [end - int((end - frontier) * (1 - self.share)) for frontier, end in rows]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sampler = APDSampler.from_included()
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS, return_tensors="pt", padding=True)
    for policy in (None, 8, Share(0.5)):
        output = sampler.generate(**inputs, max_new_tokens=32, window_size=policy, return_dict_in_generate=True)
        drafted = sum(len(draft) for row in output.trace for draft in row.drafts)
        print(f"{policy}: {int(output.drafter_forwards.sum())} drafter forwards, {drafted} masks drafted")


if __name__ == "__main__":
    main()
