"""Lower bound on the time of a step's forwards on this device: bytes and operations at measured rates.

For each forward the larger of

- bytes / bandwidth: every weight of decoder and output layer once, the embedding rows of its tokens, and the cached
  keys and values that it reads;
- operations / matmul rate: 2 per weight of the decoder and computed token, 2 per weight of the output layer and
  projected token, and 4 per (query, key, head dimension) of attention, of which a causal model needs half in its span.

Activations, normalisation, softmax, mixing and sampling are assumed to be free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.speed.instruments import Clock, Forward

__all__ = ["Rates", "Size", "cache_bytes", "floor_seconds", "measure_rates", "parts", "weights_seconds", "work"]

#: Seconds of repeating an action; the fastest repetition counts.
BUDGET = 0.4


@dataclass(frozen=True)
class Size:
    """The sizes that determine the bytes and operations of a forward.

    Attributes:
        body: weights of the decoder, the embedding table left out.
        head: weights of the output layer.
        hidden: d.
        layers: attention layers.
        query_width: query heads × head dimension.
        kv_width: key heads × head dimension.
        item: bytes of a number.
        causal: attends to the left only.
    """

    body: int
    head: int
    hidden: int
    layers: int
    query_width: int
    kv_width: int
    item: int
    causal: bool

    @classmethod
    def of(cls, model: PreTrainedModel) -> Size:
        config, head = model.config, model.get_output_embeddings()
        table = model.get_input_embeddings().weight
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            body=sum(parameter.numel() for parameter in model.base_model.parameters()) - table.numel(),
            head=sum(parameter.numel() for parameter in head.parameters()),
            hidden=config.hidden_size,
            layers=config.num_hidden_layers,
            query_width=config.num_attention_heads * head_dim,
            kv_width=config.num_key_value_heads * head_dim,
            item=table.element_size(),
            causal=getattr(config, "is_causal", True),
        )

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights that every forward reads."""
        return (self.body + self.head) * self.item


@dataclass(frozen=True)
class Rates:
    """The rates of the device without other load.

    Attributes:
        bandwidth: bytes moved per second (read and written) by a copy far larger than any cache.
        matmul: operations per second of a large square product in the models' dtype; a product counts 2 each.
        resident: per role whose weights fit in the last-level cache, the bandwidth of a copy of that size.
    """

    bandwidth: float
    matmul: float
    resident: Mapping[str, float]

    def reading(self, role: str) -> float:
        """Bytes per second of a model's weights."""
        return self.resident.get(role, self.bandwidth)


def work(size: Size, forward: Forward) -> tuple[int, int]:
    """Bytes read and operations of one forward."""
    rows, tokens, keys = forward.rows, forward.tokens, forward.keys
    cached = keys - tokens
    read = size.weight_bytes + size.item * (
        rows * tokens * size.hidden + 2 * rows * cached * size.layers * size.kv_width
    )
    pairs = tokens * cached + (tokens * (tokens + 1) // 2 if size.causal else tokens * tokens)
    operations = 2 * size.body * rows * tokens
    operations += 2 * size.head * rows * forward.projected
    operations += 4 * pairs * rows * size.layers * size.query_width
    return read, operations


def floor_seconds(sizes: Mapping[str, Size], forwards: Iterable[Forward], rates: Rates) -> float:
    """Lower bound on the seconds of these forwards in sequence."""
    return sum(max(part) for part in parts(sizes, forwards, rates))


def parts(sizes: Mapping[str, Size], forwards: Iterable[Forward], rates: Rates) -> Iterator[tuple[float, float]]:
    """Lower bounds on the seconds of reading and of arithmetic, for each of these forwards; the larger one applies."""
    for forward in forwards:
        read, operations = work(sizes[forward.role], forward)
        yield read / rates.reading(forward.role), operations / rates.matmul


def weights_seconds(sizes: Mapping[str, Size], rates: Rates) -> float:
    """Least seconds to read the weights of all models once."""
    return sum(size.weight_bytes / rates.reading(role) for role, size in sizes.items())


def cache_bytes(device: str) -> int:
    """Bytes of the last-level cache."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).L2_cache_size
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        return int(text.removesuffix("K")) * 1024
    except (OSError, ValueError):
        return 32 * 2**20  # unknown to this system; the usual order of magnitude


def measure_rates(sizes: Mapping[str, Size], device: str, dtype: torch.dtype) -> Rates:
    """The best of many short measurements each, because other load on the machine can only slow them down."""
    large, last_level = 4 * max(cache_bytes(device), 64 * 2**20), cache_bytes(device)
    resident = {
        role: _copy_rate(size.weight_bytes, device) for role, size in sizes.items() if size.weight_bytes <= last_level
    }
    side = 512 if device == "cpu" else 8192
    return Rates(_copy_rate(large, device), _matmul_rate(side, device, dtype), resident)


def _copy_rate(size: int, device: str) -> float:
    """Bytes moved per second where half of `size` bytes is copied to the other half."""
    source = torch.ones(max(size // 8, 1), device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    return moved / _best(lambda: target.copy_(source), device)


def _matmul_rate(side: int, device: str, dtype: torch.dtype) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    return 2 * side**3 / _best(lambda: torch.mm(left, right, out=product), device)


def _best(action: Callable[[], object], device: str) -> float:
    """The least seconds of an action within `BUDGET`; one measurement is long enough for the clock's resolution."""
    clock = Clock(device)

    def taken(repeats: int) -> float:
        start = clock.wall()
        for _ in range(repeats):
            action()
        return clock.wall() - start

    taken(1)  # a warm-up: the first call includes one-time setup
    repeats = max(1, round(1e-3 / max(taken(1), 1e-7)))
    tries = [taken(repeats)]
    while sum(tries) < BUDGET:
        tries.append(taken(repeats))
    return min(tries) / repeats
