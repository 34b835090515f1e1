"""Canvases with a cache: behind one another in one row, or as rows with copies of the frozen keys. Time of one pass.

    python -m benchmarks.checked.packed

A random drafter of 8 layers × 512, W 16, M 16, one row, one thread; medians of processor time over five passes in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from apd.decoding.state import DecodeState
from apd.decoding.window import FixedWindow
from apd.models.drafter import MaskedDiffusionDrafter, NeuralDrafterSession
from apd.models.horizon import FULL
from apd.models.loading import as_drafter
from apd.models.span import Span
from apd.models.transformer import EagerPasses

SIZE, MASK = 16, 999  # W and M


def drafter() -> MaskedDiffusionDrafter:
    config = Qwen2Config(
        vocab_size=MASK + 1,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        is_causal=False,
    )
    model = as_drafter(Qwen2ForCausalLM(config).eval().requires_grad_(False), spec="dream", mask_token_id=MASK)
    assert isinstance(model, MaskedDiffusionDrafter)
    return model


def canvases(state: DecodeState, count: int) -> DecodeState:
    """A row with its first 0, 1, … tokens guessed."""
    place = torch.arange(state.width) - int(state.frontier)
    guessed = (place >= 0) & (place < torch.arange(count)[:, None])
    copies = state.select(torch.zeros(count, dtype=torch.int64))
    return copies.with_decided(copies.tokens.masked_fill(guessed, 5), copies.decided | guessed)


def ways(model: MaskedDiffusionDrafter, context: int, count: int) -> dict[str, Callable[[], object]]:
    """Both ways to compute `count` canvases behind `context` committed tokens."""
    state = DecodeState.start(torch.randint(0, 900, (1, context)), max_new_tokens=64, mask_token_id=MASK)
    session: NeuralDrafterSession = model.open_cached(state, SIZE, None)
    session.logits(state, FixedWindow(SIZE).window(state))  # fills the cache
    guesses, rows = canvases(state, count), torch.zeros(count, dtype=torch.int64)
    window, start = FixedWindow(SIZE).window(guesses), context - SIZE + 1

    def packed() -> Tensor:
        session.starts = [start]
        return session.canvas_logits(guesses, window, rows).hidden

    def copied() -> Tensor:
        passes, mine = EagerPasses(model.model, attention=FULL, cache_shape=(count, state.width)), session.passes
        assert passes.cache is not None and isinstance(mine, EagerPasses) and mine.cache is not None
        for layer, frozen in zip(passes.cache.layers, mine.cache.layers, strict=True):
            layer.keys, layer.values = (
                each[:, :, : state.width + 1].expand(count, -1, -1, -1).contiguous()
                for each in (frozen.keys, frozen.values)
            )
            layer.is_initialized = True
        span = Span.of_rows([start] * count, window.ends, [0] * count, guesses.tokens.device)
        return passes(guesses.tokens, span)

    return {"packed": packed, "copied": copied}


def main() -> None:
    torch.set_num_threads(1)
    model = drafter()
    for context in (256, 1024, 4096):
        for count in (4, 16):
            seconds: dict[str, list[float]] = {}
            for _ in range(6):
                for name, run in ways(model, context, count).items():
                    start = time.process_time()
                    run()
                    seconds.setdefault(name, []).append(time.process_time() - start)
            packed, copied = (1000 * statistics.median(times[1:]) for times in seconds.values())
            print(
                f"{context} committed tokens, {count} canvases: packed {packed:.0f} ms, copied {copied:.0f} ms, "
                f"ratio {copied / packed:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
