"""The numbers inside each step.
Runs on the included pair in seconds: python examples/one_step.py

An acceptance rule sees all that a step knows; this one prints it and judges as
the paper does. docs/how-a-step-works.md explains the output.
"""

import argparse
from dataclasses import dataclass
from typing import Any

from apd import APDSampler, Coupling, Evidence, Judgement

PROMPT = 'Shuffle this list: ["Ada", "Ben", "Cleo", "Dan"].'


@dataclass(frozen=True)
class Shown:
    """The paper's rule, with its evidence printed: one line per position, up to the first miss or the stop token."""

    tokenizer: Any

    def __call__(self, evidence: Evidence) -> Judgement:
        step, row = int(evidence.state.steps[0]) + 1, evidence.state.tokens[0]
        draft = evidence.draft[0].tolist()
        draft = draft[: draft.index(self.tokenizer.eos_token_id) + 1]
        print(f"\nstep {step}: {self.tokenizer.decode(row[: evidence.state.frontier[0]])}")
        print(f"draft:  {self.tokenizer.decode(draft)}")
        print(
            f"{'x':>6} {'p_D(x)':>7} {'p_AR(x)':>7} {'p_T(x)':>7} {'y':>6} {'p_D(y)':>7} {'p_AR(y)':>7} {'p_T(y)':>7}"
        )
        target = evidence.target.scores.values.argmax(-1)  # greedy: the likeliest token of the mixture
        models = (evidence.drafter, evidence.verifier, evidence.target)
        for i, x in enumerate(draft):
            y = int(target[0, i])
            of_x, of_y = ([float(model.logprobs[0, i, token].exp()) for model in models] for token in (x, y))
            words = [self.tokenizer.decode([token]).strip() for token in (x, y)]
            line = [" ".join(f"{p:7.3f}" for p in probs) for probs in (of_x, of_y)]
            print(f"{words[0]:>6} {line[0]} {words[1]:>6} {line[1]}  {'=' if x == y else 'differ'}")
            if x != y and i > 0:
                break
        return Coupling()(evidence)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sampler = APDSampler.from_included()
    inputs = sampler.tokenizer(PROMPT, return_tensors="pt")
    shown = Shown(sampler.tokenizer)
    output = sampler.generate(**inputs, max_new_tokens=32, acceptance=shown, return_dict_in_generate=True)
    print("\ncommitted per step:", output.committed_per_step[0])


if __name__ == "__main__":
    main()
