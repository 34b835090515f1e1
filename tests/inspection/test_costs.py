"""`apd estimate`: its numbers are those of the models that run."""

import itertools
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from paths import FIXTURES, ROOT
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from apd import EXAMPLE_PROMPTS, APDConfig, APDSampler, load_drafter
from apd.cli import main
from apd.included import BLOCK_DRAFTER_DIR, DRAFTER_DIR, VERIFIER_DIR
from apd.inspection.costs import COPIES, Load, estimate
from apd.models.cache import ColumnLayer
from apd.strategies import Checked
from apd.strategies.registry import parse

SMALL = Load(rows=2, prompt=5, new_tokens=6, config=APDConfig())
FAMILIES = ("parity_dream", "parity_llada", "parity_sdar", "parity_sdar_moe", "parity_nemotron", "parity_llada2_moe")


@pytest.mark.parametrize("folder", [*(FIXTURES / name for name in FAMILIES), DRAFTER_DIR, BLOCK_DRAFTER_DIR], ids=str)
def test_parameters_are_those_of_the_loaded_model(folder: Path) -> None:
    found = estimate(folder / "config.json", None, SMALL, dtype=torch.float32).drafter
    model = load_drafter(folder, mask_token_id=3).model
    assert found.parameters == model.num_parameters()
    assert found.weight_bytes == sum(weight.nbytes for weight in model.parameters())


def test_parameters_of_published_sizes() -> None:
    costs = estimate(ROOT / "docs/configs/dream-7b", ROOT / "docs/configs/qwen2.5-0.5b", SMALL)
    assert (costs.drafter.parameters, costs.drafter.item) == (7_615_616_512, 2)
    assert (
        costs.verifier is not None and costs.verifier.parameters == 494_032_768
    )  # tied: the table is the output layer


def test_of_experts_only_those_of_one_token_are_multiplied() -> None:
    config = json.loads((FIXTURES / "parity_sdar_moe" / "config.json").read_text())
    found = estimate(FIXTURES / "parity_sdar_moe", None, SMALL).drafter
    spared = config["num_experts"] - config["num_experts_per_tok"]
    expert = 3 * config["hidden_size"] * config["moe_intermediate_size"]
    table = config["vocab_size"] * config["hidden_size"]
    assert found.parameters - table - found.read == config["num_hidden_layers"] * spared * expert
    assert "experts" in found.remarks[0]


@pytest.mark.parametrize(
    ("drafter", "kv_window"), [(DRAFTER_DIR, None), (DRAFTER_DIR, 4), (BLOCK_DRAFTER_DIR, None)], ids=str
)
def test_keys_and_values_are_those_of_a_decode(
    drafter: Path, kv_window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = APDSampler.from_pretrained(str(drafter), str(VERIFIER_DIR), kv_window=kv_window)
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[:3], return_tensors="pt", padding=True)
    made, begin = list[int](), ColumnLayer.lazy_initialization

    def record(layer: ColumnLayer, *states: torch.Tensor) -> None:
        begin(layer, *states)
        made.append(layer.keys.nbytes + layer.values.nbytes)

    monkeypatch.setattr(ColumnLayer, "lazy_initialization", record)
    sampler.generate(**inputs, max_new_tokens=16)
    load = Load(3, inputs["input_ids"].shape[1], 16, APDConfig(kv_window=kv_window))
    memory = estimate(drafter, VERIFIER_DIR, load, dtype=torch.float32).memory()
    assert sum(made) == sum(kinds["keys and values"] for kinds in memory.values())
    assert (memory["drafter"]["keys and values"] > 0) == (drafter is BLOCK_DRAFTER_DIR or kv_window is not None)


@pytest.mark.parametrize(
    ("drafter", "knobs", "strategy", "masks"),
    [
        (DRAFTER_DIR, {}, None, None),
        (DRAFTER_DIR, {"window_size": 6}, None, None),
        (DRAFTER_DIR, {"window_size": 8, "kv_window": 3}, None, None),
        (DRAFTER_DIR, {"window_size": 8}, "left-to-right:2", 2),
        (BLOCK_DRAFTER_DIR, {}, None, None),
    ],
)
def test_operations_are_those_of_a_decode(
    drafter: Path, knobs: dict[str, int], strategy: str | None, masks: int | None
) -> None:
    """Counted at every matrix product; with eager attention, which computes every pair of columns as the formula does."""
    sampler = APDSampler.from_pretrained(str(drafter), str(VERIFIER_DIR), attn_implementation="eager", **knobs)
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[3], return_tensors="pt")
    with FlopCounterMode(display=False) as counter:
        output = sampler.generate(**inputs, max_new_tokens=24, strategy=strategy, return_dict_in_generate=True)
    [steps] = output.committed_per_step
    assert len(steps) > 2
    load = Load(1, inputs["input_ids"].shape[1], 24, APDConfig(**knobs), masks=masks)
    costs = estimate(drafter, None if strategy else VERIFIER_DIR, load)
    expected, committed, last = 0, 0, 1
    for number in steps:
        expected += sum(each.operations(costs.sizes[role]) for role, each in costs.passes(committed, last).items())
        committed, last = committed + number, number
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize(
    ("reference", "breadth", "is_reached"),
    [("left-to-right", 1, True), ("left-to-right", 3, True), ("confidence:1", 2, True), ("confidence:1", 4, False)],
)
def test_a_checked_pass_drafts_as_many_canvases_as_are_counted(reference: str, breadth: int, is_reached: bool) -> None:
    """Some of many orders lead to the same canvas."""
    sampler = APDSampler.from_included()
    ids = sampler.tokenizer(EXAMPLE_PROMPTS[3], return_tensors="pt")["input_ids"]
    resolve = sampler.resolver(max_new_tokens=16, strategy=f"checked:K=3,breadth={breadth}/{reference}")
    batch, seen = sampler.batch(), [0]
    batch.add(resolve(ids, seed=0), 0, follow=True)
    while batch.num_rows:
        seen += [progress.canvases for progress in batch.step().progress]
    found = max(after - before for before, after in itertools.pairwise(seen))
    most = Checked(parse(reference).strategy, num_checked=3, breadth=breadth).most_canvases(16)
    assert found == most if is_reached else most / 2 < found < most


