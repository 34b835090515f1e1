"""`apd.check` notices a checkpoint that is read wrongly, by name, and has no complaint about a sound one."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from paths import FIXTURES
from thinned import thinned
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from apd import FAMILIES, APDSampler, IdealListModel, check, load_drafter, load_verifier
from apd.cli import main
from apd.included import DRAFTER_DIR, VERIFIER_DIR
from apd.included.tasks import ARITHMETIC, EXAMPLES, instances
from apd.inspection import Report
from apd.models.loading import load_tokenizer
from benchmarks.families.logits import MASKS, NEWER
from benchmarks.masked_lms import SMALL

TASKS = [(example.prompt, example.answer) for example in EXAMPLES[::2]]
FEW = TASKS[:2]
FOLDERS = sorted(path.name for path in FIXTURES.iterdir() if path.name.startswith(("parity_", "decode_")))


def drafter_report(path: Path = DRAFTER_DIR, text=TASKS, **loading) -> Report:
    drafter = load_drafter(path, **loading)
    return check(APDSampler(drafter, tokenizer=load_tokenizer(path)), text=text)


def problems(report: Report) -> set[str]:
    return {finding.check for finding in report.problems}


def found(report: Report, name: str):
    [finding] = [each for each in report if each.check == name]
    return finding


@pytest.fixture
def copied(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the included drafter with other fields in its config.json and tokenizer_config.json."""

    def copy(name: str = "drafter", config=None, tokenizer=None, of: Path = DRAFTER_DIR) -> Path:
        path = tmp_path / name
        shutil.copytree(of, path)
        for file, fields in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            if fields:
                (path / file).write_text(json.dumps(json.loads((path / file).read_text()) | fields))
        return path

    return copy


def test_the_included_pair_is_sound() -> None:
    report = check(APDSampler.from_included())
    assert not report.problems
    for name in ("weights: text", "weights: shift", "weights: mask", "verifier: text", "verifier: ids"):
        assert found(report, name).verdict == "ok", name
    assert '["' in found(report, "answers").advice  # a list, as the first prompt asks for
    lines = str(report).splitlines()
    assert max(map(len, lines)) <= 80
    assert all(any(each.check[:19] in line for line in lines) for each in report)
    assert any("no problem" in line for line in lines)


@pytest.mark.parametrize("folder", thinned(sorted(set(FOLDERS) - set(NEWER))))
def test_random_weights_of_every_family_are_sound_and_give_no_evidence(folder: str) -> None:
    drafter = load_drafter(
        FIXTURES / folder, mask_token_id=MASKS.get(folder, 60 if folder == "parity_a2d_qwen3" else None)
    )
    verifier = "self" if drafter.reads_causally else None
    report = check(APDSampler(drafter, verifier))
    assert not report.problems
    assert "no tokenizer" in found(report, "weights").advice
    law = "cached = uncached" if drafter.attention.is_final else "wide KV window"
    for name in ("finite logits", "batch = single", law, "masks drawn", "answers in a batch"):
        assert found(report, name).verdict == "ok", name


def test_a_wrong_shift_is_noticed_twice() -> None:
    wrong = dataclasses.replace(FAMILIES["dream"], logit_shift=0)
    report = drafter_report(spec=wrong)
    assert problems(report) == {"logit shift", "weights: shift"}
    assert "logit_shift=1" in found(report, "weights: shift").advice


@pytest.mark.parametrize("mask", [pytest.param(100, marks=pytest.mark.slow), 3])
def test_a_wrong_mask_token_is_noticed_twice(mask: int) -> None:
    report = drafter_report(mask_token_id=mask)
    assert problems(report) == {"mask token", "weights: mask"}
    assert "--mask-token-id 2" in found(report, "weights: mask").advice


@pytest.mark.slow
def test_a_wrong_mask_token_in_the_config_is_noticed(copied: Callable[..., Path]) -> None:
    report = drafter_report(copied(config={"mask_token_id": 100}))
    assert problems(report) == {"mask token", "weights: mask"}
    assert "ordinary word" in found(report, "mask token").advice


