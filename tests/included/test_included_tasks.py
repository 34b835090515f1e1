"""The included pair's tasks, scorer, tokenizer and files."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from paths import FIXTURES, ROOT

from apd import APDSampler, MaskedDiffusionDrafter, load_drafter
from apd.included import BLOCK_DRAFTER_DIR, DRAFTER_DIR, VERIFIER_DIR, tasks
from apd.models.loading import drafter_family, load_tokenizer

FIXTURE = FIXTURES / "parity_dream" / "config.json"


def wrong_answers(instance: tasks.Instance) -> list[str]:
    """Answers that look right but are not."""
    answer = instance.answer
    if instance.task == tasks.ARITHMETIC:
        steps, _, result = answer.rpartition(" ")
        return [
            f"{steps} {int(result) + 1}",
            f" Answer {result}",
            f" 1 + 1 = 3.{answer}",
            answer + ".",
            answer.replace(".", ";"),
        ]
    names = list(json.loads(answer))
    stranger = next(name for name in tasks.NAMES if name not in instance.names and name != instance.newcomer)
    wrong = [[*names, stranger], [stranger, *names[1:]], names[:-2], [names[0], *names], [*names[:-1], names[0]], []]
    if instance.task not in ("shuffle", "copy"):
        wrong.append(list(instance.names))
    if instance.newcomer:
        wrong.append([instance.newcomer] * len(names))
    if instance.task == "shuffle":
        wrong.append(list(instance.names))
    lists = ["[" + ", ".join(f'"{name}"' for name in answer) + "]" for answer in wrong if answer != names]
    return [*lists, "", answer[:-1], answer.replace('"', ""), answer.replace(", ", ","), f"Here: {answer}", answer * 2]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_own_answers_are_right_and_spoiled_ones_wrong(task: str) -> None:
    for instance in tasks.instances(task, 60, seed=3):
        assert tasks.is_right(instance, instance.answer)
        assert tasks.is_right(instance, instance.answer.strip() + "\n")
        if task != "sort" or list(instance.names) != sorted(instance.names):  # a sorted list is its own answer
            assert not any(tasks.is_right(instance, wrong) for wrong in wrong_answers(instance))


def test_every_valid_place_of_a_random_task_is_right() -> None:
    instance = tasks.Instance("insert_random", "", "", names=("Ada", "Ben"), newcomer="Zoe")
    for answer in ('["Zoe", "Ada", "Ben"]', '["Ada", "Zoe", "Ben"]', '["Ada", "Ben", "Zoe"]'):
        assert tasks.is_right(instance, answer)
    assert not tasks.is_right(instance, '["Ben", "Zoe", "Ada"]')

    instance = tasks.Instance("replace_random", "", "", names=("Ada", "Ben"), newcomer="Zoe")
    assert tasks.is_right(instance, '["Zoe", "Ben"]') and tasks.is_right(instance, '["Ada", "Zoe"]')
    assert not tasks.is_right(instance, '["Zoe", "Zoe"]')

    instance = tasks.Instance("remove_random", "", "", names=("Ada", "Ben", "Cleo"))
    assert tasks.is_right(instance, '["Ada", "Cleo"]') and not tasks.is_right(instance, '["Cleo", "Ada"]')


def test_a_story_may_reach_the_result_by_true_equations_only() -> None:
    story = tasks.Instance(tasks.ARITHMETIC, "", "", numbers=(7, 5, -3))
    assert tasks.is_right(story, " 7 + 5 = 12. 12 - 3 = 9. Answer 9")
    assert not tasks.is_right(story, " 7 + 5 = 13. 12 - 3 = 9. Answer 9")
    assert not tasks.is_right(story, " 7 + 5 = 12. 12 - 3 = 9. Answer 12")


@pytest.mark.parametrize(
    ("task", "count"), [("insert_random", 400), ("replace_random", 400), ("remove_random", 400), ("shuffle", 1500)]
)
def test_random_answers_cover_what_is_valid(task: str, count: int) -> None:
    """Each right answer is drawn: all 6 places of an insertion into 5 names, and so on."""
    drawn = [i for i in tasks.instances(task, count, seed=0) if len(i.names) == 5]
    if task == "insert_random":
        assert {json.loads(i.answer).index(i.newcomer) for i in drawn} == set(range(6))
    elif task == "replace_random":
        assert {json.loads(i.answer).index(i.newcomer) for i in drawn} == set(range(5))
    elif task == "remove_random":
        gone = {next(k for k, name in enumerate(i.names) if name not in json.loads(i.answer)) for i in drawn}
        assert gone == set(range(5))
    elif task == "shuffle":
        assert len({tuple(i.names.index(name) for name in json.loads(i.answer)) for i in drawn}) > 100


def test_stories_stay_small_and_never_go_below_zero() -> None:
    for story in tasks.instances(tasks.ARITHMETIC, 500, seed=5):
        start, *changes = story.numbers
        assert 1 <= start <= 20 and 1 <= len(changes) <= 3 and all(1 <= abs(change) <= 12 for change in changes)
        assert all(sum(story.numbers[:k]) >= 0 for k in range(1, len(story.numbers) + 1))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_train_and_test_share_no_question(task: str) -> None:
    def questions(split: str) -> set[tuple]:
        return {(i.names, i.numbers) for i in tasks.instances(task, 400, seed=7, split=split)}

    assert not questions("train") & questions("test")


def test_instances_repeat_with_the_seed_and_only_then() -> None:
    assert tasks.instances("copy", 5, seed=1) == tasks.instances("copy", 5, seed=1)
    assert tasks.instances("copy", 5, seed=1) != tasks.instances("copy", 5, seed=2)
    with pytest.raises(ValueError, match="`task` must be one of"):
        tasks.instances("sudoku", 1, seed=0)
    with pytest.raises(ValueError, match="`split` must be"):
        tasks.instances("copy", 1, seed=0, split="validation")


def test_examples_are_twelve_held_out_prompts_of_every_task() -> None:
    assert len(tasks.EXAMPLE_PROMPTS) == 12 and {example.task for example in tasks.EXAMPLES} == set(tasks.TASKS)
    assert [example.prompt for example in tasks.EXAMPLES] == tasks.EXAMPLE_PROMPTS


def test_prompts_end_where_the_answer_begins_and_fit_the_vocabulary() -> None:
    for task in tasks.TASKS:
        for i in tasks.instances(task, 100, seed=11):
            assert i.prompt.endswith("?" if task == tasks.ARITHMETIC else ".") and i.answer.startswith(" ")
            pieces = re.findall(tasks.TOKEN_PATTERN, i.prompt + i.answer)
            assert "".join(pieces) == i.prompt + i.answer and set(pieces) <= set(tasks.VOCABULARY)


@pytest.mark.parametrize("directory", [DRAFTER_DIR, VERIFIER_DIR], ids=["drafter", "verifier"])
def test_tokenizer_gives_back_every_text(directory: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    assert tokenizer.get_vocab() == {token: i for i, token in enumerate(tasks.VOCABULARY)}
    assert tokenizer.padding_side == "left" and tokenizer.pad_token_id != tokenizer.eos_token_id
    for task in tasks.TASKS:
        for i in tasks.instances(task, 10, seed=13):
            ids = tokenizer(i.prompt + i.answer).input_ids
            assert tokenizer.decode(ids) == i.prompt + i.answer
            assert ids == tokenizer(i.prompt).input_ids + tokenizer(i.answer).input_ids
    assert tokenizer(" Rumpelstiltskin").input_ids == [tokenizer.unk_token_id]


def test_drafter_config_has_the_fields_of_dream() -> None:
    config = json.loads((DRAFTER_DIR / "config.json").read_text())
    assert config["model_type"] == "Dream" and config["architectures"] == ["DreamModel"]
    assert tasks.VOCABULARY[config["mask_token_id"]] == "<mask>"
    if not FIXTURE.exists():
        pytest.skip(f"{FIXTURE} is not here")
    assert set(config) == set(json.loads(FIXTURE.read_text()))


def test_verifier_loads_as_a_plain_qwen2_that_is_several_times_smaller() -> None:
    transformers = pytest.importorskip("transformers")
    verifier = transformers.Qwen2ForCausalLM.from_pretrained(VERIFIER_DIR)
    assert verifier.config.vocab_size == len(tasks.VOCABULARY)
    sizes = [(directory / "model.safetensors").stat().st_size for directory in (DRAFTER_DIR, VERIFIER_DIR)]
    assert sizes[0] < 4e6 and sizes[1] < sizes[0] / 4


def test_the_block_causal_drafter_solves_its_tasks_and_its_cache_is_exact() -> None:
    assert drafter_family(BLOCK_DRAFTER_DIR).name == "fast-dllm-v2"
    cached = load_drafter(BLOCK_DRAFTER_DIR)
    assert (cached.attention.kind, cached.attention.block_size, cached.logit_shift) == ("block", 8, 1)
    uncached = MaskedDiffusionDrafter(
        cached.model, mask_token_id=cached.mask_token_id, logit_shift=1, attention="block", block_size=8, cache=False
    )
    instances = [instance for task in ("copy", "reverse") for instance in tasks.instances(task, 3, seed=1)]
    prompts = [instance.prompt for instance in instances]
    answers = []
    for drafter in (cached, uncached):
        sampler = APDSampler(drafter, tokenizer=load_tokenizer(BLOCK_DRAFTER_DIR))
        outputs = sampler.generate_many(prompts, strategy="left-to-right:1", max_new_tokens=32)
        answers.append([output.text for output in outputs])
    assert answers[0] == answers[1]
    assert all(tasks.is_right(instance, text) for instance, text in zip(instances, answers[0], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["full", "block"])
def test_the_training_script_runs_and_goes_on_from_its_checkpoint(attention: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("tqdm") is None:
        pytest.skip("tqdm is not installed")
    script = [sys.executable, str(ROOT / "examples" / "train_pair.py"), "--quick", "--attention", attention]
    where = ["--out", str(tmp_path / "pair"), "--checkpoints", str(tmp_path / "checkpoints")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "APD_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
    names = ["drafter", "verifier"] if attention == "full" else ["block_drafter"]
    for only in ([], ["--only", "drafter"]):
        run = subprocess.run([*script, *where, *only], capture_output=True, text=True, env=environment, check=False)
        assert run.returncode == 0, run.stderr
        assert ("| **all** |" in run.stdout) == ("zeros are expected" in run.stdout) == (not only)
    weights = [tmp_path / "pair" / name / "model.safetensors" for name in names]
    assert all(path.exists() for path in weights)
    assert ", step " not in run.stderr  # the second run found all six steps done
