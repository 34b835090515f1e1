"""How the command line complains, what a run over a file says and keeps, and conversations."""

import io
import json
import os
import re
import shlex
import shutil
import socket
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from paths import ROOT
from poisoned import Poisoned

import apd.cli.progress
from apd import EXAMPLE_PROMPTS, APDSampler, mix_seed
from apd.cli import main
from apd.cli.app import parser
from apd.cli.chat import Chat
from apd.cli.demo import Comparison, Run, table
from apd.cli.parsing import _meant
from apd.cli.report import say
from apd.cli.stream import Shown
from apd.generation.elsewhere import CALL, LOADING
from apd.included import DRAFTER_DIR, VERIFIER_DIR
from apd.included.tasks import EXAMPLES
from apd.show.terminal import console

PLAIN = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def sampler() -> APDSampler:
    return APDSampler.from_included()


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The included drafter with a chat template that joins the messages."""
    path = tmp_path_factory.mktemp("chatting")
    shutil.copytree(DRAFTER_DIR, path, dirs_exist_ok=True)
    (path / "chat_template.jinja").write_text(PLAIN)
    return path


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


# ---------------------------------------------------------------- complaints


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("generate --promt x", "there is no option --promt. Did you mean --prompt?"),
        ("generate words", "'words' stands alone, without an option before it. Write --prompt words."),
        ("infill words", "'words' stands alone, without an option before it. Write --text words."),
        ("generate --prompt x --mixture_weight 0.5", "no option --mixture_weight. Did you mean --mixture-weight?"),
        ("generate --prompt x --mixture_weight=0.5", "no option --mixture_weight. Did you mean --mixture-weight?"),
        ("generate --prompt x --tau 0.5", "there is no option --tau. Write --acceptance-threshold 0.5."),
        ("generate --prompt x --R=0.5", "there is no option --R. Write --mixture-weight 0.5."),
        ("generate --prompt x --gen-length 64", "there is no option --gen-length. Write --max-new-tokens 64."),
        ("generate --prompt x --steps 64", "there is no option --steps. The number of steps follows from what"),
        ("generate --prompt x --steps 64", "A fixed one is --strategy confidence:K, K tokens per step"),
        ("generate --prompt x --tokens-per-step 2", "Write --strategy confidence:2."),
        ("generate --model Dream", "there is no option --model. Write --drafter Dream."),
        ("infill --prompt x", "there is no option --prompt. Write --text x."),
        (
            "generate --prompt x --correction maybe",
            "--correction takes no value, got 'maybe'. Write --correction or --no-",
        ),
        ("generate --prompt x --do-sample=true", "--do-sample takes no value, got 'true'. Write --do-sample."),
        (
            "generate --prompt x --correction=on",
            "--correction takes no value, got 'on'. Write --correction or --no-corr",
        ),
        ("generate --drafter x --torch_dtype float16", "there is no option --torch_dtype. Write --dtype float16."),
        ("generate --prompt x --strategy thresold:0.9", "got 'thresold:0.9'. Did you mean `threshold`?"),
        ("generate --prompt x --strategy Left_To_Right", "got 'Left_To_Right'. Did you mean `left-to-right`?"),
        ("generat --prompt x", "there is no command 'generat'. Did you mean generate?"),
        ("--verion", "there is no option --verion. Did you mean --version?"),
        ("", "a command is missing: demo, generate,"),
    ],
)
def test_the_culprit_and_what_was_meant_are_named(capsys: pytest.CaptureFixture, arguments: str, said: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    assert stop.value.code == 2
    complaint, advice = capsys.readouterr().err.splitlines()
    assert said in complaint and re.match(r"apd( \w+)?: error: ", complaint)
    assert re.fullmatch(r"Try 'apd( \w+)? --help'\.", advice)


@pytest.mark.parametrize("command", ["generate", "infill", "chat", "serve", "check"])
def test_advice_on_options_of_other_scripts_is_no_python(command: str) -> None:
    options = parser().commands[command]._option_string_actions
    for name in {*CALL, *LOADING} - {option.lstrip("-").replace("-", "_") for option in options}:
        advice = _meant(f"--{name}", "8", options)
        assert not re.search(r"\w+\(|\w=|`(drafter|verifier)`", advice), advice


def test_an_option_that_the_command_lacks_is_not_advised(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--tau", "0.5"])
    assert capsys.readouterr().err.startswith("apd check: error: there is no option --tau.\n")


def test_a_prompt_or_a_file_is_asked_for(capsys: pytest.CaptureFixture) -> None:
    assert main(["generate"]) == 2 and "--prompt TEXT, or --input FILE" in capsys.readouterr().err
    assert main(["infill"]) == 2 and "--text TEXT, or --input FILE" in capsys.readouterr().err


def test_an_empty_prompt_and_a_missing_file_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    absent, into = tmp_path / "absent.jsonl", ["--output", str(tmp_path / "out.jsonl")]
    for options, code, said in (
        (["--prompt", ""], 2, "--prompt must not be empty."),
        (["--prompt", "-"], 1, "reads the prompt from standard input, which is empty."),
        (["--input", str(absent), *into], 1, f"--input must be a file, got {absent}: there is none."),
        (["--input", str(tmp_path), *into], 1, f"--input must be a file, got the folder {tmp_path}."),
    ):
        assert main(["generate", *options]) == code
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_cannot_be_is_refused(capsys: pytest.CaptureFixture) -> None:
    """99999 was served at 34463, the rest of its division by 65536."""
    assert main(["serve", "--drafter", "nowhere", "-R", "1", "--port", "99999"]) == 2
    assert "--port must be below 65536, got 99999" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    monkeypatch.setattr("apd.cli.serve.EngineProcess", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--port", str(port)]) == 1
    assert f"--port must be free, got {port}, where another program listens on 127.0.0.1." in capsys.readouterr().err
    assert main(["serve", "--host", "192.0.2.1"]) == 1  # an address for documentation, of nobody's machine
    assert "--host must be an address of this machine, got 192.0.2.1" in capsys.readouterr().err


def test_strategies_are_listed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--strategy", "list"])
    out = capsys.readouterr().out
    assert stop.value.code == 0 and "blocks:LENGTH" in out and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--chat"], "A chat needs a chat template, and the tokenizer of"),
        (["--quantization", "8bit"], "pip install bitsandbytes"),
        (["--dtype", "bf16"], "--dtype must be a dtype of torch, got bf16. Use float32, bfloat16 or float16."),
        (["--spec", "lada"], "lada"),
        (["--mask-token-id", "9999"], "mask"),
        (["--verifier", "self"], "got 'self', but the family 'dream' was never trained"),
    ],
)
def test_what_is_cheap_is_checked_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, options: list[str], said: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # and no weights
        if (DRAFTER_DIR / name).exists():
            shutil.copy(DRAFTER_DIR / name, tmp_path)
    weightless = ["--drafter", str(tmp_path), "--verifier", str(VERIFIER_DIR)]
    assert main(["generate", "--prompt", "x", *weightless, *options]) in (1, 2)
    assert said in capsys.readouterr().err


def test_without_tokenizer_files_no_weights_are_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    shutil.copy(DRAFTER_DIR / "config.json", tmp_path)
    assert main(["generate", "--prompt", "x", "--drafter", str(tmp_path), "--verifier", str(VERIFIER_DIR)]) == 1
    assert "has no tokenizer files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "given", "said"),
    [
        ("--drafter", "./nowhere", "--drafter must be a folder or a hub name, got ./nowhere: no such folder."),
        ("--drafter", "a/b/c", "got a/b/c: no such folder."),
        ("--verifier", "./nowhere", "--verifier must be a folder or a hub name, got ./nowhere: no such folder."),
        ("--drafter", "pair", "got pair, which has no config.json. Did you mean pair/drafter?"),
        ("--verifier", "pair", "got pair, which has no config.json. Did you mean pair/verifier?"),
        ("--drafter", "pair/drafter/config.json", "got the file pair/drafter/config.json. Name its folder."),
    ],
)
def test_a_folder_that_is_none_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    option: str,
    given: str,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, path in {"drafter": DRAFTER_DIR, "verifier": VERIFIER_DIR}.items():
        (tmp_path / "pair" / name).mkdir(parents=True)
        shutil.copy(path / "config.json", tmp_path / "pair" / name)
    options = {"--drafter": "pair/drafter", "--verifier": "pair/verifier", option: given}
    asked = [word for pair in options.items() for word in pair]
    for command in (["generate", "--prompt", "x"], ["check"]):
        assert main([*command, *asked]) == 1
        assert said.replace("/", os.sep) in capsys.readouterr().err.replace("/", os.sep)


def test_messages_are_wrapped_at_words_in_a_terminal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    message = "one sentence of many words, " * 8
    monkeypatch.setenv("COLUMNS", "60")
    for stream, lines in ((Terminal(), 4), (io.StringIO(), 1)):
        monkeypatch.setattr(sys, "stderr", stream)
        say(message.strip())
        said = stream.getvalue()
        assert said.count("\n") == lines and " ".join(said.split()) == message.strip()
        assert lines == 1 or max(map(len, said.splitlines())) <= 60


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_table_of_the_demo_has_as_many_columns_as_fit(width: int) -> None:
    run = Run("", [], 12, 12, 12, 1.0, True)
    out = io.StringIO()
    shown = console(out)
    shown.width = width
    shown.print(table([Comparison(each, run, run) for each in EXAMPLES], width))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= width and "…" not in out.getvalue()
    assert ("verifier" in out.getvalue()) == (width >= 80)


def test_the_commands_of_the_page_are_valid() -> None:
    page = (ROOT / "docs/cli.md").read_text("utf-8")
    commands = re.findall(r"^apd (.+)$", "".join(re.findall(r"```bash\n(.*?)```", page, re.DOTALL)), re.MULTILINE)
    assert len(commands) >= 2
    for line in commands:
        parser().parse_args(shlex.split(line))
    named = set(re.findall(r"^\| `apd ([\w-]+)`", page, re.MULTILINE))
    assert named == parser().commands.keys()


# ---------------------------------------------------------------- files


def test_fields_of_a_line_come_back_in_its_answer(tmp_path: Path) -> None:
    source = written(
        tmp_path / "in.jsonl",
        {"id": "q7", "prompt": EXAMPLE_PROMPTS[0], "gold": ["a"], "text": "mine", "index": 3},
        {"prompt": EXAMPLE_PROMPTS[1]},
    )
    output = tmp_path / "out.jsonl"
    command = ["generate", "--input", str(source), "--output", str(output)]
    assert main(command) == 0
    first, second = read(output)
    assert list(first)[:6] == ["index", "prompt", "id", "gold", "input_text", "input_index"]
    assert (first["index"], first["id"], first["gold"], first["input_text"]) == (0, "q7", ["a"], "mine")
    assert first["text"] != "mine" and "id" not in second
    before = output.read_bytes()
    assert main(command) == 0 and output.read_bytes() == before
    written(source, {"id": "q8", "prompt": EXAMPLE_PROMPTS[0]}, {"prompt": EXAMPLE_PROMPTS[1]})
    assert main(command) == 1  # another id: another run


def test_messages_are_answered_and_come_back(tmp_path: Path, chatting: Path, sampler: APDSampler) -> None:
    messages = [{"role": "user", "content": EXAMPLE_PROMPTS[2]}]
    source = written(tmp_path / "in.jsonl", {"messages": messages}, {"prompt": EXAMPLE_PROMPTS[3]})
    output, pair = tmp_path / "out.jsonl", ["--drafter", str(chatting), "--verifier", str(VERIFIER_DIR)]
    options = ["--max-new-tokens", "32", "--device-map", "cpu"]
    assert main(["generate", "--input", str(source), "--output", str(output), *pair, *options]) == 0
    first, second = read(output)
    wanted = [answer.text for answer in sampler.generate_many(EXAMPLE_PROMPTS[2:4], max_new_tokens=32)]
    assert [first["text"], second["text"]] == wanted and first["messages"] == messages


def test_what_a_chat_saves_is_read_without_a_chat_template(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    saved, output = tmp_path / "saved.jsonl", tmp_path / "out.jsonl"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*EXAMPLE_PROMPTS[1:3], f"/save {saved}"])))
    assert main(["chat"]) == 0 and "2 prompts → " in capsys.readouterr().err
    with saved.open("a") as file:  # the same prompt as a chat
        file.write(json.dumps({"messages": [{"role": "user", "content": EXAMPLE_PROMPTS[1]}]}) + "\n")
    assert main(["generate", "--input", str(saved), "--output", str(output)]) == 0
    first, second, third = read(output)
    assert (first["text"].strip(), second["text"].strip()) == (first["answer"], second["answer"])
    assert third["text"] == first["text"] and third["messages"][0]["content"] == first["prompt"]


def test_a_longer_chat_without_a_template_is_named_by_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    chat = [{"role": role, "content": "Hello."} for role in ("user", "assistant", "user")]
    source, output = (
        written(tmp_path / "in.jsonl", {"prompt": EXAMPLE_PROMPTS[1]}, {"messages": chat}),
        tmp_path / "out",
    )
    ask = ["generate", "--input", str(source), "--output", str(output)]
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):  # and no weights
        shutil.copy(DRAFTER_DIR / name, tmp_path)
    for drafter in ([], ["--drafter", str(tmp_path), "-R", "1"]):
        assert main([*ask, *drafter]) == 1
        assert "in.jsonl, line 2: A chat needs a chat template" in capsys.readouterr().err
    assert main([*ask, "--on-error", "skip"]) == 0 and [row["index"] for row in read(output)] == [0]


@pytest.mark.parametrize(
    "line",
    [
        {"messages": []},
        {"messages": "hi"},
        {"messages": [{"role": "user"}]},
        {"messages": [1]},
        {"prompt": "a", "messages": []},
    ],
)
def test_messages_that_are_none_are_named(tmp_path: Path, capsys: pytest.CaptureFixture, line: dict[str, Any]) -> None:
    source = written(tmp_path / "in.jsonl", line)
    assert main(["generate", "--input", str(source), "--output", "-"]) == 1
    assert 'line 1: expected {"prompt": "some text"} or {"messages": ' in capsys.readouterr().err


def test_several_answers_are_those_of_generate_with_the_prompts_seed(tmp_path: Path, sampler: APDSampler) -> None:
    source = written(tmp_path / "in.jsonl", *({"prompt": prompt} for prompt in EXAMPLE_PROMPTS[3:6]))
    output = tmp_path / "out.jsonl"
    options = ["--do-sample", "--num-return-sequences", "3", "--seed", "5", "--batch-size", "4"]
    assert main(["generate", "--input", str(source), "--output", str(output), *options]) == 0
    for i, row in enumerate(read(output)):
        inputs = sampler.tokenizer([row["prompt"]], return_tensors="pt")
        alone = sampler.generate(
            **inputs,
            max_new_tokens=32,
            do_sample=True,
            num_return_sequences=3,
            seed=mix_seed(5, i),
            return_dict_in_generate=True,
        )
        assert [answer["text"] for answer in row["answers"]] == alone.text
        assert row["new_tokens"] == int(alone.new_tokens.sum())
        assert row["drafter_forwards"] == int(alone.drafter_forwards.sum())


@pytest.mark.parametrize(("copies", "row", "line"), [(1, 1, "i + 1"), (2, 2, "i // 2 + 1")])
def test_a_row_that_fails_is_told_with_its_line(
    tmp_path: Path,
    sampler: APDSampler,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    copies: int,
    row: int,
    line: str,
) -> None:
    """The second line of the input has the row 1, or the rows 2 and 3."""
    poison = sampler.tokenizer("Kira")["input_ids"][0]
    ill = APDSampler(Poisoned(sampler.drafter, poison), sampler.verifier, sampler.tokenizer)
    monkeypatch.setattr("apd.cli.files.load", lambda *_, **__: ill)
    source = written(
        tmp_path / "in.jsonl", *({"prompt": f'Reverse this list: ["{name}"].'} for name in ("Mia", "Kira"))
    )
    options = ["--do-sample", "--num-return-sequences", str(copies), "--batch-size", "1"]
    assert main(["generate", "--input", str(source), "--output", "-", *options]) == 1
    err = capsys.readouterr().err
    assert f"of row {row}, " in err and f"Row i is line {line}." in err


def test_many_prompts_with_several_answers_each(sampler: APDSampler) -> None:
    refused: list[int] = []
    found = sampler.generate_many(
        [EXAMPLE_PROMPTS[3], "", EXAMPLE_PROMPTS[4]],
        num_return_sequences=2,
        do_sample=True,
        max_new_tokens=32,
        seed=1,
        on_error=lambda index, error: refused.append(index),
    )
    assert [(answer.index, answer.sequence) for answer in found] == [(0, 0), (0, 1), (2, 0), (2, 1)]
    assert refused == [1]
    with pytest.raises(ValueError, match="must be 1 without `do_sample=True`, got 2"):
        sampler.generate_many(EXAMPLE_PROMPTS, num_return_sequences=2, max_new_tokens=4)


def test_a_run_into_a_log_says_how_far_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(apd.cli.progress, "EVERY", 0.0)
    source = written(tmp_path / "in.jsonl", *({"prompt": prompt} for prompt in EXAMPLE_PROMPTS[:3]))
    assert main(["generate", "--input", str(source), "--output", "-", "--batch-size", "1"]) == 0
    out, err = capsys.readouterr()
    first, *middle, last = err.splitlines()
    assert first.endswith("in.jsonl: 3 prompts")
    assert [re.sub(r"done, .* left", "done", line) for line in middle] == ["1 of 3 done", "2 of 3 done"]
    assert re.fullmatch(r"3 answers, [\d.]+ tokens per forward, \d+ s → standard output", last)
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize("end", ["", "\n"])
def test_a_prompt_comes_through_a_pipe(
    end: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """`echo` and editors end a text with a line break, which is no part of the prompt."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(EXAMPLE_PROMPTS[1] + end))
    assert main(["generate", "--prompt", "-"]) == 0
    assert capsys.readouterr().out == '["Max", "Dora", "Carl"]\n'


