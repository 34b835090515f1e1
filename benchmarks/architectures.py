"""Which causal LMs of transformers can be verifiers, and how they are run, class by class.

Builds a small random model of every class that `AutoModelForCausalLM` knows, lets `apd` find a way to run it, and compares every
logit of a verifier session with the model alone on each row without a cache: ragged batches, rows of up to 1,500 tokens, drafts
that are taken back.

    python -m benchmarks.architectures                  # a Markdown table of all classes
    python -m benchmarks.architectures gemma3_text lfm2 # of these model types

"""

from __future__ import annotations

import argparse
import dataclasses
import random
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from apd.decoding.state import DecodeState
from apd.decoding.window import Window
from apd.models.checks import check_causal
from apd.models.own_cache import takes
from apd.models.verifier import CausalVerifier
from apd.models.ways import MOST_DIFFERENCE, relative_difference, try_ways

#: Ids of the small models.
VOCABULARY = 96

#: Layers of the small models.
LAYERS = 4

_HEADS = 4
_SIZES: list[tuple[int, str]] = [
    (VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size"),
    (
        32,
        "hidden_size d_model n_embd dim embedding_size emb_dim word_embed_proj_dim ngram_hidden_size hidden_dim lru_width width",
    ),
    (48, "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff ffn_hidden_size dff n_inner dim_ff"),
    (
        LAYERS,
        "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers num_encoder_layers",
    ),
    (
        _HEADS,
        "num_attention_heads num_heads n_head n_heads encoder_attention_heads decoder_attention_heads linear_num_heads "
        "num_decoder_attention_heads num_encoder_attention_heads linear_num_value_heads index_n_heads swa_num_attention_heads "
        "n_routed_experts num_experts num_local_experts moe_num_experts decoder_num_attention_heads",
    ),
    (
        2,
        "num_key_value_heads linear_num_key_heads num_experts_per_tok swa_num_key_value_heads moe_topk zero_expert_num moe_k "
        "num_kv_shared_layers moe_num_active_experts top_k_experts",
    ),
    (1, "n_group topk_group n_shared_experts moe_num_shared_experts num_shared_experts"),
    (
        8,
        "head_dim sliding_window attention_chunk_size qk_rope_head_dim qk_nope_head_dim v_head_dim linear_key_head_dim "
        "linear_value_head_dim linear_head_dim index_head_dim index_topk swa_head_dim sliding_window_size window_size "
        "hidden_size_per_layer_input mamba_n_heads mamba_d_head mamba_d_state attention_window_size",
    ),
    (
        16,
        "kv_lora_rank q_lora_rank moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size state_size chunk_size "
        "moe_shared_expert_intermediate_size mamba_chunk_size n_mamba_heads intermediate_size_moe d_rel",
    ),
    (2048, "max_position_embeddings n_positions n_ctx max_sequence_length max_target_positions"),
]

#: Fields that make any model small, under all the names that configs give them. Windows and chunks of 8 tokens are small, too.
SMALL: dict[str, Any] = {name: size for size, names in _SIZES for name in names.split()}
SMALL |= {"initializer_range": 0.2, "init_std": 0.2, "is_decoder": True, "bos_token_id": 1, "eos_token_id": 2}

#: Fields of particular models.
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_expert_group": 1, "num_experts_per_token": 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 1e4} for name in ("sliding_attention", "full_attention")
        },
    },
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dory": {
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 3,
        "num_hidden_layers": 12,
        "n_input_layers": 4,
        "n_recurrent_layers": 4,
        "n_output_layers": 4,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_experts_per_token": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 100,
        "ple_embed_dim": 32,
        "split_ngram_parts": 4,
    },
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local"] * 4},
    "xlm": {"causal": True},
    "xlstm": {"qk_dim_factor": 1.0, "num_heads": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "num_hidden_layers": 6},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "mamba_headdim": 8, "n_mamba_heads": 8},
    "zaya": {"num_experts_per_tok": 1},
}


