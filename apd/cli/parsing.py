"""The parser of the command line: help that fits the terminal, and complaints that name the culprit and what was meant."""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import shlex
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from apd.cli.report import say
from apd.generation.elsewhere import CALL, LETTERS, LOADING

#: In a narrower terminal, what an option does stands below it.
_NARROW = 76
#: What arguments of other scripts become: "Write NAME=VALUE".
_WRITE = re.compile(r"Write (\w+)=(\{value\}|[^;,]*)")
#: Advice that helps in Python alone.
_PYTHON = re.compile(r"\w\(|\w=|first argument|second argument")
#: Arguments of other scripts whose counterpart on the command line is not that of `generate()` or `from_pretrained()`.
_HERE = {
    "Write --drafter {value}": "model model_path pretrained pretrained_model_name_or_path",
    "Write --verifier {value}": "verifier_model assistant_model draft_model",
    "Write --mask-token-id {value}": "mask_id mask_token",
    "Write --device-map {value}": "device",
    "Write --prompt {value}": "prompts text texts",
    "Write --text {value}": "prompt prompts texts",
    'Write --input FILE, with {"messages": [...]} in its lines': "messages",
    "Write --stop-string {value}": "stop until stop_words",
    "Write --quantization 8bit": "load_in_8bit",
    "Write --quantization 4bit": "load_in_4bit",
    "Write --show-steps": "output_history return_history",
    "Leave it out: `apd chat` shows answers as they grow": "stream tokens_hook generation_tokens_hook_func",
    "Leave it out: only in Python a `logits_processor` can be given": (
        "logits_hook logits_eos_inf generation_logits_hook_func"
    ),
    "Leave it out: it is read from the drafter's folder": "tokenizer",
    "Leave it out: rows end at their stop tokens": "early_termination early_stop",
}


class Help(argparse.HelpFormatter):
    """Help as wide as the terminal, wrapped at words; indented lines of a description are commands and stay lines."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog)
        self._max_help_position = 34 if self._width >= _NARROW else 8

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return reflowed(text, width, indent)

    def _format_usage(self, usage: str | None, *args: Any, **kwargs: Any) -> str:
        if usage is None:
            return super()._format_usage(usage, *args, **kwargs)
        return "\n".join(textwrap.wrap(f"usage: {usage}", self._width, subsequent_indent=" " * 7)) + "\n\n"


def reflowed(text: str, width: int, indent: str = "") -> str:
    """Paragraphs wrapped at words; lines that begin with a space stay lines, commands are broken before their options."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines: list[str] = []
        for line in paragraph.splitlines():
            if line.startswith(" ") or not lines or lines[-1].startswith(" ") or lines[-1].endswith(":"):
                lines.append(line)
            else:
                lines[-1] += f" {line}"
        paragraphs.append("\n".join(shown for line in lines for shown in _wrapped(line, width, indent)))
    return "\n\n".join(paragraphs)


