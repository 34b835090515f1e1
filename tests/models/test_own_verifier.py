"""A drafter that verifies itself: one set of weights, read with its own mask to draft and causally to verify."""

import copy
import itertools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import left_padded, new_tokens
from paths import FIXTURES
from transformers import NoRepeatNGramLogitsProcessor, Qwen2Config, Qwen2ForCausalLM

import apd
from apd import APDSampler, Autoregressive, CausalVerifier, IdealListModel, MaskedDiffusionDrafter, ModelSpec
from apd.cli import main
from apd.included import DRAFTER_DIR, VERIFIER_DIR
from apd.models.loading import drafter_family

MASK, STOP = 23, 22
LAW_12 = {"mixture_weight": 0.0, "correction": True, "first": "judge"}
KINDS = [("causal", None), ("causal", 3), ("prefix", 4), ("block", 3), ("full", None)]


def tiny(seed: int = 0) -> Qwen2ForCausalLM:
    """Random weights in float64: rounding must not hide a fault."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "initializer_range": 0.6}
    config = Qwen2Config(vocab_size=24, num_attention_heads=2, num_key_value_heads=1, **sizes)
    return Qwen2ForCausalLM(config).eval().requires_grad_(False).double()


def drafter(kind: str, block_size: int | None, shift: int) -> MaskedDiffusionDrafter:
    model = tiny()
    model.config.is_causal = kind != "full"
    attention: Any = {"attention": kind, "block_size": block_size}
    return MaskedDiffusionDrafter(model, mask_token_id=MASK, logit_shift=shift, reads_causally=True, **attention)


SAMPLERS = {
    (kind, size, shift): APDSampler(drafter(kind, size, shift), "self")
    for (kind, size), shift in itertools.product(KINDS, (0, 1))
}
ALONE = APDSampler(drafter("causal", None, 0), CausalVerifier(tiny()))


def case(seed: int) -> tuple[Any, list[list[int]], dict[str, Any], dict[str, Any]]:
    """A drafter, prompts, a call, and knobs that change no token."""
    rng = random.Random(seed)
    which = rng.choice([*SAMPLERS])
    prompts = [[rng.randrange(22) for _ in range(rng.randint(1, 6))] for _ in range(rng.randint(1, 4))]
    call: dict[str, Any] = {"max_new_tokens": rng.randint(1, 14), "eos_token_id": rng.choice((STOP, None))}
    call |= {"pad_token_id": 0, "seed": rng.randrange(1000)}
    if rng.random() < 0.7:
        call |= {"do_sample": True, "temperature": rng.choice((0.5, 1.0, 1.5)), "top_k": 0}
        call["top_p"] = rng.choice((1.0, 0.8))
    if rng.random() < 0.2:
        call["logits_processor"] = [NoRepeatNGramLogitsProcessor(2)]
    knobs: dict[str, Any] = {"window_size": rng.choice((None, None, 1, 3, 5, "auto"))}
    if which[0] == "full":
        knobs["kv_window"] = rng.choice((None, 2))
    return which, prompts, call, knobs


def differing(seeds: range, **law: Any) -> list[int]:
    """The cases in which a row is not the causal model's own text."""
    wrong = []
    for seed in seeds:
        which, prompts, call, knobs = case(seed)
        if seed % 2:
            expected, found = (
                [one.tokens for one in sampler.generate_many(prompts, batch_size=2, **call, **more)]
                for sampler, more in ((ALONE, {"strategy": Autoregressive()}), (SAMPLERS[which], law | knobs))
            )
        else:
            call |= left_padded(prompts, pad=0) | {"return_dict_in_generate": True}
            expected = new_tokens(ALONE.generate(**call, strategy=Autoregressive()))
            found = new_tokens(SAMPLERS[which].generate(**call, **law, **knobs))
        if expected != found:
            wrong.append(seed)
    return wrong


def test_law_12_the_model_writes_what_it_writes_alone() -> None:
    assert differing(range(8), **LAW_12) == []
    assert differing(range(4), **LAW_12 | {"first": "draft"})


@pytest.mark.slow
def test_law_12_the_model_writes_what_it_writes_alone_in_five_hundred_cases() -> None:
    assert differing(range(8, 516), **LAW_12) == []


