"""Train the included pair: the drafter and the verifier in `apd/embedded`.

Why: adaptive parallel decoding needs two trained models with one vocabulary. This script trains such a pair from random
weights on an ordinary CPU, so every figure of the README can be reproduced.

How: both models are small Qwen2 networks on the tasks of `apd.embedded.tasks`, with fresh instances at every step.

1. The drafter first learns to read and answer as a causal language model.
2. Then it sees both ways and learns to fill masks, with shifted logits (token i is predicted at position i - 1, as in
   Dream). Half of the rows mask everything from a random frontier on, the states of left-to-right decoding; the others
   mask at random, the states of any-order decoding. A quarter of the rows end inside the answer, since a decoding
   window may do so.
3. The verifier, a causal model many times smaller, is trained for a few minutes only: it has to be weaker than the
   drafter, else the pair would not show the effect of parallel decoding.

With `--attention block` the drafter is block-causal, as in Fast-dLLM v2: a token sees its own block and the blocks before
it, so the keys of finished blocks can be kept without error. It has the shape of the included drafter and starts from its
weights (Fast-dLLM v2 starts from a trained causal model), and the included verifier serves it.

After an interruption the same command continues from the last checkpoint:

    python examples/train_pair.py                # about 70 minutes on one CPU core
    python examples/train_pair.py --table        # only measure the pair in --out
    python examples/train_pair.py --quick --out pair   # seconds; shows that the script runs
    python examples/train_pair.py --attention block   # about 50 minutes on one loaded core; with --table, only measure
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from apd import APDSampler, Autoregressive, Confidence, LeftToRight, Threshold
from apd.embedded import BLOCK_DRAFTER_DIR, tasks

INCLUDED_PAIR = Path(__file__).parents[1] / "apd" / "embedded"

ROW_LENGTH = 60  # tokens of a training row: prompt and canvas
MAX_CANVAS = 32  # positions that are decoded: answer and the <eos> tail
TAIL_WEIGHT = 0.15  # loss weight of the <eos>s behind the first one

LONGEST_ROW = 53  # tokens of the longest prompt and answer, <eos> included
LONGEST_ANSWER = 21

FAST_DLLM_CODE = "Efficient-Large-Model/Fast_dLLM_v2_7B"  # where Fast-dLLM v2's own modelling code is published
DREAM_CODE = "Dream-org/Dream-v0-Instruct-7B"  # where Dream's own modelling code is published

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


@dataclass(frozen=True)
class Recipe:
    """Shape of a network and how long to train it. `causal_steps` come before the masked ones."""

    layers: int
    width: int
    heads: int
    hidden: int
    rows: int
    causal_steps: int
    masked_steps: int
    learning_rate: float = 2.5e-3

    @property
    def steps(self) -> int:
        return self.causal_steps + self.masked_steps


DRAFTER = Recipe(layers=4, width=192, heads=6, hidden=512, rows=64, causal_steps=2000, masked_steps=15600)
# Starts from the included drafter; a step teaches two or three blocks of each row.
BLOCK_DRAFTER = replace(DRAFTER, rows=32, causal_steps=0, masked_steps=3600, learning_rate=1.5e-3)
VERIFIER = Recipe(layers=2, width=32, heads=2, hidden=96, rows=64, causal_steps=2500, masked_steps=0)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer and training rows
# ---------------------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Rows:
    """A batch of solved instances, right-padded.

    Args:
        ids: `b n`, prompt, answer, <eos>s, padding.
        starts: `b 1`, where the canvas starts, that is the length of the prompt.
        tails: `b 1`, where the tail starts, that is behind the first <eos>.
        ends: `b 1`, where the canvas ends; the same as `tails` in a row that ends inside the answer.
        newcomers: `b 1`, token of the new name, -1 if there is none.
        is_story: `b 1` bool, whether the row is arithmetic.
    """

    ids: Tensor
    starts: Tensor
    tails: Tensor
    ends: Tensor
    newcomers: Tensor
    is_story: Tensor


class RowSource:
    """Draws training rows; a function of (seed, step) only, so that a resumed run sees the same data."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self.encode = tokenizer.backend_tokenizer.encode
        self.token_id = {token: i for i, token in enumerate(tasks.VOCABULARY)}
        self.seed = seed

    def draw(self, step: int, count: int, half: int, cut: float = 0.0, block_size: int | None = None) -> Rows:
        """`count` rows; `half` (0 or 1) chooses the task weights.

        A share `cut` ends inside the answer. With a `block_size` all rows end with the block of the first <eos> instead.
        """
        rng = random.Random(f"rows {self.seed} {step}")
        chosen = rng.choices(tasks.TASKS, [TASK_WEIGHTS[task][half] for task in tasks.TASKS], k=count)
        pad, eos = self.token_id["<pad>"], self.token_id["<eos>"]
        length = LONGEST_ROW + -LONGEST_ROW % block_size if block_size else ROW_LENGTH
        ids, bounds = [], []
        for task in chosen:
            instance = next(tasks.stream(task, rng))
            prompt = self.encode(instance.prompt).ids
            answer = [*self.encode(instance.answer).ids, eos]
            room = min(MAX_CANVAS, ROW_LENGTH - len(prompt))
            if block_size:
                canvas = len(answer) + -(len(prompt) + len(answer)) % block_size
            elif rng.random() < cut:
                canvas = rng.randint(1, len(answer) - 1)
            else:
                canvas = room if rng.random() < 0.6 else rng.randint(len(answer), room)
            row = prompt + (answer + [eos] * canvas)[:canvas]
            newcomer = self.token_id[instance.newcomer] if instance.newcomer else -1
            bounds.append((len(prompt), min(len(prompt) + len(answer), len(row)), len(row), newcomer))
            ids.append(row + [pad] * (length - len(row)))
        columns = torch.tensor(bounds).split(1, dim=1)
        is_story = torch.tensor([[task == tasks.ARITHMETIC] for task in chosen])
        return Rows(torch.tensor(ids), *columns, is_story)


