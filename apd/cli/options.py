"""Declares the options of the commands, and the knobs."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from apd.cli.parsing import flag
from apd.cli.usage import STANDARD
from apd.config import KNOBS, APDConfig, Form

_DESCRIPTION = """\
Answer one prompt, or every line of a file.

The included pair knows ten list tasks over 3 to 6 of 44 first names, and sums told as stories, in the
wordings of `apd.EXAMPLE_PROMPTS`; to anything else its answer is noise.

--input holds one {"prompt": "..."} or {"messages": [...]} per line; messages go through the chat
template. --output gets one line per prompt, in the order of the input: index (of the input's
line, from 0), all fields of the input's line, text, new_tokens, drafter_forwards,
verifier_forwards, canvases, tokens_per_forward, finish ("stop" or "length"), and run, a
fingerprint of the settings. Until the end, answers are in OUTPUT.part-*; after an interruption
the same command continues. As a file, - is standard input or output; answers go there in order,
and nothing is continued. Started by `accelerate launch` or `torchrun`, every process decodes its
share. With --do-sample, prompt i has the seed mix(SEED, i): its answer depends neither on its
batch nor on the number of processes nor on interruptions."""


_ABOUT_CHECK = """\
Check a checkpoint before it is used: is what is used what its files and its
family say? Is known text likely in this reading of the weights, and less likely
in others (logit shift, mask token, attention)? Do rows, batches and caches
agree? Prints a table; the exit code is 1 if there is a problem. Nothing is
written. Send us the table with a report."""

_INFILL = """\
Fill the holes of one text, or of every line of a file; both sides are read.

