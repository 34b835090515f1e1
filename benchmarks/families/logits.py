"""Logits of each family's checkpoint in every recorded layout: what the drafter computes, beside what was recorded.

A layout is computed in up to three ways:

- "one pass": all columns in one pass without a cache, under the drafter's own mask.
- "decode": the drafter's session, in the first pass of a decode that starts at the layout's frontier.
- "cached": the same session after passes at earlier frontiers, so that most keys come from its cache.
- "verify": the session of a verifier made of the same weights, likewise after an earlier pass.

What was recorded, and how, is in `NOTES.md` of each folder. The approximate cache within a block of Fast-dLLM v2 is left out:
nothing here computes it. A window of SDLM whose first mask is decided is computed in one pass only: in a decode here the seed
has moved on to that token.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from apd.decoding.state import DecodeState
from apd.decoding.window import Window
from apd.models.config_fields import LLADA2_CONFIG
from apd.models.drafter import MaskedDiffusionDrafter
from apd.models.horizon import CAUSAL, Attention
from apd.models.loading import load_drafter
from apd.models.span import Span
from apd.models.transformer import EagerPasses
from apd.models.verifier import CausalVerifier

FIXTURES = Path(__file__).parents[2] / "tests" / "fixtures"

#: Mask tokens of the small vocabularies where config.json does not say them.
MASKS = {"decode_llada2_moe": 126, "parity_llada2_moe": 60, "parity_llada_moe": 60}

#: Folders that need a newer transformers than the oldest supported one.
NEWER = () if LLADA2_CONFIG is not None else ("decode_llada2_moe", "parity_llada2_moe")

Record = dict[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """A recorded layout.

    Attributes:
        layout: its name in the recording.
        way: how it was computed.
        computed, recorded: logits of the same rows, `n v` float32.
    """

    layout: str
    way: str
    computed: Tensor
    recorded: Tensor

    @property
    def gap(self) -> float:
        """The largest difference."""
        return float((self.computed - self.recorded).abs().max())

    @property
    def largest(self) -> float:
        """The largest recorded logit."""
        return float(self.recorded.abs().max())


Loading = Callable[..., MaskedDiffusionDrafter]


def compare(folder: str, implementation: str | None = None, **changes: Any) -> Iterator[Comparison]:
    """Every recorded layout of a folder, in every way that computes it.

    Args:
        folder: a name in `LAYOUTS`.
        implementation: "sdpa", "eager" or "grouped_sdpa"; by default the drafter's.
        **changes: attributes of the drafter that are set to other values, to see that the layouts would tell.
    """
    record = load_file(FIXTURES / folder / "parity.safetensors")

    def load(path: Path = FIXTURES / folder, **more: Any) -> MaskedDiffusionDrafter:
        drafter = load_drafter(path, mask_token_id=MASKS.get(folder), attn_implementation=implementation, **more)
        for name, value in changes.items():
            setattr(drafter, name, value)
        return drafter

    yield from LAYOUTS[folder](load, record)


@torch.no_grad()
def one_pass(
    drafter: MaskedDiffusionDrafter,
    ids: Tensor,
    paddings: Sequence[int] | None = None,
    *,
    seed: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Logits of all columns from one pass under the drafter's mask, without a cache: `b l v`; padding is zero.

    Args:
        drafter: the drafter.
        ids: `b l` int64.
        paddings: columns of left padding of each row.
        seed: of a prefix model, the first column that sees all of the canvas; `None`: no column does.
        positions: `b l` int64, position ids of the columns.
    """
    rows, width = ids.shape
    paddings = paddings or [0] * rows
    seeds = None if seed is None else [seed] * rows
    attention = CAUSAL if drafter.attention.kind == "prefix" and seed is None else drafter.attention
    span = Span.of_rows(paddings, [width] * rows, paddings, ids.device, seeds)
    passes = EagerPasses(drafter.model, attention=attention, role=drafter.role)
    hidden = passes(ids, span, positions)
    logits = drafter.model.get_output_embeddings()(hidden)
    return torch.stack([pad(row[: width - p], (0, 0, p, 0)) for row, p in zip(logits, paddings, strict=True)])


