r"""Holes in antibodies: released weights, several ways to decode.

    pip install --no-deps antiberty==0.1.3
    python -m benchmarks.real_weights > benchmarks/results/real_weights.md

AntiBERTy, converted by `examples/antibody.py`, fills four kinds of holes in eight chains: the one of the example, and seven that
the model samples from it by masking every third residue (temperature 1, fixed seeds). `equal`: chains whose residues are those of
the reference, which draws one residue per pass, left to right; for checked decoding of another order, of that order. `pass`:
residues per forward pass, pooled. `rows`: canvases of a chain per pass. `log p`: mean pseudo-log-likelihood per filled residue, in
nats: each residue predicted from all others. `residues/s`: one torch thread, one chain at a time, and depends on the machine.
With `--verifier`, a small causal LM over residues is trained for some minutes on chains that the model samples itself, and APD
and checked decoding use it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from apd.sampler import APDSampler

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from antibody import EXAMPLE, convert

LTR, CONFIDENT = "left-to-right:1", "confidence:1"

#: Rows of the table: a strategy, and the reference that it is compared with.
ROWS = (
    (LTR, LTR),
    (CONFIDENT, CONFIDENT),
    ("threshold:0.9", CONFIDENT),
    ("threshold:0.7", CONFIDENT),
    ("checked:proposer=drafter", LTR),
    ("checked:proposer=drafter,c=0.9", LTR),
    ("checked:proposer=drafter,c=0.8", LTR),
    ("checked:proposer=drafter/confidence:1", CONFIDENT),
    ("checked:proposer=drafter/threshold:0.9", "threshold:0.9"),
)
WITH_VERIFIER = (
    ("apd:R=0.5", LTR),
    ("apd:R=0.8", LTR),
    ("checked", LTR),
    ("checked:c=0.9", LTR),
)


KINDS = ("a loop of 20", "every third residue", "60 at the end", "all but 12")


@dataclass
class Counts:
    """What a strategy made of the chains."""

    equal: int = 0
    chains: int = 0
    residues: int = 0
    passes: int = 0
    rows: int = 0
    logp: float = 0.0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.equal} of {self.chains} | {self.residues / self.passes:.2f} | {self.rows / self.passes:.2f} | "
            f"{self.logp / self.chains:.3f} | {self.residues / self.seconds:.0f}"
        )


def holes(length: int) -> dict[str, list[int]]:
    """The columns of each kind of hole; column 0 is [CLS]."""
    return {
        "a loop of 20": list(range(97, 117)),
        "every third residue": list(range(3, length + 1, 3)),
        "60 at the end": list(range(length - 59, length + 1)),
        "all but 12": list(range(13, length + 1)),
    }


def chains(sampler: APDSampler, count: int, seed: int = 0) -> list[list[int]]:
    """The chain of the example, and others that the model samples from it: ids with special tokens."""
    ids = sampler.tokenizer(EXAMPLE[1])["input_ids"]
    found = [ids]
    for i in range(1, count):
        masked = [
            sampler.drafter.mask_token_id if 0 < c < len(ids) - 1 and c % 3 == i % 3 else t for c, t in enumerate(ids)
        ]
        made = fill(sampler, masked, LTR, temperature=1, seed=seed + i)
        found.append(made.sequences[0].tolist())
    return found


def fill(sampler: APDSampler, ids: list[int], strategy: str, *, temperature: int, seed: int):  # type: ignore[no-untyped-def]
    prompt = torch.tensor([ids])
    sampling = {"do_sample": True, "top_k": 0} if temperature else {}
    return sampler.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        strategy=strategy,
        seed=seed,
        eos_token_id=None,
        return_dict_in_generate=True,
        **sampling,
    )


@torch.no_grad()
def pseudo_logp(sampler: APDSampler, ids: list[int], columns: list[int]) -> float:
    """Mean log-probability of the residues at these columns, each predicted from all others: nats."""
    rows: Tensor = torch.tensor([ids]).repeat(len(columns), 1)
    at = torch.arange(len(columns)), torch.tensor(columns)
    tokens = rows[at]
    rows[at] = sampler.drafter.mask_token_id
    logits = sampler.drafter.model(rows, attention_mask=torch.ones_like(rows)).logits[at]
    logits[:, :5] = -torch.inf  # special tokens are never drawn
    return float(logits.log_softmax(-1).gather(1, tokens[:, None]).mean())


def train_verifier(sampler: APDSampler, minutes: float, seed: int = 0) -> Qwen2ForCausalLM:
    """A causal LM of two layers over residues, trained on chains that the model samples itself."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=sampler.drafter.vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = Qwen2ForCausalLM(config)
    ids = sampler.tokenizer(EXAMPLE[1])["input_ids"]
    data, end = [ids], time.perf_counter() + 60 * minutes * 0.6
    while time.perf_counter() < end:
        i = len(data)
        base = data[i % max(1, len(data) // 2)]
        masked = [
            sampler.drafter.mask_token_id if 0 < c < len(ids) - 1 and (c * 7 + i) % 5 < 2 else t
            for c, t in enumerate(base)
        ]
        batch = torch.tensor([masked] * 16)
        out = sampler.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            strategy="threshold:0.6",
            do_sample=True,
            top_k=0,
            seed=i,
            eos_token_id=None,
        )
        data += out.tolist()
    rows = torch.tensor(data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    end = time.perf_counter() + 60 * minutes * 0.4
    while time.perf_counter() < end:
        batch = rows[torch.randint(len(rows), (32,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"verifier: {len(rows)} chains, loss {float(loss):.2f} nats per residue", file=sys.stderr)
    return model.eval()


def measure(
    sampler: APDSampler,
    found: list[list[int]],
    strategies: tuple[tuple[str, str], ...],
    kinds: list[str],
    temperature: int,
) -> Iterator[tuple[str, str, Counts]]:
    """Kind of hole, strategy, counts."""
    for kind in kinds:
        made: dict[str, list[list[int]]] = {}
        for strategy, reference in tqdm(strategies, desc=f"{kind}, T {temperature}", disable=None):
            counts = Counts()
            made[strategy] = []
            for i, ids in enumerate(found):
                columns = holes(len(ids) - 2)[kind]
                masked = [sampler.drafter.mask_token_id if c in columns else token for c, token in enumerate(ids)]
                started = time.process_time()
                output = fill(sampler, masked, strategy, temperature=temperature, seed=100 + i)
                counts.seconds += time.process_time() - started
                filled = output.sequences[0].tolist()
                made[strategy].append(filled)
                counts.chains += 1
                counts.equal += filled == made[reference][i]
                counts.residues += len(columns)
                counts.passes += int(output.drafter_forwards[0])
                counts.rows += int(output.canvases[0])
                counts.logp += pseudo_logp(sampler, filled, columns)
            yield kind, strategy, counts


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_weights", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--chains", type=int, default=8)
    parser.add_argument(
        "--holes", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of holes (default: all, hours)"
    )
    parser.add_argument("--temperature", type=int, nargs="+", choices=(0, 1), default=[0, 1])
    parser.add_argument(
        "--verifier", type=float, default=0.0, metavar="MINUTES", help="train a verifier for so long (default: none)"
    )
    parser.add_argument("--model", type=Path, default=Path.home() / ".cache" / "apd" / "antiberty")
    arguments = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    sampler = APDSampler.from_pretrained(str(convert(arguments.model)), mixture_weight=1.0)
    found = chains(sampler, arguments.chains)
    strategies = ROWS
    if arguments.verifier:
        sampler = APDSampler(sampler.drafter, train_verifier(sampler, arguments.verifier), sampler.tokenizer)
        strategies = ROWS + WITH_VERIFIER
    print(
        f"# Holes in antibodies\n\n{(__doc__ or '').split('fills', 1)[0].splitlines()[-1].strip()} fills holes in {arguments.chains} chains.\n"
    )
    for temperature in arguments.temperature:
        print(f"\nTemperature {temperature}\n")
        print("| hole | decoding | equal | pass | rows | log p | residues/s |\n|---|---|---|--:|--:|--:|--:|")
        for kind, strategy, counts in measure(sampler, found, strategies, arguments.holes, temperature):
            print(f"| {kind} | `{strategy}` | {counts} |", flush=True)


if __name__ == "__main__":
    main()
