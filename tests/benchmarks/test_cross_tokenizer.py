"""`benchmarks.cross_tokenizer`: trains proposers of other languages, loads them, and compares what they guess."""

from pathlib import Path

import pytest

from apd import APDSampler
from apd.included import tasks
from apd.models.text_proposer import TextProposer
from benchmarks.cross_tokenizer import KINDS, compare, load, main, train, train_tokenizer


@pytest.mark.parametrize("kind", list(KINDS))
def test_its_tokenizers_write_the_tasks_as_they_are_and_split_them_unlike_the_drafter(kind: str) -> None:
    tokenizer = train_tokenizer(kind, count=300)
    native = APDSampler.from_included().tokenizer
    text = tasks.EXAMPLES[0].prompt + tasks.EXAMPLES[0].answer
    for each in (text, "naïve 字 😀"):
        assert tokenizer.decode(tokenizer(each)["input_ids"]) == each
    assert tokenizer.tokenize(text) != native.tokenize(text)


@pytest.mark.slow
def test_what_was_trained_is_loaded_and_compared(tmp_path: Path) -> None:
    shares = train("bpe", tmp_path, steps=2, rows=2, count=1)
    assert set(shares) == set(tasks.TASKS)
    model, tokenizer = load(tmp_path / "bpe")
    sampler = APDSampler.from_included()
    proposer = TextProposer(model, tokenizer, sampler.tokenizer)
    tokens, forwards, _ = compare(proposer, sampler, depth=2, count=1, chosen=["copy"])
    assert 0 < forwards <= tokens <= 3 * forwards


def test_a_directory_without_a_model_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["accuracy", "--out", str(tmp_path)]) == 2
    assert "`directory` must hold a trained proposer" in capsys.readouterr().err