@pytest.mark.parametrize("which", SAMPLERS, ids=str)
def test_the_alone_decoding_is_that_of_transformers(which: Any) -> None:
    ids = torch.tensor([[3, 14, 15, 9]])
    greedy = {"max_new_tokens": 12, "eos_token_id": None, "do_sample": False}
    banned = [[MASK]]  # the mask is never drawn
    expected = tiny().generate(
        ids, attention_mask=torch.ones_like(ids), pad_token_id=0, bad_words_ids=banned, **greedy
    )
    assert torch.equal(SAMPLERS[which].generate(ids, **LAW_12, **greedy), expected)


def test_a_causal_drafter_with_shifted_logits_drafts_its_own_first_token() -> None:
    """Its row before the first mask has read the same tokens in both roles, so the first token is never replaced."""
    call = {"max_new_tokens": 24, "eos_token_id": None, "return_dict_in_generate": True, "do_sample": True, "seed": 1}
    output = SAMPLERS["causal", None, 1].generate(torch.tensor([[3, 4, 5]]), **LAW_12, **call)
    [row] = output.trace
    assert [row.drafts[step][0] for step in range(len(row.committed))] == [row.tokens[start] for start in row.starts]
    assert torch.equal(output.drafter_forwards, output.verifier_forwards)
    assert output.drafter_forwards.sum() < output.new_tokens.sum()