A hole is written <mask:8>, 8 tokens long, or <mask:4-12>: every length is
decoded, and the best taken. --input holds one {"text": "..."} with such holes
per line, or {"parts": [...]}, a list of strings, numbers of masks and
{"range": [4, 12]}. --output gets one line each, in the order of the input:
index (of the input's line, from 0), given (the parts as they were), text,
parts, holes (start, ids, text, logprob), score (mean log-probability of a
token), new_tokens, drafter_forwards, verifier_forwards and run, a fingerprint
of the settings. A run is continued, shared among processes and seeded as that
of `apd generate`."""


_SERVE = """\
Serve the pair over HTTP as OpenAI's API: chat completions and completions, whole
or streamed. Without --drafter, the included pair. Requests are decoded together,
and each answer is what it would be alone. --do-sample, --temperature and the like
are for requests that name no temperature. SIGTERM lets running requests end.
docs/serve.md has the routes and the fields."""


def add_generate(commands: Any, formatter: type[argparse.HelpFormatter]) -> argparse.ArgumentParser:
    """Add the command `generate` and return its parser."""
    generate: argparse.ArgumentParser = commands.add_parser(
        "generate",
        usage="apd generate (--prompt TEXT | --input FILE --output FILE) [options]",
        bare="--prompt",
        help="answer a prompt, or a file of prompts",
        description=_DESCRIPTION,
        formatter_class=formatter,
    )
    what = generate.add_argument_group("prompts")
    source = what.add_mutually_exclusive_group()
    source.add_argument(
        "--prompt",
        metavar="TEXT",
        help="one prompt, or - for standard input, without a last line break; the answer goes to standard output",
    )
    source.add_argument("--input", type=_file, metavar="FILE", help="JSONL file of prompts, or -; needs --output")
    _add_files(what)
    what.add_argument("--chat", action="store_true", help="put each prompt through the tokenizer's chat template")
    what.add_argument("--show-steps", action="store_true", help="with --prompt: mark the tokens by committing step")
    add_colour(what)

    add_models(generate)
    add_knobs(generate)
    told = (
        "limit per prompt (default: as the drafter's generation_config.json says, 32 of the included pair; else 256)"
    )
    add_sampling(generate, new_tokens=None, told=told, returns_several=True)
    return generate


def add_infill(commands: Any, formatter: type[argparse.HelpFormatter]) -> argparse.ArgumentParser:
    """Add the command `infill` and return its parser."""
    infill: argparse.ArgumentParser = commands.add_parser(
        "infill",
        usage="apd infill (--text TEXT | --input FILE --output FILE) [options]",
        bare="--text",
        help="fill the holes of a text, or of a file of texts",
        description=_INFILL,
        formatter_class=formatter,
    )
    what = infill.add_argument_group("texts")
    source = what.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="TEXT", help="one text with holes such as <mask:8> or <mask:4-12>")
    source.add_argument("--input", type=_file, metavar="FILE", help="JSONL file of texts, or -; needs --output")
    _add_files(what)
    add_models(infill)
    add_knobs(infill)
    add_sampling(infill, new_tokens=0, told="tokens to append behind the text (default 0)")
    infill.set_defaults(prompt=None, chat=False, show_steps=False)
    return infill


def add_serve(commands: Any, formatter: type[argparse.HelpFormatter]) -> argparse.ArgumentParser:
    """Add the command `serve` and return its parser."""
    serve: argparse.ArgumentParser = commands.add_parser(
        "serve",
        usage="apd serve [--drafter PATH --verifier PATH] [options]",
        help="serve an OpenAI-compatible API",
        description=_SERVE,
        formatter_class=formatter,
    )
    where = serve.add_argument_group("server")
    where.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1: this machine only)"
    )
    where.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0 takes a free one (default 8000)")
    where.add_argument(
        "--served-model-name", metavar="NAME", help="what clients call the model (default: the drafter's name)"
    )
    where.add_argument(
        "--max-batch-size", type=int, default=8, metavar="N", help="answers decoded together (default 8)"
    )
    where.add_argument(
        "--max-queue", type=int, default=64, metavar="N", help="answers that may wait; then 429 (default 64)"
    )
    where.add_argument(
        "--max-length", type=int, metavar="N", help="most tokens of prompt and answer (default: what the models allow)"
    )
    where.add_argument(
        "--request-timeout", type=float, metavar="SECONDS", help="longest time of a request (default: no limit)"
    )
    where.add_argument(
        "--drain-timeout",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="after SIGTERM, time for what is running (default 30)",
    )
    where.add_argument("--max-body", type=int, default=2**20, metavar="BYTES", help="largest request (default 1 MiB)")
    where.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="environment variable with the key that clients must send (default: no key)",
    )
    where.add_argument(
        "--cors-origin",
        action="append",
        metavar="URL",
        help="let pages of this origin call; may be given several times",
    )
    where.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template in place of the tokenizer's, or for one without",
    )
    where.add_argument(
        "--fixed-decoding", action="store_true", help="refuse requests that name a strategy or a knob of their own"
    )
    add_models(serve)
    add_knobs(serve)
    add_sampling(
        serve,
        new_tokens=None,
        told="limit of requests that name none (default: as the drafter's generation_config.json says, 32 of the included pair; else 256)",
    )
    serve.set_defaults(prompt=None, input=None, output=None, show_steps=False, batch_size=None)
    return serve


def _add_files(what: argparse._ArgumentGroup) -> None:
    what.add_argument(
        "--output", type=_file, metavar="FILE", help="JSONL file for the results, or -; a file is continued"
    )
    what.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts decoded together (default 8)")
    what.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="at a prompt that cannot be read or decoded: end the run (default), or report it and go on",
    )


def add_models(parser: argparse.ArgumentParser) -> None:
    """Add the options that name and load models."""
    models = parser.add_argument_group(
        "models", "directories or hub names; without --drafter, the included pair, which knows list tasks and sums"
    )
    models.add_argument(
        "--drafter",
        metavar="PATH",
        help="masked-diffusion LM (Dream, LLaDA, SDAR, ...) or masked LM (ModernBERT, ESM-2, ...)",
    )
    models.add_argument(
        "--verifier",
        metavar="PATH",
        help="small causal LM of the same vocabulary, or of any with --strategy checked; 'self': the drafter's own weights, "
        "read causally; not needed at R = 1",
    )
    _add_loading(models)
    models.add_argument(
        "--quantization",
        choices=["8bit", "4bit"],
        help="quantise the drafter while it is loaded; needs the package bitsandbytes",
    )
    models.add_argument("--compile", action="store_true", help="compile the passes of both models; for GPUs")


def add_sampling(
    parser: argparse.ArgumentParser, *, new_tokens: int | None, told: str, returns_several: bool = False
) -> None:
    """Add the options of sampling and stopping.

    Args:
        new_tokens: default of `--max-new-tokens`.
        told: its help.
        returns_several: whether `--num-return-sequences` is one of them.
    """
    parser.set_defaults(num_return_sequences=1)
    sampling = parser.add_argument_group("sampling", "greedy unless --do-sample is given")
    sampling.add_argument("--max-new-tokens", type=int, metavar="N", default=new_tokens, help=told)
    if returns_several:
        sampling.add_argument(
            "--num-return-sequences",
            type=int,
            default=1,
            metavar="N",
            help="answers per prompt, with --do-sample (default 1); in a file they are the list `answers` of its line",
        )
    sampling.add_argument("--do-sample", action="store_true", help="sample instead of taking the likeliest tokens")
    sampling.add_argument("--temperature", type=float, metavar="T", help="lower is closer to greedy (default 1)")
    sampling.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest; 0 keeps all (default 50)")
    sampling.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest up to this mass (default 1)")
    sampling.add_argument("--min-p", type=float, metavar="P", help="drop what is below P times the likeliest")
    sampling.add_argument("--seed", type=int, default=0, help="same seed, same answers (default 0)")
    sampling.add_argument(
        "--stop-string",
        action="append",
        metavar="TEXT",
        help="end an answer with this text, which is kept; may be given several times",
    )
    sampling.add_argument(
        "--strategy",
        type=_strategy,
        metavar="SPEC",
        help="decode in another way, such as checked, left-to-right, confidence:2, threshold:0.9 or "
        "blocks:8/confidence:2; 'list' shows all",
    )


def add_check(commands: Any, formatter: type[argparse.HelpFormatter]) -> argparse.ArgumentParser:
    """Add the command `check` and return its parser."""
    check: argparse.ArgumentParser = commands.add_parser(
        "check",
        usage="apd check [--drafter PATH [--verifier PATH]] [options]",
        help="check that a checkpoint is read as it was trained",
        description=_ABOUT_CHECK,
        formatter_class=formatter,
    )
    check.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="try the weights on this plain text, best 500 tokens or more, or, if it ends in .jsonl, on its lines "
        '{"prompt": ..., "answer": ...} (default: ten built-in prompts in English)',
    )
    models = check.add_argument_group(
        "models", "directories or hub names; without --drafter, the included pair, which knows list tasks and sums"
    )
    models.add_argument("--drafter", metavar="PATH", help="masked-diffusion LM (Dream, LLaDA, SDAR, WeDLM, ...)")
    models.add_argument(
        "--verifier", metavar="PATH", help="causal LM; 'self': the drafter's own weights, read causally"
    )
    _add_loading(models)
    return check


def _add_loading(models: argparse._ArgumentGroup) -> None:
    """Add the options `LOADING`."""
    models.add_argument(
        "--spec", metavar="NAME", help="family of the drafter (default: the one that config.json names)"
    )
    models.add_argument(
        "--mask-token-id",
        type=int,
        metavar="N",
        help="id of the drafter's mask token (default: as config.json, tokenizer or family say)",
    )
    models.add_argument(
        "--block-size",
        type=int,
        metavar="N",
        help="tokens that the drafter drafts at once (default: as its config.json or family says)",
    )
    models.add_argument("--dtype", help="float32, bfloat16, ... (default: float32 on a CPU)")
    models.add_argument(
        "--device-map", metavar="DEVICE", help="cpu, cuda, auto, ... (default: each process's own GPU, else cpu)"
    )
    models.add_argument(
        "--attn-implementation",
        metavar="NAME",
        help="sdpa, eager or grouped_sdpa (default: grouped_sdpa where heads share keys)",
    )
    models.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the drafter on the hub")
    models.add_argument("--verifier-revision", metavar="NAME", help="branch, tag or commit of the verifier on the hub")


def add_colour(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--color`."""
    parser.add_argument(
        "--color",
        choices=["auto", "always", "never"],
        default="auto",
        help="colours; auto (default): if a terminal has them",
    )


def add_knobs(parser: argparse.ArgumentParser) -> None:
    """Add an option per field of `APDConfig`; omitted options keep the library's defaults."""
    group = parser.add_argument_group("knobs", "how a step decides what to commit; 'none' means no limit")
    for name, knob in KNOBS.items():
        default = getattr(APDConfig(), name)
        shown = {"None": "none", "False": "off", "0.0": "0"}.get(str(default), default)
        options: dict[str, Any] = {"default": argparse.SUPPRESS, "help": f"{knob.help} (default {shown})"}
        if knob.form is not None:
            metavar = knob.letter if knob.letter.isascii() else knob.spec.upper()
            options |= {"type": partial(_read, knob.form), "metavar": metavar}
        elif knob.choices:
            options["choices"] = knob.choices
        else:
            options["action"] = argparse.BooleanOptionalAction
        letters = [f"-{knob.letter}"] if knob.letter and knob.letter.isascii() else []
        group.add_argument(*letters, flag(name), **options)


def _read(form: Form, text: str) -> Any:
    try:
        return form.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _file(text: str) -> Path | str:
    return text if text == STANDARD else Path(text)


def _strategy(text: str) -> str:
    """The canonical short name of a strategy: equal strategies have equal names."""
    from apd.strategies.registry import GRAMMAR, parse

    if text == "list":
        print(GRAMMAR)
        raise SystemExit(0)
    try:
        return parse(text).spec
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
