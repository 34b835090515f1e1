"""Measures settings on prompts and answers of your own.

Runs on the included pair in seconds: python examples/measure.py
With your pair, and a file of lines {"prompt": "...", "answer": "..."}:

    python examples/measure.py --data lines.jsonl --max-new-tokens 256 \\
        --drafter Dream-org/Dream-v0-Instruct-7B --verifier Qwen/Qwen2.5-0.5B \\
        --device-map cuda left-to-right:1 apd:R=0.3 apd:R=0.5 threshold:0.9

docs/evaluation.md says what counts as right and what the intervals tell.
"""

import argparse
from pathlib import Path

from training.own import Line, lines_of

from apd import APDSampler
from apd.included import DRAFTER_DIR, VERIFIER_DIR, tasks
from apd.strategies.registry import parse

SETTINGS = ["left-to-right:1", "apd:R=0", "apd:R=0.5", "apd:R=0.5,tau=0.5", "apd:R=0.9", "threshold:0.9"]


def row(sampler, lines, setting, **options):
    """Share of right answers with its 95 % interval, and tokens per forward, of all lines together."""
    answers = list(sampler.generate_many([line.prompt for line in lines], strategy=setting, **options))
    pairs = [(one.text.split(), line.answer.split()) for one, line in zip(answers, lines, strict=True)]
    right, n, z2 = sum(words[-len(last) :] == last for words, last in pairs), len(lines), 1.96**2
    centre = (right + z2 / 2) / (n + z2)  # Wilson's interval: wide where lines are few, even if all are right
    half = (z2 * (right * (n - right) / n + z2 / 4)) ** 0.5 / (n + z2)
    interval = f"[{max(centre - half, 0):.1%}, {min(centre + half, 1):.1%}]"
    tokens = sum(len(one.tokens) for one in answers)
    forwards = sum(one.drafter_forwards or one.verifier_forwards for one in answers)
    return f"{setting:<28} {right / n:6.1%} {interval:<18}{tokens / forwards:19.2f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", default=SETTINGS, help="`apd generate --strategy list` has their names")
    parser.add_argument("--data", type=Path, metavar="FILE", help="default: 24 held-out stories of the included pair")
    parser.add_argument("--drafter", default=str(DRAFTER_DIR))
    parser.add_argument("--verifier", default=str(VERIFIER_DIR))
    parser.add_argument("--device-map")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    given = parser.parse_args()
    sizes = {"batch_size": given.batch_size, "max_new_tokens": given.max_new_tokens}
    lines = [Line(each.prompt, each.answer) for each in tasks.instances(tasks.ARITHMETIC, 24, seed=1)]
    try:
        if min(sizes.values()) < 1:
            raise ValueError(f"`--batch-size` and `--max-new-tokens` must be at least 1, got {sizes}.")
        settings = [parse(setting).spec for setting in given.settings]
        lines = lines_of(given.data) if given.data else lines
        sampler = APDSampler.from_pretrained(given.drafter, given.verifier, device_map=given.device_map)
    except (ValueError, OSError) as error:
        raise SystemExit(f"measure.py: error: {error}") from None
    print(f"{'setting':<28} {f'right, of {len(lines)} [95 %]':<26}tokens per forward")
    for setting in settings:
        print(row(sampler, lines, setting, do_sample=False, **sizes), flush=True)


if __name__ == "__main__":
    main()