def _wrapped(line: str, width: int, indent: str) -> list[str]:
    """The lines of a line; a command is broken before its options."""
    start = indent + line[: len(line) - len(line.lstrip())]
    text = line.strip()
    if not text.startswith(("apd ", "accelerate ", "torchrun ")):
        term = re.match(r"\S.*?\s{2,}(?=\S)", text)  # two columns
        hang = start + " " * (len(term[0]) if term and len(term[0]) < width // 2 else 0)
        return textwrap.wrap(text, width, initial_indent=start, subsequent_indent=hang, break_on_hyphens=False)
    lines = [start]
    for part in re.split(r" (?=--|\[|\()", text):
        if len(lines[-1]) + len(part) > width - 2 and lines[-1].strip():
            lines[-1] += " \\"
            lines.append(f"{start}    ")
        lines[-1] += f" {part}" if lines[-1].strip() else part
    return lines


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one sentence each, with what was probably meant.

    Args:
        bare: the option that a word without one probably belongs to; "" if there is none.
        **options: of `ArgumentParser`.
    """

    def __init__(self, *, bare: str = "", formatter_class: Any = Help, **options: Any) -> None:
        super().__init__(formatter_class=formatter_class, **options)
        self.bare = bare

    @property
    def commands(self) -> dict[str, argparse.ArgumentParser]:
        """The parsers of the commands, by name."""
        found = [action for action in self._actions if isinstance(action, argparse._SubParsersAction)]
        return dict(found[0].choices) if found else {}

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse, or complain of the first argument that is unknown; exit code 2."""
        given = list(sys.argv[1:] if args is None else args)
        self._check_command(given)
        arguments, unknown = self.parse_known_args(given, namespace)
        if unknown:
            self._refuse(unknown, given)
        return arguments

    def error(self, message: str) -> NoReturn:
        if valued := re.fullmatch(r"argument (\S+): ignored explicit argument (.*)", message, re.DOTALL):
            option = self._option_string_actions.get(valued[1].split("/")[0])
            message = _takes_none(option, ast.literal_eval(valued[2])) if option is not None else message
        say(f"{self.prog}: error: {message}")
        say(f"Try '{self.prog} --help'.")
        raise SystemExit(2)

    def _check_command(self, given: list[str]) -> None:
        word = given[0] if given else None
        if word is None:
            self.error(f"a command is missing: {', '.join(self.commands)}")
        if not word.startswith("-") and word not in self.commands:
            self.error(
                f"there is no command {word!r}.{_nearest(word, self.commands)} Commands: {', '.join(self.commands)}"
            )

    def _refuse(self, unknown: list[str], given: list[str]) -> NoReturn:
        culprit, parser = unknown[0], self.commands.get(given[0], self)
        of = parser if isinstance(parser, Parser) else self
        if not culprit.startswith("-") or culprit == "-":
            before = given[given.index(culprit) - 1] if culprit in given[1:] else ""
            action = of._option_string_actions.get(before)
            if action is not None and action.nargs == 0:
                of.error(_takes_none(action, culprit))
            hint = f" Write {of.bare} {shlex.quote(culprit)}." if of.bare else ""
            of.error(f"{culprit!r} stands alone, without an option before it.{hint}")
        name, _, value = culprit.partition("=")
        value = value or (unknown[1] if len(unknown) > 1 and not unknown[1].startswith("-") else "")
        of.error(f"there is no option {name}.{_meant(name, value, of._option_string_actions)}")


def _meant(option: str, value: str, options: Iterable[str]) -> str:
    """What an unknown option was probably meant to be, as a sentence behind a space; "" if nothing is near."""
    name, options = option.lstrip("-").replace("-", "_"), list(options)
    if name in LETTERS and flag(LETTERS[name]) in options:
        return f" Write {flag(LETTERS[name])} {value}".rstrip() + "."
    if found := {each.lower().replace("_", "-"): each for each in options}.get(option.lower().replace("_", "-")):
        return f" Did you mean {found}?"
    for becomes, names in _HERE.items():
        written = re.match(r"Write (--\S+)", becomes)
        if name in names.split() and (written is None or written[1] in options):
            return f" {becomes.replace('{value}', value)}".rstrip() + "."
    for table in (CALL, LOADING):
        if becomes := table.get(name, ""):
            write = _WRITE.match(becomes)
            if write and flag(write[1]) in options:
                meant = write[2].replace("'", "").replace("{value}", value)
                return f" Write {flag(write[1])} {meant}".rstrip() + "."
            becomes = re.sub(r"strategy='(.*?)'", r"--strategy \1", becomes)
            if not write and not _PYTHON.search(becomes):
                return f" {becomes}."
    return _nearest(option, options)


def _takes_none(action: argparse.Action, value: str) -> str:
    """Of an option without a value that was given one."""
    name, *others = (each for each in action.option_strings if each.startswith("--"))
    return f"{name} takes no value, got {value!r}. Write {' or '.join([name, *others])}."


def _nearest(word: str, known: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {nearest[0]}?" if nearest else ""


def flag(name: str) -> str:
    """The option of an argument: `kv_window` → `--kv-window`."""
    return "--" + name.replace("_", "-")
