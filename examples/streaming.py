"""Text as it becomes final.
Runs on the included pair in seconds: python examples/streaming.py

Only committed tokens are streamed, and these are never taken back; a step
hands over all it committed at once.
"""

import argparse

from transformers import TextStreamer

from apd import EXAMPLE_PROMPTS, APDSampler


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sampler = APDSampler.from_included()
    tokenizer = sampler.tokenizer

    print("One row, with a streamer of transformers:")
    inputs = tokenizer(EXAMPLE_PROMPTS[3], return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    sampler.generate(**inputs, max_new_tokens=32, streamer=streamer)

    print("\nSeveral rows, chunk by chunk:")
    prompts = EXAMPLE_PROMPTS[2:5]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    texts = [""] * len(prompts)
    for chunk in sampler.stream(**inputs, max_new_tokens=32):
        texts[chunk.row] += chunk.text
        end = ", done" if chunk.done else ""
        print(f"step {chunk.step + 1}, row {chunk.row}: {len(chunk.tokens)} tokens{end}: {chunk.text!r}")
    for prompt, text in zip(prompts, texts, strict=True):
        print(f"{prompt}{text}")


if __name__ == "__main__":
    main()
