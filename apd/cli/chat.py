"""`apd chat`: a conversation that streams, in a terminal or through a pipe."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from apd.cli.answers import load, note_unknown_words, sampling
from apd.cli.checkpoints import check_places, settle_new_tokens, too_many
from apd.cli.generate import processes_of
from apd.cli.report import say
from apd.cli.settings import set_up
from apd.cli.stream import Shown
from apd.cli.usage import SAMPLING, UsageError, check_usage, config_of
from apd.config import KNOBS, NUMBER, WHOLE_NUMBER, APDConfig
from apd.decoding.noise import mix_seed
from apd.generation.elsewhere import LETTERS
from apd.generation.many import encode
from apd.included.tasks import EXAMPLE_PROMPTS
from apd.sampler import APDSampler
from apd.show.rows import number
from apd.strategies.registry import OF_APD, settle

_HELP = """\
/R 0.5          a knob, by letter or name: /tau 0.7, /window 32, /W none, /correction on
/strategy SPEC  another way to decode, such as confidence:2; apd goes back
/temperature T  sample; 0 is greedy
/max-new-tokens N, /seed N
/system TEXT    set the system message; needs a chat template
/reset          forget the conversation, keep the system message and the settings
/save FILE      write the conversation for `apd generate --input`: a line of messages; without a chat template a line per prompt
/quit           end; so does Ctrl-D. Ctrl-C stops an answer and keeps the conversation
Without a value, a command says what is set."""
_ENDS = ("quit", "exit", "q")


def run(arguments: argparse.Namespace) -> None:
    """Run the command with parsed arguments.

    Raises:
        UsageError: the options cannot be used together, or one is out of range.
    """
    config = config_of(arguments)
    check_usage(arguments)
    with processes_of(arguments) as processes:
        if processes.num_processes > 1:
            raise UsageError(f"`apd chat` takes one process, got {processes.num_processes}.")
        check_places(arguments)
        set_up(included=arguments.drafter is None)
        settle_new_tokens(arguments)
        sampler = load(arguments, config, chats=arguments.system is not None)
        chat = Chat(sampler, arguments)
        is_terminal = sys.stdin.isatty()
        if is_terminal:
            chat.greet()
        for line in lines(is_terminal):
            if not chat.take(line):
                break


def lines(is_terminal: bool) -> Iterator[str]:
    """What is typed, or comes through a pipe; a line that ends in a backslash goes on in the next one."""
    if is_terminal:
        import readline  # noqa: F401 (editing and history)
    held = ""
    while True:
        try:
            line = input(("... " if held else "> ") if is_terminal else "")
        except EOFError:
            if held:
                yield held
            if is_terminal:
                say("")
            return
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            say("\n(/quit or Ctrl-D ends)")
            held = ""
            continue
        if line.endswith("\\"):
            held += line[:-1] + "\n"
            continue
        if (held + line).strip():
            yield held + line
        held = ""


class Chat:
    """A conversation and its settings.

    Args:
        sampler: the pair.
        arguments: the command's options.

    Attributes:
        strategy, knobs, settings: what the commands have set; knobs that are not among them are the sampler's.
        messages: the conversation so far; without a chat template it is not shown to the models.
    """

    def __init__(self, sampler: APDSampler, arguments: argparse.Namespace) -> None:
        self.sampler, self.arguments = sampler, arguments
        self.knobs: dict[str, Any] = {}
        self.has_template = bool(getattr(sampler.tokenizer, "chat_template", None))
        self.strategy: str | None = arguments.strategy
        self.settings: dict[str, Any] = {"max_new_tokens": arguments.max_new_tokens, **sampling(arguments)}
        self.seed, self.num_answers = arguments.seed, 0
        self.messages: list[dict[str, str]] = []
        self.is_told = False  # that commands begin with a slash
        if arguments.system is not None:
            self.messages.append({"role": "system", "content": arguments.system})
        self.commands: dict[str, Callable[[str], None]] = {
            "strategy": self._strategy,
            "temperature": self._temperature,
            "max-new-tokens": self._max_new_tokens,
            "seed": self._seed,
            "system": self._system,
            "reset": self._reset,
            "save": self._save,
            "help": lambda _: say(_HELP),
        }

    def greet(self) -> None:
        """Say what a line means here."""
        if self.has_template:
            say("A conversation. /help lists the commands, Ctrl-D ends.")
        else:
            say("Every line is a prompt of its own: there is no chat template. /help lists the commands, Ctrl-D ends.")
        if self.arguments.drafter is None:
            say(f"The included pair knows ten list tasks and sums told as stories. For example: {EXAMPLE_PROMPTS[1]}")

    def take(self, line: str) -> bool:
        """Obey a command or answer a message; a mistake is one sentence. Returns whether to go on."""
        try:
            if not line.startswith("/"):
                if not self.is_told and line.strip() in (*self.commands, *_ENDS):
                    self.is_told = True
                    say(f"(taken as a prompt: commands begin with a slash, /{line.strip()})")
                self.answer(line)
                return True
            name, _, value = line[1:].strip().partition(" ")
            if name in _ENDS:
                return False
            self._obey(name, value.strip())
        except (ValueError, TypeError, OSError, RuntimeError, ArithmeticError) as error:
            say(f"apd: error: {' '.join(str(error).split())}")
        return True

    # ---------------------------------------------------------------- answers

    def answer(self, message: str) -> None:
        """Decode an answer and show it as it grows; when it is stopped, the part that there is counts."""
        asked = {"role": "user", "content": message}
        prompt: Any = [*self.messages, asked] if self.has_template else message
        ids = encode(prompt, self.sampler.tokenizer)
        note_unknown_words(message, self.sampler.tokenizer)
        shown = Shown(self.sampler.tokenizer, self.arguments.color if self.arguments.show_steps else None)
        start, output = time.perf_counter(), None
        options: dict[str, Any] = {"return_dict_in_generate": True, "streamer": shown, **self._settings, **self.knobs}
        seed = mix_seed(self.seed, self.num_answers)
        try:
            output = self.sampler.generate(ids, seed=seed, strategy=self.strategy or "apd", **options)
        except KeyboardInterrupt:
            shown.end()
            say("(stopped)")
        seconds = time.perf_counter() - start
        self.num_answers += 1
        self.messages += [asked, {"role": "assistant", "content": shown.text.strip()}]
        if output is not None:
            say(
                f"({number(int(output.new_tokens[0]), 'token')}, {number(int(output.drafter_forwards[0]), 'drafter forward')}, "
                f"{float(output.tokens_per_forward[0]):.1f} tokens per forward, {seconds:.1f} s)"
            )

    # ---------------------------------------------------------------- commands

    def _obey(self, name: str, value: str) -> None:
        command = name.replace("_", "-")
        knob = LETTERS.get(name, name.replace("-", "_"))
        if command in self.commands:
            self.commands[command](value)
        elif knob in KNOBS:
            self._knob(knob, value)
        else:
            known = [*self.commands, *(each for each in LETTERS if each.isascii()), *KNOBS, "quit"]
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean /{nearest[0]}?" if nearest else "/help lists the commands."
            raise ValueError(f"there is no command /{name}. {hint}")

    def _knob(self, name: str, text: str) -> None:
        if text:
            knob = KNOBS[name]
            value: Any = text
            if knob.form is not None:
                try:
                    value = knob.form.read(text)
                except ValueError as error:
                    raise ValueError(f"`{name}` {error}.") from None
            elif not knob.choices:
                value = {"on": True, "true": True, "off": False, "false": False}.get(text.lower(), text)
            self._settle(self.strategy, self.knobs | {name: value})
        say(f"{name} = {getattr(self._config(), name)}")

    def _strategy(self, spec: str) -> None:
        if spec:
            chosen = None if spec == "apd" else spec
            idle = self.knobs.keys() & OF_APD if chosen and not chosen.startswith("apd") else set()
            self._settle(chosen, {name: value for name, value in self.knobs.items() if name not in idle})
            if idle:
                say(f"{', '.join(sorted(idle))}: forgotten, only apd reads it")
        say(f"strategy = {self.strategy or 'apd'}")

    def _settle(self, strategy: str | None, knobs: dict[str, Any]) -> None:
        """Take strategy and knobs over, if they can be used together and with these models."""
        self.sampler.generate_many([], strategy=strategy or "apd", **self._settings, **knobs)  # checks them
        self.strategy, self.knobs = strategy, knobs

    @property
    def _settings(self) -> dict[str, Any]:
        """The settings that have an effect: greedy answers take no options of sampling."""
        idle = () if self.settings["do_sample"] else SAMPLING
        return {name: value for name, value in self.settings.items() if name not in idle}

    def _config(self) -> APDConfig:
        return settle(self.strategy, self.sampler.config, self.knobs)[1]

    def _temperature(self, text: str) -> None:
        if text:
            value = _read(NUMBER, "temperature", text, least=0)
            self.settings["do_sample"] = value > 0
            if value > 0:
                self.settings["temperature"] = value
        said = self.settings.get("temperature", 1.0) if self.settings["do_sample"] else 0
        say(f"temperature = {said:g}{' (greedy)' * (not said)}")

    def _max_new_tokens(self, text: str) -> None:
        if text:
            self.settings["max_new_tokens"] = _read(WHOLE_NUMBER, "max_new_tokens", text, least=1)
            stored = getattr(self.sampler.drafter, "generation_config", None)
            if told := too_many(self.settings["max_new_tokens"], getattr(stored, "max_new_tokens", None)):
                say(told)
        say(f"max_new_tokens = {self.settings['max_new_tokens']}")

    def _seed(self, text: str) -> None:
        if text:
            self.seed, self.num_answers = _read(WHOLE_NUMBER, "seed", text), 0
        say(f"seed = {self.seed}")

    def _system(self, text: str) -> None:
        if text and not self.has_template:
            raise ValueError("a system message needs a chat template, and this tokenizer has none.")
        rest = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages = [{"role": "system", "content": text}, *rest]
        said = [message["content"] for message in self.messages if message["role"] == "system"]
        say(f"system = {said[0]}" if said else "there is no system message")

    def _reset(self, _: str) -> None:
        self.messages = [message for message in self.messages if message["role"] == "system"]
        self.num_answers = 0
        say("the conversation begins anew")

    def _save(self, text: str) -> None:
        if not text:
            raise ValueError("/save needs a file, such as /save chat.jsonl.")
        if not any(message["role"] == "assistant" for message in self.messages):
            raise ValueError("there is nothing to save yet.")
        said = [message["content"] for message in self.messages]
        rows: list[dict[str, Any]] = [{"messages": self.messages}]
        if not self.has_template:  # then every line was a prompt of its own, and there is no system message
            rows = [{"prompt": asked, "answer": told} for asked, told in zip(said[::2], said[1::2], strict=True)]
        try:
            with Path(text).expanduser().open("x", encoding="utf-8") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except FileExistsError:
            raise ValueError(f"{text} exists, and nothing is overwritten. Choose another file.") from None
        what = number(len(said), "message") if self.has_template else number(len(rows), "prompt")
        say(f"{what} → {text}")


def _read(form: Any, name: str, text: str, *, least: float | None = None) -> Any:
    try:
        value = form.read(text)
    except ValueError as error:
        raise ValueError(f"`{name}` {error}.") from None
    if least is not None and not value >= least:
        raise ValueError(f"`{name}` must be at least {least}, got {text}.")
    return value