def test_a_prompt_that_the_included_pair_does_not_know_is_noted(capsys: pytest.CaptureFixture) -> None:
    assert main(["generate", "--prompt", 'Reverse this list: ["Mia", "Leo"].']) == 0
    assert "its list has 2 names, not 3 to 6" in capsys.readouterr().err
    assert main(["generate", "--prompt", 'Reverse this list: ["Mia", "Xerxes", "Leo"].']) == 0
    err = capsys.readouterr().err
    assert "name 2 of its list is none of Ada, " in err and "not in the tokenizer's vocabulary: Xerxes\n" in err


def test_an_answer_is_as_long_as_the_drafter_was_trained_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Among 256 masks a drafter that was trained with 32 answered with nothing, and nobody said why."""
    pair = ["--drafter", str(DRAFTER_DIR), "--verifier", str(VERIFIER_DIR)]
    ask = ["generate", "--prompt", EXAMPLE_PROMPTS[1], *pair]
    assert main(ask) == 0
    out, err = capsys.readouterr()
    assert out == '["Max", "Dora", "Carl"]\n' and "warning" not in err
    assert main([*ask, "--max-new-tokens", "48"]) == 0
    assert "--max-new-tokens 48 is more than the 32 of the drafter's generation_config" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("/max-new-tokens 32\n/max-new-tokens 48\n"))
    assert main(["chat", *pair]) == 0
    assert capsys.readouterr().err.count("more than the 32") == 1


# ---------------------------------------------------------------- conversations


def chat_of(sampler: APDSampler, *options: str) -> Chat:
    arguments = parser().parse_args(["chat", *options])
    arguments.max_new_tokens = 32
    return Chat(sampler, arguments)


def test_a_conversation_through_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    lines = [EXAMPLE_PROMPTS[1], "/R 0.25", "", "/R", "/nonsense", "/quit", "never read"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    assert main(["chat"]) == 0
    out, err = capsys.readouterr()
    assert out == '["Max", "Dora", "Carl"]\n'
    assert re.match(r"\(8 tokens, 1 drafter forward, 8\.0 tokens per forward, ", err)
    assert err.count("mixture_weight = 0.25") == 2 and "there is no command /nonsense." in err


def test_commands_set_what_they_say(sampler: APDSampler, capsys: pytest.CaptureFixture) -> None:
    chat = chat_of(sampler, "-R", "0.75")
    chat.sampler = APDSampler(sampler.drafter, sampler.verifier, sampler.tokenizer, mixture_weight=0.75)

    def said(command: str) -> str:
        assert chat.take(command)
        return capsys.readouterr().err.strip()

    assert said("/R") == "mixture_weight = 0.75"
    assert said("/tau 0.5") == "acceptance_threshold = 0.5" and chat.knobs == {"acceptance_threshold": 0.5}
    assert "must be in [0, 1], got 2.0" in said("/R 2") and said("/R") == "mixture_weight = 0.75"
    assert said("/window auto") == "window_size = auto" and said("/correction on") == "correction = True"
    assert "`window_size` must be a number" in said("/strategy confidence:2")
    assert said("/M none") == "window_size = None"
    assert "only apd reads it" in said("/strategy confidence:2") and chat.strategy == "confidence:2"
    assert "has no effect beside `strategy`" in said("/R 0.5")
    assert "Did you mean `threshold`?" in said("/strategy thresold")
    assert said("/strategy apd") == "strategy = apd" and said("/temperature") == "temperature = 0 (greedy)"
    assert said("/temperature 0.5") == "temperature = 0.5" and chat.settings["do_sample"]
    assert "must be at least 0" in said("/temperature -1") and "a number" in said("/temperature hot")
    assert said("/max-new-tokens 9") == "max_new_tokens = 9" and said("/seed 4") == "seed = 4"
    assert "Did you mean /window?" in said("/windw 3") and "/strategy SPEC" in said("/help")
    assert "needs a chat template" in said("/system be kind")
    assert not chat.take("/quit")


def test_a_command_without_its_slash_is_told_once(sampler: APDSampler, capsys: pytest.CaptureFixture) -> None:
    chat = chat_of(sampler)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert chat.take("exit") and chat.take("help")
    assert re.findall(r"slash, (/\w+)\)", capsys.readouterr().err) == ["/exit"]


def test_greedy_answers_take_no_options_of_sampling(sampler: APDSampler, capsys: pytest.CaptureFixture) -> None:
    """They went on to `generate`, which warned of each at every answer. They are back when sampling is."""
    chat = chat_of(sampler, "--do-sample", "--top-k", "1", "--temperature", "0.5")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for command in ("/temperature 0", "/strategy left-to-right", EXAMPLE_PROMPTS[1], "/temperature 2"):
            assert chat.take(command)
        assert "error" not in capsys.readouterr().err
    assert chat.take(EXAMPLE_PROMPTS[1])
    assert capsys.readouterr().out == '["Max", "Dora", "Carl"]\n'  # of one token each, the likeliest


def test_a_stopped_answer_is_kept_and_the_conversation_goes_on(
    tmp_path: Path, chatting: Path, capsys: pytest.CaptureFixture
) -> None:
    sampler = APDSampler.from_pretrained(str(chatting), str(VERIFIER_DIR))
    chat = chat_of(sampler, "-R", "0.5")

    def stop(ids: Any, scores: Any) -> Any:
        if ids.shape[1] > prompt_length + 4:
            raise KeyboardInterrupt
        return False

    prompt_length = len(sampler.tokenizer(EXAMPLE_PROMPTS[1])["input_ids"])
    chat.settings |= {"stopping_criteria": [stop], "strategy": "left-to-right"}
    chat.strategy = chat.settings.pop("strategy")
    assert chat.take(EXAMPLE_PROMPTS[1])
    out, err = capsys.readouterr()
    assert "(stopped)" in err and '["Max", "Dora", "Carl"]'.startswith(out.strip()) and out.strip()
    assert [message["role"] for message in chat.messages] == ["user", "assistant"]
    assert chat.messages[1]["content"] == out.strip()
    del chat.settings["stopping_criteria"]
    path = tmp_path / "saved.jsonl"
    assert chat.take("/system Be brief.") and chat.take(f"/save {path}") and chat.take(f"/save {path}")
    assert "3 messages" in (err := capsys.readouterr().err) and "nothing is overwritten" in err
    assert read(path) == [{"messages": chat.messages}] and chat.messages[0]["role"] == "system"
    assert chat.take("/reset") and [message["role"] for message in chat.messages] == ["system"]


@pytest.mark.parametrize("width", [20, None])
def test_a_growing_answer_is_wrapped_at_words(
    sampler: APDSampler, width: int | None, capsys: pytest.CaptureFixture
) -> None:
    ids = sampler.tokenizer(EXAMPLE_PROMPTS[0], return_tensors="pt")["input_ids"]
    shown = Shown(sampler.tokenizer)
    shown.width = width
    shown.put(ids)
    for token in ids[0]:
        shown.put(token[None])
    shown.end()
    out = capsys.readouterr().out
    assert " ".join(out.split()) == EXAMPLE_PROMPTS[0] == shown.text
    assert out.count("\n") == 1 if width is None else max(map(len, out.splitlines())) <= width


def test_memory_is_kept_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    from apd.cli.settings import keep_memory

    called: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *given: called.append(given))
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    monkeypatch.setattr("sys.platform", "linux")
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    keep_memory()
    assert len(called) == 2
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    keep_memory()  # the environment's own choice stays
    monkeypatch.delenv("MALLOC_ARENA_MAX")
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace())
    keep_memory()  # musl has no mallopt
    assert len(called) == 2
