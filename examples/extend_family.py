"""A model family of your own.
Runs in seconds, with random weights: python examples/extend_family.py

A family is a `ModelSpec`: which transformers class computes the model, which
columns see each other (`attention`, by default all), how its `config.json` and
its weights are named, and where a logit is read. Nothing of the model's own
code is needed, and none is run.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from apd import APDSampler, ModelSpec, load_drafter
from apd.models.families import decoder_fields


def config_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """From the checkpoint's config.json to the arguments of `LlamaConfig`."""
    return decoder_fields({**raw, "hidden_size": raw["width"], "num_hidden_layers": raw["depth"]})


TINY = ModelSpec(
    "tiny",
    LlamaForCausalLM,
    logit_shift=0,  # row i of the logits predicts token i; 1 where it predicts token i + 1, as in a causal model
    config_fields=config_fields,
    key_mapping={r"^net\.": "model.", r"^out\.": "lm_head."},  # the checkpoint's weight names → transformers' names
    model_types=("tiny-diffusion",),
    architectures=("TinyDiffusionModel",),
)


def write_checkpoint(path: Path) -> None:
    """What somebody published: other names in its files, random weights."""
    sizes = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 20}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=16, num_hidden_layers=2, **sizes))
    names = {name: name.replace("lm_head.", "out.").replace("model.", "net.") for name in model.state_dict()}
    save_file({names[name]: value for name, value in model.state_dict().items()}, path / "model.safetensors")
    raw = {"model_type": "tiny-diffusion", "architectures": ["TinyDiffusionModel"], "width": 16, "depth": 2}
    raw |= {"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "mask_token_id": 19} | sizes
    (path / "config.json").write_text(json.dumps(raw))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory))
        drafter = load_drafter(directory, spec=TINY)
        sampler = APDSampler(drafter, mixture_weight=1.0)  # the drafter alone; a verifier of its vocabulary is welcome
        print(
            sampler.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, pad_token_id=0, eos_token_id=None).tolist()
        )


if __name__ == "__main__":
    main()