@pytest.mark.slow
def test_wrong_shift_and_mask_token_are_both_named() -> None:
    """Each alone is hard to see where the other is wrong."""
    report = drafter_report(spec=dataclasses.replace(FAMILIES["dream"], logit_shift=0), mask_token_id=100)
    assert problems(report) == {"logit shift", "mask token", "weights: shift", "weights: mask"}


@pytest.mark.parametrize("size", [2, 8])
def test_a_wrong_block_size_is_noticed(size: int) -> None:
    report = check(APDSampler(load_drafter(FIXTURES / "parity_sdar", block_size=size)))
    assert problems(report) == {"block size"}
    assert found(report, "block size").expected.startswith("4 (block_size in config.json")


def test_a_family_other_than_that_of_the_config_is_noticed() -> None:
    spec = dataclasses.replace(FAMILIES["dream"], attention="causal")
    assert problems(drafter_report(text=FEW, spec=spec)) == {"attention"}


@pytest.mark.slow
def test_attention_that_the_weights_were_not_trained_with_is_noticed() -> None:
    """Stories whose results depend on what stands behind: causal attention makes them unlikely."""
    stories = [(each.prompt, each.answer) for each in instances(ARITHMETIC, 20, seed=11)]
    report = drafter_report(spec=dataclasses.replace(FAMILIES["dream"], attention="causal"), text=stories)
    assert problems(report) == {"attention", "weights: attention"}
    assert "attention='full'" in found(report, "weights: attention").advice


def test_untrained_weights_are_called_so(copied: Callable[..., Path]) -> None:
    path = copied()
    torch.manual_seed(0)
    drafter = load_drafter(path)
    random = Qwen2ForCausalLM(drafter.model.config).eval()
    random.save_pretrained(path, safe_serialization=True)
    shutil.copy(DRAFTER_DIR / "config.json", path)
    report = drafter_report(path)
    assert not report.problems
    advice = found(report, "weights: text").advice
    assert "look untrained: evidence not usable" in advice
    assert '--text FILE.jsonl with a {"prompt": "...", "answer": "..."} per line' in advice


def test_text_that_the_tokenizer_does_not_know_is_no_evidence() -> None:
    foreign = drafter_report(text=[("Où est la gare, s'il vous plaît ?", " Elle est derrière vous, madame.")] * 4)
    assert "unknown to the tokenizer" in found(foreign, "weights").advice


@pytest.mark.slow
def test_plain_text_is_tried_too() -> None:
    text = "\n".join(prompt + answer for prompt, answer in TASKS)
    assert problems(drafter_report(text=text, mask_token_id=100)) == {"mask token", "weights: mask"}
    with pytest.raises(ValueError, match=r"at least 48 tokens .* got 3 tokens"):
        drafter_report(text="Ada Ben Carl")
    with pytest.raises(TypeError, match=r"list of \(prompt, answer\)"):
        drafter_report(text=["a prompt"])


TEMPLATE = "{% for m in messages %}<unk>{{ m.role }}: {{ m.content }}{% if m.role == 'assistant' %}<pad>{% endif %} {% endfor %}"


def test_a_chat_that_ends_with_no_stop_token_is_noticed(copied: Callable[..., Path]) -> None:
    path = copied(tokenizer={"chat_template": TEMPLATE})
    report = drafter_report(path, FEW)
    assert "stop tokens" in problems(report)
    assert "eos_token_id=[0, 1]" in found(report, "stop tokens").advice


def test_no_stop_token_and_no_chat_template_are_noticed(copied: Callable[..., Path]) -> None:
    path = copied("Drafter-Instruct", {"eos_token_id": None}, {"eos_token": None})
    assert problems(drafter_report(path, FEW)) == {"stop tokens", "chat template"}


def test_a_tokenizer_with_more_ids_than_the_model_is_noticed() -> None:
    tokenizer = load_tokenizer(DRAFTER_DIR)
    tokenizer.add_tokens(["more"])
    report = check(APDSampler(load_drafter(DRAFTER_DIR), tokenizer=tokenizer), text=FEW)
    assert problems(report) == {"vocabulary"}


