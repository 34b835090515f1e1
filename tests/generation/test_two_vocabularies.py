"""Pairs without a shared vocabulary: exact with `Checked`, refused otherwise."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from pairs import TRACES, left_padded
from safetensors.torch import load_file, save_file
from tongues import TEXTS, tokenizer_of
from transformers import LlamaConfig, LlamaForCausalLM

from apd import APD, APDSampler, Autoregressive, Checked, LeftToRight, PromptLookup, TextProposer, Threshold, mix_seed
from apd.cli.app import main
from apd.included import DRAFTER_DIR, VERIFIER_DIR
from apd.included.tasks import EXAMPLE_PROMPTS

DRAFTER_KIND, VERIFIER_KIND = "byte_bpe", "unigram"
#: Greedy and sampled. In float64, a tie within rounding has a probability below 1e-9 per token.
DRAWING = {"greedy": {}, "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 30}}


@pytest.fixture(scope="module")
def llada(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaDA checkpoint, as published, with a tokenizer of its own."""
    path = tmp_path_factory.mktemp("pair") / "llada"
    shutil.copytree(TRACES / "models/llada", path)
    tokenizer = tokenizer_of(DRAFTER_KIND)
    tokenizer.save_pretrained(path)
    rows = len(tokenizer) + 3
    weights = load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    for name in ("wte", "ff_out"):
        weights[f"model.transformer.{name}.weight"] = torch.randn(rows, 48, generator=generator)
    save_file(weights, path / "model.safetensors")
    fields = json.loads((path / "config.json").read_text())
    fields |= {"vocab_size": rows, "embedding_size": rows, "mask_token_id": 2, "eos_token_id": 1, "pad_token_id": 1}
    (path / "config.json").write_text(json.dumps(fields))
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama checkpoint with a tokenizer of another kind and size."""
    path = tmp_path_factory.mktemp("pair") / "llama"
    tokenizer = tokenizer_of(VERIFIER_KIND)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.4,
        eos_token_id=1,
        bos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sampler(llada: Path, llama: Path) -> APDSampler:
    return APDSampler.from_pretrained(str(llada), str(llama), strategy="checked", dtype=torch.float64)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [
        tokenizer_of(DRAFTER_KIND)(text)["input_ids"][:length] for text, length in zip(TEXTS, (9, 4), strict=False)
    ]


def test_a_verifier_of_another_vocabulary_guesses_text(sampler: APDSampler) -> None:
    assert sampler.verifier is None and isinstance(sampler.proposer, TextProposer) and sampler.proposer.is_cached
    assert sampler.vocab_size == sampler.drafter.vocab_size == len(tokenizer_of(DRAFTER_KIND)) + 3


@pytest.mark.parametrize("drawing", DRAWING)
def test_a_batch_has_the_drafters_sequential_tokens(
    sampler: APDSampler, prompts: list[list[int]], drawing: str
) -> None:
    call = {**left_padded(prompts, pad=1), "max_new_tokens": 12, "seed": 5, **DRAWING[drawing]}
    found = sampler.generate(**call, return_dict_in_generate=True)
    assert torch.equal(found.sequences, sampler.generate(**call, strategy=LeftToRight(1)))
    assert found.verifier_forwards.min() > 0


@pytest.mark.parametrize("drawing", DRAWING)
def test_streams_and_many_prompts_have_them_too(sampler: APDSampler, prompts: list[list[int]], drawing: str) -> None:
    call = {"max_new_tokens": 12, **DRAWING[drawing]}
    sought = [
        sampler.generate(torch.tensor([ids]), seed=[mix_seed(3, i)], strategy=LeftToRight(1), **call)[0, len(ids) :]
        for i, ids in enumerate(prompts)
    ]
    answers = list(sampler.generate_many(prompts, batch_size=2, seed=3, **call))
    assert [answer.tokens for answer in answers] == [row.tolist() for row in sought]
    for i, ids in enumerate(prompts):
        chunks = list(sampler.stream(torch.tensor([ids]), seed=[mix_seed(3, i)], **call))
        assert [token for chunk in chunks for token in chunk.tokens] == sought[i].tolist()


def test_other_references_are_checked_by_text_too(sampler: APDSampler, prompts: list[list[int]]) -> None:
    call = {**left_padded(prompts, pad=1), "max_new_tokens": 8, "return_dict_in_generate": True}
    for checked in (Checked(Threshold(0.3), "verifier", 4), Checked(LeftToRight(2), num_checked="auto")):
        found = sampler.generate(**call, strategy=checked)
        assert torch.equal(found.sequences, sampler.generate(**call, strategy=checked.reference).sequences)
        assert found.verifier_forwards.min() > 0
    # A proposer that needs no verifier stays what it is.
    assert sampler.generate(**call, strategy=Checked(proposer=PromptLookup())).verifier_forwards.max() == 0


@pytest.mark.parametrize("strategy", ["apd", "apd:R=0.5,rejection", APD(0.5), Autoregressive()])
def test_what_needs_a_shared_vocabulary_says_so(sampler: APDSampler, strategy: object) -> None:
    for call in (sampler.generate, sampler.stream):
        with pytest.raises(ValueError, match=r"different vocabularies, got .*mixture.* needs a shared one"):
            call(torch.tensor([[5, 6]]), max_new_tokens=4, strategy=strategy)
    sampler.generate(torch.tensor([[5, 6]]), max_new_tokens=4, strategy="apd:R=1")  # the drafter alone


@pytest.mark.parametrize("strategy", [None, "threshold:0.9", Checked(proposer="lookup")])
def test_without_checked_the_pair_is_refused_with_the_remedy(
    llada: Path, llama: Path, sampler: APDSampler, strategy: object
) -> None:
    with pytest.raises(
        ValueError, match=r"must share a vocabulary.*`strategy=Checked\(\)` takes a transformers verifier of any"
    ):
        APDSampler.from_pretrained(str(llada), str(llama), strategy=strategy)
    assert sampler.proposer is not None
    with pytest.raises(ValueError, match=r"must share a vocabulary.*`strategy=Checked\(\)` takes"):
        APDSampler(
            sampler.drafter,
            sampler.proposer.model,
            sampler.tokenizer,
            verifier_tokenizer=tokenizer_of(VERIFIER_KIND),
            strategy=strategy,
        )


@pytest.mark.parametrize("role", ["drafter", "verifier"])
def test_a_missing_tokenizer_is_named_before_weights_are_read(
    llada: Path, llama: Path, role: str, tmp_path: Path
) -> None:
    pair = {name: shutil.copytree(path, tmp_path / name) for name, path in (("drafter", llada), ("verifier", llama))}
    for path in pair.values():
        (path / "model.safetensors").write_bytes(b"")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (pair[role] / name).unlink()
    # Without tokenizers, a small difference in size could be padding.
    fields = json.loads((pair["verifier"] / "config.json").read_text()) | {"vocab_size": 2000}
    (pair["verifier"] / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"only text in common: give the tokenizer of the {role}\."):
        APDSampler.from_pretrained(str(pair["drafter"]), str(pair["verifier"]), strategy="checked")


def test_an_unknown_strategy_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`strategy` must be a known name, got .cheked.\. Did you mean `checked`"):
        APDSampler.from_pretrained(str(tmp_path), strategy="cheked")
    with pytest.raises(ValueError, match="`mixture_weight` has no effect beside `strategy`"):
        APDSampler.from_pretrained(str(tmp_path), strategy="checked", mixture_weight=0.3)


@pytest.fixture(scope="module")
def renumbered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The included verifier with its tokens in the opposite order, the special ones excepted."""
    path = tmp_path_factory.mktemp("pair") / "renumbered"
    shutil.copytree(VERIFIER_DIR, path)
    tokenizer = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    last = len(vocab) + 3
    tokenizer["model"]["vocab"] = {word: i if i < 4 else last - i for word, i in vocab.items()}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    weights = load_file(path / "model.safetensors")
    order = torch.tensor([i if i < 4 else last - i for i in range(len(vocab))])
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        weights[name][: len(order)] = weights[name][order]
    save_file(weights, path / "model.safetensors")
    return path


