"""Writes a trained network as a checkpoint that `apd` loads."""

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

FAST_DLLM_CODE = "Efficient-Large-Model/Fast_dLLM_v2_7B"  # where Fast-dLLM v2's own modelling code is published
DREAM_CODE = "Dream-org/Dream-v0-Instruct-7B"  # where Dream's own modelling code is published


def export(
    network: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    is_drafter: bool,
    block_size: int | None = None,
    new_tokens: int | None = None,
) -> None:
    """Write bfloat16 weights, tokenizer and config; a drafter's config is Dream's or Fast-dLLM v2's, field by field.

    `new_tokens` is the number of masks that a drafter was trained on: the default of `max_new_tokens`.
    """
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
    if new_tokens is not None:  # the special ids are those of config.json
        text = json.dumps({"max_new_tokens": new_tokens}, indent=2)
        (directory / "generation_config.json").write_text(text + "\n")