def mask_rows(rows: Rows, is_content: Tensor, generator: torch.Generator, half: int) -> tuple[Tensor, Tensor]:
    """Choose what to mask; returns the mask and the loss weights, both `b n`.

    The second half of the training emphasises the weak points of the first half. Stories are masked from a frontier on,
    because otherwise a sum is visible in the next equation. A new name without a fixed place that is still missing, with
    one or two masks left, weighs four times as much: the model must notice there that the name is missing. (The weight
    depends on visible tokens only, so the learned probabilities stay right.)

    Args:
        rows: the solved rows.
        is_content: `v` bool, the tokens that carry the answer (names and numbers); the others are punctuation, which
            confidence order uncovers first.
        generator: source of randomness.
        half: 0 or 1, of the training.
    """
    b, n = rows.ids.shape

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    position = torch.arange(n).expand(b, n)
    canvas = (position >= rows.starts) & (position < rows.ends)
    answer = canvas & (position < rows.tails)
    tail = canvas & ~answer
    content = answer & is_content[rows.ids]

    # Left to right: everything from a uniform frontier on, the nearest tokens weighing most.
    frontier = rows.starts + (uniform(b, 1) * (rows.tails - rows.starts)).long()
    behind_frontier = canvas & (position >= frontier)
    frontier_weight = 1 / (1 + (position - frontier).clamp(min=0) / 4)

    # Any order: k of the content tokens, k uniform; punctuation and tail all visible, all masked, or at the same rate.
    num_content = content.sum(1, keepdim=True)
    k = 1 + (uniform(b, 1) * num_content).long()
    rate = k / num_content.clamp(min=1)
    order = uniform(b, n)
    # In confidence order a name with a random place stays masked to the last: such states are drawn often.
    hide_newcomer = content & (rows.ids == rows.newcomers) & (uniform(b, 1) < 0.4)
    order = torch.where(content, order - hide_newcomer.float(), 2.0)
    masked_content = content & (order.argsort(1).argsort(1) < k)
    punctuation_rate = torch.where(uniform(b, 1) < 0.5, 0.0, rate)
    masked_punctuation = answer & ~content & (uniform(b, n) < punctuation_rate)
    tail_kind = uniform(b, 1)
    tail_rate = torch.where(tail_kind < 0.5, 0.0, torch.where(tail_kind < 0.75, 1.0, rate))
    masked_tail = tail & (uniform(b, n) < tail_rate)
    any_order = masked_content | masked_punctuation | masked_tail

    is_cut = rows.ends == rows.tails
    share = torch.where(is_cut, 0.7, 0.4)
    if half == 1:
        share = torch.where(rows.is_story, 0.8, share)
    left_to_right = (uniform(b, 1) < share) | (num_content == 0)
    masked = torch.where(left_to_right, behind_frontier, any_order)
    weight = torch.where(left_to_right, frontier_weight, 1.0) * torch.where(tail, TAIL_WEIGHT, 1.0)
    weight = normalise(weight * masked)
    if half == 1:
        is_missing = (masked & (rows.ids == rows.newcomers)).any(1, keepdim=True)
        is_late = (masked & content).sum(1, keepdim=True) <= 2
        weight = weight * torch.where(is_missing & is_late & ~is_cut, 4.0, 1.0)
    return masked, weight


