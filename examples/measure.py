"""Measures settings on prompts and answers of your own. Runs on the included pair in seconds: python examples/measure.py

The price of speed depends on the task. With a file of lines {"prompt": ..., "answer": ...} and a pair of yours:

    python examples/measure.py --data lines.jsonl --drafter Dream-org/Dream-v0-Instruct-7B --verifier Qwen/Qwen2.5-0.5B \\
        --device-map cuda --max-new-tokens 256 left-to-right:1 apd:R=0.3 apd:R=0.5 apd:R=0.5,tau=0.5 threshold:0.9

An answer is right if it ends with the line's, white space aside. The standard error of a share says which differences count.
"""

import argparse
import json
from pathlib import Path

from apd import APDSampler
from apd.included import DRAFTER_DIR, VERIFIER_DIR, tasks

SETTINGS = ["left-to-right:1", "apd:R=0", "apd:R=0.5", "apd:R=0.5,tau=0.5", "apd:R=0.9", "threshold:0.9"]


def row(sampler, lines, setting, **options):
    """Share of right answers with its standard error, and tokens per drafter forward, of all lines together."""
    answers = list(sampler.generate_many([line["prompt"] for line in lines], strategy=setting, **options))
    pairs = zip(answers, lines, strict=True)
    right = sum(answer.text.strip().endswith(line["answer"].strip()) for answer, line in pairs)
    guess = (right + 2) / (len(lines) + 4)  # Agresti and Coull: no error of 0 where all are right
    error = (guess * (1 - guess) / (len(lines) + 4)) ** 0.5
    tokens, forwards = (
        sum(len(answer.tokens) for answer in answers),
        sum(answer.drafter_forwards for answer in answers),
    )
    return f"{setting:<24} {right / len(lines):6.1%} ± {error:.1%}   {tokens / forwards:5.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "settings", nargs="*", default=SETTINGS, help="short names of strategies, see docs/generate.md"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="default: 24 held-out stories of the included pair")
    parser.add_argument("--drafter", default=str(DRAFTER_DIR))
    parser.add_argument("--verifier", default=str(VERIFIER_DIR))
    parser.add_argument("--device-map")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    arguments = parser.parse_args()
    if arguments.data is None:
        lines = [
            {"prompt": each.prompt, "answer": each.answer} for each in tasks.instances(tasks.ARITHMETIC, 24, seed=1)
        ]
    else:
        lines = [json.loads(line) for line in arguments.data.read_text("utf-8").splitlines()]
    sampler = APDSampler.from_pretrained(arguments.drafter, arguments.verifier, device_map=arguments.device_map)
    print(f"{'setting':<24} right, of {len(lines)}   tokens per drafter forward")
    options = {"batch_size": arguments.batch_size, "max_new_tokens": arguments.max_new_tokens}
    for setting in arguments.settings:
        print(row(sampler, lines, setting, **options), flush=True)


if __name__ == "__main__":
    main()