def shrunk(config: PreTrainedConfig, **special: Any) -> PreTrainedConfig:
    """A config of the same class for a small model, with every type of layer that the default has.

    Args:
        config: the class's default.
        **special: further fields.
    """
    known = config.to_dict()
    fields = {name: size for name, size in SMALL.items() if name in known and known[name] is not None}
    if known.get("kv_lora_rank") is not None and known.get("num_key_value_heads") == known.get("num_attention_heads"):
        fields["num_key_value_heads"] = _HEADS  # latent attention has no groups of heads
    if isinstance(pad := known.get("pad_token_id"), int) and pad >= VOCABULARY:
        fields["pad_token_id"] = 0
    if types := known.get("layer_types"):
        distinct = list(dict.fromkeys(types))
        fields["layer_types"] = [distinct[i % len(distinct)] for i in range(LAYERS)]
    parts = {name: getattr(config, name) for name in getattr(config, "sub_configs", {})}
    fields |= {name: shrunk(part).to_dict() for name, part in parts.items() if isinstance(part, PreTrainedConfig)}
    return type(config)(**fields | special)


def tiny_model(model_type: str, **special: Any) -> PreTrainedModel:
    """A small random model of the class that `AutoModelForCausalLM` takes for this model type, in evaluation mode.

    Args:
        model_type: as in `config.json`.
        **special: fields of its config.
    """
    config_class = CONFIG_MAPPING[model_type]
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    config = shrunk(config_class(), **SPECIAL.get(model_type, {}) | special)
    if model_class.config_class is config.sub_configs.get("text_config"):  # as in AutoModelForCausalLM
        config = config.get_text_config()
    with torch.device("meta"):
        size = sum(weights.numel() for weights in model_class(config).parameters())
    if size > 3e7:
        raise ValueError(f"no small model could be made: {size / 1e6:.0f} million weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).eval().requires_grad_(False)


#: Lengths of the rows that the law is tested on: far behind a window of 8 tokens, and a short row beside them.
LENGTHS = (1500, 700, 24)


@torch.no_grad()
def worst_difference(
    model: PreTrainedModel,
    verifier: CausalVerifier,
    lengths: Sequence[int] = LENGTHS,
    *,
    steps: int = 7,
    seed: int = 0,
    text: Sequence[int] = (),
) -> float:
    """The largest difference between logits of one verifier session and the model alone on each row, without a cache.

    Drafts of 1 to 8 random tokens, of which any number is kept; single tokens one after the other; ways back to any earlier
    token, which changes; a row that leaves the batch and one that joins.

    Args:
        model: the verifier's model.
        lengths: tokens of the rows; the last 40 % are new.
        steps: calls of the session.
        seed: of tokens and rollbacks.
        text: ids that rows and drafts are cut from; by default they are random.
    Returns:
        The difference in units of the largest logit of its row.
    """
    chance = random.Random(seed)
    limit = takes(model, "logits_to_keep")

    def ids(number: int) -> list[int]:
        if not text:
            return [chance.randrange(verifier.vocab_size) for _ in range(number)]
        first = chance.randrange(len(text) - number + 1)
        return list(text[first : first + number])

    state = _start(lengths, ids)
    session = verifier.open(state)
    worst = 0.0
    for step in range(steps):
        if step == steps // 2:
            rows = torch.tensor([*range(1, len(lengths)), 0])[: max(1, len(lengths) - 1)]
            state = state.select(rows)
            session.select(rows)
            state = state.stack(_start(lengths[:1], ids), mask_token_id=0)
            session.join(state)
        is_single = step % 5 in (2, 3)
        frontier, padding = list(state.layout.frontier), state.layout.padding
        ends = [min(t + (1 if is_single else chance.randint(1, 8)), state.width) for t in frontier]
        window = Window.of_rows(state, ends)
        draft = torch.tensor([ids(window.columns.shape[1]) for _ in frontier])
        logits = session.logits(state, window, draft)[:, :]
        tokens = state.tokens.clone()
        for row, (t, end) in enumerate(zip(frontier, ends, strict=True)):
            tokens[row, t:end] = draft[row, : end - t]
            row_ids = tokens[row : row + 1, padding[row] : end - 1]
            kept = {"logits_to_keep": end - t} if limit else {}
            expected = model(input_ids=row_ids, use_cache=False, **kept).logits[0, t - end :]
            worst = max(worst, relative_difference(logits[row, : end - t], expected))
            # The token before the new frontier is a correction, or what follows a way back: any token.
            t = end if is_single else chance.randint(t + 1, end)
            if step % 5 == 4:
                t = max(padding[row] + 1, t - chance.choice((1, 3, 9, 40, 400)))
            tokens[row, t - 1] = draft[row, 0] if is_single else ids(1)[0]
            frontier[row] = min(t, state.width - 1)
        decided = torch.arange(state.width)[None] < torch.tensor(frontier)[:, None]
        state = state.with_decided(tokens, decided)
    return worst


def _start(lengths: Sequence[int], ids: Callable[[int], list[int]]) -> DecodeState:
    """Rows of ids, left-padded."""
    width = max(lengths)
    new = min(width * 2 // 5, min(lengths) - 1)
    prompts = torch.tensor([[0] * (width - length) + ids(length - new) for length in lengths])
    padding = torch.tensor([width - length for length in lengths])
    return DecodeState.start(prompts, max_new_tokens=new, mask_token_id=0, padding=padding)


@dataclass(frozen=True)
class Finding:
    """What became of one class.

    Attributes:
        name: the class.
        model_types: those that `AutoModelForCausalLM` gives it.
        verdict: how it is run, or that it is refused.
        why: why not in a faster way.
        seconds: time of building and trying it.
    """

    name: str
    model_types: tuple[str, ...]
    verdict: str
    why: str = ""
    seconds: float = 0.0


VERDICTS = {
    "columns": "taken",
    "own head": "taken, own head",
    "own cache": "taken, row by row",
    "own cache, one by one": "taken, row by row, one token at a time",
    "no cache": "taken without a cache",
}


def classes() -> dict[str, list[str]]:
    """The classes of `AutoModelForCausalLM`, each with its model types."""
    found: dict[str, list[str]] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        found.setdefault(name, []).append(model_type)
    return found


def examine(name: str, model_types: Sequence[str], lengths: Sequence[int] = LENGTHS) -> Finding:
    """Build a class small, find its way, and hold it to the law."""
    started = time.monotonic()
    model, errors = None, []
    for model_type in model_types:
        try:
            model = tiny_model(model_type)
            break
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    if model is None:
        return Finding(name, tuple(model_types), "not built", " ".join(min(errors, key=len).split()))
    verdict, why = "refused", ""
    try:
        check_causal(model)
    except ValueError:
        why = "attends both ways, or to an encoder"
    else:
        way, reasons = try_ways(model)
        why = reasons[-1] if reasons else ""  # why not in the next faster way
        if way is not None:
            verdict = VERDICTS[way]
            worst = worst_difference(model, CausalVerifier(model, way), lengths)
            if not worst <= MOST_DIFFERENCE[model.dtype]:
                verdict, why = "WRONG", f"{way}: differs by {worst:.2g} of the largest logit"
    return Finding(name, tuple(model_types), verdict, " ".join(why.split()), time.monotonic() - started)


def table(findings: Iterable[Finding]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| class | model types | as a verifier | why |"
    yield "|---|---|---|---|"
    for one in findings:
        yield f"| {one.name} | {', '.join(one.model_types)} | {one.verdict} | {one.why.replace('|', '/')[:120]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model_types", nargs="*", help="model types; by default all")
    parser.add_argument("--verbose", action="store_true", help="print seconds, too")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    counts: dict[str, int] = {}
    print(f"transformers {transformers.__version__}, torch {torch.__version__}", flush=True)
    findings = (
        examine(name, types)
        for name, types in sorted(classes().items())
        if not chosen.model_types or set(types) & set(chosen.model_types)
    )

    def counted() -> Iterator[Finding]:
        for one in findings:
            counts[one.verdict] = counts.get(one.verdict, 0) + 1
            yield dataclasses.replace(one, verdict=f"{one.verdict} ({one.seconds:.1f} s)") if chosen.verbose else one

    for line in table(counted()):
        print(line, flush=True)
    print(", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items())))


if __name__ == "__main__":
    main()