@dataclass(frozen=True)
class Batch:
    """What a network reads in one step, and what it should say.

    Args:
        inputs: `b n`, token ids.
        targets: `b m`, the token that each of the first m columns should predict.
        weights: `b m`, loss weights of the targets.
        visible: `b 1 n n` bool, which columns (last) a column sees.
        positions: `b n` or `1 n`, position of each column in its row.
    """

    inputs: Tensor
    targets: Tensor
    weights: Tensor
    visible: Tensor
    positions: Tensor


def causal_batch(rows: Rows) -> Batch:
    """Rows as they are; every token sees those before it."""
    n = rows.ids.shape[1]
    position = torch.arange(n)
    canvas = (position >= rows.starts) & (position < rows.ends)
    weights = normalise(canvas * torch.where(position < rows.tails, 1.0, TAIL_WEIGHT))
    visible = (position < rows.ends)[:, None, None, :] & torch.ones(n, n).tril().bool()
    return Batch(rows.ids, rows.ids[:, 1:], weights[:, 1:], visible, position[None])


def full_batch(rows: Rows, mask: int, noise: Callable[[Rows], tuple[Tensor, Tensor]]) -> Batch:
    """Rows with masks (id `mask`) that `noise` chooses, see `mask_rows`; every token sees all others."""
    n = rows.ids.shape[1]
    position = torch.arange(n)
    masked, weights = noise(rows)
    visible = (position < rows.ends)[:, None, None, :].expand(-1, 1, n, -1)
    inputs = torch.where(masked, mask, rows.ids)
    return Batch(inputs, rows.ids[:, 1:], weights[:, 1:], visible, position[None])


