"""The measured pairs: the included one, random weights in a given shape, and checkpoints on disk."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen2Config

from apd import EXAMPLE_PROMPTS, APDSampler
from apd.included import tasks
from apd.models.attention import GROUPED
from apd.models.graphs import CompiledModel

__all__ = ["PAIRS", "SHAPES", "Pair", "Rows", "Shape", "causal_twin", "compiled", "load", "random_pair"]

Inputs = dict[str, Any]  # `input_ids`, `attention_mask`, and the row seeds, of one call


@dataclass(frozen=True)
class Shape:
    """A random pair: arguments of two Qwen2 configurations, and the sizes of a call.

    Attributes:
        drafter, verifier: sizes, as in `Qwen2Config`.
        prompt_length: tokens of a prompt.
        new_tokens: of every answer; there is no stop token.
        needs_gpu: too large for a CPU.
    """

    drafter: dict[str, Any]
    verifier: dict[str, Any]
    prompt_length: int
    new_tokens: int
    needs_gpu: bool = False


def _sizes(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int, tied: bool, **more: Any
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 32768,
    } | more


_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}

SHAPES: dict[str, Shape] = {
    # For tests; its speed is meaningless.
    "tiny": Shape(_sizes(32, 2, 2, 1, 64, 96, False), _sizes(16, 2, 2, 1, 32, 96, True), 6, 12),
    # 99.5M and 10.9M parameters.
    "100m": Shape(_sizes(768, 8, 12, 4, 2048, 32_000, False), _sizes(256, 4, 4, 2, 640, 32_000, True), 64, 32),
    # Dream-7B and Qwen2.5-0.5B.
    "dream-7b": Shape(
        _sizes(3584, 28, 28, 4, 18944, 152_064, False, **_ROPE),
        _sizes(896, 24, 14, 2, 4864, 151_936, True, **_ROPE),
        256,
        256,
        needs_gpu=True,
    ),
}
PAIRS = ("included", *SHAPES)


@dataclass(frozen=True)
class Rows:
    """Prompts of one measurement, in calls of `batch` rows each.

    Attributes:
        calls: inputs of each call, padded on the left.
        instances: the tasks of the prompts, in order; empty if there is no scorer.
    """

    calls: Sequence[Inputs]
    instances: Sequence[tasks.Instance] = ()


@dataclass(frozen=True)
class Pair:
    """A drafter, a verifier and their prompts.

    Attributes:
        name: as on the command line.
        sampler: both models.
        trained: False for random weights, where the accepted counts are a schedule and no stop token ends a row.
        new_tokens: most tokens of an answer.
        prompt_length: tokens of a prompt, for random weights.
        scored: whether the tasks of the included pair score the answers.
        note: a remark for the table.
    """

    name: str
    sampler: APDSampler
    trained: bool
    new_tokens: int
    prompt_length: int = 0
    scored: bool = False
    note: str = ""

    @property
    def models(self) -> dict[str, PreTrainedModel]:
        """The transformers models by their role."""
        return {"drafter": self.sampler.drafter.model, "verifier": self.sampler.verifier.model}

    @property
    def compiled(self) -> dict[str, CompiledModel]:
        """The compiled passes by role; empty without compilation."""
        passes = {"drafter": self.sampler.drafter.compiled, "verifier": self.sampler.verifier.compiled}
        return {role: each for role, each in passes.items() if each is not None}

    @property
    def generation(self) -> dict[str, Any]:
        """Arguments of every `generate` call: greedy, and without a stop token for random weights."""
        given: dict[str, Any] = {"max_new_tokens": self.new_tokens, "do_sample": False}
        return given if self.trained else given | {"eos_token_id": None, "pad_token_id": 0}

    @property
    def stop_token_ids(self) -> list[int]:
        """Stop tokens of the drafter; none for random weights."""
        ids = getattr(self.sampler.drafter.generation_config, "eos_token_id", None) if self.trained else None
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

    def to_stop(self, tokens: list[int]) -> list[int]:
        """The tokens up to and including the first stop token; all if there is none."""
        return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in self.stop_token_ids), tokens)

    def rows(self, count: int, batch: int, *, seed: int = 1) -> Rows:
        """`count` prompts: the tasks in turn, or random ids. The last call may have fewer than `batch` rows."""
        if not self.trained:
            vocab_size = self.sampler.vocab_size - 1  # the mask is the last id
            generator = torch.Generator().manual_seed(seed)
            ids = torch.randint(1, vocab_size, (count, self.prompt_length), generator=generator)
            ids = ids.to(self.sampler.drafter.device)
            return Rows([_call(i * batch, part, torch.ones_like(part)) for i, part in enumerate(ids.split(batch))])
        instances: list[tasks.Instance] = []
        if self.scored:
            per_task = [tasks.instances(task, -(-count // len(tasks.TASKS)), seed) for task in tasks.TASKS]
            instances = [instance for turn in zip(*per_task, strict=True) for instance in turn][:count]
            prompts = [instance.prompt for instance in instances]
        else:
            prompts = [EXAMPLE_PROMPTS[i % len(EXAMPLE_PROMPTS)] for i in range(count)]
        calls = [self._encoded(i, prompts[i : i + batch]) for i in range(0, count, batch)]
        return Rows(calls, instances)

    def _encoded(self, first: int, prompts: list[str]) -> Inputs:
        encoded = self.sampler.tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        device = self.sampler.drafter.device
        return _call(first, encoded["input_ids"].to(device), encoded["attention_mask"].to(device))


def _call(first: int, ids: Tensor, mask: Tensor) -> Inputs:
    """The inputs of a call. A prompt's number is its seed, so a schedule gives it the same counts in any batch."""
    return {"input_ids": ids, "attention_mask": mask, "seed": list(range(first, first + len(ids)))}


