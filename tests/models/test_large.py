"""Models that do not fit one device as they are: offloaded, split over processes, quantised. All as in transformers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pairs import TRACES, left_padded, new_tokens, trace_prompts, trace_sampler
from paths import ROOT

from apd import APDSampler

DRAFTER, VERIFIER = str(TRACES / "models/dream"), str(TRACES / "models/verifier")
CALL = {**left_padded(trace_prompts()), "max_new_tokens": 16, "window_size": 6}


@pytest.mark.parametrize("kv_window", [None, 4])
def test_weights_on_disk_give_the_same_tokens(tmp_path, kv_window):
    """The embeddings too: where they are kept says nothing about where inputs go."""
    parts = ["model.layers.0", "model.layers.2", "model.norm", "model.embed_tokens", "lm_head"]
    device_map = dict.fromkeys(parts, "disk") | {"model.layers.1": "cpu", "model.rotary_emb": "cpu"}
    large = APDSampler.from_pretrained(
        DRAFTER, None, mixture_weight=1.0, device_map=device_map, offload_folder=str(tmp_path), dtype="float32"
    )
    assert large.drafter.model.lm_head.weight.device.type == "meta"
    whole = APDSampler(trace_sampler().drafter, mixture_weight=1.0)
    assert torch.equal(large.generate(**CALL, kv_window=kv_window), whole.generate(**CALL, kv_window=kv_window))


@pytest.mark.slow
def test_two_processes_that_split_the_drafter_draw_the_same_tokens(tmp_path):
    """`tp_plan="auto"` with 2 gloo processes: both say what one process says, greedy and sampled."""
    script = tmp_path / "split.py"
    script.write_text(f"""
import os, sys, torch
torch.set_num_threads(1)
sys.path[:0] = {[str(ROOT / "tests"), str(Path(__file__).parent)]!r}
from test_large import CALL, DRAFTER, VERIFIER, new_tokens
from apd import APDSampler
sampler = APDSampler.from_pretrained(DRAFTER, VERIFIER, tp_plan="auto")
assert sampler.drafter.vocab_size == 160
local = sampler.drafter.model.model.layers[0].self_attn.q_proj.weight.to_local()
assert local.shape[0] == 32, local.shape  # half of the heads
for sampling in ({{}}, {{"do_sample": True, "top_k": 0}}):
    for kv_window in (None, 4):
        output = sampler.generate(**CALL, **sampling, kv_window=kv_window, seed=3, return_dict_in_generate=True)
        sys.stdout.write(f"RESULT {{os.environ['RANK']}} {{new_tokens(output)}}\\n")
""")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    assert run.returncode == 0, run.stderr
    expected = [
        str(
            new_tokens(trace_sampler().generate(**CALL, **sampling, kv_window=w, seed=3, return_dict_in_generate=True))
        )
        for sampling in ({}, {"do_sample": True, "top_k": 0})
        for w in (None, 4)
    ]
    for rank in "01":
        said = [line.split(" ", 2)[2] for line in run.stdout.splitlines() if line.startswith(f"RESULT {rank} ")]
        assert said == expected


def test_a_quantised_drafter_decodes():
    """8-bit weights through torchao, which runs on a CPU; rounding may tip decisions, but not most of them."""
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    small = APDSampler.from_pretrained(
        DRAFTER, VERIFIER, quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig())
    )
    weight = small.drafter.model.model.layers[0].mlp.up_proj.weight
    assert "torchao" in type(weight).__module__
    same = (small.generate(**CALL, eos_token_id=None) == trace_sampler().generate(**CALL, eos_token_id=None))[:, -16:]
    assert same.float().mean() > 0.5


def test_splitting_arguments_go_to_the_drafter_alone():
    with pytest.raises(TypeError, match="Did you mean `tp_plan`"):
        APDSampler.from_pretrained(DRAFTER, VERIFIER, tp_pln="auto")
