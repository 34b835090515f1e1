"""`benchmarks.cross_tokenizer`: trains proposers of other languages, loads them, and replays what they guess."""

import random
from pathlib import Path

import pytest

from apd import APDSampler
from apd.embedded import tasks
from apd.models.text_proposer import TextProposer
from benchmarks.cross_tokenizer import KINDS, load, main, replay, train, train_tokenizer


@pytest.mark.parametrize("kind", list(KINDS))
def test_its_tokenizers_write_the_tasks_as_they_are_and_split_them_unlike_the_drafter(kind: str) -> None:
    tokenizer = train_tokenizer(kind, count=300)
    native = APDSampler.from_embedded().tokenizer
    text = tasks.EXAMPLES[0].prompt + tasks.EXAMPLES[0].answer
    for each in (text, "naïve 字 😀"):
        assert tokenizer.decode(tokenizer(each)["input_ids"]) == each
    assert tokenizer.tokenize(text) != native.tokenize(text)


def test_what_was_trained_is_loaded_and_replayed(tmp_path: Path) -> None:
    shares = train("bpe", tmp_path, steps=2, rows=2, count=1)
    assert set(shares) == set(tasks.TASKS)
    model, tokenizer = load(tmp_path / "bpe")
    sampler = APDSampler.from_embedded()
    guesser = TextProposer(model, tokenizer, sampler.tokenizer)
    tokens, steps, _ = replay(guesser, sampler, width=2, count=1, chosen=[random.Random(0).choice(tasks.LIST_TASKS)])
    assert 0 < steps <= tokens <= 3 * steps


def test_the_drafters_own_language_is_replayed_in_few_steps() -> None:
    sampler = APDSampler.from_embedded()
    proposer = TextProposer(sampler.verifier, sampler.tokenizer, sampler.tokenizer)
    tokens, steps, _ = replay(proposer, sampler, width=8, count=1, chosen=["copy", "sort"])
    assert tokens > 5 * steps


def test_a_directory_without_a_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accuracy", "--out", str(tmp_path)]) == 2
    assert "`directory` must hold a trained proposer" in capsys.readouterr().err
