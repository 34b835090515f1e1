"""Prompts of different lengths in one call.
Runs on the included pair in seconds: python examples/batch.py

Rows start level, padded on the left; then each advances by its own number of
tokens per step and leaves the batch when it is done. What a row becomes does
not depend on the others: with its own seed it is the same alone.
"""

import argparse

from apd import EXAMPLE_PROMPTS, APDSampler


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sampler = APDSampler.from_included()
    # With checkpoints: APDSampler.from_pretrained("Dream-org/Dream-v0-Instruct-7B", "Qwen/Qwen2.5-0.5B")
    tokenizer = sampler.tokenizer
    sampling = {"max_new_tokens": 32, "do_sample": True, "temperature": 0.5, "return_dict_in_generate": True}

    inputs = tokenizer(EXAMPLE_PROMPTS, return_tensors="pt", padding=True)
    seeds = [100 + row for row in range(len(EXAMPLE_PROMPTS))]
    output = sampler.generate(**inputs, **sampling, seed=seeds)
    answers = [tokenizer.decode(row.tokens, skip_special_tokens=True) for row in output.trace]
    for prompt, answer, steps in zip(EXAMPLE_PROMPTS, answers, output.committed_per_step, strict=True):
        print(f"{prompt}\n {answer}   (tokens per step: {steps})")
    print(f"{int(output.new_tokens.sum())} tokens in {int(output.drafter_forwards.sum())} drafter forwards")

    last = tokenizer(EXAMPLE_PROMPTS[-1], return_tensors="pt")
    alone = sampler.generate(**last, **sampling, seed=seeds[-1])
    assert alone.trace[0].tokens == output.trace[-1].tokens
    print("The last row, decoded alone with its seed, is the same.")


if __name__ == "__main__":
    main()