def test_rows_that_depend_on_their_batch_are_noticed() -> None:
    drafter = load_drafter(DRAFTER_DIR)
    hook = drafter.model.model.layers[0].register_forward_hook(lambda _, __, out: out + 0.1 * (out.shape[0] > 1))
    report = check(APDSampler(drafter, tokenizer=load_tokenizer(DRAFTER_DIR)), text=FEW)
    hook.remove()
    assert "batch = single" in problems(report)


def test_a_cache_that_changes_logits_is_noticed() -> None:
    drafter = load_drafter(FIXTURES / "parity_sdar")
    hook = drafter.model.model.layers[0].register_forward_hook(lambda _, __, out: out + 1.0 * (out.shape[1] < 9))
    report = check(APDSampler(drafter))
    hook.remove()
    assert "cached = uncached" in problems(report)


def test_logits_that_are_nan_are_noticed() -> None:
    drafter = load_drafter(DRAFTER_DIR)
    with torch.no_grad():
        drafter.model.model.norm.weight[3] = torch.nan
    report = check(APDSampler(drafter, tokenizer=load_tokenizer(DRAFTER_DIR)), text=FEW)
    assert {"finite logits", "answers"} <= problems(report)


def test_an_untrained_verifier_is_called_so() -> None:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=239,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    sampler = APDSampler(load_drafter(DRAFTER_DIR), Qwen2ForCausalLM(config).eval(), load_tokenizer(DRAFTER_DIR))
    report = check(sampler, text=FEW)
    assert not report.problems
    assert "untrained" in found(report, "verifier: text").advice
    assert found(report, "verifier: ids").verdict == "not known"  # nothing says what its ids are


@pytest.mark.slow
def test_a_verifier_loaded_with_other_ids_is_noticed(copied: Callable[..., Path]) -> None:
    path = copied("verifier", of=VERIFIER_DIR)
    file = path / "tokenizer.json"
    text = file.read_text().replace('"Ada"', '"Ada*"').replace('"Ben"', '"Ada"').replace('"Ada*"', '"Ben"')
    file.write_text(text)
    drafter = load_drafter(DRAFTER_DIR)
    report = check(APDSampler(drafter, load_verifier(path), load_tokenizer(DRAFTER_DIR)), text=FEW)
    assert "verifier: ids" in problems(report)
    guessing = APDSampler(
        drafter, load_verifier(path), load_tokenizer(DRAFTER_DIR), verifier_tokenizer=load_tokenizer(path), strategy="checked"
    )  # fmt: skip
    assert not check(guessing, text=FEW).problems


def test_other_models_are_checked_as_parts() -> None:
    sampler = APDSampler(IdealListModel(torch.tensor([[3, 4]])).drafter, mixture_weight=1.0)
    assert not check(sampler, new_tokens=2).problems
    assert "`max_new_tokens` must be 2" in check(sampler).problems[0].advice  # exact models know complete answers only


# ---------------------------------------------------------------- command line


@pytest.mark.slow
def test_the_command_prints_the_report_and_its_exit_code(
    copied: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(prompt + answer for prompt, answer in TASKS))
    options = ["--drafter", str(DRAFTER_DIR), "--text", str(text), "--device-map", "cpu"]
    assert main(["check", *options, "--mask-token-id", "100"]) == 1
    assert "What to do:" in capsys.readouterr().out

    assert main(["check", *options, "--verifier", str(VERIFIER_DIR)]) == 0
    assert "no problem in" in capsys.readouterr().out

    path = copied("verifier", of=VERIFIER_DIR)
    file = path / "tokenizer.json"
    file.write_text(file.read_text().replace('"Ada"', '"Zac"'))
    before = {each: each.stat().st_mtime_ns for each in tmp_path.rglob("*")}
    assert main(["check", *options, "--verifier", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "verifier: ids" in printed and "1 problem in" in printed
    assert before == {each: each.stat().st_mtime_ns for each in tmp_path.rglob("*")}


def test_wrong_usage_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["check", "--spec", "dream"]) == 2
    assert "--spec without --drafter" in capsys.readouterr().err
    assert main(["check", "--text", str(tmp_path / "none.txt")]) == 2
    assert "--text must be a file of text" in capsys.readouterr().err
    lines = tmp_path / "lines.jsonl"
    for text, told in (
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}', "got line 2 of"),
        ('{"prompt": "a", "answer": ""}', "texts that are not empty, got line 1 of"),
        ("plain text", "got line 1 of"),
        ("", "at least one line, got none"),
    ):
        lines.write_text(text)
        assert main(["check", "--text", str(lines)]) == 2
        assert told in capsys.readouterr().err
    assert main(["check", "--drafter", str(DRAFTER_DIR), "--spec", "none"]) == 1
    assert "`spec` must be" in capsys.readouterr().err


