"""Scorers on the recorded cases of the official ones, and on what those do not cover."""

import importlib.util
import shutil

import pytest
from paths import SHARED

pytest.importorskip("benchmarks.parallelbench", reason="benchmarks are imported from the repository root")

from benchmarks.parallelbench import score, text
from benchmarks.parallelbench.__main__ import main
from benchmarks.parallelbench.cases import check_cases
from benchmarks.parallelbench.score import TASKS, kind_of, parse_list

CASES = SHARED / "data/parallelbench_metric_cases.json"


def correct(sentence: str) -> bool:
    return True


@pytest.mark.skipif(not CASES.exists(), reason="the recorded cases carry no licence and lie outside the repository")
def test_every_recorded_case_is_equal(capsys):
    report = check_cases(CASES)
    with capsys.disabled():
        print()
        print("\n".join(report.lines()))
    assert not report.wrong
    assert report.equal.total() + report.missing.total() == 234
    # Summaries need rouge-score, except the blank one.
    assert report.missing.total() == (0 if importlib.util.find_spec("rouge_score") else 6)


@pytest.mark.skipif(not CASES.exists(), reason="the recorded cases carry no licence and lie outside the repository")
def test_the_command_prints_n_of_n(capsys):
    assert main(["cases", str(CASES)]) == 0
    assert "recorded cases equal" in capsys.readouterr().out


def test_a_wrong_scorer_would_be_noticed(tmp_path):
    file = tmp_path / "cases.json"
    file.write_text(
        '{"cases": [{"task": "waiting_line/copy", "kind": "k", "label": "[a]", "response": "[b]", '
        '"official_per_sample": {"score": 1.0}}]}'
    )
    assert [case["kind"] for case, _ in check_cases(file).wrong] == ["k"]
    assert main(["cases", str(file)]) == 1


@pytest.mark.parametrize(
    ("text", "lenient", "strict"),
    [
        ('["Al Day", "Bo Ek"]', ["Al Day", "Bo Ek"], ["Al Day", "Bo Ek"]),
        ('So: ["Al Day"] or ["Bo Ek"], say', ["Bo Ek"], ["Bo Ek"]),
        ('["Al Day","Bo Ek"]', ["Al Day", "Bo Ek"], None),
        ('["Al Day", "Bo Ek', ["Al Day", "Bo Ek"], None),
        ("Al Day, Bo Ek", ["Al Day", "Bo Ek"], None),
        ("['Al Day']", ["'Al Day'"], None),
        ("[]", [], None),
        ("", [], None),
    ],
)
def test_lists_are_read_leniently_and_strictly(text, lenient, strict):
    assert parse_list(text) == lenient
    assert parse_list(text, strict=True) == strict


def test_every_official_name_of_both_generations_has_a_scorer():
    assert len(TASKS) == 17
    for task in (*TASKS, "waiting_line_n15/sort", "words_to_sentence/hard_n7", "puzzles/sudoku_n4"):
        assert kind_of(task)
    assert kind_of("text_writing/summarization") == kind_of("paraphrase_summarize/samsum") == "summary"
    assert kind_of("text_writing/paraphrasing") == kind_of("paraphrase_summarize/chatgpt-paraphrases") == "paraphrase"
    with pytest.raises(ValueError, match="waiting_line/copie"):
        score("waiting_line/copie", "", "[]")


def test_conventions_differ_in_text_tasks():
    label = {"words": ["sea", "boat"]}
    got = score("words_to_sentence/easy", "A boat.", label, grammar=correct)
    assert got == {"score": 0.0, "score_strict": 0.0, "inclusion_score": 0.0, "grammar_score": 1.0}
    assert score("words_to_sentence/easy", "A boat.", label, grammar=correct, convention="grammar_only")["score"] == 1
    assert score("words_to_sentence/easy", "A seaboat.", label, grammar=correct)["score"] == 1  # substrings count
    with pytest.raises(ValueError, match="v3"):
        score("words_to_sentence/easy", "", label, convention="v3")


def test_a_missing_package_is_named_with_the_remedy(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(text.importlib, "import_module", missing)
    text._language_tool.cache_clear()
    with pytest.raises(ImportError, match=r"needs language-tool-python.*pip install '"):
        score("words_to_sentence/easy", "A boat at sea.", {"words": ["sea"]})
    with pytest.raises(ImportError, match="needs sacrebleu"):
        text.bleu("a b c d", "a b c d")


@pytest.mark.parametrize(("kind", "label"), [("samsum", {"summary": "x"}), ("chatgpt-paraphrases", {"text": "x"})])
def test_blank_text_needs_no_package_and_scores_nothing(kind, label):
    assert set(score(f"paraphrase_summarize/{kind}", " \n", label).values()) == {0.0}


def test_bleu_is_one_for_the_same_and_zero_without_a_common_four_gram():
    pytest.importorskip("sacrebleu")
    assert text.bleu("the cat sat on the mat", "the cat sat on the mat") == pytest.approx(1)
    assert text.bleu("the cat sat", "the cat sat") == 0
    # 5 of 7, 4 of 6, 3 of 5, 2 of 4 n-grams; 8 words in the reference
    expected = (5 / 7 * 4 / 6 * 3 / 5 * 2 / 4) ** 0.25
    got = text.bleu("the cat sat on the big mat", "yes the cat sat on the old rug")
    assert got == pytest.approx(expected * 2.718281828 ** (1 - 8 / 7))


def test_bertscore_matches_tokens_by_cosine(tmp_path):
    """By hand on a tiny random encoder; special tokens are matched against but not counted."""
    import torch
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaConfig, RobertaModel, RobertaTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(["a cat sat on the mat today"] * 9, vocab_size=290, special_tokens=special)
    trained.save_model(str(tmp_path))
    tokenizer = RobertaTokenizer(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = RobertaModel(RobertaConfig(vocab_size=300, pad_token_id=1, **sizes), add_pooling_layer=False).eval()
    encoder.save_pretrained(tmp_path)

    @torch.inference_mode()
    def states(sentence: str) -> list[torch.Tensor]:
        ids = tokenizer(" " + sentence, return_tensors="pt").input_ids
        return list(encoder(ids, output_hidden_states=True).hidden_states[2][0])

    @torch.inference_mode()
    def mean_best(these: list[torch.Tensor], those: list[torch.Tensor]) -> float:
        best = [max(float(torch.cosine_similarity(x, y, dim=0)) for y in those) for x in these[1:-1]]
        return sum(best) / len(best)

    one, other = "the cat", "a mat today"
    precision, recall = mean_best(states(one), states(other)), mean_best(states(other), states(one))
    got = text.bertscore(one, other, model=str(tmp_path), layer=2)
    assert got == pytest.approx(2 * precision * recall / (precision + recall), abs=1e-5)
    assert text.bertscore(one, one, model=str(tmp_path), layer=2) == pytest.approx(1, abs=1e-5)

    pickled = tmp_path / "pickled"
    shutil.copytree(tmp_path, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(encoder.state_dict(), pickled / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        text.bertscore(one, one, model=str(pickled), layer=2)
