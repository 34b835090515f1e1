"""The decode step once more, slowly: one row, no cache, no batch, Python loops. What fast paths are checked against."""

import math

import torch

from apd.decoding.noise import DRAFT, keyed_gumbel


def reference_generate(
    drafter,
    verifier,
    prompt: list[int],
    *,
    max_new_tokens: int,
    mixture_weight: float,
    acceptance_threshold: float = 0.0,
    window_size: int | None = None,
    correction: bool = False,
    first: str = "draft",
    temperature: float = 0.0,
    seed: int = 0,
    stop: int | None = None,
) -> tuple[list[int], list[int]]:
    """New tokens and committed counts per step of the coupling rule; `drafter` in Dream's format (shift 1)."""
    tokens, length, counts = list(prompt), len(prompt) + max_new_tokens, []
    removed = drafter.mask_token_id
    shared = min(drafter.vocab_size, verifier.vocab_size)
    with torch.no_grad():
        while len(tokens) < length and (stop is None or stop not in tokens[len(prompt) :]):
            t = len(tokens)
            m = length - t if window_size is None else min(window_size, length - t)
            canvas = torch.tensor([tokens + [drafter.mask_token_id] * m])
            everything = torch.ones(1, 1, t + m, t + m, dtype=torch.bool)
            draft_logits = drafter.model(canvas, attention_mask=everything).logits[0].float()
            committed = []
            draft, lp_draft, noise = [], [], []
            for j in range(m):
                logits = draft_logits[t + j - drafter.logit_shift, :shared].clone()
                logits[removed] = -math.inf
                lp_draft.append(logits.log_softmax(-1))
                key = torch.tensor([seed]), torch.tensor([[t + j]])
                noise.append(
                    keyed_gumbel(*key, DRAFT, torch.arange(len(logits)))[0, 0]
                    if temperature > 0
                    else torch.zeros(len(logits))
                )
                draft.append(int((lp_draft[j] / (temperature or 1.0) + noise[j]).argmax()))
            verify_logits = verifier.model(torch.tensor([tokens + draft])).logits[0].float()
            for j in range(m):
                logits = verify_logits[t + j - 1, :shared].clone()
                logits[removed] = -math.inf
                mixture = mixture_weight * lp_draft[j] + (1 - mixture_weight) * logits.log_softmax(-1)
                mixture[removed] = -math.inf
                target = int((mixture / (temperature or 1.0) + noise[j]).argmax())
                p_target = mixture.log_softmax(-1).exp()
                is_trusted = j == 0 and first == "draft"
                if is_trusted or (draft[j] == target and p_target[draft[j]] >= acceptance_threshold):
                    committed.append(draft[j])
                    if draft[j] == stop:
                        break
                    continue
                if correction and p_target[target] >= acceptance_threshold:
                    committed.append(target)
                break
            tokens += committed
            counts.append(len(committed))
    return tokens[len(prompt) :], counts
