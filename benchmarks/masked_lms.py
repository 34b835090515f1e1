"""Holds masked LMs as drafters against their own classes, on small random checkpoints that are saved and loaded.

python -m benchmarks.masked_lms                    # the model types that were tried
python -m benchmarks.masked_lms bert esm           # these
python -m benchmarks.masked_lms --all              # every model type of transformers' masked LMs
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, MODEL_FOR_MASKED_LM_MAPPING, AutoModelForMaskedLM, PreTrainedModel

from apd import APDSampler, Checked, LeftToRight, MaskedLMDrafter, Threshold, load_drafter
from apd.decoding.state import DecodeState
from apd.decoding.window import Window
from apd.models.masked_lm import TRIED
from benchmarks.architectures import shrunk

VOCABULARY, MASK = 96, 5

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "initializer_range": 0.2,
}
_ROBERTA = _BERT | {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "type_vocab_size": 1}
_RELATIVE = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}

#: Fields of the config of a small model, of each model type that was tried.
SMALL: dict[str, dict[str, Any]] = {
    "bert": _BERT | {"pad_token_id": 0},
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": {
        "vocab_size": VOCABULARY,
        "dim": 32,
        "hidden_dim": 48,
        "n_layers": 3,
        "n_heads": 4,
        "max_position_embeddings": 80,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    },
    "modernbert": _BERT
    | {
        "num_hidden_layers": 4,
        "local_attention": 6,
        "global_attn_every_n_layers": 3,
        "bos_token_id": 2,
        "cls_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
        "pad_token_id": 0,
    },
    "esm": _BERT
    | {"position_embedding_type": "rotary", "token_dropout": True, "pad_token_id": 1, "mask_token_id": MASK},
    "electra": _BERT | {"embedding_size": 16, "pad_token_id": 0},
    "deberta": _BERT | _RELATIVE | {"pad_token_id": 0, "pooler_hidden_size": 32},
    "deberta-v2": _BERT
    | _RELATIVE
    | {
        "pad_token_id": 0,
        "pooler_hidden_size": 32,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_buckets": 8,
        "max_relative_positions": -1,
    },
}

#: Further fields that other classes need to be small and valid.
OTHERS: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "longformer": {"attention_window": 8},
    "xmod": {"default_language": "en_XX"},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
}

STRATEGIES = {"threshold": Threshold(0.05), "left to right": LeftToRight(1), "checked": Checked(proposer="drafter")}
PROMPTS = [[7, 8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18, 19], [20]]


def tiny(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """A small random masked LM of this model type, float32, in evaluation mode."""
    fields = SMALL.get(model_type)
    config_class = CONFIG_MAPPING[model_type]
    config = config_class(**fields) if fields else shrunk(config_class(), **OTHERS.get(model_type, {}))
    config.is_decoder = False
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODEL_FOR_MASKED_LM_MAPPING[config_class](config)
        for (
            weight
        ) in model.parameters():  # biases and norms are constants else, and a head without its bias would pass
            weight.data += 0.1 * torch.randn_like(weight)
    return model.eval().requires_grad_(False)


def load(path: Path, **more: Any) -> tuple[MaskedLMDrafter, PreTrainedModel]:
    """A drafter, and the same checkpoint as transformers loads it."""
    drafter = load_drafter(path, mask_token_id=MASK, **more)
    assert isinstance(drafter, MaskedLMDrafter)
    theirs = AutoModelForMaskedLM.from_pretrained(path, attn_implementation=drafter.model.config._attn_implementation)
    return drafter, theirs.eval()


def state_of(rows: Sequence[Sequence[int]], new: int, *, more_padding: int = 0) -> DecodeState:
    """Rows before their first step, padded on the left, with tokens in the padding that must not be read."""
    width = max(map(len, rows)) + more_padding
    padding = [width - len(row) for row in rows]
    prompt = torch.tensor([[30 + i for i in range(n)] + list(row) for n, row in zip(padding, rows, strict=True)])
    return DecodeState.start(prompt, max_new_tokens=new, mask_token_id=MASK, padding=torch.tensor(padding))


@torch.no_grad()
def largest_difference(
    drafter: MaskedLMDrafter, model: PreTrainedModel, state: DecodeState, sizes: Sequence[int]
) -> float:
    """The largest difference between drafted logits and those of the class alone on each row, absolute.

    Args:
        sizes: masks in the window of each row.
    """
    window = Window.of_rows(state, [t + size for t, size in zip(state.layout.frontier, sizes, strict=True)])
    drafted = drafter.open(state).logits(state, window)[:, :]
    worst = 0.0
    rows = zip(state.layout.padding, window.starts, window.ends, strict=True)
    for row, (padding, start, end) in enumerate(rows):
        ids = state.tokens[row : row + 1, padding:end]
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, start - padding :]
        worst = max(worst, float((drafted[row, : end - start] - theirs).abs().max()))
    return worst


def differences(drafter: MaskedLMDrafter, model: PreTrainedModel, *, new: int = 9) -> dict[str, float]:
    """Largest differences of rows alone, padded, and in a ragged batch whose windows have different sizes."""
    sizes = [new, new - 4, new - 1, new]
    alone = [largest_difference(drafter, model, state_of([row], new), [new]) for row in PROMPTS]
    padded = [largest_difference(drafter, model, state_of([row], new, more_padding=6), [new]) for row in PROMPTS]
    ragged = largest_difference(drafter, model, state_of(PROMPTS, new), sizes)
    return {"alone": max(alone), "padded": max(padded), "ragged": ragged}


def generated(
    drafter: MaskedLMDrafter, rows: Sequence[Sequence[int]], strategy: Any, new: int = 12
) -> list[list[int]]:
    """The new tokens of each row, decoded in one batch. Rows are told apart by their seeds, so sampling is compared, too."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    sampler = APDSampler(drafter, mixture_weight=1.0)
    call = {"do_sample": True, "top_k": 0, "seed": [row[0] for row in rows], "max_new_tokens": new, "window_size": 8}
    found: Tensor = sampler.generate(ids, attention_mask=mask, strategy=strategy, eos_token_id=None, **call)
    return found[:, width:].tolist()


