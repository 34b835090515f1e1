r"""Holes in antibodies: released weights, several ways to decode.

    pip install --no-deps antiberty==0.1.3
    python -m benchmarks.real_weights > benchmarks/results/real_weights.md

AntiBERTy (Ruffolo, Gray, Sulam 2021, arXiv:2112.07782), a BERT of 26 million parameters that `examples/antibody.py` converts, fills
four kinds of holes in up to four chains: the one of the example, and others that the model samples from it by masking every third
residue (temperature 1, fixed seeds). A small causal LM over residues, the verifier, is trained before that on chains that the model
samples itself; it has seen relatives of every chain here.

- *equal*: chains whose residues are those of the reference: for thresholds most confident first, for checked decoding the order
  that it checks, else left to right. *as left to right*: those whose residues are as in that order.
- *pass @ canvases*: residues per pass of the drafter, and canvases of a chain per pass.
- *log p*: mean pseudo-log-likelihood of a filled residue in nats, each predicted from all others; behind it the difference from left
  to right.
- *residues/s*: one torch thread, one chain at a time; depends on the machine.
"""

from __future__ import annotations

import argparse
import math
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from apd.sampler import APDSampler

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from antibody import EXAMPLE, convert

LTR, CONFIDENT = "left-to-right:1", "confidence:1"
STEPS = 200  # of training the verifier

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
    ("checked:K=4", LTR),
    ("checked:K=4,c=0.9", LTR),
)

#: Kinds of holes, and chains of each: about twenty minutes of one core in all.
KINDS = {"a loop of 20": 4, "every third residue": 4, "60 at the end": 1, "all but 12": 1}


