"""An acceptance rule of your own.
Runs on the included pair in seconds: python examples/extend_rule.py

A rule is a callable from `Evidence` to `Judgement`. It judges every drafted
token of a window at once; the loop commits the longest accepted prefix, and
always the first token (unless `first="judge"`).
"""

import argparse
from dataclasses import dataclass
from typing import ClassVar

from apd import EXAMPLE_PROMPTS, APDSampler, Evidence, Judgement


@dataclass(frozen=True)
class Typical:
    """Accept x where p_T(x) ≥ min(ε, δ·exp(−H(p_T))): a flat mixture accepts less likely tokens than a peaked one.

    Source: typical acceptance of Medusa, arXiv:2401.10774.
    """

    epsilon: float = 0.3
    delta: float = 0.6

    def __call__(self, evidence: Evidence) -> Judgement:
        logprobs = evidence.target.logprobs  # b m v
        entropy = -(logprobs.exp() * logprobs.clamp(min=-1e9)).sum(-1)  # b m, in nats
        bar = (self.delta * (-entropy).exp()).clamp(max=self.epsilon)
        return Judgement(accept=evidence.target.logprob(evidence.draft).exp() >= bar)


@dataclass(frozen=True)
class Plausible:
    """Accept x where the verifier gives it at least probability γ. Needs one number per token, no vocabulary."""

    threshold: float = 0.1
    scores_only: ClassVar[bool] = True

    def __call__(self, evidence: Evidence) -> Judgement:
        return Judgement(accept=evidence.verifier_logprobs.exp() >= self.threshold)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sampler = APDSampler.from_included()
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS, return_tensors="pt", padding=True)
    for rule in (Typical(), Plausible()):
        output = sampler.generate(**inputs, max_new_tokens=32, acceptance=rule, return_dict_in_generate=True)
        print(f"{rule}: {float(output.tokens_per_forward.mean()):.1f} tokens per drafter forward")
        print(sampler.tokenizer.decode(output.trace[0].tokens, skip_special_tokens=True))


if __name__ == "__main__":
    main()
