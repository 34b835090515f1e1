"""The command `apd`: its parser, its exit codes, and how it reports errors."""

import argparse
import os
import shutil
import sys
import warnings
from collections.abc import Sequence

from apd import __version__
from apd.cli import estimate
from apd.cli.chat_options import add_chat
from apd.cli.options import add_check, add_colour, add_generate, add_infill, add_knobs, add_serve
from apd.cli.parsing import Help as _Help
from apd.cli.parsing import Parser, reflowed
from apd.cli.report import complain, show_warning
from apd.cli.usage import UsageError, config_of

# Commands are imported when they run, so that `apd --help` does not import torch.

_DESCRIPTION = """\
Adaptive Parallel Decoding for masked-diffusion language models (arXiv 2506.00413): a diffusion
model drafts many tokens at once, a small causal one decides how many are kept."""

_EXAMPLES = """\
examples:
  apd demo
      watch the included pair decode, beside one token per step; nothing is downloaded
  apd generate --prompt 'Shuffle this list: ["Ada", "Ben", "Carl"].' --show-steps
      one answer from the included pair, which knows ten list tasks over 3 to 6 of 44 first names, and sums told as stories; to anything else its answer is noise
  apd generate --drafter Dream-org/Dream-v0-Instruct-7B --verifier Qwen/Qwen2.5-0.5B \\
      --input prompts.jsonl --output answers.jsonl --chat --device-map cuda
      many prompts with checkpoints; run it again to continue where it was interrupted
  apd chat
      a conversation; with checkpoints, --drafter and --verifier as above
  apd check --drafter JetLM/SDAR-1.7B-Chat --verifier Qwen/Qwen3-0.6B --device-map cuda
      whether a checkpoint is read as it was trained, before anything else
  apd infill --text 'Reverse this list: ["Ada", "Ben"]. ["<mask:3>"]'
      fill the holes of a text
  apd serve --port 8000
      an OpenAI-compatible server on this machine; needs the extra serve
  accelerate launch --num-processes 8 -m apd generate --input prompts.jsonl ...
      many prompts over 8 GPUs

'apd COMMAND --help' lists every option."""

_LM_EVAL = """\
usage: apd lm-eval --model apd --model_args NAME=VALUE,... --tasks ... [options of lm-eval]

EleutherAI's evaluation harness, with `apd` among its models: accuracy, and tokens per forward beside it. Ours are --model apd and
what --model_args may hold, separated by commas:

  pair=included                 the included pair; or
  drafter=PATH, verifier=PATH   directories or hub names; verifier=self for the drafter's own weights
  strategy=SPEC                 another way to decode, such as confidence:2; ';' for the commas of a name
  mixture_weight=R, ...         every knob of `apd generate --help`, as NAME=VALUE with underscores
  batch_size, max_new_tokens, max_length, seed, dtype, device_map, revision, spec, mask_token_id, ...

For example:
  apd lm-eval --model apd --tasks gsm8k --model_args drafter=DRAFTER,verifier=VERIFIER,mixture_weight=0.7

docs/evaluation.md says what the numbers mean. Everything else is lm-eval's own command line:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (the run failed, or found a problem), 2 (wrong usage) or 130 (interrupted)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["lm-eval"]:  # the harness parses the rest
        arguments = argparse.Namespace(run=_lm_eval, rest=argv[1:])
    else:
        arguments = parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            code = arguments.run(arguments)
        sys.stdout.flush()
    except UsageError as error:
        return complain(error, 2)
    except BrokenPipeError:  # the reader has closed the pipe, as in `apd generate … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        return complain(error, 1)
    except KeyboardInterrupt as stop:
        is_continued = getattr(arguments, "output", None) not in (None, "-")
        done = f": {stop}" if str(stop) else ""
        return complain(f"interrupted{done}{'; the same command continues' * is_continued}", 130)
    return int(code or 0)


def parser() -> Parser:
    """The parser of all commands; each sets `run`, which takes the parsed arguments and may return an exit code."""
    top = Parser(prog="apd", usage="apd COMMAND ...", description=_DESCRIPTION, epilog=_EXAMPLES)
    top.add_argument("--version", action="version", version=f"apd {__version__}", help="show the version and exit")
    commands = top.add_subparsers(title="commands", metavar="COMMAND", prog="apd")

    demo = commands.add_parser(
        "demo",
        usage="apd demo [--no-animation] [knobs]",
        formatter_class=_Help,
        help="watch the included pair decode, beside one token per step",
        description="Decode a few prompts with the included pair, one token per step and adaptively in parallel.",
        epilog="Plain text goes to a pipe, to a terminal without colours and where NO_COLOR is set.",
    )
    demo.add_argument("--no-animation", action="store_true", help="show the answers at once, not step by step")
    add_colour(demo)
    add_knobs(demo)
    demo.set_defaults(run=_demo)

    add_generate(commands, _Help).set_defaults(run=_generate)
    add_check(commands, _Help).set_defaults(run=_check)
    add_infill(commands, _Help).set_defaults(run=_infill)
    add_serve(commands, _Help).set_defaults(run=_serve)
    add_chat(commands, _Help).set_defaults(run=_chat)
    estimate.add_estimate(commands, _Help).set_defaults(run=estimate.run)
    commands.add_parser("lm-eval", add_help=False, help="lm-eval's own command line with `apd` among its models")
    return top


def _demo(arguments: argparse.Namespace) -> None:
    config = config_of(arguments)
    from apd.cli import demo

    demo.run(config, colour=arguments.color, animate=not arguments.no_animation)


def _generate(arguments: argparse.Namespace) -> None:
    from apd.cli import generate

    generate.run(arguments)


def _chat(arguments: argparse.Namespace) -> None:
    from apd.cli import chat

    chat.run(arguments)


def _check(arguments: argparse.Namespace) -> int:
    from apd.cli import check

    return check.run(arguments)


def _infill(arguments: argparse.Namespace) -> None:
    from apd.cli import infill

    infill.run(arguments)


def _serve(arguments: argparse.Namespace) -> None:
    from apd.cli import serve

    serve.run(arguments)


def _lm_eval(arguments: argparse.Namespace) -> None:
    from apd.cli.settings import set_up

    if not arguments.rest or arguments.rest[0] in ("-h", "--help"):
        print(reflowed(_LM_EVAL, shutil.get_terminal_size().columns - 2))
    set_up(included=any(f"pair={name}" in each for name in ("included", "embedded") for each in arguments.rest))
    from apd.integrations.lm_eval import main

    main(arguments.rest)
