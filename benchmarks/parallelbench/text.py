"""Measures of free text behind the extra `bench-text`: grammar, ROUGE, BLEU; BERTScore is computed here.

Settings are those of the official code. BLEU is `evaluate`'s (tokenizer 13a, up to 4-grams, no smoothing), as
sacrebleu computes it. The package bert-score has had no release since 2023, so BERTScore is implemented here
on transformers; its values equal bert-score 0.3.13 with `lang="en"`.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from apd.extras import install

__all__ = ["ROUGE_NAMES", "bertscore", "bleu", "is_grammatical", "rouge"]

ROUGE_NAMES = ("rouge1_score", "rouge2_score", "rougeL_score")
_BERTSCORE_MODEL, _BERTSCORE_LAYER = "roberta-large", 17


def rouge(text: str, reference: str) -> dict[str, float]:
    """F-measures of ROUGE-1, -2 and -L over stemmed words, under `ROUGE_NAMES`."""
    scores = _rouge_scorer().score(reference, text)
    return {name: scores[name.removesuffix("_score")].fmeasure for name in ROUGE_NAMES}


def bleu(text: str, reference: str) -> float:
    """BLEU of one sentence against one reference, 0 to 1; 0 where no 4-gram is shared."""
    return _package("sacrebleu").corpus_bleu([text], [[reference]], smooth_method="none").score / 100


def bertscore(text: str, reference: str, *, model: str = _BERTSCORE_MODEL, layer: int = _BERTSCORE_LAYER) -> float:
    """F1 of the best cosine match of every token, by an encoder's hidden states; no rescaling, no idf.

    The two special tokens can be matched but need no match themselves.

    Args:
        model: a RoBERTa checkpoint; the default is a download of 1.4 GB.
        layer: which hidden state, 0 being the embeddings.
    Source: Zhang et al. 2020, arXiv:1904.09675.
    """
    import torch

    tokenizer, encoder = _encoder(model)
    states = []
    for sentence in (text, reference):
        inputs = tokenizer(" " + sentence.strip(), return_tensors="pt", truncation=True)
        with torch.inference_mode():
            hidden = encoder(**inputs, output_hidden_states=True).hidden_states[layer][0]
        states.append(hidden / hidden.norm(dim=-1, keepdim=True))
    similarity = states[0] @ states[1].T  # tokens of text × tokens of reference
    precision = float(similarity.amax(1)[1:-1].mean())
    recall = float(similarity.amax(0)[1:-1].mean())
    return 2 * precision * recall / (precision + recall)


def is_grammatical(text: str) -> bool:
    """True if LanguageTool (en-US, spelling included) finds no mistake. It needs Java 17 and downloads itself once."""
    return not _language_tool().check(text)


@functools.cache
def _rouge_scorer() -> Any:
    scorer = _package("rouge_score.rouge_scorer", "rouge-score")
    return scorer.RougeScorer([name.removesuffix("_score") for name in ROUGE_NAMES], use_stemmer=True)


@functools.cache
def _language_tool() -> Any:
    package = _package("language_tool_python")
    try:
        return package.LanguageTool("en-US")
    except (OSError, package.exceptions.LanguageToolError) as error:
        raise RuntimeError(
            f"LanguageTool did not start: {error}. It needs Java 17 and, once, the network. Or pass your own `grammar`."
        ) from error


@functools.cache
def _encoder(model: str) -> tuple[Any, Any]:
    from transformers import AutoTokenizer, RobertaModel

    encoder = RobertaModel.from_pretrained(model, add_pooling_layer=False, use_safetensors=True)  # no pickles
    return AutoTokenizer.from_pretrained(model), encoder.eval()


def _package(name: str, distribution: str | None = None) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = distribution or name.replace("_", "-")
        raise ImportError(f"This score needs {missing}: {error}. Install it with: {install('bench-text')}.") from error