@dataclass(frozen=True)
class Loading:
    """Where and how a pair is loaded.

    Attributes:
        device: `"cpu"` or `"cuda"`.
        dtype: of the weights; `None`: float32 on a CPU, bfloat16 on a GPU.
        layers: most layers of a drafter with random weights.
        prompt_length, new_tokens: override those of the pair.
        is_compiled: whether the forward passes are compiled, see `APDSampler.compile`.
    """

    device: str = "cpu"
    dtype: torch.dtype | None = None
    layers: int | None = None
    prompt_length: int | None = None
    new_tokens: int | None = None
    is_compiled: bool = False

    @property
    def weights(self) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        return torch.float32 if self.device == "cpu" else torch.bfloat16


def load(name: str, loading: Loading) -> Pair:
    """Load a pair by its name, or from `DRAFTER_DIR:VERIFIER_DIR`.

    Raises:
        ValueError: no such pair or directory, or a pair that needs a GPU.
    """
    pair = _load(name, loading)
    return compiled(pair) if loading.is_compiled else pair


def compiled(pair: Pair, **options: Any) -> Pair:
    """A copy of the pair with compiled passes, see `APDSampler.compile`; the models are shared."""
    sampler = copy.copy(pair.sampler)
    sampler.drafter, sampler.verifier = copy.copy(sampler.drafter), copy.copy(sampler.verifier)
    return replace(pair, sampler=sampler.compile(**options), name=f"{pair.name}, compiled")


def _load(name: str, loading: Loading) -> Pair:
    if name in SHAPES:
        return random_pair(name, SHAPES[name], loading)
    if name == "included":
        sampler = APDSampler.from_included(dtype=loading.weights, device_map=loading.device)
        return Pair(name, sampler, trained=True, new_tokens=loading.new_tokens or 32, scored=True)
    drafter, colon, verifier = name.partition(":")
    if not colon:
        raise ValueError(f"`--pair` must be {', '.join(PAIRS)} or DRAFTER_DIR:VERIFIER_DIR, got {name!r}.")
    for directory in (drafter, verifier):
        if not (Path(directory) / "config.json").is_file():
            raise ValueError(f"`--pair` must name two directories with a config.json each, got {directory!r}.")
    sampler = APDSampler.from_pretrained(drafter, verifier, dtype=loading.weights, device_map=loading.device)
    return Pair(name, sampler, trained=True, new_tokens=loading.new_tokens or 128)


def random_pair(name: str, shape: Shape, loading: Loading) -> Pair:
    """Random weights in a shape, made on the device where they are used.

    Raises:
        ValueError: the shape needs a GPU.
    """
    if shape.needs_gpu and loading.device == "cpu":
        raise ValueError(f"`--pair {name}` needs a GPU, got `--device cpu`. Use --pair 100m on a CPU.")
    layers = shape.drafter["num_hidden_layers"]
    note = "random weights"
    if loading.layers is not None and loading.layers < layers:
        shape = replace(shape, drafter=shape.drafter | {"num_hidden_layers": loading.layers})
        note += f", the drafter cut to {loading.layers} of {layers} layers"
    drafter = _random_model(shape.drafter, loading, seed=0)
    drafter.config.is_causal = False
    verifier = _random_model(shape.verifier, loading, seed=1)
    mask = min(shape.drafter["vocab_size"], shape.verifier["vocab_size"]) - 1
    sampler = APDSampler(drafter, verifier, spec="dream", mask_token_id=mask)
    return Pair(
        name,
        sampler,
        trained=False,
        new_tokens=loading.new_tokens or shape.new_tokens,
        prompt_length=loading.prompt_length or shape.prompt_length,
        note=note,
    )


def _random_model(sizes: dict[str, Any], loading: Loading, seed: int) -> PreTrainedModel:
    config = Qwen2Config(**sizes, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    with torch.random.fork_rng(), torch.device(loading.device):
        torch.manual_seed(seed)
        # As `load_drafter` and `load_verifier` load it.
        model = AutoModelForCausalLM.from_config(config, dtype=loading.weights, attn_implementation=GROUPED)
    return model.eval().requires_grad_(False)


def causal_twin(drafter: PreTrainedModel) -> PreTrainedModel:
    """A causal model of the drafter's shape for plain `generate()`; it shares the drafter's weights.

    Its text is meaningless, since the weights were trained with bidirectional attention; it costs as much as a causal
    model under transformers' default attention.
    """
    shared = {id(parameter): parameter for parameter in drafter.parameters()}
    twin = copy.deepcopy(drafter, shared)
    twin.config.is_causal = True
    if twin.config._attn_implementation == GROUPED:
        twin.set_attn_implementation("sdpa")
    twin.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    return twin
