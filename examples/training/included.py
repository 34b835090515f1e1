"""The included pair: its tasks as training rows, its tokenizer and its sizes.

1. The drafter first learns to read and answer as a causal language model.
2. Then it sees both ways and learns to fill masks, with shifted logits (token i is predicted at position i - 1, as in
   Dream). Half of the rows mask everything from a random frontier on, the states of left-to-right decoding; the others
   mask at random, the states of any-order decoding. A quarter of the rows end inside the answer, since a decoding
   window may do so.
3. The verifier, a causal model many times smaller, is trained for a few minutes only: it has to be weaker than the
   drafter, else the pair would not show the effect of parallel decoding.

A block-causal drafter, as in Fast-dLLM v2, sees a token's own block and the blocks before it, so the keys of finished blocks
can be kept without error. It has the shape of the included drafter and starts from its weights (Fast-dLLM v2 starts from a
trained causal model), and the included verifier serves it.
"""

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from apd import APDSampler
from apd.included import DRAFTER_DIR, tasks
from training.batches import Example, RowSource, Shape
from training.networks import Recipe
from training.table import SETTINGS, measure, print_sizes, print_table

PACKAGE_DIR = DRAFTER_DIR.parent
SHAPE = Shape(row=60, canvas=32, longest_row=53, longest_answer=21)

# How often a task is drawn in the first and in the second half of the training; hard tasks are drawn more often.
TASK_WEIGHTS = {
    "copy": (0.5, 0.4),
    "reverse": (0.7, 0.5),
    "sort": (1.5, 2.0),
    "shuffle": (1.5, 2.0),
    "replace_index": (1.0, 0.8),
    "replace_random": (1.5, 3.0),
    "insert_index": (1.0, 0.8),
    "insert_random": (1.5, 2.5),
    "remove_index": (1.0, 0.8),
    "remove_random": (1.0, 0.8),
    tasks.ARITHMETIC: (2.0, 5.0),
}

DRAFTER = Recipe(layers=4, width=192, heads=6, hidden=512, rows=64, causal_steps=2000, masked_steps=15600)
# Starts from the included drafter; a step teaches two or three blocks of each row.
BLOCK_DRAFTER = replace(DRAFTER, rows=32, causal_steps=0, masked_steps=3600, learning_rate=1.5e-3)
VERIFIER = Recipe(layers=2, width=32, heads=2, hidden=96, rows=64, causal_steps=2500, masked_steps=0)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, space included; decoding gives back the text exactly."""
    vocabulary = {token: i for i, token in enumerate(tasks.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(tasks.TOKEN_PATTERN), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        mask_token="<mask>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def row_source(tokenizer: PreTrainedTokenizerFast, seed: int) -> RowSource:
    """Fresh instances of the tasks at every step."""
    token_id = {token: i for i, token in enumerate(tasks.VOCABULARY)}

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer.backend_tokenizer.encode(text).ids
        return ids

    def examples(rng: random.Random, count: int, half: int) -> Iterator[Example]:
        for task in rng.choices(tasks.TASKS, [TASK_WEIGHTS[task][half] for task in tasks.TASKS], k=count):
            instance = next(tasks.stream(task, rng))
            newcomer = token_id[instance.newcomer] if instance.newcomer else -1
            yield Example(encode(instance.prompt), encode(instance.answer), newcomer, task == tasks.ARITHMETIC)

    return RowSource(examples, SHAPE, token_id["<pad>"], token_id["<eos>"], seed)


def content() -> Tensor:
    """`v` bool, the tokens that carry an answer: names and numbers."""
    return torch.tensor([token.strip() in tasks.NAMES or token.strip().isdigit() for token in tasks.VOCABULARY])


def print_tables(drafter: Path, verifier: Path, count: int) -> None:
    """Accuracy and tokens per forward, greedy, task by task; without a verifier, of the included one."""
    if not verifier.exists():
        verifier = PACKAGE_DIR / "verifier"
    sampler = APDSampler.from_pretrained(str(drafter), str(verifier))
    print(
        f"Greedy, {count} held-out instances per task, {SHAPE.canvas} new tokens: accuracy @ tokens per drafter forward"
    )
    print("(of the verifier alone: per verifier forward)\n")

    def rows() -> Iterator[tuple[str, list]]:
        for task in tasks.TASKS:
            instances = tasks.instances(task, count, seed=1)
            prompts = [instance.prompt for instance in instances]

            def is_right(i: int, text: str, instances: list[tasks.Instance] = instances) -> bool:
                return tasks.is_right(instances[i], text)

            yield task, [measure(sampler, prompts, is_right, SHAPE.canvas, setting) for setting in SETTINGS.values()]

    print_table("task", rows(), total=True)
    print_sizes(sampler, drafter, verifier)