def equal_tokens(drafter: MaskedLMDrafter, strategies: Iterable[Any] = STRATEGIES.values()) -> tuple[int, int]:
    """How many new tokens are the same for rows alone and in a batch, and how many there are."""
    equal = total = 0
    for strategy in strategies:
        together = generated(drafter, PROMPTS, strategy)
        for row, batched in zip(PROMPTS, together, strict=True):
            alone = generated(drafter, [row], strategy)[0]
            equal += sum(a == b for a, b in zip(alone, batched, strict=True))
            total += len(alone)
    return equal, total


@dataclass(frozen=True)
class Finding:
    """What became of one model type; `why` where it was refused or could not be built."""

    name: str
    gaps: dict[str, float]
    equal: tuple[int, int]
    way: str
    why: str = ""

    def line(self) -> str:
        """A line of the table."""
        if self.why:
            return f"| {self.name} | | | | | {self.why} |"
        gaps = " | ".join(f"{gap:.1e}" for gap in self.gaps.values())
        return f"| {self.name} | {gaps} | {self.equal[0]} of {self.equal[1]} | {self.way} |"


def examine(model_type: str, **more: Any) -> Finding:
    """Save, load and compare a small model of this type."""
    name = MODEL_FOR_MASKED_LM_MAPPING[CONFIG_MAPPING[model_type]].__name__
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory)
        try:
            tiny(model_type).save_pretrained(path)
        except Exception as error:
            return Finding(name, {}, (0, 0), "", f"not built: {' '.join(str(error).split())[:90]}")
        try:
            drafter, model = load(path, **more)
        except (ValueError, ImportError) as error:
            return Finding(name, {}, (0, 0), "", f"refused: {' '.join(str(error).split())[:150]}")
        way = "rows together" if drafter.pads else "a pass per length"
        way += ", head where needed" if drafter.splits else ""
        return Finding(name, differences(drafter, model), equal_tokens(drafter), way)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.masked_lms", description=__doc__.splitlines()[0])
    parser.add_argument("model_types", nargs="*", help=f"model types; by default {', '.join(sorted(TRIED))}")
    parser.add_argument("--all", action="store_true", help="every model type of transformers' masked LMs")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)
    types = chosen.model_types or sorted(TRIED)
    if chosen.all:
        types = sorted(config_class.model_type for config_class in MODEL_FOR_MASKED_LM_MAPPING)
    print(f"transformers {transformers.__version__}, torch {torch.__version__}")
    print("| class | alone | padded | ragged | equal tokens | way |")
    print("|---|--:|--:|--:|--:|---|")
    for model_type in types:
        print(examine(model_type).line(), flush=True)


if __name__ == "__main__":
    main()
