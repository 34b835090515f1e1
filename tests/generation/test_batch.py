"""Rows of a batch that come, go and fail between steps."""

from __future__ import annotations

import pytest
import torch
from poisoned import Poisoned

from apd import EXAMPLE_PROMPTS, APDSampler

PROMPT = 'Reverse this list: ["Mia", "Leo", "Zoe"].'
STRATEGIES = ("apd", "left-to-right:1", "checked:K=3", "klass:0.9")


@pytest.fixture(scope="module")
def sampler() -> APDSampler:
    return APDSampler.from_included()


def ids_of(sampler: APDSampler, prompt: str) -> torch.Tensor:
    return torch.tensor([sampler.tokenizer(prompt)["input_ids"]])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_rows_that_leave_change_nothing_for_the_others(sampler: APDSampler, strategy: str) -> None:
    """Cancelled before their first step, in the middle, and when they are done; the steps join to the answers."""
    resolve, batch = sampler.resolver(max_new_tokens=16, strategy=strategy), sampler.batch()
    prompts = [ids_of(sampler, prompt) for prompt in EXAMPLE_PROMPTS[:5]]
    for row, ids in enumerate(prompts[:3]):
        batch.add(resolve(ids, seed=[row]), row, follow=True)
    batch.cancel([1])
    found, pieces, num_steps = {}, {}, 0
    while batch.num_rows:
        stepped = batch.step()
        num_steps += 1
        for progress in stepped.progress:
            pieces.setdefault(progress.row, []).extend(progress.settled)
        found |= {answer.index: answer for answer in stepped.ended}
        if num_steps == 1:
            batch.add(resolve(prompts[3], seed=[3]), 3, follow=True)
            batch.add(resolve(prompts[4], seed=[4]), 4, follow=True)
            batch.cancel([4, 99])
    assert 1 not in found and 4 not in found and set(found) == {0, 2, 3}
    for row, answer in found.items():
        alone = sampler.generate(prompts[row], max_new_tokens=16, seed=[row], strategy=strategy)
        assert answer.tokens == pieces[row] == alone[0, prompts[row].shape[1] :].tolist()


def test_a_row_that_fails_leaves_the_others_and_generate_many_raises(sampler: APDSampler) -> None:
    poison = sampler.tokenizer("Kira")["input_ids"][0]
    ill = APDSampler(Poisoned(sampler.drafter, poison), sampler.verifier, sampler.tokenizer)
    prompts = [PROMPT, PROMPT.replace("Mia", "Kira")]
    resolve, batch = ill.resolver(max_new_tokens=16), ill.batch()
    for row, prompt in enumerate(prompts):
        batch.add(resolve(ids_of(ill, prompt), seed=[0]), row)
    failed, ended = {}, []
    while batch.num_rows:
        stepped = batch.step()
        failed |= stepped.failed
        ended += stepped.ended
    assert [answer.text for answer in ended] == [' ["Zoe", "Leo", "Mia"]']
    assert isinstance(failed[1], FloatingPointError) and set(failed) == {1}
    with pytest.raises(FloatingPointError, match="of row 1"):
        list(ill.generate_many(prompts, max_new_tokens=16))
    for batch_size in (1, 2):  # what is done is yielded before the error
        answers = []
        with pytest.raises(FloatingPointError):
            for answer in ill.generate_many([prompts[0]] * 2 + [prompts[1]], max_new_tokens=16, batch_size=batch_size):
                answers.append(answer.index)
        assert answers == [0, 1]