def block_batch(rows: Rows, mask: int, noise: Callable[[Rows], tuple[Tensor, Tensor]], block_size: int) -> Batch:
    """All blocks of the answers with masks, each behind its finished blocks, in one pass.

    A row is there twice: `clean`, then its answer's blocks once more, `noisy`. Clean columns see the clean columns up to
    their block's end; noisy ones see the clean blocks before theirs, and their own noisy block. This is what decoding
    shows them. The first token of a block is predicted at the last clean column before it.

    Args:
        rows: rows that end with a block.
        mask: id of the mask token.
        noise: as in `full_batch`; it sees every noisy block as a row of its own.
        block_size: tokens per block, counted from the start of the row.
    """
    b, n = rows.ids.shape
    num_clean = (LONGEST_ROW - 1) // block_size * block_size
    num_blocks = (LONGEST_ANSWER + 2 * (block_size - 1)) // block_size
    first = rows.starts // block_size * block_size
    clean = torch.arange(num_clean).expand(b, -1)
    noisy = first + torch.arange(num_blocks * block_size)
    positions = torch.cat([clean, noisy], 1)

    ids = F.pad(rows.ids, (0, LONGEST_ROW + num_blocks * block_size - n))  # any value: it is never seen, and weighs 0
    block_starts = noisy[:, ::block_size].reshape(-1, 1)

    def in_block(bounds: Tensor) -> Tensor:
        return (bounds.repeat_interleave(num_blocks, 0) - block_starts).clamp(0, block_size)

    blocks = Rows(
        ids=ids.gather(1, noisy).view(-1, block_size),
        starts=in_block(rows.starts),
        tails=in_block(rows.tails),
        ends=in_block(rows.ends),
        newcomers=rows.newcomers.repeat_interleave(num_blocks, 0),
        is_story=rows.is_story.repeat_interleave(num_blocks, 0),
    )
    masked, weights = noise(blocks)
    weights = torch.where(blocks.ends > 0, weights, 0.0)  # a short answer has fewer blocks
    inputs = torch.cat([ids[:, :num_clean], torch.where(masked, mask, blocks.ids).view(b, -1)], 1)

    # Column r predicts token r + 1; weights of the first tokens of blocks belong to the clean column before.
    weights = weights.view(b, num_blocks, block_size)
    next_weights = torch.zeros(b, positions.shape[1])
    next_weights[:, num_clean:] = F.pad(weights[:, :, 1:], (0, 1)).flatten(1)
    last_before = noisy[:, ::block_size].sub(1).clamp(0, num_clean - 1)
    next_weights.scatter_add_(1, last_before, weights[:, :, 0])
    targets = ids.gather(1, positions + 1)

    block = positions // block_size
    is_noisy = torch.arange(positions.shape[1]) >= num_clean
    same, earlier = block[:, :, None] == block[:, None, :], block[:, :, None] > block[:, None, :]
    visible = torch.where(is_noisy, is_noisy[:, None] & same, earlier | (~is_noisy[:, None] & same))
    visible = visible & (positions < rows.ends)[:, None, :]
    return Batch(inputs, targets, next_weights, visible[:, None], positions)


def normalise(weights: Tensor) -> Tensor:
    """Scale the weights of each row to a sum of 1."""
    return weights / weights.sum(1, keepdim=True)


# ---------------------------------------------------------------------------------------------------------------------
# Networks and training
# ---------------------------------------------------------------------------------------------------------------------


def build_network(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, is_causal: bool) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=recipe.hidden,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    config.is_causal = is_causal
    return Qwen2ForCausalLM(config)


def loss_of(
    network: Qwen2ForCausalLM, inputs: Tensor, targets: Tensor, weights: Tensor, visible: Tensor, positions: Tensor
) -> Tensor:
    """Weighted cross-entropy in nats, summed within rows, averaged over them; for the arguments see `Batch`."""
    bias = torch.where(visible, 0.0, -1e9)
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
        logits = network(input_ids=inputs, attention_mask=bias, position_ids=positions).logits
    logits = logits[:, : targets.shape[1]].float()
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return (losses * weights.flatten()).sum() / len(inputs)


def learning_rate_factor(step: int, steps: int) -> float:
    """Short warm-up, then constant, then linear to zero over the second half, which gives much of the accuracy."""
    return min((step + 1) / 50, 1.0, 2 * (steps - step) / steps)