def window_of(
    drafter: MaskedDiffusionDrafter, ids: Tensor, paddings: Sequence[int], prompt_end: int
) -> tuple[DecodeState, Window]:
    """A decode that stands at the first mask of each row, and the widest window that the drafter drafts there."""
    masks = drafter.mask_token_id
    state = DecodeState.start(ids, max_new_tokens=0, mask_token_id=masks, padding=torch.tensor(paddings))
    state = dataclasses.replace(state, prompt_end=torch.full_like(state.prompt_end, prompt_end))
    return state, Window.of_rows(state, drafter.window_ends(state))


@torch.no_grad()
def decoded(
    drafter: MaskedDiffusionDrafter,
    ids: Tensor,
    recorded: Tensor,
    *,
    first: int = 0,
    earlier: Sequence[int] = (),
    paddings: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
    prompt_end: int = 0,
) -> tuple[Tensor, Tensor]:
    """Logits of the window at the first mask of each row, from the drafter's session, and those recorded: `n v` each.

    Args:
        drafter: the drafter.
        ids: `b l` int64.
        recorded: `b r v`, recorded rows.
        first: the column of the first recorded row.
        earlier: frontiers at which the session made a pass before, when only the tokens before them were decided.
        paddings: columns of left padding of each row.
        rows: the rows to compare, by default all.
        prompt_end: the column behind the prompt, from which an anchored drafter counts its blocks.
    """
    paddings = paddings or [0] * len(ids)
    session = None
    for frontier in (*earlier, ids.shape[1]):
        tokens = ids.clone()
        tokens[:, frontier:] = drafter.mask_token_id
        state, window = window_of(drafter, tokens, paddings, prompt_end)
        if session is None:
            session = drafter.open(state)
        elif frontier == ids.shape[1]:
            assert all(start > padding for start, padding in zip(session.starts, paddings, strict=True)), (
                "nothing is cached"
            )
        logits = session.logits(state, window)[:, :]
    at = (window.columns - drafter.logit_shift - first).clamp(0)
    expected = recorded.gather(1, at[..., None].expand(-1, -1, recorded.shape[-1]))
    kept = torch.zeros_like(window.inside)
    kept[list(range(len(ids)) if rows is None else rows)] = True
    return logits[kept & window.inside], expected[kept & window.inside]