@pytest.mark.parametrize("drawing", DRAWING)
def test_a_good_verifier_saves_passes_whatever_its_ids(renumbered: Path, drawing: str) -> None:
    sampler = APDSampler.from_pretrained(str(DRAFTER_DIR), str(renumbered), strategy=Checked(num_checked=8))
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[:4], return_tensors="pt", padding=True)
    call = {**inputs, "max_new_tokens": 32, "seed": 1, "return_dict_in_generate": True, **DRAWING[drawing]}
    sought, found = sampler.generate(**call, strategy=LeftToRight(1)), sampler.generate(**call)
    assert torch.equal(found.sequences, sought.sequences)
    assert 2 * found.drafter_forwards.sum() < sought.drafter_forwards.sum()


def test_the_command_line_takes_such_a_pair(renumbered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ask = ["generate", "--prompt", EXAMPLE_PROMPTS[0], "--max-new-tokens", "32"]
    models = ["--drafter", str(DRAFTER_DIR), "--verifier", str(renumbered)]
    assert main([*ask, "--strategy", "left-to-right"]) == 0
    sought = capsys.readouterr()
    assert main([*ask, *models, "--strategy", "checked"]) == 0
    found = capsys.readouterr()
    assert found.out == sought.out
    assert " 0 verifier forwards" in sought.err and " 0 verifier forwards" not in found.err
    assert main([*ask, *models]) == 1
    assert "`strategy=Checked()` takes a transformers verifier of any vocabulary" in capsys.readouterr().err