class Living(TorchDispatchMode):
    """Counts the bytes of large tensors that are alive, and their largest sum."""

    def __init__(self, least: int) -> None:
        super().__init__()
        self.least, self.sizes, self.now, self.peak = least, dict[int, int](), 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        for each in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(each, torch.Tensor) and each.untyped_storage().nbytes() >= self.least:
                storage = each.untyped_storage()
                if storage.data_ptr() not in self.sizes:
                    self.sizes[storage.data_ptr()] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.drop, storage.data_ptr())
        return found

    def drop(self, place: int) -> None:
        self.now -= self.sizes.pop(place)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "canvases"),
    [
        ("coupling", {}, 1),
        ("coupling", {"do_sample": True, "temperature": 0.7}, 1),
        ("alone", {"strategy": "threshold:0.9"}, 1),
        ("rejection", {"acceptance": "rejection", "do_sample": True}, 1),
        ("alone", {"strategy": "checked:K=4/threshold:0.9"}, 5),
    ],
)
def test_copies_of_the_logits_are_those_that_live_at_once(kind: str, options: dict[str, Any], canvases: int) -> None:
    """Of every canvas; one is left of the pass before, whose marginals are kept."""
    vocab, masks = 5000, 64
    torch.manual_seed(0)
    models = []
    for is_causal in (False, True):
        config = Qwen2Config(
            vocab_size=vocab,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        config.is_causal = is_causal
        models.append(Qwen2ForCausalLM(config).eval().bfloat16())
    sampler = APDSampler(*models, spec="dream", mask_token_id=3)
    with Living(least=masks * vocab) as living:
        sampler.generate(torch.arange(4, 20)[None], max_new_tokens=masks, seed=0, **options)
    copies = living.peak / (masks * vocab * 4)
    expected = COPIES[kind] * canvases + (canvases > 1)
    assert expected - 0.6 < copies < expected + 0.6


def test_the_times_are_those_of_the_slower_of_reading_and_computing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--memory-bandwidth", "1", "--tflops", "1000", "--prompt-length", "9"]) == 0
    reading = _times(capsys)
    assert main(["estimate", "--memory-bandwidth", "2", "--tflops", "1000", "--prompt-length", "9"]) == 0
    assert [2 * ms for ms in _times(capsys)] == pytest.approx(reading, abs=0.02)
    assert main(["estimate", "--memory-bandwidth", "1e6", "--tflops", "1e-3", "--prompt-length", "9"]) == 0
    costs = estimate(DRAFTER_DIR, VERIFIER_DIR, Load(1, 9, 256, APDConfig()))
    passes = costs.passes(0, 1) | {f"{role} later": each for role, each in costs.passes(128, 1).items()}
    expected = [each.operations(costs.sizes[role.split()[0]]) / 1e6 for role, each in passes.items()]
    assert _times(capsys) == pytest.approx(expected, abs=0.01)


def test_an_answer_of_one_token_has_one_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--max-new-tokens", "1"]) == 0
    out = capsys.readouterr().out
    assert "drafter, first" in out and "in the middle" not in out


def _times(capsys: pytest.CaptureFixture[str]) -> list[float]:
    lines = capsys.readouterr().out.splitlines()
    return [float(line.split()[-1]) for line in lines if ", first" in line or ", in the middle" in line]


def test_a_verifier_that_is_the_drafter_has_no_weights_of_its_own() -> None:
    memory = estimate(FIXTURES / "parity_nemotron", "self", SMALL).memory()
    assert memory["verifier"]["weights"] == 0 < memory["verifier"]["keys and values"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tflops", "3"], "--memory-bandwidth and --tflops go together"),
        (["--tflops", "3", "--memory-bandwidth", "0"], "must be more than 0, got 0.0 and 3.0"),
        (["--drafter", str(DRAFTER_DIR)], "--drafter needs --verifier, or -R 1"),
        (["--verifier", str(VERIFIER_DIR)], "--verifier without --drafter"),
        (["--dtype", "half-full"], "--dtype must be a dtype of torch, got half-full"),
        (["--batch-size", "0"], "`rows` must be at least 1, got 0"),
        (["--strategy", "autoregressive"], "--strategy must run the drafter"),
        (["--drafter", str(DRAFTER_DIR / "model.safetensors"), "-R", "1"], "got the file "),
        (["--drafter", str(VERIFIER_DIR), "-R", "1"], "none of the families that work"),
    ],
)
def test_wrong_options_are_refused(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *options]) in (1, 2)
    assert message in capsys.readouterr().err
