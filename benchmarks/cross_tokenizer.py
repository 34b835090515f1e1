"""Proposers with another tokenizer than the included drafter's: trains two, and compares their guesses with the verifier's.

Both are causal LMs of 2 layers × 64 on the included tasks. One reads a byte-level BPE, one a SentencePiece-like Unigram
with byte fallback; the drafter's tokenizer is word level, so no ids agree and words are split at other places.

    python -m benchmarks.cross_tokenizer train --out runs/cross     # about 4 minutes on one CPU core for each
    python -m benchmarks.cross_tokenizer compare --out runs/cross   # tokens per drafter forward with each proposer

Checkpoints are made here and are not part of the repository.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from apd import APDSampler
from apd.included import tasks
from apd.models.text_proposer import TextProposer
from apd.strategies import Checked, LeftToRight

__all__ = ["KINDS", "accuracy", "compare", "load", "main", "train", "train_tokenizer"]

#: Ids of a vocabulary; 256 of them are bytes.
VOCAB_SIZE = 400
#: Positions that are decoded, as in `examples/train_pair.py`.
MAX_CANVAS = 32
PAD, EOS = "<pad>", "<eos>"
#: How often a task is drawn; sums are what is hard.
WEIGHTS = {tasks.ARITHMETIC: 5.0, "sort": 2.0, "shuffle": 2.0}


def byte_level_bpe(texts: Sequence[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A BPE over bytes that splits words as GPT-2 does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def unigram(texts: Sequence[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A Unigram model as SentencePiece makes them: words begin with ▁, and unknown characters fall back to bytes."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    special = [PAD, EOS, "<unk>"]
    learned = vocab_size - 256
    trainer = trainers.UnigramTrainer(
        vocab_size=learned, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    pieces = [tuple(piece) for piece in _model(tokenizer)["vocab"]]
    least = min(score for _, score in pieces)
    pieces += [(f"<0x{byte:02X}>", least - 10) for byte in range(256)]
    tokenizer.model = models.Unigram(pieces, unk_id=2, byte_fallback=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


#: Proposers by name: what trains their tokenizer.
KINDS: dict[str, Callable[..., Tokenizer]] = {"bpe": byte_level_bpe, "unigram": unigram}


def train_tokenizer(kind: str, *, seed: int = 0, count: int = 4000) -> PreTrainedTokenizerFast:
    """A tokenizer of this kind, trained on `count` texts of the tasks."""
    source = texts(random.Random(f"tokenizer {seed}"))
    tokenizer = KINDS[kind]([next(source) for _ in range(count)])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (PAD, EOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def texts(rng: random.Random) -> Iterator[str]:
    """Endless solved tasks of the training split."""
    while True:
        prompt, answer = _draw(rng)
        yield prompt + answer


def train(
    kind: str, out: Path, *, steps: int, rows: int = 48, count: int = 40, learning_rate: float = 3e-3, seed: int = 0
) -> dict[str, float]:
    """Train tokenizer and network of one kind, save them in `out / kind`, and return their `accuracy` on `count` instances."""
    tokenizer = train_tokenizer(kind, seed=seed)
    torch.manual_seed(seed)
    network = _network(tokenizer)
    inner = [p for name, p in network.named_parameters() if p.ndim == 2 and "layers" in name]
    outer = [p for name, p in network.named_parameters() if p.ndim != 2 or "layers" not in name]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(inner, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    rng = random.Random(f"rows {seed}")
    started, average = time.process_time(), 0.0
    for step in range(steps):
        ids, weights = _batch(tokenizer, rng, rows)
        logits = network(input_ids=ids[:, :-1]).logits
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        loss = (losses * weights[:, 1:].flatten()).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min((step + 1) / 50, 1.0, 2 * (steps - step) / steps)
            optimizer.step()
            optimizer.zero_grad()
        average = loss.item() if step == 0 else 0.98 * average + 0.02 * loss.item()
        if step % 100 == 99:
            print(
                f"{kind}: step {step + 1} of {steps}, loss {average:.3f}, "
                f"{(time.process_time() - started) / 60:.1f} CPU minutes",
                file=sys.stderr,
            )
    network.eval()
    network.save_pretrained(out / kind)
    tokenizer.save_pretrained(out / kind)
    return accuracy(network, tokenizer, count)


def load(directory: Path) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    """A trained proposer: its model and its tokenizer.

    Args:
        directory: `out / kind` of `train`.
    Raises:
        FileNotFoundError: nothing was trained there.
    """
    if not (directory / "config.json").exists():
        raise FileNotFoundError(
            f"`directory` must hold a trained proposer, got {directory}. Make it with "
            f"`python -m benchmarks.cross_tokenizer train --out {directory.parent}`."
        )
    model = Qwen2ForCausalLM.from_pretrained(directory).eval().requires_grad_(False)
    return model, PreTrainedTokenizerFast.from_pretrained(directory)


@torch.inference_mode()
def accuracy(network: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int = 40) -> dict[str, float]:
    """The share of right greedy answers to `count` held-out instances of each task."""
    found = {}
    for task in tasks.TASKS:
        asked = tasks.instances(task, count, seed=1)
        inputs = tokenizer([instance.prompt for instance in asked], return_tensors="pt", padding=True)
        output = network.generate(**inputs, max_new_tokens=100, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [tasks.is_right(instance, text) for instance, text in zip(asked, answers, strict=True)]
        found[task] = sum(right) / count
    return found


def compare(
    proposer: TextProposer | str,
    sampler: APDSampler,
    *,
    depth: int,
    count: int,
    chosen: Sequence[str] = tasks.TASKS,
    temperature: float = 0.0,
) -> tuple[int, int, float]:
    """Tokens, drafter forwards and seconds of checked decoding, which gives the drafter's own tokens, one per step.

    Args:
        proposer: what guesses, or the name of a proposer.
        sampler: drafter and tokenizer.
        depth: guesses per step.
        count: held-out instances per task.
        chosen: the tasks.
        temperature: of the drafter; 0 is greedy.
    Raises:
        AssertionError: a token differs from the drafter's own.
    """
    tokens, forwards, seconds = 0, 0, 0.0
    reference = LeftToRight(1)
    for task in chosen:
        prompts = [instance.prompt for instance in tasks.instances(task, count, seed=1)]
        call: dict[str, Any] = {**sampler.tokenizer(prompts, return_tensors="pt", padding=True), "seed": 0}
        call |= {"do_sample": True, "temperature": temperature} if temperature else {}
        call |= {"max_new_tokens": MAX_CANVAS, "return_dict_in_generate": True}
        sought = sampler.generate(**call, strategy=reference)
        started = time.perf_counter()
        found = sampler.generate(**call, strategy=Checked(reference, proposer, depth))
        seconds += time.perf_counter() - started
        assert torch.equal(found.sequences, sought.sequences), (
            f"{task}: checked decoding must give the drafter's tokens"
        )
        tokens, forwards = tokens + int(found.new_tokens.sum()), forwards + int(found.drafter_forwards.sum())
    return tokens, forwards, seconds


def _draw(rng: random.Random) -> tuple[str, str]:
    task = rng.choices(tasks.TASKS, [WEIGHTS.get(task, 1.0) for task in tasks.TASKS])[0]
    instance = next(tasks.stream(task, rng))
    return instance.prompt, instance.answer


def _batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random, rows: int) -> tuple[Tensor, Tensor]:
    """Solved instances, padded on the right, and the weight of each token in the loss: `b n` each."""
    pairs = [_draw(rng) for _ in range(rows)]
    solved = tokenizer([prompt + answer for prompt, answer in pairs])["input_ids"]
    width = max(map(len, solved)) + 1
    ids = torch.full((rows, width), tokenizer.pad_token_id)
    weights = torch.zeros(rows, width)
    for row, (tokens, (prompt, _)) in enumerate(zip(solved, pairs, strict=True)):
        ids[row, : len(tokens) + 1] = torch.tensor([*tokens, tokenizer.eos_token_id])
        weights[row, : len(tokens) + 1] = 0.1  # names of a prompt cannot be foreseen, but its words teach the language
        # A piece may span the end of the prompt, so the answer is found from behind.
        behind = len(tokenizer(prompt)["input_ids"]) - 1
        weights[row, behind : len(tokens) + 1] = 1.0
    return ids, weights


def _network(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    ).train()


def _model(tokenizer: Tokenizer) -> dict[str, Any]:
    return json.loads(tokenizer.to_str())["model"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cross_tokenizer", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("train", "train tokenizers and models"),
        ("accuracy", "answers of the models alone"),
        ("compare", "tokens per drafter forward of checked decoding with their guesses"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--out", type=Path, required=True, help="directory of the checkpoints")
        command.add_argument("--kind", nargs="+", choices=tuple(KINDS), default=list(KINDS))
        if name == "train":
            command.add_argument("--steps", type=int, default=2000)
            command.add_argument("--seed", type=int, default=0)
        if name == "compare":
            command.add_argument("--depth", type=int, default=8, help="guesses per step")
            command.add_argument("--count", type=int, default=16, help="held-out instances per task")
            command.add_argument("--temperature", type=float, default=0.0, help="of the drafter; 0 is greedy")
    return parser


def _print_comparison(options: argparse.Namespace) -> None:
    sampler = APDSampler.from_included()
    proposers: dict[str, TextProposer | str] = {"the verifier, by ids": "verifier"}
    proposers["the verifier, by text"] = TextProposer(sampler.verifier, sampler.tokenizer, sampler.tokenizer)
    for kind in options.kind:
        model, tokenizer = load(options.out / kind)
        proposers[kind] = TextProposer(model, tokenizer, sampler.tokenizer)
        proposers[f"{kind}, not healed"] = TextProposer(model, tokenizer, sampler.tokenizer, heal=False)
    print(f"Temperature {options.temperature:g}, {options.count} held-out instances per task, depth {options.depth}\n")
    print("| proposer | tokens per drafter forward | seconds |")
    print("|---|---|---|")
    for name, proposer in proposers.items():
        tokens, forwards, seconds = compare(
            proposer, sampler, depth=options.depth, count=options.count, temperature=options.temperature
        )
        print(f"| {name} | {tokens / forwards:.2f} | {seconds:.1f} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        if options.command == "compare":
            _print_comparison(options)
            return 0
        for kind in options.kind:
            if options.command == "train":
                found = train(kind, options.out, steps=options.steps, seed=options.seed)
            else:
                found = accuracy(*load(options.out / kind))
            mean = sum(found.values()) / len(found)
            print(f"{kind}: {mean:.2f} of held-out answers right")
            print("    " + ", ".join(f"{task} {share:.2f}" for task, share in found.items()))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
