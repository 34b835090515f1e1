"""Models beside the pairs, each against something small: a causal LM, an endpoint on this machine, an official checkout."""

import importlib.util
import json
import shutil
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

pytest.importorskip("benchmarks.parallelbench", reason="benchmarks are imported from the repository root")

from apd.included import DRAFTER_DIR, VERIFIER_DIR
from apd.included import tasks as included
from benchmarks.parallelbench import models
from benchmarks.parallelbench.__main__ import main
from benchmarks.parallelbench.alone import CausalLM, Endpoint
from benchmarks.parallelbench.models import our_questions, questions_of_checkout
from benchmarks.parallelbench.records import NAME, read
from benchmarks.parallelbench.specs import ENDPOINT, parse
from benchmarks.parallelbench.tasks import generate

TEMPLATE = "{% for turn in messages %}{{ turn['content'] }} {% endfor %}"


def ran(out, *arguments):
    return main(["run", "--out", str(out), *map(str, arguments)])


def records(out):
    return read(out / NAME).records


# --- A causal LM


@pytest.fixture(scope="module")
def causal_directory(tmp_path_factory):
    """The included verifier with a chat template, and a checkpoint's usual bad habits in its generation config."""
    path = tmp_path_factory.mktemp("causal") / "model"
    shutil.copytree(VERIFIER_DIR, path)
    config = json.loads((path / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    habits = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "repetition_penalty": 1.5, "eos_token_id": [1]}
    (path / "generation_config.json").write_text(json.dumps(habits))
    return path


def greedy_by_hand(model, ids, stops, length):
    ids, start = list(ids), len(ids)
    while len(ids) - start < length:
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in stops:
            break
    return ids[start:]


def test_a_causal_lm_is_greedy_in_batches_and_counts_to_the_first_stop_token(causal_directory):
    model = AutoModelForCausalLM.from_pretrained(causal_directory, dtype=torch.float32).eval()
    # `AutoTokenizer` takes Qwen's own splitting for this model type, which does not know the words.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(causal_directory)
    causal = CausalLM(model, tokenizer)
    assert causal.stops == [1]
    prompts = [instance.prompt for task in ("copy", "arithmetic") for instance in included.instances(task, 3, 0)]
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt in prompts}) > 1
    finishes = set()
    for length in (4, 32):
        answers = list(causal.answers(list(enumerate(prompts, 5)), batch_size=4, max_new_tokens=length))
        assert [answer.index for answer in answers] == list(range(5, 11))
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens = greedy_by_hand(model, tokenizer(prompt)["input_ids"], [1], length)
            assert answer.text == tokenizer.decode(tokens, skip_special_tokens=True)
            assert answer.new_tokens == answer.verifier_forwards == len(tokens) and answer.drafter_forwards == 0
            assert answer.finish == ("stop" if tokens[-1] == 1 else "length")
            finishes.add(answer.finish)
    assert finishes == {"stop", "length"}


def test_every_stop_token_of_a_checkpoint_ends_an_answer(causal_directory):
    causal = CausalLM.from_pretrained(str(causal_directory))
    causal.stops = [1, 9]
    answer = causal._answer(0, [5, 9, 1, 1])
    assert (answer.new_tokens, answer.finish) == (2, "stop")


def test_a_chat_without_template_becomes_plain_text(causal_directory):
    causal = CausalLM.from_pretrained(str(causal_directory))
    chat = [{"role": "user", "content": "Ada Bo"}, {"role": "assistant", "content": "Bo"}]
    assert causal._ids(chat) == causal.tokenizer("Ada Bo Bo ")["input_ids"]
    causal.tokenizer.chat_template = None
    assert causal._ids(chat) == causal.tokenizer("Ada Bo\n\nBo\n")["input_ids"]


def test_a_run_of_a_causal_lm_has_a_report(causal_directory, tmp_path, capsys):
    arguments = ["--causal-lm", causal_directory, "--tasks", "waiting_line/copy", "--count", 2, "--max-new-tokens", 4]
    assert ran(tmp_path, *arguments) == 0
    assert "waiting_line/copy  0.0 % of 2" in capsys.readouterr().out
    for record in records(tmp_path):
        assert record["strategy"] == "autoregressive" and record["drafter_forwards"] == 0
        assert record["verifier_forwards"] == record["new_tokens"] <= 4 == record["max_new_tokens"]
    assert main(["report", str(tmp_path)]) == 0
    assert ran(tmp_path, *arguments) == 0 and len(records(tmp_path)) == 2


def test_what_is_no_causal_lm_is_named(tmp_path, capsys):
    assert ran(tmp_path, "--causal-lm", tmp_path / "nothing", "--count", 1) == 2
    assert "`causal_lm` must be a directory or hub id" in capsys.readouterr().err


# --- An endpoint

KEY = "secret-3141592653589793"


