"""Models small enough to know everything about: an enumerable toy with any weights, and random neural pairs."""

import itertools

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from apd import CausalVerifier, MaskedDiffusionDrafter
from apd.models.ideal import IdealListModel
from apd.models.loading import as_drafter, as_verifier

TOKENS, LENGTH = 3, 4


def toy(seed: int = 0) -> IdealListModel:
    """All 81 sequences of 3 tokens and length 4, each with a random weight: every position depends on every other."""
    answers = torch.tensor(list(itertools.product(range(TOKENS), repeat=LENGTH)))
    noise = torch.randn(len(answers), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return IdealListModel(answers, noise.exp())


def tiny_pair(seed: int = 0, vocab: int = 32, num_layers: int = 2) -> tuple[MaskedDiffusionDrafter, CausalVerifier]:
    """A random Dream and a random Qwen2; the mask is the last id. Every token depends on its context."""
    models = []
    with torch.random.fork_rng():
        for offset in range(2):
            torch.manual_seed(2 * seed + offset)
            config = Qwen2Config(
                vocab_size=vocab,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=num_layers,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=128,
                initializer_range=0.35,
                tie_word_embeddings=False,
                pad_token_id=None,
                bos_token_id=None,
                eos_token_id=None,
            )
            models.append(Qwen2ForCausalLM(config).eval().requires_grad_(False))
    drafter, verifier = models
    drafter.config.is_causal = False
    return as_drafter(drafter, spec="dream", mask_token_id=vocab - 1), as_verifier(verifier)