def build_optimizers(network: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, biases and norms."""
    named = list(network.named_parameters())
    inner = [p for name, p in named if p.ndim == 2 and "layers" in name]
    outer = [p for name, p in named if p.ndim != 2 or "layers" not in name]
    return [
        torch.optim.Muon(inner, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def save_checkpoint(path: Path, network: torch.nn.Module, optimizers: list[torch.optim.Optimizer], step: int) -> None:
    tensors = {f"network {name}": value for name, value in network.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer {i} {j} {key}": value for key, value in state.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, f"{path}.tmp", {"step": str(step)})
    os.replace(f"{path}.tmp", path)  # never a half-written checkpoint


def load_checkpoint(path: Path, network: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> int:
    """Restore both and return the number of steps done; 0 if there is no checkpoint."""
    if not path.exists():
        return 0
    weights: dict[str, Tensor] = {}
    states: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    for name, value in load_file(path).items():
        kind, *key = name.split(" ")
        if kind == "network":
            weights[key[0]] = value
        else:
            states[int(key[0])].setdefault(int(key[1]), {})[key[2]] = value
    network.load_state_dict(weights)
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    with safe_open(path, "pt") as file:
        return int(file.metadata()["step"])


def train(
    network: Qwen2ForCausalLM,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    checkpoint: Path,
    save_every: int,
    title: str,
    block_size: int | None = None,
) -> None:
    """Train `network` in place, from the last checkpoint if there is one; block-causal with a `block_size`."""
    device = next(network.parameters()).device
    optimizers = build_optimizers(network, recipe.learning_rate)
    done = load_checkpoint(checkpoint, network, optimizers)
    source = RowSource(tokenizer, seed)
    is_content = torch.tensor([token.strip() in tasks.NAMES or token.strip().isdigit() for token in tasks.VOCABULARY])
    network.set_attn_implementation(
        "eager"
    )  # at 60 tokens the backward pass of torch's CPU kernel takes as long as everything else
    loss_function: Callable[..., Tensor] = torch.compile(loss_of) if can_compile(device) else loss_of

    network.train()
    progress = tqdm(range(done, recipe.steps), initial=done, total=recipe.steps, desc=title, mininterval=5)
    average = 0.0
    for step in progress:
        is_masked_phase = step >= recipe.causal_steps
        half = 2 * step // recipe.steps
        if is_masked_phase:
            rows = source.draw(step, recipe.rows, half, cut=0.25, block_size=block_size)
            generator = torch.Generator().manual_seed(seed * 10**9 + step)
            noise = partial(mask_rows, is_content=is_content, generator=generator, half=half)
            if block_size:
                batch = block_batch(rows, tokenizer.mask_token_id, noise, block_size)
            else:
                batch = full_batch(rows, tokenizer.mask_token_id, noise)
        else:
            batch = causal_batch(source.draw(step, recipe.rows, half))

        loss = loss_function(network, *(getattr(batch, field.name).to(device) for field in fields(batch)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * learning_rate_factor(step, recipe.steps)
            optimizer.step()
            optimizer.zero_grad()

        average = loss.item() if step == done else 0.99 * average + 0.01 * loss.item()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{average:.3f}")
        if (step + 1) % save_every == 0 or step + 1 == recipe.steps:
            save_checkpoint(checkpoint, network, optimizers, step + 1)
    network.eval()


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here; on a CPU it needs a C++ compiler."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception:  # whatever a missing or broken compiler raises
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Export
# ---------------------------------------------------------------------------------------------------------------------


def export(
    network: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    is_drafter: bool,
    block_size: int | None = None,
) -> None:
    """Write bfloat16 weights, tokenizer and config; a drafter's config is Dream's or Fast-dLLM v2's, field by field."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    tokenizer_config = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizer_config["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that transformers 4 and 5 both know
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2, sort_keys=True) + "\n")
    weights = {name: value.detach().cpu().bfloat16().contiguous() for name, value in network.state_dict().items()}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    c = network.config
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": c.eos_token_id,
        "eos_token_id": c.eos_token_id,
        "hidden_act": "silu",
        "hidden_size": c.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": c.intermediate_size,
        "max_position_embeddings": c.max_position_embeddings,
        "max_window_layers": c.num_hidden_layers,
        "model_type": "qwen2",
        "num_attention_heads": c.num_attention_heads,
        "num_hidden_layers": c.num_hidden_layers,
        "num_key_value_heads": c.num_key_value_heads,
        "pad_token_id": c.pad_token_id,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": c.vocab_size,
    }
    if block_size:
        code = f"{FAST_DLLM_CODE}--modeling.Fast_dLLM_Qwen"
        config |= {
            "architectures": ["Fast_dLLM_QwenForCausalLM"],
            "auto_map": {
                "AutoConfig": f"{FAST_DLLM_CODE}--configuration.Fast_dLLM_QwenConfig",
                "AutoModel": f"{code}Model",
                "AutoModelForCausalLM": f"{code}ForCausalLM",
            },
            "bd_size": block_size,
            "mask_token_id": tokenizer.mask_token_id,
            "model_type": "Fast_dLLM_Qwen",
        }
    elif is_drafter:
        config |= {
            "architectures": ["DreamModel"],
            "auto_map": {
                "AutoConfig": f"{DREAM_CODE}--configuration_dream.DreamConfig",
                "AutoModel": f"{DREAM_CODE}--modeling_dream.DreamModel",
            },
            "mask_token_id": tokenizer.mask_token_id,
            "model_type": "Dream",
            "use_mrope": False,
        }
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