def completion(text, tokens=7, finish="stop"):
    message = {"role": "assistant", "content": text}
    return 200, {
        "id": "x",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens},
    }


@contextmanager
def serving(*replies):
    """A server that gives these replies (status, JSON or text), the last one again and again; URL and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers["Authorization"], body))
            status, content = replies[min(len(asked), len(replies)) - 1]
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "1")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def openai(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "not for this server")
    return pytest.importorskip("openai")


ONE_TASK = ["--tasks", "waiting_line/copy", "--model", "m"]


def test_an_endpoint_is_evaluated_and_the_key_stays_secret(openai, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MY_KEY", KEY)
    row = generate("waiting_line/copy", 1, seed=0)[0]
    with serving((500, {"error": "busy"}), completion(row.answer), completion("?", finish="length")) as (url, asked):
        assert ran(tmp_path, "--endpoint", url, *ONE_TASK, "--count", 2, "--api-key-env", "MY_KEY") == 0
    assert len(asked) == 3  # the first was repeated
    for path, authorization, body in asked:
        assert (path, authorization) == ("/v1/chat/completions", f"Bearer {KEY}")
        assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 0, 64)
    assert asked[0][2]["messages"] == asked[1][2]["messages"] == row.messages
    right, wrong = records(tmp_path)
    assert (right["score"], wrong["score"]) == (1, 0) and (right["finish"], wrong["finish"]) == ("stop", "length")
    for record in (right, wrong):
        assert (record["drafter_forwards"], record["verifier_forwards"], record["new_tokens"]) == (None, None, 7)
        assert parse(record["strategy"]) == ENDPOINT and not ENDPOINT.is_apd and not ENDPOINT.is_any_order
    assert read(tmp_path / NAME).settings["pair"] == f"m at {url}"
    shown = capsys.readouterr()
    assert "endpoint  waiting_line/copy  50.0 % of 2" in shown.out
    assert KEY not in shown.out + shown.err + (tmp_path / NAME).read_text()


def test_without_a_named_variable_no_key_is_sent(openai):
    with serving(completion("Hi")) as (url, asked):
        (answer,) = Endpoint(url, "m").answers([(3, "Hello?")], batch_size=1, max_new_tokens=5)
    assert (answer.index, answer.text, answer.new_tokens) == (3, "Hi", 7)
    assert asked[0][1] == "Bearer none" and asked[0][2]["messages"] == [{"role": "user", "content": "Hello?"}]


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ((200, {"object": "chat.completion"}), "without choices"),
        ((200, {"choices": []}), "without choices"),
        ((200, {"choices": [{"index": 0}]}), "without choices"),
        ((200, "<html>proxy</html>"), "reply"),
        ((200, '"text"'), "without choices"),
        ((200, "null"), "without choices"),
        ((401, {"error": {"message": f"Wrong key {KEY}"}}), r"Wrong key \[key\]"),
        ((500, {"error": "down"}), "failed.*500"),
    ],
)
def test_a_bad_reply_names_its_prompt(reply, told, openai, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(reply) as (url, _), pytest.raises(RuntimeError, match=told) as caught:
        list(Endpoint(url, "m", "MY_KEY").answers([(0, "Who comes first?")], batch_size=1, max_new_tokens=5))
    assert "'Who comes first?'" in str(caught.value) and KEY not in str(caught.value)


def test_an_interrupted_run_of_an_endpoint_goes_on(openai, tmp_path, capsys):
    with serving(completion("a"), (400, {"error": "no"}), completion("b")) as (url, asked):
        arguments = ["--endpoint", url, *ONE_TASK, "--count", 3]
        assert ran(tmp_path, *arguments) == 2
        assert "goes on from here" in capsys.readouterr().err
        assert ran(tmp_path, *arguments) == 0
    assert [record["text"] for record in records(tmp_path)] == ["a", "b", "b"] and len(asked) == 4


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--endpoint", "http://h/v1"], "`endpoint` needs a `model`"),
        (["--model", "m"], "`model` is for `endpoint`; the included pair takes none"),
        (["--endpoint", "h/v1", "--model", "m"], "must be a URL"),
        (["--endpoint", f"http://me:{KEY}@h/v1", "--model", "m"], "must not hold"),
        (["--endpoint", f"http://h/v1?key={KEY}", "--model", "m"], "must not hold"),
        (["--endpoint", "http://h/v1", "--model", "m", "--api-key-env", KEY], "`api_key_env` must name"),
        (
            ["--endpoint", "http://h/v1", "--model", "m", "--dtype", "float32"],
            "`dtype` is for `drafter` or `causal_lm`; `endpoint` takes none",
        ),
        (["--endpoint", "http://h/v1", "--model", "m", "--strategies", "apd"], "must be endpoint for m at"),
        (["--endpoint", "http://h/v1", "--model", "m", "--temperature", "1"], "`temperature` must be 0"),
        (["--causal-lm", "a", "--strategies", "one-step"], "must be autoregressive for a"),
        (["--causal-lm", "a", "--drafter", "b"], "must not both be given"),
        (["--strategies", "endpoint"], "must not have endpoint"),
        ([], "`strategies` must be given"),
        (["--data", "."], "`data` is for `drafter`"),
    ],
)
def test_wrong_arguments_are_reported_without_the_key(arguments, told, openai, tmp_path, capsys):
    assert ran(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert told in error and KEY not in error


# --- A checkout


@pytest.fixture
def checkout(tmp_path):
    """Rows of ours in the official form: lists sorted by length, a grid, and a text task."""
    root = tmp_path / "checkout"
    lines = {
        "waiting_line/copy": sorted(generate("waiting_line/copy", 12, seed=3), key=lambda row: row.metadata["length"]),
        "puzzle/sudoku_n4_12": generate("puzzle/sudoku_n4_12", 2, seed=3),
        "words_to_sentence/easy": generate("words_to_sentence/easy", 1, seed=3),
    }
    for task, rows in lines.items():
        folder, _, name = task.partition("/")
        file = root / "data/output/test" / folder / f"{name}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_text("".join(json.dumps(row.to_json()) + "\n" for row in rows))
        file.with_name("task_config.yaml").write_text(json.dumps({task: {"prompt": rows[0].prompt}}))
    return root, lines


def test_a_checkout_is_evaluated_unchanged(openai, checkout, tmp_path):
    root, lines = checkout
    with serving(completion("x")) as (url, asked):
        assert ran(tmp_path, "--endpoint", url, "--model", "m", "--data", root, "--count", 50) == 0
    found = records(tmp_path)
    assert len(found) == len(asked) == 14  # all rows there are; the text task only where it is named
    for task, length in (("waiting_line/copy", 32), ("puzzle/sudoku_n4_12", 64)):
        of_task = [record for record in found if record["task"] == task]
        assert {json.dumps(record["prompt"]) for record in of_task} == {
            json.dumps(row.messages) for row in lines[task]
        }
        assert {record["max_new_tokens"] for record in of_task} == {length}
    assert {body["max_tokens"] for _, _, body in asked} == {32, 64}
    settings = read(tmp_path / NAME).settings
    assert len(settings["data"]) == 16 and settings["lengths"] == "by task"
    assert str(root) not in (tmp_path / NAME).read_text()


def test_answers_to_a_checkout_are_scored_by_its_labels(checkout):
    root, lines = checkout
    for task in ("waiting_line/copy", "puzzle/sudoku_n4_12"):
        answers = {json.dumps(row.messages): row.reference for row in lines[task]}
        for sample in questions_of_checkout(root).samples(task, 50, 0):
            assert sample.judge(answers[json.dumps(sample.prompt)])["score"] == 1
            assert sample.judge("nothing")["score"] == 0


def test_few_samples_of_a_checkout_have_all_lengths_and_more_begin_with_them(checkout):
    root, lines = checkout
    questions = questions_of_checkout(root)
    few, more = (questions.samples("waiting_line/copy", count, 0) for count in (4, 9))
    lengths = {json.dumps(row.messages): row.metadata["length"] for row in lines["waiting_line/copy"]}
    assert {lengths[json.dumps(sample.prompt)] for sample in few} == set(lengths.values())
    assert [sample.prompt for sample in more[:4]] == [sample.prompt for sample in few]
    assert [sample.number for sample in few] == [0, 1, 2, 3]


def test_a_text_task_without_its_packages_is_refused_before_anything_is_decoded(checkout, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        models.importlib.util, "find_spec", lambda name: None if "language" in name else find_spec(name)
    )
    for questions in (questions_of_checkout(checkout[0]), our_questions()):
        with pytest.raises(
            ValueError,
            match=r"words_to_sentence/easy is scored with language-tool-python\. Install it with: pip install",
        ):
            questions.samples("words_to_sentence/easy", 1, 0)


def test_a_folder_without_tasks_is_refused(tmp_path, capsys):
    assert ran(tmp_path, "--causal-lm", "a", "--data", tmp_path) == 2
    assert "which has none of the tasks" in capsys.readouterr().err


def test_a_drafter_answers_a_checkout(checkout, tmp_path):
    shutil.copytree(DRAFTER_DIR, tmp_path / "drafter")
    config = json.loads((tmp_path / "drafter" / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (tmp_path / "drafter" / "tokenizer_config.json").write_text(json.dumps(config))
    arguments = ["--drafter", tmp_path / "drafter", "--data", checkout[0], "--strategies", "one-step", "--count", 1]
    assert ran(tmp_path, *arguments) == 0
    assert [record["max_new_tokens"] for record in records(tmp_path)] == [32, 64]