@torch.no_grad()
def verified(
    drafter: MaskedDiffusionDrafter, prefix: Tensor, draft: Tensor, recorded: Tensor
) -> tuple[Tensor, Tensor]:
    """Logits of a draft from a verifier of the drafter's weights, and those recorded: `n v` each.

    Args:
        drafter: the drafter.
        prefix: `1 p` int64, the decided tokens, which the verifier read in an earlier pass.
        draft: `1 n` int64, the drafted tokens.
        recorded: `1 n v`: row i predicts the token behind the i-th of the draft.
    """
    verifier, masks = CausalVerifier(drafter.model), torch.full_like(draft, drafter.mask_token_id)
    ids = torch.cat([prefix, draft], dim=1)
    session = None
    for start in (prefix.shape[1] // 2, prefix.shape[1]):
        tokens = torch.cat([ids[:, :start], masks.new_full((1, ids.shape[1] - start), drafter.mask_token_id)], dim=1)
        state = DecodeState.start(tokens, max_new_tokens=0, mask_token_id=0)
        state = state.with_decided(tokens, tokens != drafter.mask_token_id)
        session = verifier.open(state) if session is None else session
        window = Window.of_rows(state, state.layout.end)
        logits = session.logits(state, window, ids[:, start:])[:, :]
    return logits[0, 1:], recorded[0, :-1]


def _sdar(load: Loading, record: Record) -> Iterator[Comparison]:
    for size in (4, 8):
        drafter, name = load(block_size=size), f"b{size}"
        ids, whole = record[f"{name}.input_ids"], record[f"{name}.logits"]
        yield Comparison(name, "one pass", one_pass(drafter, ids), whole)
        yield Comparison(name, "decode", *decoded(drafter, ids, whole))
        for way, earlier in ("prefix", [20]), ("blockwise", range(size, 24, size)):
            last = record[f"{name}.logits_cached{'_blockwise' * (way == 'blockwise')}_last"]
            found = decoded(drafter, ids, last, first=24 - size, earlier=[t - 1 for t in earlier if t <= 24 - size])
            yield Comparison(f"{name} {way} last", "cached", *found)
    drafter, paddings = load(), record["lp.pads"].tolist()
    ids, whole = record["lp.input_ids"], record["lp.logits"]
    real = torch.arange(ids.shape[1]) >= record["lp.pads"][:, None]
    yield Comparison("left padded", "one pass", one_pass(drafter, ids, paddings)[real], whole[real])
    # The second row ends within a block; a decode fills it with masks.
    for way, earlier in ("decode", []), ("cached", [5, 9]):
        yield Comparison(
            "left padded", way, *decoded(drafter, ids, whole, earlier=earlier, paddings=paddings, rows=[0])
        )
    alone = one_pass(drafter, ids[1:, paddings[1] :])[0]
    yield Comparison("left padded, row alone", "one pass", alone, record["lp.logits_row1_alone"])


def _fast_dllm_v2(load: Loading, record: Record) -> Iterator[Comparison]:
    for size, stored in (32, 64), (8, 32):
        drafter, ids = load(block_size=size), record[f"ids_bs{size}"]
        whole, last = record[f"logits_full_bs{size}"], record[f"logits_last_cached_bs{size}"]
        following = record[f"next_token_logits_bs{size}"]
        yield Comparison(f"block {size}", "one pass", one_pass(drafter, ids), whole)
        yield Comparison(f"block {size}", "decode", *decoded(drafter, ids, whole))
        earlier = [size // 2, size + 3]
        yield Comparison(f"block {size}, last", "cached", *decoded(drafter, ids, last, first=stored, earlier=earlier))
        # The first token of a block is predicted by the last row of the block before.
        fresh = pad(ids[:, :stored], (0, size), value=drafter.mask_token_id)
        for way, before in ("decode", []), ("cached", earlier):
            found, _ = decoded(drafter, fresh, whole, earlier=before)
            first = found.view(len(ids), size, -1)[:, 0]
            yield Comparison(f"block {size}, next token", way, first, following)
    yield Comparison("block 8, tail", "one pass", one_pass(drafter, record["ids_tail_bs8"]), record["logits_tail_bs8"])


def _wedlm(load: Loading, record: Record) -> Iterator[Comparison]:
    drafter, ids = load(), record["ids_natural"]
    yield Comparison("natural order", "one pass", one_pass(drafter, ids), record["logits_natural"])
    yield Comparison("no masks", "one pass", one_pass(drafter, record["ids_plain"]), record["logits_plain"])
    order = record["positions_reordered"]
    found = one_pass(drafter, record["ids_reordered"], positions=order)
    yield Comparison("decided first", "one pass", found, record["logits_reordered"])
    yield Comparison(
        "decided first", "decode", *decoded(drafter, ids, record["logits_reordered"][:, order[0].argsort()])
    )
    window, first = record["window_positions"], ids.shape[1] - record["window_ids"].shape[1]
    last = record["logits_window_cached"][:, window[0].argsort()]
    yield Comparison("decided first, last", "cached", *decoded(drafter, ids, last, first=first, earlier=[11, 30]))


def _llada2_decode(load: Loading, record: Record) -> Iterator[Comparison]:
    for name in sorted({name.split(".")[0] for name in record}):
        size = int(name.split("_")[0].removeprefix("block"))
        drafter, ids, whole = load(block_size=size), record[f"{name}.input_ids"], record[f"{name}.logits"]
        yield Comparison(name, "one pass", one_pass(drafter, ids), whole)
        yield Comparison(name, "decode", *decoded(drafter, ids, whole))
        yield Comparison(name, "cached", *decoded(drafter, ids, whole, earlier=[size // 2, size + 1]))


def _llada2(load: Loading, record: Record) -> Iterator[Comparison]:
    drafter = load(block_size=32)  # longer than the rows: all of their columns see each other
    for name in ("full", "batch", "far"):
        found = one_pass(drafter, record[f"{name}.input_ids"], positions=record.get(f"{name}.position_ids"))
        yield Comparison(name, "one pass", found, record[f"{name}.logits"])
    drafter, ids, whole = load(block_size=8), record["block.input_ids"], record["block.logits"]
    yield Comparison("block 8", "one pass", one_pass(drafter, ids), whole)
    yield Comparison("block 8", "decode", *decoded(drafter, ids, whole))


def _llada_moe(load: Loading, record: Record) -> Iterator[Comparison]:
    drafter = load()
    for name in ("full", "batch"):
        ids, whole = record[f"{name}.input_ids"], record[f"{name}.logits"]
        yield Comparison(name, "one pass", one_pass(drafter, ids), whole)
        yield Comparison(name, "decode", *decoded(drafter, ids, whole))
    real = record["pad.attention_mask"].bool()
    found = one_pass(drafter, record["pad.input_ids"], (~real).sum(1).tolist())
    yield Comparison("left padded", "one pass", found[real], record["pad.logits"][real])


def _sdlm(load: Loading, record: Record) -> Iterator[Comparison]:
    yield Comparison("causal", "one pass", one_pass(load(), record["causal.input_ids"]), record["causal.logits"])
    for size in (4, 8):
        drafter = load(block_size=size)
        for layout in ("plain", "window", "cached", "filled"):
            name = f"{layout}{size}"
            ids, logits = record[f"{name}.input_ids"], record[f"{name}.logits"]
            if layout != "plain":  # its last token stands twice; here its one copy sees the masks, and they see it
                ids, logits = (torch.cat([each[:, : -size - 1], each[:, -size:]], dim=1) for each in (ids, logits))
            ids = torch.cat([record.get(f"{name}.prefix_ids", ids[:, :0]), ids], dim=1)
            first, seed = ids.shape[1] - logits.shape[1], ids.shape[1] - size
            yield Comparison(name, "one pass", one_pass(drafter, ids, seed=seed)[:, first:], logits)
            if layout == "filled":
                continue
            ids = pad(ids, (0, 1), value=drafter.mask_token_id)  # the token that the last mask's row predicts
            yield Comparison(name, "decode", *decoded(drafter, ids, logits, first=first))
            yield Comparison(name, "cached", *decoded(drafter, ids, logits, first=first, earlier=[5, seed - 2]))


def _nemotron(load: Loading, record: Record) -> Iterator[Comparison]:
    with tempfile.TemporaryDirectory() as folder:
        source = FIXTURES / "parity_nemotron"
        for file in ("model.safetensors", "generation_config.json"):
            shutil.copy(source / file, folder)
        shutil.copy(source / "config_long_rope.json", Path(folder, "config.json"))
        of_rope = {"": load(), "long_rope.": load(Path(folder))}
        anchored = {"": load(), "long_rope.": load(Path(folder))}
    names = sorted({name.rsplit(".", 1)[0] for name in record})
    for name in names:
        prefix = "long_rope." if name.startswith("long_rope.") else ""
        drafter, ids, logits = of_rope[prefix], record[f"{name}.input_ids"], record[f"{name}.logits"]
        layout = name.removeprefix(prefix)
        before = record.get(f"{name}.prefix_ids", ids[:, :0])
        whole, first = torch.cat([before, ids], dim=1), before.shape[1]
        seed = None if layout.startswith(("causal", "verify")) else first
        yield Comparison(name, "one pass", one_pass(drafter, whole, seed=seed)[:, first:], logits)
        if layout.startswith(("draft", "filled")):
            yield Comparison(name, "decode", *decoded(drafter, whole, logits, first=first))
            yield Comparison(name, "cached", *decoded(drafter, whole, logits, first=first, earlier=[4, first - 2]))
            drafter = anchored[prefix]
            drafter.attention = Attention("prefix", ids.shape[1], anchored=True)
            where = {"first": first, "prompt_end": first}
            yield Comparison(f"{name}, anchored", "decode", *decoded(drafter, whole, logits, **where))
            yield Comparison(f"{name}, anchored", "cached", *decoded(drafter, whole, logits, **where, earlier=[first]))
        if layout.startswith("verify"):
            yield Comparison(name, "verify", *verified(drafter, before, ids, logits))


#: Of each folder, the function that computes its layouts.
LAYOUTS: dict[str, Callable[[Loading, Record], Iterator[Comparison]]] = {
    "parity_sdar": _sdar,
    "parity_sdar_moe": _sdar,
    "parity_fast_dllm_v2": _fast_dllm_v2,
    "parity_wedlm": _wedlm,
    "parity_wedlm_qwen3": _wedlm,
    "decode_llada2_moe": _llada2_decode,
    "parity_llada2_moe": _llada2,
    "parity_llada_moe": _llada_moe,
    "parity_sdlm": _sdlm,
    "parity_nemotron": _nemotron,
}