#: The settings that are compared, as arguments of `generate`. Rivals decode in their own order.
SETTINGS: dict[str, dict[str, Any]] = {
    "left to right, 1 per step": {"strategy": LeftToRight(1)},
    "by confidence, 1 per step": {"strategy": Confidence(1)},
    "left to right, 4 per step": {"strategy": LeftToRight(4)},
    "by confidence, 4 per step": {"strategy": Confidence(4)},
    "threshold 0.9": {"strategy": Threshold(0.9)},
    "verifier alone": {"strategy": Autoregressive()},
    "APD, R = 0": {"mixture_weight": 0.0},
    "APD, R = 0.5": {"mixture_weight": 0.5},
    "APD, R = 0.5, correction": {"mixture_weight": 0.5, "correction": True},
}


@dataclass(frozen=True)
class Measured:
    """Right answers, tokens and forward passes (of the drafter, or of the verifier alone) over some instances."""

    right: int
    instances: int
    tokens: int
    forwards: int

    def __add__(self, other: "Measured") -> "Measured":
        return Measured(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __str__(self) -> str:
        return f"{self.right / self.instances:.2f} @ {self.tokens / self.forwards:.1f}"


def measure(sampler: APDSampler, task: str, count: int, arguments: dict[str, Any]) -> Measured:
    """Greedy answers to `count` held-out instances."""
    instances = tasks.instances(task, count, seed=1)
    inputs = sampler.tokenizer([instance.prompt for instance in instances], return_tensors="pt", padding=True)
    output = sampler.generate(**inputs, max_new_tokens=MAX_CANVAS, return_dict_in_generate=True, **arguments)
    answers = output.sequences[:, inputs["input_ids"].shape[1] :]
    texts = sampler.tokenizer.batch_decode(answers, skip_special_tokens=True)
    right = sum(tasks.is_right(instance, text) for instance, text in zip(instances, texts, strict=True))
    forwards = output.drafter_forwards.sum() or output.verifier_forwards.sum()
    return Measured(right, count, int(output.new_tokens.sum()), int(forwards))


def print_table(drafter: Path, verifier: Path, count: int) -> None:
    """Accuracy and tokens per forward of an exported pair, greedy, task by task; without a verifier, of the included one."""
    if not verifier.exists():
        verifier = INCLUDED_PAIR / "verifier"
    places = {"drafter": drafter, "verifier": verifier}
    sampler = APDSampler.from_pretrained(*map(str, places.values()))
    print(
        f"Greedy, {count} held-out instances per task, {MAX_CANVAS} new tokens: accuracy @ tokens per drafter forward"
    )
    print("(of the verifier alone: per verifier forward)\n")
    print("| task |", " | ".join(SETTINGS), "|")
    print("|---" * (len(SETTINGS) + 1) + "|")
    rows = []
    for task in tasks.TASKS:
        rows.append([measure(sampler, task, count, arguments) for arguments in SETTINGS.values()])
        print(f"| {task} |", " | ".join(map(str, rows[-1])), "|", flush=True)
    totals = [sum(column[1:], start=column[0]) for column in zip(*rows, strict=True)]
    print("| **all** |", " | ".join(map(str, totals)), "|\n")
    for name, place in places.items():
        network = getattr(sampler, name).model
        size = (place / "model.safetensors").stat().st_size
        print(f"{name}: {network.num_parameters():,} parameters, {size / 1e6:.2f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=INCLUDED_PAIR)
    parser.add_argument(
        "--checkpoints",
        type=Path,
        default=Path.home() / ".cache" / "apd" / "train_pair",
        help="delete it to start over",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attention", choices=("full", "block"), default="full", help="of the drafter")
    parser.add_argument("--block-size", type=int, default=8, help="tokens per block, for --attention block")
    parser.add_argument("--only", choices=("drafter", "verifier"), help="train one of the two, e.g. in two processes")
    parser.add_argument("--table", action="store_true", help="measure what is in --out and stop")
    parser.add_argument("--count", type=int, default=100, help="held-out instances per task in the table")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of tiny networks, to see that all of it runs"
    )
    arguments = parser.parse_args()
    block_size = arguments.block_size if arguments.attention == "block" else None
    if not 1 <= arguments.block_size <= MAX_CANVAS:
        parser.error(f"--block-size must be 1 to {MAX_CANVAS}, got {arguments.block_size}.")
    # The included drafters lie side by side.
    folders = {"drafter": arguments.out / "drafter", "verifier": arguments.out / "verifier"}
    if block_size and arguments.out == INCLUDED_PAIR:
        folders["drafter"] = BLOCK_DRAFTER_DIR
    torch.set_num_threads(int(os.environ.get("APD_NUM_THREADS", "1")))

    if not arguments.table:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = build_tokenizer()
        recipes = {"drafter": BLOCK_DRAFTER} if block_size else {"drafter": DRAFTER, "verifier": VERIFIER}
        for name, recipe in recipes.items():
            if arguments.only not in (None, name):
                continue
            if arguments.quick:
                recipe = replace(
                    recipe,
                    layers=1,
                    width=24,
                    heads=2,
                    hidden=32,
                    rows=4,
                    causal_steps=3,
                    masked_steps=3 * (name == "drafter"),
                )
            torch.manual_seed(arguments.seed)
            network = build_network(recipe, tokenizer, is_causal=name == "verifier").to(device)
            arguments.checkpoints.mkdir(parents=True, exist_ok=True)
            if block_size and not arguments.quick:
                network.load_state_dict(load_file(INCLUDED_PAIR / "drafter" / "model.safetensors"))
            kind = f"{name}-block{block_size}" if block_size else name
            checkpoint = arguments.checkpoints / f"{kind}-{arguments.seed}{'-quick' * arguments.quick}.safetensors"
            started = time.perf_counter(), time.process_time()
            train(network, recipe, tokenizer, arguments.seed, checkpoint, 400, title=name, block_size=block_size)
            minutes = [
                (now - then) / 60
                for now, then in zip((time.perf_counter(), time.process_time()), started, strict=True)
            ]
            print(f"{name}: {minutes[0]:.1f} minutes, {minutes[1]:.1f} CPU minutes in this run")
            export(network, tokenizer, folders[name], name == "drafter", block_size)
    if arguments.only is None or arguments.table:
        print_table(**folders, count=arguments.count if not arguments.quick else 4)


if __name__ == "__main__":
    main()