@pytest.fixture(params=["untraced", *(pytest.param(name, marks=pytest.mark.slow) for name in ("eager", "aot_eager"))])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A backend of `torch.compile`; tracing takes seconds, so by default what is compiled runs as it is."""
    with torch.compiler.set_stance("force_eager" if request.param == "untraced" else "default"):
        yield request.param.replace("untraced", "eager")


@pytest.mark.parametrize(
    "which", [("causal", None, 0), ("causal", 3, 1), ("prefix", 4, 1), ("full", None, 0)], ids=str
)
def test_both_roles_of_one_module_compile(which: Any, backend: str) -> None:
    torch._dynamo.reset()
    sampler = APDSampler(drafter(*which), "self").compile(backend=backend)
    assert sampler.drafter.compiled is not sampler.verifier.compiled  # type: ignore[union-attr]
    prompts = [[3, 4, 5], [6], [7, 8], [9, 10, 11, 12]]
    call = {"batch_size": 2, "max_new_tokens": 9, "seed": 3, "pad_token_id": 0, "do_sample": True, "top_k": 0}
    expected = [one.tokens for one in ALONE.generate_many(prompts, strategy=Autoregressive(), **call)]
    assert [one.tokens for one in sampler.generate_many(prompts, **LAW_12, **call)] == expected


def test_one_module_has_both_roles() -> None:
    own = drafter("causal", None, 0)
    sampler = APDSampler(own, "self")
    assert isinstance(sampler.verifier, CausalVerifier)
    assert sampler.verifier.model is sampler.drafter.model is own.model
    named = APDSampler(own, own.model, **LAW_12)
    call = {"max_new_tokens": 9, "eos_token_id": None, "do_sample": True, "seed": 4}
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(sampler.generate(ids, **call, **LAW_12), named.generate(ids, **call))
    twin = copy.deepcopy(sampler)
    assert twin.verifier.model is twin.drafter.model is not own.model  # type: ignore[union-attr]


# ---------------------------------------------------------------- by name


OWN = ModelSpec("own", Qwen2ForCausalLM, 1, reads_causally=True)
TRUSTING = ModelSpec("trusting", Qwen2ForCausalLM, 1)


def test_a_checkpoint_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    original = Qwen2ForCausalLM.from_pretrained

    def counted(path: str, **more: Any) -> Any:
        read.append(path)
        return original(path, **more)

    monkeypatch.setattr(Qwen2ForCausalLM, "from_pretrained", counted)
    sampler = APDSampler.from_pretrained(str(DRAFTER_DIR), "self", spec=OWN)
    assert read == [str(DRAFTER_DIR)]
    assert sampler.verifier.model is sampler.drafter.model  # type: ignore[union-attr]
    assert sampler.tokenizer is not None
    inputs = sampler.tokenizer(apd.EXAMPLE_PROMPTS[:2], return_tensors="pt", padding=True)
    call = {**inputs, "max_new_tokens": 8}
    expected = sampler.generate(**call, strategy=Autoregressive())
    assert torch.equal(sampler.generate(**call, **LAW_12), expected)
    assert torch.equal(
        sampler.generate(**call, strategy="checked:proposer=verifier"), sampler.generate(**call, strategy="checked")
    )


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("parity_*")), ids=lambda path: path.name)
def test_a_family_writes_what_it_writes_alone_or_is_refused(path: Path) -> None:
    try:
        family = drafter_family(path)
    except ValueError:
        pytest.skip("no family loads it")
    if not family.reads_causally:
        with pytest.raises(ValueError, match=f"the family '{family.name}' was never trained"):
            APDSampler.from_pretrained(str(path), "self")
        return
    sampler = APDSampler.from_pretrained(str(path), "self", dtype=torch.float64)
    words = [token for token in range(3, 60) if token != sampler.drafter.mask_token_id]
    prompts = [words[:7], words[7:10], words[20:25]]
    call = left_padded(prompts, pad=0) | {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "seed": 3}
    for sampling in ({}, {"do_sample": True, "top_k": 0}):
        expected = sampler.generate(**call, **sampling, strategy=Autoregressive())
        assert torch.equal(sampler.generate(**call, **sampling, **LAW_12), expected)


@pytest.mark.parametrize("spec", [None, "dream", TRUSTING], ids=str)
def test_a_family_that_was_never_trained_causally_is_refused_before_its_weights_are_read(
    tmp_path: Path, spec: Any
) -> None:
    shutil.copy(DRAFTER_DIR / "config.json", tmp_path)  # there are no weights
    name = "trusting" if spec is TRUSTING else "dream"
    told = rf"`verifier` must be a causal model .*, got 'self', but the family '{name}' was never .* small causal model .*'\./self'"
    with pytest.raises(ValueError, match=told):
        APDSampler.from_pretrained(str(tmp_path), "self", spec=spec)


def test_a_drafter_that_was_never_trained_causally_is_refused() -> None:
    sampler = APDSampler.from_included()
    with pytest.raises(ValueError, match=r"got 'self', but this drafter was never trained .*`reads_causally=True`"):
        APDSampler(sampler.drafter, "self")
    with pytest.raises(ValueError, match="got 'self', but this drafter was never trained"):
        APDSampler(IdealListModel.shuffle(3).drafter, "self")
    own = APDSampler(sampler.drafter, sampler.drafter.model)  # type: ignore[attr-defined]
    assert own.verifier is not None  # who says so explicitly may


def test_another_word_is_no_verifier() -> None:
    with pytest.raises(TypeError, match=r"`verifier` must be a transformers model or an `apd\.Verifier`, got str"):
        APDSampler(drafter("causal", None, 0), "itself")  # type: ignore[arg-type]


def test_a_revision_of_the_drafters_own_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="`verifier_revision` must be None with verifier='self', got 'main'"):
        APDSampler.from_pretrained(str(DRAFTER_DIR), "self", spec=OWN, verifier_revision="main")


def test_a_directory_of_that_name_is_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(VERIFIER_DIR, tmp_path / "self")
    monkeypatch.chdir(tmp_path)
    sampler = APDSampler.from_pretrained(str(DRAFTER_DIR), "./self")
    assert sampler.verifier.model is not sampler.drafter.model  # type: ignore[union-attr]


def test_the_command_line_takes_the_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["generate", "--prompt", apd.EXAMPLE_PROMPTS[3], "--max-new-tokens", "6", "--verifier", "self"]
    assert main([*ask, "--drafter", str(DRAFTER_DIR)]) == 1
    assert "apd: error: `verifier` must be a causal model" in capsys.readouterr().err
    config = json.loads((DRAFTER_DIR / "config.json").read_text()) | {"model_type": "own"}
    shutil.copytree(DRAFTER_DIR, tmp_path / "own")
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    family = ModelSpec(
        "own", Qwen2ForCausalLM, 1, model_types=("own",), architectures=("DreamModel",), reads_causally=True
    )
    monkeypatch.setitem(apd.FAMILIES, "own", family)
    found = []
    for more in (["--strategy", "autoregressive"], ["-R", "0", "--correction", "--first", "judge"]):
        assert main([*ask, "--drafter", str(tmp_path / "own"), *more]) == 0
        found.append(capsys.readouterr().out)
    assert found[0] == found[1] != ""