@dataclass
class Counts:
    """What a strategy made of the chains."""

    equal: int = 0
    as_left_to_right: int = 0
    chains: int = 0
    residues: int = 0
    passes: int = 0
    rows: int = 0
    logp: float = 0.0
    seconds: float = 0.0

    def cells(self, baseline: Counts) -> str:
        """The cells of a line; `baseline` is left to right."""
        logp, its = (each.logp / each.chains for each in (self, baseline))
        return (
            f"{self.equal} of {self.chains} | {self.as_left_to_right} of {self.chains} | "
            f"{self.residues / self.passes:.1f} @ {self.rows / self.passes:.1f} | {logp:.3f} ({logp - its:+.3f}) | "
            f"{self.residues / self.seconds:.1f}"
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


class PseudoLikelihood:
    """Mean log-probability of residues, each predicted from all others: nats. Chains are computed once."""

    def __init__(self, sampler: APDSampler) -> None:
        self.drafter, self.known = sampler.drafter, dict[tuple[int, ...], float]()

    @torch.no_grad()
    def __call__(self, ids: list[int], columns: list[int]) -> float:
        key = (*ids, -1, *columns)
        if key not in self.known:
            rows: Tensor = torch.tensor([ids]).repeat(len(columns), 1)
            at = torch.arange(len(columns)), torch.tensor(columns)
            tokens = rows[at]
            rows[at] = self.drafter.mask_token_id
            logits = self.drafter.model(rows, attention_mask=torch.ones_like(rows)).logits[at]
            logits[:, :5] = -torch.inf  # special tokens are never drawn
            self.known[key] = float(logits.log_softmax(-1).gather(1, tokens[:, None]).mean())
        return self.known[key]


def sampled_chains(sampler: APDSampler, count: int) -> Tensor:
    """Chains that the model samples, 16 at a time, by filling two fifths of an earlier one anew: `count l` int64."""
    found = [sampler.tokenizer(EXAMPLE[1])["input_ids"]]
    mask, last = sampler.drafter.mask_token_id, len(found[0]) - 1
    for i in tqdm(range(math.ceil(count / 16)), desc="chains for the verifier", disable=None):
        base = found[(5 * i) % len(found)]
        masked = [mask if 0 < c < last and (c * 7 + i) % 5 < 2 else token for c, token in enumerate(base)]
        batch = torch.tensor([masked] * 16)
        settings: dict[str, Any] = {"strategy": "left-to-right:4", "do_sample": True, "top_k": 0, "eos_token_id": None}
        found += sampler.generate(batch, attention_mask=torch.ones_like(batch), seed=i, **settings).tolist()
    return torch.tensor(found[1 : count + 1])


def train_verifier(sampler: APDSampler, count: int) -> Qwen2ForCausalLM:
    """A causal LM of two layers over residues, trained on `count` chains that the model samples itself."""
    torch.manual_seed(0)
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = Qwen2Config(
        vocab_size=sampler.drafter.vocab_size,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        **special,
    )
    model, rows = Qwen2ForCausalLM(config), sampled_chains(sampler, count)
    held_out, rows = rows[-max(1, count // 8) :], rows[: -max(1, count // 8)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    best, kept = math.inf, model.state_dict()
    for step in tqdm(range(STEPS), desc="verifier", disable=None):
        batch = rows[torch.randint(len(rows), (32,))]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 9 and (now := _loss(model, held_out)) < best:
            best, kept = now, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(kept)
    print(f"The verifier: {count} chains, {best:.2f} nats per residue of held-out ones.", flush=True)
    return model.eval()


@torch.no_grad()
def _loss(model: Qwen2ForCausalLM, rows: Tensor) -> float:
    return float(model(input_ids=rows, labels=rows).loss)


def measure(
    sampler: APDSampler,
    found: list[list[int]],
    strategies: tuple[tuple[str, str], ...],
    kind: str,
    temperature: int,
) -> Iterator[tuple[str, Counts, Counts]]:
    """Strategy, its counts, and those of left to right."""
    made: dict[str, list[list[int]]] = {}
    logp, baseline = PseudoLikelihood(sampler), Counts()
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
            counts.as_left_to_right += filled == made[LTR][i]
            counts.residues += len(columns)
            counts.passes += int(output.drafter_forwards[0])
            counts.rows += int(output.canvases[0])
            counts.logp += logp(filled, columns)
        baseline = counts if strategy == LTR else baseline
        yield strategy, counts, baseline


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_weights",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--holes", nargs="+", choices=KINDS, default=list(KINDS), help="kinds of holes (default: all)")
    parser.add_argument("--chains", type=int, help="chains of each kind (default: 4, 4, 1 and 1)")
    parser.add_argument("--temperature", type=int, nargs="+", choices=(0, 1), default=[0, 1])
    parser.add_argument(
        "--verifier",
        type=int,
        default=64,
        metavar="CHAINS",
        help="chains that it is trained on (default 64); 0: none",
    )
    parser.add_argument("--model", type=Path, default=Path.home() / ".cache" / "apd" / "antiberty")
    arguments = parser.parse_args()
    disable_progress_bar()
    torch.set_num_threads(1)
    title, _, text = (__doc__ or "").partition("\n\n")
    print(f"# {title}\n\n{textwrap.dedent(text)}")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, {date.today()}.", flush=True)
    sampler = APDSampler.from_pretrained(str(convert(arguments.model)), mixture_weight=1.0)
    most = {kind: arguments.chains or KINDS[kind] for kind in arguments.holes}
    found, strategies, started = chains(sampler, max(most.values())), ROWS, time.process_time()
    if arguments.verifier:
        sampler = APDSampler(sampler.drafter, train_verifier(sampler, arguments.verifier), sampler.tokenizer)
        strategies = ROWS + WITH_VERIFIER
    for temperature in arguments.temperature:
        print(f"\n## Temperature {temperature}\n")
        print("| hole | decoding | equal | as left to right | pass @ canvases | log p | residues/s |")
        print("|---|---|---|---|---|---|--:|")
        for kind, count in most.items():
            for strategy, counts, baseline in measure(sampler, found[:count], strategies, kind, temperature):
                print(f"| {kind} | `{strategy}` | {counts.cells(baseline)} |", flush=True)
    print(f"\n{(time.process_time() - started) / 60:.0f} minutes of one core.")


if __name__ == "__main__":
    main()