@pytest.mark.parametrize(("count", "tried"), [(2, 2), pytest.param(60, 48, marks=pytest.mark.slow)])
def test_lines_of_prompts_and_answers_are_text_of_ones_own(
    count: int, tried: int, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    lines = tmp_path / "lines.jsonl"
    pairs = [(TASKS * 12)[i] for i in range(count)]
    lines.write_text("".join(json.dumps({"prompt": prompt, "answer": answer}) + "\n" for prompt, answer in pairs))
    assert main(["check", "--drafter", str(DRAFTER_DIR), "--text", str(lines), "--device-map", "cpu"]) == 0
    assert f"your prompts and answers, {tried} stretches" in capsys.readouterr().out


def test_the_help_fits_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A small random BERT with a tokenizer that spells."""
    special = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }
    letters = [chr(code) for code in range(33, 127)]
    words = {word: i for i, word in enumerate([*special.values(), *letters, *(f"##{letter}" for letter in letters)])}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", words["[SEP]"]), ("[CLS]", words["[CLS]"]))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    torch.manual_seed(0)
    fields = SMALL["bert"] | {"vocab_size": len(words), "pad_token_id": words["[PAD]"]}
    BertForMaskedLM(BertConfig(**fields)).save_pretrained(tmp_path)
    return tmp_path


def test_a_masked_lm_is_checked_but_for_what_its_class_fixes(bert: Path) -> None:
    report = drafter_report(bert, text=None)
    assert not report.problems
    for name in ("family", "mask token", "vocabulary", "finite logits", "batch = single", "answers in a batch"):
        assert found(report, name).verdict == "ok", name
    assert found(report, "mask token").found == "4 ([MASK])"
    stops = found(report, "stop tokens")
    assert stops.verdict == "not known" and "[SEP]) ends a text" in stops.advice
    assert "look untrained" in found(report, "weights: text").advice
    assert not {"weights: shift", "weights: attention", "wide KV window"} & {finding.check for finding in report}


def test_a_wrong_mask_token_of_a_masked_lm_is_noticed(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert problems(drafter_report(bert, text=None, mask_token_id=9)) == {"mask token"}
    assert main(["check", "--drafter", str(bert)]) == 0
    assert "BertForMaskedLM" in capsys.readouterr().out


@pytest.mark.slow
def test_the_mask_token_that_a_masked_lm_has_learned_is_found(bert: Path) -> None:
    """A few steps on one text are enough to know its next letters from the mask token and its place."""
    path, text = bert, "\n\n".join(["the quick brown fox jumps over the lazy dog and on"] * 6)
    drafter = load_drafter(path)
    tokenizer = load_tokenizer(path)
    ids = torch.tensor([tokenizer(text.split("\n\n")[0]).input_ids[:-1]])
    model = drafter.model.train().requires_grad_(True)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        hidden = torch.rand(8, ids.shape[1], generator=generator) < 0.4
        rows = ids.expand(8, -1)
        logits = model(torch.where(hidden, 4, rows)).logits
        loss = torch.nn.functional.cross_entropy(logits[hidden], rows[hidden])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.eval().requires_grad_(False).save_pretrained(path)
    assert not drafter_report(path, text=text).problems
    wrong = drafter_report(path, text=text, mask_token_id=3)
    assert problems(wrong) == {"mask token", "weights: mask"}
    assert "--mask-token-id 4" in found(wrong, "weights: mask").advice
