"""The evaluation harness: its own runs over small local tasks, and what answers and log-probabilities must be.

Nothing is downloaded: tasks are written as YAML with the data beside them. Skipped where lm-eval is not installed.
"""

import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from paths import ROOT

os.environ.setdefault("HF_DATASETS_OFFLINE", "1")  # before the harness imports datasets
pytest.importorskip("lm_eval", exc_type=ImportError)

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from toy import LENGTH, TOKENS, tiny_pair, toy

from apd import APDConfig, APDSampler, BlockWindow, Coupling, LeftToRight, MaskedDiffusionDrafter
from apd.cli import main
from apd.included import DRAFTER_DIR, VERIFIER_DIR
from apd.included.tasks import instances
from apd.integrations.lm_eval import APDLM, StopInAnswer
from apd.integrations.scoring import sequential_logprobs
from apd.models.families import FAMILIES
from apd.models.ideal import IdealListModel
from apd.strategies.registry import parse

DOCS = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
STAND_INS = {"Dream-org/Dream-v0-Instruct-7B": str(DRAFTER_DIR), "Qwen/Qwen2.5-0.5B": str(VERIFIER_DIR)}
TASK = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: answer
metadata: {{version: 1}}
"""
ANSWERS = """\
output_type: generate_until
generation_kwargs: {until: ["\\n"], do_sample: false, temperature: 0.0, max_gen_toks: 32}
filter_list: [{name: strip, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICES = """\
output_type: multiple_choice
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
TEXTS = """\
output_type: loglikelihood_rolling
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture(scope="module")
def sampler() -> APDSampler:
    return APDSampler.from_included()


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three tasks on the included pair's vocabulary: to answer, to choose from, to score."""
    place = tmp_path_factory.mktemp("tasks")
    os.environ["HF_DATASETS_CACHE"] = str(place / "cache")
    lists = [instance for task in ("copy", "reverse", "sort") for instance in instances(task, 4, seed=7)]
    answers = [{"prompt": instance.prompt, "answer": instance.answer.strip()} for instance in lists]
    choices = [
        {"prompt": row["prompt"], "choices": [row["answer"], other["answer"]], "answer": 0}
        for row, other in zip(answers, [*answers[1:], answers[0]], strict=True)
    ]
    texts = [{"prompt": "", "answer": instance.prompt + instance.answer} for instance in lists[:3]]
    for name, rows, rest in (
        ("answers", answers, ANSWERS),
        ("choices", choices, CHOICES),
        ("texts", texts, TEXTS),
    ):
        data = place / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (place / f"{name}.yaml").write_text(TASK.format(name=f"apd_{name}", data=data) + rest)
    return place


@pytest.fixture(scope="module", autouse=True)
def no_list_of_packages() -> Iterator[None]:
    """The harness lists every installed package in its results, by a process that takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        yield


def evaluate(lm: APDLM, tasks: Path, *names: str, **kwargs: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=0, **kwargs)


def model(sampler: APDSampler, **arguments: Any) -> APDLM:
    """The included pair was trained for 32 new tokens."""
    return APDLM(sampler, **({"max_new_tokens": 32} | arguments))


def request(*arguments: Any, kind: str = "generate_until") -> Instance:
    return Instance(kind, {}, arguments, 0, ("some task", 0, 1))


def ask(lm: APDLM, prompts: list[str], **setting: Any) -> list[str]:
    return lm.generate_until([request(prompt, setting) for prompt in prompts], disable_tqdm=True)


PROMPTS = [instance.prompt for task in ("copy", "shuffle", "arithmetic") for instance in instances(task, 3, seed=5)]


# ---------------------------------------------------------------- holes


def test_masks_in_a_context_are_filled_and_the_answer_is_their_text(sampler: APDSampler) -> None:
    given = 'Copy this list: ["Mia", "Leo", "Zoe", "Ada"]. ["{}", "Leo", "{}"]'
    lm, mask = model(sampler, strategy="checked"), sampler.tokenizer.mask_token
    (copied,) = instances("copy", 1, seed=5)
    answers = ask(lm, [given.format(mask, mask), copied.prompt, given.format("Mia", mask * 3)], until=['", "Ada'])
    assert answers == ["Mia\nZoe", copied.answer, "Zoe"]
    (counts,) = lm.generated.values()
    assert counts.requests == 3 and counts.tokens == 2 + len(sampler.tokenizer(copied.answer).input_ids) + 1 + 3
    with pytest.raises(ValueError, match="Task some task, document 0: A context with holes must fit 8 tokens, got 21"):
        ask(model(sampler, max_length=8), [given.format(mask, mask)], max_gen_toks=4)


def test_a_mask_in_a_chat_is_refused(sampler: APDSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler.tokenizer, "chat_template", "{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ValueError, match="A message must not hold the tokenizer's mask token '<mask>'"):
        model(sampler).apply_chat_template([{"role": "user", "content": "Copy <mask>"}])


# ---------------------------------------------------------------- the harness's own runs


def test_the_harness_evaluates_answers_and_reports_tokens_per_forward(sampler: APDSampler, tasks: Path) -> None:
    lm = model(sampler, batch_size=5)
    results = evaluate(lm, tasks, "apd_answers")
    assert results["results"]["apd_answers"]["exact_match,strip"] > 0.5  # of a trained pair on copy, reverse and sort
    counts = lm.generated["apd_answers"]
    rows = [sample["resps"][0][0] for sample in results["samples"]["apd_answers"]]
    assert counts.requests == len(rows) == 12
    assert counts.tokens == sum(len(sampler.tokenizer(row).input_ids) + 1 for row in rows)  # the stop token counts
    assert counts.drafter_forwards == counts.verifier_forwards >= 12
    assert results["config"]["tokens_per_forward"] == counts.tokens / counts.drafter_forwards > 1
    assert results["config"]["generated"]["apd_answers"]["tokens"] == counts.tokens
    assert results["config"]["apd_config"]["mixture_weight"] == sampler.config.mixture_weight
    json.dumps(results["config"])


def test_one_token_per_step_is_a_strategy(sampler: APDSampler, tasks: Path) -> None:
    lms = model(sampler, strategy=LeftToRight(1)), APDLM.create_from_arg_string("pair=included,tokens_per_step=1")
    for lm in lms:
        results = evaluate(lm, tasks, "apd_answers", limit=2)
        assert results["config"]["tokens_per_forward"] == 1
        assert "LeftToRight" in results["config"]["apd_strategy"]
        assert lm.generated["apd_answers"].verifier_forwards == 0


def test_the_harness_evaluates_choices_and_texts(sampler: APDSampler, tasks: Path) -> None:
    lm = model(sampler, batch_size=16)
    results = evaluate(lm, tasks, "apd_choices", "apd_texts", limit=3)
    assert results["results"]["apd_choices"]["acc,none"] == 1  # the other answer has other names
    assert results["results"]["apd_texts"]["bits_per_byte,none"] > 0
    assert results["config"]["tokens_per_forward"] is None and not lm.generated
    assert lm.scored.requests == 9 and "9 given texts" in lm.summary()


def test_knobs_of_a_call_come_through_gen_kwargs(sampler: APDSampler, tasks: Path) -> None:
    plain, careful = model(sampler), model(sampler)
    evaluate(plain, tasks, "apd_answers", limit=4)
    evaluate(careful, tasks, "apd_answers", limit=4, gen_kwargs={"window_size": 1})
    assert careful.generated["apd_answers"].tokens_per_forward == 1 < plain.generated["apd_answers"].tokens_per_forward


def test_the_command_line_keeps_the_built_in_models(capsys: pytest.CaptureFixture[str]) -> None:
    from lm_eval.api.registry import get_model

    from apd.integrations.lm_eval import register

    register()
    register()
    assert get_model("apd") is APDLM
    assert get_model("dummy").__name__ == "DummyLM"
    before = list(sys.argv)
    with pytest.raises(SystemExit) as end:
        main(["lm-eval", "--help"])
    assert end.value.code == 0
    assert sys.argv == before
    assert "Language Model Evaluation Harness" in capsys.readouterr().out


def test_without_the_harness_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "apd.integrations.lm_eval")
    assert main(["lm-eval", "ls", "tasks"]) == 1
    assert "is an extra: pip install '" in capsys.readouterr().err


# ---------------------------------------------------------------- answers


def test_answers_do_not_depend_on_the_batch(sampler: APDSampler) -> None:
    setting = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_gen_toks": 24}
    alone, together = (ask(model(sampler, batch_size=size, seed=3), PROMPTS, **setting) for size in (1, 4))
    assert alone == together
    assert ask(model(sampler, seed=4), PROMPTS, **setting) != alone


def test_an_answer_is_what_the_sampler_generates(sampler: APDSampler) -> None:
    (answer,) = ask(model(sampler), PROMPTS[:1], max_gen_toks=24)
    inputs = sampler.tokenizer(PROMPTS[0], return_tensors="pt")
    new = sampler.generate(**inputs, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    assert answer == sampler.tokenizer.decode(new, skip_special_tokens=True)


def test_a_sampled_answer_does_not_depend_on_other_requests(sampler: APDSampler, tasks: Path) -> None:
    def answers(*names: str, **limits: Any) -> dict[int, str]:
        results = evaluate(model(sampler, seed=3), tasks, *names, gen_kwargs=RANDOM, **limits)
        return {sample["doc_id"]: sample["resps"][0][0] for sample in results["samples"]["apd_answers"]}

    few = answers("apd_answers", limit=2)
    assert answers("apd_texts", "apd_answers", limit=4).items() >= few.items()
    assert answers("apd_answers", samples={"apd_answers": [0, 1, 5]}).items() >= few.items()


def test_repeats_of_a_request_are_drawn_apart(sampler: APDSampler) -> None:
    answers = ask(model(sampler), [PROMPTS[3]] * 6, do_sample=True, temperature=1.0, max_gen_toks=24)
    assert len(set(answers)) > 1


def test_requests_of_other_settings_keep_their_order(sampler: APDSampler) -> None:
    lm = model(sampler, batch_size=4)
    mixed = [request(prompt, {"until": [stop]}) for prompt in PROMPTS for stop in ("\n", '", "')]
    answers = lm.generate_until(mixed, disable_tqdm=True)
    whole = ask(lm, PROMPTS, until=["\n"])
    assert answers[::2] == whole
    assert answers[1::2] == [text.split('", "')[0] for text in whole]


def test_a_stop_sequence_ends_the_row_and_is_cut_off(sampler: APDSampler) -> None:
    lm = model(sampler)
    (whole,) = ask(lm, PROMPTS[:1])
    tokens = lm.generated["some task"].tokens
    lm.reset_counts()
    (answer,) = ask(lm, PROMPTS[:1], until=['", "', "never"])
    assert whole.startswith(answer + '", "') and '", "' not in answer
    assert lm.generated["some task"].tokens == 3 < tokens  # [", a name, and the separator; nothing behind it


def test_a_stop_sequence_that_begins_in_the_prompt_does_not_count(sampler: APDSampler) -> None:
    """`until: ["\\n\\n"]` behind a chat template's line break must not end an answer that begins with one."""
    prompt = 'Copy this list: ["Ada", "Ben", "Carl"].'
    across = '. ["'
    (whole,) = ask(model(sampler), [prompt])
    (answer,) = ask(model(sampler), [prompt], until=[across])
    assert whole.startswith(across[1:]) and answer == whole


def test_stopping_tells_the_rows_of_a_batch_apart(sampler: APDSampler) -> None:
    encode = sampler.tokenizer.encode
    ada, ben = encode('["Ada", "Ben'), encode("Ben")
    criterion = StopInAnswer(["Ben"], sampler.tokenizer, [ada[:2], ada])
    assert not criterion(torch.tensor([[*ada, *encode(" list")]]), None)  # stands in the prompt of this row
    assert criterion(torch.tensor([[*ada[:2], *encode(" list"), *ben]]), None)


def test_every_alias_of_the_length_is_understood(sampler: APDSampler) -> None:
    for alias in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        lm = model(sampler)
        ask(lm, PROMPTS[:1], **{alias: 2})
        assert lm.generated["some task"].tokens == 2


def test_greedy_decoding_ignores_what_only_sampling_reads(
    sampler: APDSampler, recwarn: pytest.WarningsRecorder
) -> None:
    lm = model(sampler)
    assert ask(lm, PROMPTS[:2], do_sample=False, temperature=0.0, top_p=0.9) == ask(lm, PROMPTS[:2])
    assert not [warning for warning in recwarn if "do_sample" in str(warning.message)]


def test_a_misspelt_generation_argument_is_refused(sampler: APDSampler) -> None:
    with pytest.raises(TypeError, match="top_p"):
        ask(model(sampler), PROMPTS[:1], do_sample=True, temperature=1.0, top_pp=0.9)


def test_long_prompts_lose_their_left_end(sampler: APDSampler, caplog: pytest.LogCaptureFixture) -> None:
    lm = model(sampler, max_length=40)
    ids = lm.tok_encode(PROMPTS[0])
    (answer,) = ask(lm, [" ".join([PROMPTS[1]] * 5) + PROMPTS[0]], max_gen_toks=40 - len(ids))
    assert "loses its left end" in caplog.text
    assert answer == ask(model(sampler), PROMPTS[:1], max_gen_toks=40 - len(ids))[0]
    with pytest.raises(ValueError, match="room"):
        ask(lm, PROMPTS[:1], max_gen_toks=40)


def test_an_empty_context_is_the_prefix_token(sampler: APDSampler) -> None:
    lm = model(sampler)
    assert lm.prefix_token_id == sampler.tokenizer.eos_token_id  # this tokenizer has no BOS token
    assert len(ask(lm, [""], max_gen_toks=2)) == 1
    (score,) = lm.loglikelihood([request("", " list", kind="loglikelihood")], disable_tqdm=True)
    assert score == lm._loglikelihood_tokens([(None, [lm.prefix_token_id], lm.tok_encode(" list"))])[0]


def test_results_are_cached_as_the_harness_does(sampler: APDSampler) -> None:
    kept: dict[Any, Any] = {}
    lm = model(sampler)
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda kind, args, result: kept.update({(kind, str(args)): result})))
    answers = ask(lm, PROMPTS[:2], max_gen_toks=4)
    scores = lm.loglikelihood([request("Copy this", " list", kind="loglikelihood")], disable_tqdm=True)
    totals = lm.loglikelihood_rolling([request("Copy this list", kind="loglikelihood_rolling")], disable_tqdm=True)
    assert sorted(map(str, kept.values())) == sorted(map(str, [*answers, *scores, *totals]))
    assert {kind for kind, _ in kept} == {"generate_until", "loglikelihood", "loglikelihood_rolling"}


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (
            {"do_sample": "true", "temperature": "1.5", "top_k": "0"},
            {"do_sample": True, "temperature": 1.5, "top_k": 0},
        ),
        ({"do_sample": True, "temperature": "1", "top_p": "0.9"}, {"do_sample": True, "temperature": 1, "top_p": 0.9}),
        ({"do_sample": "False", "temperature": "0.7"}, {"do_sample": False}),
        ({"do_sample": None, "temperature": None, "top_p": "none"}, {}),
        ({"max_gen_toks": "4", "window_size": "2"}, {"max_gen_toks": 4, "window_size": 2}),
        ({"max_gen_toks": 4.0, "window_size": "none"}, {"max_gen_toks": 4, "window_size": None}),
        ({"until": None}, {"until": []}),
    ],
)
def test_numbers_may_be_text(sampler: APDSampler, given: dict[str, Any], meant: dict[str, Any]) -> None:
    """As they are behind quotes on the harness's command line and in YAML."""
    lms = model(sampler), model(sampler)
    assert ask(lms[0], PROMPTS[3:5], **given) == ask(lms[1], PROMPTS[3:5], **meant)
    assert lms[0].generated == lms[1].generated


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"do_sample": True, "temperature": "warm"}, TypeError, "`temperature` must be a number, got 'warm'"),
        ({"do_sample": True, "top_p": [0.9]}, TypeError, "`top_p` must be a number, got [0.9]"),
        ({"do_sample": "maybe"}, TypeError, "`do_sample` must be True or False, got 'maybe'"),
        ({"max_gen_toks": "8.5"}, ValueError, "`max_gen_toks` must be a whole number of at least 1, got 8.5"),
        ({"max_tokens": 0}, ValueError, "`max_tokens` must be a whole number of at least 1, got 0"),
        ({"until": 3}, TypeError, "`until` must be a text or a list of texts, got 3"),
        ({"until": ["\n", 3]}, TypeError, "`until` must be a text or a list of texts"),
        ({"until": ["\ud83d"]}, ValueError, "surrogate pair"),
    ],
)
def test_generation_arguments_that_cannot_be_meant_are_named(
    sampler: APDSampler, given: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ask(model(sampler), PROMPTS[:1], **given)


def test_half_a_character_in_a_text_is_named(sampler: APDSampler) -> None:
    lm, half = model(sampler), "Copy \ud83d"
    for run in (
        lambda: ask(lm, [half]),
        lambda: lm.loglikelihood([request("Copy", half, kind="loglikelihood")], disable_tqdm=True),
        lambda: lm.loglikelihood_rolling([request(half, kind="loglikelihood_rolling")], disable_tqdm=True),
    ):
        with pytest.raises(ValueError, match="surrogate pair"):
            run()


def test_a_refused_request_is_named(sampler: APDSampler) -> None:
    mask = sampler.tokenizer.convert_ids_to_tokens(sampler.drafter.mask_token_id)
    with pytest.raises(
        ValueError, match="Task some task, document 0: The first token of a prompt must not be the mask token"
    ):
        ask(model(sampler), [PROMPTS[0], mask])


# ---------------------------------------------------------------- several processes


class Process(APDLM):
    """One of several processes, run one after another, the first one last: what the others send waits in a mailbox."""

    def __init__(self, sampler: APDSampler, rank: int, mail: list[list[Any]], **arguments: Any) -> None:
        super().__init__(sampler, max_new_tokens=32, **arguments)
        self.place, self.mail = rank, mail

    @property
    def rank(self) -> int:
        return self.place

    @property
    def world_size(self) -> int:
        return len(self.mail)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        assert dst == 0
        if self.rank:
            self.mail[self.rank].append(obj)
            return None
        return [obj, *(sent.pop(0) for sent in self.mail[1:])]


RANDOM = {"do_sample": True, "temperature": 1.5, "top_k": 0}


def test_the_shares_of_processes_make_up_what_one_process_gives(sampler: APDSampler, tasks: Path) -> None:
    """Answers, results and costs, where the shares differ in size: two documents of each task, and one."""
    names, setting = ("apd_answers", "apd_choices"), {"limit": 3, "gen_kwargs": RANDOM}
    alone = APDLM(sampler, max_new_tokens=32, seed=3)
    whole = evaluate(alone, tasks, *names, **setting)
    mail: list[list[Any]] = [[], []]
    first, second = (Process(sampler, rank, mail, seed=3) for rank in range(2))
    assert evaluate(second, tasks, *names, **setting) is None
    assert not second.generated and not second.scored.requests
    together = evaluate(first, tasks, *names, **setting)
    assert not any(mail)

    def answers(results: dict[str, Any]) -> dict[int, list[list[str]]]:
        return {sample["doc_id"]: sample["resps"] for sample in results["samples"]["apd_answers"]}

    assert answers(together) == answers(whole)
    assert {task: len(found) for task, found in together["samples"].items()} == dict.fromkeys(names, 3)
    assert first.generated == alone.generated and first.scored == alone.scored
    assert first.summary() == alone.summary()
    for key in ("generated", "scored", "tokens_per_forward"):
        assert together["config"][key] == whole["config"][key]
    for task, metrics in whole["results"].items():
        numbers = {name: value for name, value in metrics.items() if isinstance(value, float)}
        assert {name: together["results"][task][name] for name in numbers} == pytest.approx(numbers)


@pytest.mark.slow
def test_launched_processes_share_the_requests(tasks: Path, tmp_path: Path) -> None:
    """One table of forwards and one file of results, of all 12 answers and 3 texts."""
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m apd lm-eval --model apd"
    arguments = (
        f"--model_args pair=included --tasks apd_answers apd_texts --include_path {tasks} --output_path {tmp_path}"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launcher.split(), *arguments.split()], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_tables(done.stdout, "apd_answers", 12)
    assert done.stdout.count("Tokens per forward") == done.stdout.count("3 given texts") == 1
    (written,) = tmp_path.rglob("results_*.json")
    assert json.loads(written.read_text())["config"]["generated"]["apd_answers"]["requests"] == 12


# ---------------------------------------------------------------- given texts


def scores(
    drafter: Any, pairs: list[tuple[list[int], list[int]]], vocab_size: int, batch_size: int = 7
) -> list[tuple]:
    found = {i: rest for i, *rest in sequential_logprobs(drafter, pairs, vocab_size=vocab_size, batch_size=batch_size)}
    return [tuple(found[i]) for i in range(len(pairs))]


def by_hand(drafter: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The chain rule, one position at a time, one row, through the transformers model itself."""
    total, greedy = 0.0, True
    for j, token in enumerate(continuation):
        ids = [*context, *continuation[:j], *[drafter.mask_token_id] * (len(continuation) - j)]
        seen = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool)
        with torch.inference_mode():
            logits = drafter.model(torch.tensor([ids]), attention_mask=seen).logits[0].float()
        row = logits[len(context) + j - drafter.logit_shift].clone()
        row[drafter.mask_token_id] = -math.inf
        total += float(row.log_softmax(-1)[token])
        greedy &= int(row.argmax()) == token
    return total, greedy


def test_log_probabilities_of_an_exact_model_are_exact() -> None:
    exact = toy()
    pairs = [([0], answer) for answer in exact.answers.tolist()]
    found = scores(exact.drafter, pairs, exact.vocab_size)
    expected = (exact.weights / exact.weights.sum()).log().tolist()
    assert [logprob for logprob, *_ in found] == pytest.approx(expected, abs=1e-5)
    # A shared canvas is asked once: 1 + 3 + 9 + 27 known prefixes.
    assert sum(num_rows for *_, num_rows in found) == sum(TOKENS**j for j in range(LENGTH))
    impossible = scores(IdealListModel.shuffle(3).drafter, [([0], [0, 0, 1])], 4)
    assert impossible[0][0] == -math.inf


def test_log_probabilities_equal_the_chain_rule_by_hand() -> None:
    drafter, _ = tiny_pair(vocab=32)
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randint(31, (n,), generator=generator).tolist(), torch.randint(31, (m,), generator=generator).tolist())
        for n, m in ((1, 1), (3, 5), (9, 2), (2, 7), (5, 5), (1, 4))
    ]
    pairs.append((pairs[1][0], [*pairs[1][1][:3], 7, 8]))  # shares context, length and a prefix with another
    expected = [by_hand(drafter, *pair) for pair in pairs]
    for batch_size in (1, 4, 100):
        found = scores(drafter, pairs, 32, batch_size)
        assert [logprob for logprob, *_ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-4)
        assert [greedy for _, greedy, _ in found] == [greedy for _, greedy in expected]
        assert sum(num_rows for *_, num_rows in found) == sum(len(c) for _, c in pairs) - 4


def test_log_probabilities_of_a_drafter_without_shift_too() -> None:
    drafter = MaskedDiffusionDrafter(tiny_pair(vocab=32)[0].model, mask_token_id=31, logit_shift=0)
    (found,) = scores(drafter, [([1, 2], [3, 4, 5])], 32)
    assert found[0] == pytest.approx(by_hand(drafter, [1, 2], [3, 4, 5])[0], abs=1e-4)


def test_probabilities_of_all_continuations_sum_to_one() -> None:
    drafter, _ = tiny_pair(vocab=6)
    for context, length in (([1], 1), ([4, 0, 2], 3)):
        pairs = [(context, list(continuation)) for continuation in product(range(5), repeat=length)]  # 5 is the mask
        found = scores(drafter, pairs, 6, batch_size=32)
        assert math.fsum(math.exp(logprob) for logprob, *_ in found) == pytest.approx(1, abs=1e-5)
        assert sum(greedy for _, greedy, _ in found) == 1


def test_greedy_continuations_are_those_of_sequential_decoding(sampler: APDSampler) -> None:
    inputs = sampler.tokenizer(PROMPTS[0], return_tensors="pt")
    context = inputs["input_ids"][0].tolist()
    sequences = sampler.generate(**inputs, max_new_tokens=8, eos_token_id=None, strategy=LeftToRight(1))
    continuation = sequences[0, len(context) :].tolist()
    other = [*continuation[:-1], continuation[0]]
    (is_greedy, other_is_greedy) = (
        score[1] for score in scores(sampler.drafter, [(context, continuation), (context, other)], sampler.vocab_size)
    )
    assert is_greedy and not other_is_greedy


def test_tokens_outside_the_support_have_probability_zero() -> None:
    drafter, _ = tiny_pair(vocab=32)
    found = scores(drafter, [([1], [31]), ([1], [2, 20]), ([1], [])], vocab_size=16)
    assert [logprob for logprob, *_ in found] == [-math.inf, -math.inf, 0.0]
    assert found[2][1:] == (True, 0)


def test_a_broken_drafter_is_named() -> None:
    drafter, _ = tiny_pair()
    drafter.model.lm_head.weight.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="drafter"):
        scores(drafter, [([1], [2])], 32)


def test_trailing_spaces_go_to_the_continuation(sampler: APDSampler) -> None:
    lm = model(sampler)
    one, other = lm.loglikelihood(
        [request("Copy this", " list", kind="loglikelihood"), request("Copy this ", "list", kind="loglikelihood")],
        disable_tqdm=True,
    )
    assert one == other


def test_rolling_scores_every_token_once_in_windows(sampler: APDSampler) -> None:
    text = PROMPTS[0] + instances("copy", 3, seed=5)[0].answer
    ids = sampler.tokenizer(text).input_ids
    rolling = request(text, kind="loglikelihood_rolling")
    lm = model(sampler)
    (whole,) = lm.loglikelihood_rolling([rolling], disable_tqdm=True)
    eos = sampler.tokenizer.eos_token_id
    assert whole == pytest.approx(by_hand(sampler.drafter, [eos], ids)[0], abs=1e-3)
    assert lm.scored.tokens == len(ids)

    short = model(sampler, max_length=8)
    (windowed,) = short.loglikelihood_rolling([rolling], disable_tqdm=True)
    assert short.scored.tokens == len(ids)
    bounds = [*range(0, len(ids), 7), len(ids)]  # seven tokens and one of context fill eight places
    parts = []
    for start, end in pairwise(bounds):
        context = [eos] if start == 0 else ids[max(0, end - 8) : start]
        parts.append(by_hand(sampler.drafter, context, ids[start:end])[0])
    assert windowed == pytest.approx(sum(parts), abs=1e-3)


def test_contexts_that_are_too_long_lose_their_left_end(sampler: APDSampler) -> None:
    lm, short = model(sampler), model(sampler, max_length=6)
    context, continuation = lm.tok_encode(PROMPTS[0]), lm.tok_encode(" list")
    (cut,) = short._loglikelihood_tokens([(None, context, continuation)], disable_tqdm=True)
    (same,) = lm._loglikelihood_tokens([(None, context[-5:], continuation)], disable_tqdm=True)
    assert cut == same
    with pytest.raises(ValueError, match="room"):
        short._loglikelihood_tokens([(None, context, continuation * 6)], disable_tqdm=True)


# ---------------------------------------------------------------- construction


def test_model_args_reach_models_and_knobs() -> None:
    lm = APDLM.create_from_arg_string(
        f"drafter={DRAFTER_DIR},verifier={VERIFIER_DIR},mixture_weight=0.7,window_size=9,kv_window=none,correction=true,"
        "dtype=float32,batch_size=3,max_new_tokens=20",
        {"batch_size": 1, "max_batch_size": None, "device": None},
    )
    config = lm.sampler.config
    assert (config.mixture_weight, config.window_size, config.kv_window, config.correction) == (0.7, 9, None, True)
    assert (lm.batch_size, lm.max_new_tokens, lm.max_length) == (3, 20, 512)
    assert APDLM.create_from_arg_string("pair=included").max_new_tokens == 32


def test_model_args_name_a_drafter_that_verifies_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="got 'self', but the family 'dream' was never trained"):
        APDLM.create_from_arg_string(f"drafter={DRAFTER_DIR},verifier=self")
    monkeypatch.setitem(FAMILIES, "own", dataclasses.replace(FAMILIES["dream"], name="own", reads_causally=True))
    lm = APDLM.create_from_arg_string(
        f"drafter={DRAFTER_DIR},verifier=self,spec=own,mixture_weight=0,correction=true,first=judge"
    )
    assert lm.sampler.verifier.model is lm.sampler.drafter.model
    assert (lm.sampler.config.first, lm.sampler.config.correction) == ("judge", True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ("pair=included,mixture_wieght=0.7", TypeError, "Did you mean `mixture_weight`"),
        ("pair=included,max_new_token=7", TypeError, "Did you mean `max_new_tokens`"),
        ("pair=includd", ValueError, "'included'"),
        ("mixture_weight=0.7", ValueError, "pair=included"),
        ("drafter=somewhere", ValueError, "`verifier` must be given with drafter='somewhere', got None"),
        ("drafter=somewhere,strategy=klas", ValueError, "Did you mean `klass`?"),
        ("pair=included,R=0.7", TypeError, "Write mixture_weight="),
        ("pair=included,drafter=somewhere", ValueError, "Exactly one"),
        ("pair=included,verifier=somewhere", ValueError, "goes with `drafter`"),
        ("pair=included,batch_size=auto", ValueError, "`batch_size` must be a whole number"),
        ("pair=included,max_new_tokens=-1", ValueError, "`max_new_tokens` must be a whole number"),
        ("pair=included,tokens_per_step=0", ValueError, "`tokens_per_step` must be a whole number"),
        ("pair=included,mixture_weight=7", ValueError, "`mixture_weight` must be in"),
        ("pair=included,mixture_weight=much", TypeError, "`mixture_weight` must be a number"),
        ("pair=included,max_length=long", ValueError, "`max_length` must be a whole number"),
        ("pair=included,seed=0.5", TypeError, "`seed` must be one integer"),
        ("pair=included,device=3", TypeError, "`device` must be a name"),
        ("pair=included,strategy=confidense", ValueError, "Did you mean `confidence`?"),
        ("pair=included,strategy=3", TypeError, "`strategy` must be an object such as"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        APDLM.create_from_arg_string(arguments)


def test_numbers_in_model_args_may_be_text() -> None:
    arguments = {"pair": "included", "mixture_weight": "0.7", "window_size": "auto", "kv_window": "none", "seed": "3"}
    lm = APDLM.create_from_arg_obj(arguments | {"max_length": "50", "correction": "true"}, {"batch_size": "2"})
    config = lm.sampler.config
    assert (config.mixture_weight, config.window_size, config.kv_window, config.correction) == (
        0.7,
        "auto",
        None,
        True,
    )
    assert (lm.seed, lm.max_length, lm.batch_size) == (3, 50, 2)


@pytest.mark.parametrize("name", ["confidence:2", "wino:0.6;length=8", "apd:R=0.7;tau=0.2"])
def test_a_strategy_has_a_short_name_in_model_args(sampler: APDSampler, tasks: Path, name: str) -> None:
    lm = APDLM.create_from_arg_string(f"pair=included,strategy={name}")
    results = evaluate(lm, tasks, "apd_answers", limit=2)
    assert results["config"]["apd_strategy"] == name
    wanted = model(sampler, strategy=parse(name).strategy)
    gen_kwargs = parse(name).knobs
    assert evaluate(wanted, tasks, "apd_answers", limit=2, gen_kwargs=gen_kwargs)["results"] == results["results"]
    assert wanted.generated == lm.generated


def test_objects_among_the_knobs_are_reported_by_their_repr(sampler: APDSampler) -> None:
    config = APDConfig(window_size=BlockWindow(4), acceptance=Coupling(0.5))
    info = APDLM(APDSampler(sampler.drafter, sampler.verifier, sampler.tokenizer, config)).get_model_info()
    assert json.loads(json.dumps(info))["apd_config"]["window_size"] == "BlockWindow(size=4)"
    assert info["apd_config"]["acceptance"] == "Coupling(threshold=0.5, correction=False)"


def test_a_sampler_has_its_knobs_already(sampler: APDSampler) -> None:
    with pytest.raises(ValueError, match="Give one of them"):
        APDLM(sampler, tokens_per_step=1, strategy=LeftToRight(1))
    with pytest.raises(ValueError, match="mixture_weight, device too"):
        APDLM(sampler, mixture_weight=0.5, device="cpu")
    with pytest.raises(ValueError, match="tokenizer"):
        APDLM(APDSampler(*tiny_pair()))


def test_chat_templates_are_the_tokenizer_s(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = APDLM(pair="included")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(lm.tokenizer, "chat_template", template)
    assert lm.chat_template(True) == template
    assert "included" in lm.tokenizer_name and "/" not in lm.tokenizer_name
    assert lm.apply_chat_template([{"role": "user", "content": "Copy"}]) == "Copy"
    plain = evaluate(APDLM(pair="included"), tasks, "apd_answers", limit=2)
    chat = evaluate(lm, tasks, "apd_answers", limit=2, apply_chat_template=True)
    assert chat["results"]["apd_answers"]["exact_match,strip"] == plain["results"]["apd_answers"]["exact_match,strip"]


def test_a_bos_token_is_not_written_twice(sampler: APDSampler) -> None:
    """Some chat templates write it, and so does the tokenizer."""
    lm, added = model(sampler), []
    lm.tokenizer = SimpleNamespace(
        bos_token="<bos>", encode=lambda text, add_special_tokens: added.append(add_special_tokens)
    )
    lm.tok_encode("<bos>text")
    lm.tok_encode("text")
    lm.tok_encode("text", add_special_tokens=False)
    assert added == [False, True, False]


# ---------------------------------------------------------------- docs/evaluation.md


@pytest.mark.slow
def test_the_page_is_true(
    tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every block runs, with the included pair in the place of the checkpoints and a local task in that of GSM8K."""
    gsm8k, sort = re.findall(r"^```bash\n(.*?)^```$", DOCS, flags=re.MULTILINE | re.DOTALL)
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", DOCS, flags=re.MULTILINE | re.DOTALL)
    for name, directory in STAND_INS.items():
        gsm8k = gsm8k.replace(name, directory)
    gsm8k = gsm8k.replace("gsm8k", f"apd_answers --include_path {tasks} --limit 2")

    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "docs/evaluation.md", "exec"), {"__name__": "page"})

    command = sort.replace("apd", f'"{sys.executable}" -m apd', 1)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_tables(done.stdout, "sort", 20)

    assert (
        main(shlex.split(gsm8k.replace("\\\n", ""))[1:]) == 0
    )  # in this process: importing the harness takes seconds
    check_tables(capsys.readouterr().out, "apd_answers", 2)
    (written,) = Path("results").rglob("results_*.json")
    config = json.loads(written.read_text())["config"]
    assert (config["apd_config"]["mixture_weight"], config["apd_max_new_tokens"]) == (0.7, 256)


def check_tables(printed: str, task: str, answers: int) -> None:
    """The harness's table, and below it what the answers cost."""
    assert re.search(rf"\|{task} *\|.*exact_match", printed)
    (row,) = re.findall(
        rf"^\|{task} *\| *(\d+)\| *(\d+)\| *(\d+)\| *([\d.]+)\| *(\d+)\| *(\d+)\|$", printed, flags=re.MULTILINE
    )
    assert int(row[0]) == answers and float(row[3]) == round(int(row[1]) / int(row[2]), 2)
    assert row[4] == row[2]  # one canvas per forward, but with checked decoding
    assert printed.index("exact_match") < printed.index("Tokens per forward")
