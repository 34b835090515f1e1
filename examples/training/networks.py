"""The networks of the pair, and the loop that trains them."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from training.batches import RowSource, block_batch, causal_batch, full_batch, mask_rows

SAVE_EVERY = 120  # seconds between checkpoints
SAY_EVERY = 60  # seconds between two lines of a log


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


def learning_rate_factor(step: int, progress: float) -> float:
    """Short warm-up, then constant, then linear to zero over the second half, which gives much of the accuracy."""
    return min((step + 1) / 50, 1.0, 2 * (1 - progress))


def build_optimizers(network: torch.nn.Module, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, biases and norms."""
    named = list(network.named_parameters())
    inner = [p for name, p in named if p.ndim == 2 and "layers" in name]
    outer = [p for name, p in named if p.ndim != 2 or "layers" not in name]
    return [
        torch.optim.Muon(inner, lr=learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def save_checkpoint(
    path: Path, network: torch.nn.Module, optimizers: list[torch.optim.Optimizer], step: int, seconds: float
) -> None:
    tensors = {f"network {name}": value for name, value in network.state_dict().items()}
    for i, optimizer in enumerate(optimizers):
        for j, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer {i} {j} {key}": value for key, value in state.items()}
    save_file(
        {name: value.contiguous() for name, value in tensors.items()},
        f"{path}.tmp",
        {"step": str(step), "seconds": repr(seconds)},
    )
    os.replace(f"{path}.tmp", path)  # never a half-written checkpoint


def load_checkpoint(
    path: Path, network: torch.nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[int, float]:
    """Restore both; returns the steps and the seconds of training so far, 0 and 0 if there is no checkpoint."""
    if not path.exists():
        return 0, 0.0
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
        metadata = file.metadata()
    return int(metadata["step"]), float(metadata["seconds"])


def train(
    network: Qwen2ForCausalLM,
    recipe: Recipe,
    source: RowSource,
    checkpoint: Path,
    *,
    is_content: Tensor,
    mask: int,
    title: str,
    minutes: float | None = None,
    block_size: int | None = None,
    is_compiled: bool = True,
) -> None:
    """Train `network` in place, from the last checkpoint if there is one; block-causal with a `block_size`.

    Args:
        is_content: `v` bool, see `mask_rows`.
        mask: id of the mask token.
        minutes: train this long, compiling not counted, instead of `recipe.steps`; of these only the ratio counts then.
    """
    device = next(network.parameters()).device
    optimizers = build_optimizers(network, recipe.learning_rate)
    step, seconds = load_checkpoint(checkpoint, network, optimizers)

    def progress() -> float:
        return step / recipe.steps if minutes is None else min(seconds / (60 * minutes), 1.0)

    share = f"{progress():.0%} of the training"
    print(f"{title}: goes on from step {step}, {share}" if step else f"{title}: begins", flush=True)
    is_compiled = is_compiled and progress() < 1
    if is_compiled:
        print(f"{title}: compiling first, which takes a while and is no training time", flush=True)
    # At 60 tokens the backward pass of torch's CPU kernel takes as long as everything else.
    network.set_attn_implementation("eager")
    loss_function: Callable[..., Tensor] = torch.compile(loss_of) if is_compiled and can_compile(device) else loss_of
    network.train()
    bar = tqdm(total=100, desc=title, mininterval=5, bar_format="{l_bar}{bar}| {elapsed} {postfix}", disable=None)
    bar.set_postfix_str("compiling" if is_compiled else "")
    average, saved, before = 0.0, time.perf_counter(), None
    said = saved
    while (done := progress()) < 1:
        half = int(2 * done)
        if done >= recipe.causal_steps / recipe.steps:
            rows = source.draw(step, recipe.rows, half, cut=0.25, block_size=block_size)
            generator = torch.Generator().manual_seed(source.seed * 10**9 + step)
            noise = partial(mask_rows, is_content=is_content, generator=generator, half=half)
            if block_size:
                batch = block_batch(rows, mask, noise, block_size, source.shape)
            else:
                batch = full_batch(rows, mask, noise)
        else:
            batch = causal_batch(source.draw(step, recipe.rows, half))

        loss = loss_function(network, *(getattr(batch, field.name).to(device) for field in fields(batch)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * learning_rate_factor(step, done)
            optimizer.step()
            optimizer.zero_grad()

        average = 0.99 * average + 0.01 * loss.item() if average else loss.item()
        step += 1
        now = time.perf_counter()
        if before is not None:  # the first step of a process is spent compiling
            seconds += now - before
        before = now
        bar.set_postfix_str(f"step {step}, loss {average:.3f}", refresh=False)
        bar.update(100 * progress() - bar.n)
        if bar.disable and now - said > SAY_EVERY:  # a log
            print(f"{title}: {progress():.0%}, step {step}, loss {average:.3f}", flush=True)
            said = now
        if now - saved > SAVE_EVERY or progress() >= 1:
            save_checkpoint(checkpoint, network, optimizers, step, seconds)
            saved = now
    bar.close()
    network.eval()


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works here; on a CPU it needs a C++ compiler."""
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception:  # whatever a missing or broken compiler raises
        return False
    return True
