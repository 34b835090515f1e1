"""Output that obeys a grammar.
Runs on the included pair in seconds: python examples/constrained.py

`prefix_allowed_tokens_fn` says which ids may come next. It acts on drafter and
verifier alike, position by position along the draft, so that many tokens per
step and a grammar go together: every output obeys it, at every temperature.
Here: a list of the given names, each at most once, in any order.
"""

import argparse
import json
import re
from collections.abc import Callable

from torch import Tensor

from apd import APDSampler

NAMES = ["Ada", "Ben", "Cleo", "Dan"]
PROMPT = f"Shuffle this list: {json.dumps(NAMES)}."


def list_of(names: list[str], tokenizer, prompt_length: int) -> Callable[[int, Tensor], list[int]]:
    """Allows ` ["A", "B"]` and then the stop token, every name at most once."""
    opening, between, closing, *ids = tokenizer.convert_tokens_to_ids([' ["', '", "', '"]', *names])

    def allowed(row: int, so_far: Tensor) -> list[int]:
        answer = so_far[prompt_length:].tolist()
        left = [token for token in ids if token not in answer]
        if not answer:
            return [opening]
        if answer[-1] in (opening, between):
            return left
        if answer[-1] in ids:
            return [between, closing] if left else [closing]
        return [tokenizer.eos_token_id]

    return allowed


def obeys(text: str) -> bool:
    if not re.fullmatch(r' \["\w+"(, "\w+")*\]', text):
        return False
    names = json.loads(text)
    return len(names) == len(set(names)) and set(names) <= set(NAMES)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sampler = APDSampler.from_included(mixture_weight=1.0)  # all in one step: fast, and free to repeat a name
    inputs = sampler.tokenizer(PROMPT, return_tensors="pt")
    sampling = {"max_new_tokens": 32, "do_sample": True, "temperature": 1.5, "num_return_sequences": 200, "seed": 0}
    length = inputs["input_ids"].shape[1]
    for title, grammar in (("free", None), ("grammar", list_of(NAMES, sampler.tokenizer, length))):
        sequences = sampler.generate(**inputs, **sampling, prefix_allowed_tokens_fn=grammar)
        texts = sampler.tokenizer.batch_decode(sequences[:, length:], skip_special_tokens=True)
        print(f"{title}: {sum(map(obeys, texts))} of {len(texts)} outputs obey it, for example {texts[0].strip()}")


if __name__ == "__main__":
    main()
