"""The command `apd`: a demo on the embedded pair, and generation from any supported pair."""

import argparse
import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apd import __version__
from apd.config import APDConfig

if TYPE_CHECKING:
    from apd import APDSampler
    from apd.jsonl import Prompt

# What only one command needs is imported where it is used.

_DESCRIPTION = """\
Adaptive Parallel Decoding for masked-diffusion language models (arXiv 2506.00413):
a diffusion model drafts many tokens at once, a small causal one decides how many are kept."""

_EXAMPLES = """\
examples:
  apd demo
      watch the embedded pair decode, beside one token per step; nothing is downloaded
  apd generate --prompt 'Shuffle this list: ["Ada", "Ben", "Carl"].' --show-steps
      one answer from the embedded pair
  apd generate --drafter Dream-org/Dream-v0-Instruct-7B --verifier Qwen/Qwen2.5-0.5B \\
      --input prompts.jsonl --output answers.jsonl --chat --device-map cuda
      many prompts with checkpoints; run it again to continue where it was interrupted

'apd COMMAND --help' lists every option."""

_GENERATE_DESCRIPTION = """\
Answer one prompt, or every line of a file.

--input holds one {"prompt": "..."} per line. --output gets one line per prompt:
index (of the input's line, from 0), prompt, text, new_tokens, drafter_forwards,
verifier_forwards, tokens_per_forward, finish ("stop" or "length"), and run, a fingerprint
of the settings. A batch is written as soon as it is done; after an interruption the same
command continues. With --do-sample, prompt i has the seed mix(SEED, i): its answer depends
neither on its batch nor on interruptions."""

_SAMPLING = {"temperature": (0, float("inf")), "top_k": (0, float("inf")), "top_p": (0, 1), "min_p": (0, 1)}
_LOADING = ("dtype", "device_map", "attn_implementation", "revision")


class UsageError(ValueError):
    """The command line cannot be meant as it stands: exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (the run failed), 2 (wrong usage) or 130 (interrupted)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
        sys.stdout.flush()
    except UsageError as error:
        return _complain(error, 2)
    except BrokenPipeError:  # the reader has seen enough, as in `apd demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, RuntimeError) as error:
        return _complain(error, 1)
    except KeyboardInterrupt:
        return _complain("interrupted; with --output, the same command continues", 130)
    return 0


def _complain(error: object, code: int) -> int:
    print(f"apd: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="apd",
        usage="apd COMMAND ...",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"apd {__version__}", help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        usage="apd demo [--no-animation] [knobs]",
        formatter_class=_Help,
        help="watch the embedded pair decode, beside one token per step",
        description="Decode a few prompts with the embedded pair, one token per step and adaptively in parallel.",
        epilog="Plain text goes to a pipe, to a terminal without colours and where NO_COLOR is set.",
    )
    demo.add_argument("--no-animation", action="store_true", help="show the answers at once, not step by step")
    _add_colour(demo)
    _add_knobs(demo)
    demo.set_defaults(run=_demo)

    generate = commands.add_parser(
        "generate",
        usage="apd generate (--prompt TEXT | --input FILE --output FILE) [options]",
        help="answer a prompt, or a file of prompts",
        description=_GENERATE_DESCRIPTION,
        formatter_class=_Help,
    )
    what = generate.add_argument_group("prompts")
    source = what.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="one prompt; the answer goes to standard output")
    source.add_argument("--input", type=Path, metavar="FILE", help="JSONL file of prompts; needs --output")
    what.add_argument("--output", type=Path, metavar="FILE", help="JSONL file for the results; continued if it exists")
    what.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts decoded together (default 8)")
    what.add_argument(
        "--on-error",
        choices=["stop", "skip"],
        default="stop",
        help="at a prompt that cannot be read or decoded: end the run (default), or report it and go on",
    )
    what.add_argument("--chat", action="store_true", help="put each prompt through the tokenizer's chat template")
    what.add_argument("--show-steps", action="store_true", help="with --prompt: mark the tokens by committing step")
    _add_colour(what)

    models = generate.add_argument_group("models", "directories or hub names; without --drafter, the embedded pair")
    models.add_argument("--drafter", metavar="PATH", help="masked-diffusion LM (Dream, DiffuCoder, LLaDA, ...)")
    models.add_argument(
        "--verifier", metavar="PATH", help="small causal LM of the same vocabulary; not needed at R = 1"
    )
    models.add_argument("--dtype", help="float32, bfloat16, ... (default: float32 on a CPU)")
    models.add_argument("--device-map", metavar="DEVICE", help="cpu, cuda, auto, ...")
    models.add_argument("--attn-implementation", metavar="NAME", help="sdpa, eager, ...")
    models.add_argument("--revision", metavar="NAME", help="branch, tag or commit of the drafter on the hub")

    _add_knobs(generate)

    sampling = generate.add_argument_group("sampling", "greedy unless --do-sample is given")
    sampling.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="limit per prompt (default 256; 32 with the embedded pair)"
    )
    sampling.add_argument("--do-sample", action="store_true", help="sample instead of taking the likeliest tokens")
    sampling.add_argument("--temperature", type=float, metavar="T", help="lower is closer to greedy (default 1)")
    sampling.add_argument("--top-k", type=int, metavar="K", help="keep the K likeliest; 0 keeps all (default 50)")
    sampling.add_argument("--top-p", type=float, metavar="P", help="keep the likeliest up to this mass (default 1)")
    sampling.add_argument("--min-p", type=float, metavar="P", help="drop what is below P times the likeliest")
    sampling.add_argument("--seed", type=int, default=0, help="same seed, same answers (default 0)")
    generate.set_defaults(run=_generate)
    return parser


class _Help(argparse.RawDescriptionHelpFormatter):
    """Options and what they do in two columns wide enough for `-R R, --mixture-weight R`."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34)


def _add_colour(parser: "argparse.ArgumentParser | argparse._ArgumentGroup") -> None:
    parser.add_argument(
        "--color",
        choices=["auto", "always", "never"],
        default="auto",
        help="colours; auto (default): if a terminal has them",
    )


def _add_knobs(parser: argparse.ArgumentParser) -> None:
    """The fields of `APDConfig` as options; one that is not given leaves the library's default."""
    defaults = APDConfig()
    group = parser.add_argument_group("knobs", "how a step decides what to commit; 'none' stands for no limit")

    def add(*names: str, help: str, **kwargs: Any) -> None:
        field = names[-1].removeprefix("--").replace("-", "_")
        default = getattr(defaults, field)
        shown = "none" if default is None else default
        group.add_argument(*names, default=argparse.SUPPRESS, help=f"{help} (default {shown})", **kwargs)

    add("-R", "--mixture-weight", type=float, metavar="R", help="drafter's weight, 0 to 1; higher is faster, riskier")
    add("--acceptance-threshold", type=float, metavar="TAU", help="commit in parallel only if p_T >= TAU, 0 to 1")
    add("-M", "--window-size", type=_count, metavar="M", help="masks drafted per step")
    add("-W", "--kv-window", type=_count, metavar="W", help="committed tokens recomputed per step, for the KV cache")
    add("--acceptance", choices=["coupling", "rejection"], help="rule that accepts a draft")
    group.add_argument(
        "--correction",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help=f"also commit the mixture's token at the first mismatch (default {'on' if defaults.correction else 'off'})",
    )
    add("--noise", choices=["keyed", "step"], help="noise per position, or redrawn at each step as in published code")


def _count(text: str) -> int | None:
    return None if text == "none" else int(text)


_count.__name__ = "whole number or 'none'"  # argparse names it in its error


def _config(arguments: argparse.Namespace) -> APDConfig:
    given = vars(arguments)
    try:
        return APDConfig(**{name: given[name] for name in asdict(APDConfig()) if name in given})
    except ValueError as error:
        raise UsageError(error) from None


def _prepare(*, embedded: bool) -> None:
    """Process-wide settings, which the library itself leaves alone.

    The embedded pair is fastest on one thread and loads too fast for progress bars; `APD_NUM_THREADS` sets the threads
    for any pair.
    """
    import torch
    from transformers.utils import logging

    if embedded:
        logging.disable_progress_bar()
    wanted = os.environ.get("APD_NUM_THREADS", "1" if embedded else "")
    if not wanted:
        return
    if not wanted.isdigit() or int(wanted) < 1:
        raise UsageError(f"APD_NUM_THREADS must be a whole number of at least 1, got {wanted!r}. Unset it or use 1.")
    torch.set_num_threads(int(wanted))


def _demo(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    _prepare(embedded=True)
    from apd import APDSampler
    from apd.demo import run
    from apd.display import wants_colour

    sampler = APDSampler.from_embedded(**asdict(config))
    colour = wants_colour(sys.stdout, arguments.color)
    animate = colour and sys.stdout.isatty() and not arguments.no_animation  # plain text has no escape codes at all
    run(sampler, sys.stdout, colour=colour, animate=animate)


def _generate(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    _check_usage(arguments, config)
    _prepare(embedded=arguments.drafter is None)
    if arguments.input is None:
        _answer(_load(arguments, config), arguments)
    else:
        _answer_file(arguments, config)


def _check_usage(arguments: argparse.Namespace, config: APDConfig) -> None:
    given = vars(arguments)
    if (arguments.input is None) != (arguments.output is None):
        raise UsageError("--input and --output go together: prompts are read from one file, results go to the other.")
    if arguments.input and arguments.output.exists() and arguments.output.samefile(arguments.input):
        raise UsageError(f"--output must be another file than --input, got {arguments.output} for both.")
    if arguments.show_steps and arguments.input:
        raise UsageError("--show-steps goes with --prompt, got --input. Leave it out, or decode a single prompt.")
    if arguments.max_new_tokens is None:
        arguments.max_new_tokens = 32 if arguments.drafter is None else 256  # the embedded pair was trained for 32
    for name in ("batch_size", "max_new_tokens"):
        if given[name] < 1:
            raise UsageError(f"{_flag(name)} must be at least 1, got {given[name]}.")
    useless = [_flag(name) for name in _SAMPLING if given[name] is not None and not arguments.do_sample]
    if useless:
        raise UsageError(f"{', '.join(useless)} without --do-sample has no effect. Add --do-sample or leave it out.")
    for name, (low, high) in _SAMPLING.items():
        if given[name] is not None and not low <= given[name] <= high:
            raise UsageError(
                f"{_flag(name)} must be at least {low}{f', at most {high}' * (high == 1)}, got {given[name]}."
            )
    if arguments.drafter is not None and arguments.verifier is None and config.mixture_weight < 1:
        raise UsageError("--drafter needs --verifier, or -R 1 to trust the drafter alone.")
    if arguments.drafter is None:
        homeless = [_flag(name) for name in ("verifier", *_LOADING) if given[name] is not None]
        if homeless:
            raise UsageError(f"{', '.join(homeless)} without --drafter: the embedded pair is complete. Add --drafter.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _load(arguments: argparse.Namespace, config: APDConfig) -> "APDSampler":
    from apd import APDSampler

    if arguments.drafter is None:
        return APDSampler.from_embedded(**asdict(config))
    if str(arguments.device_map).startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise UsageError(f"--device-map must be a device of this machine, got {arguments.device_map}. Try cpu.")
    loading = {name: vars(arguments)[name] for name in _LOADING}
    sampler = APDSampler.from_pretrained(arguments.drafter, arguments.verifier, **loading, **asdict(config))
    if sampler.tokenizer is None:
        raise ValueError(f"{arguments.drafter} has no tokenizer files. Put the tokenizer's files beside the weights.")
    return sampler


def _decode(sampler: "APDSampler", prompts: "Sequence[Prompt]", arguments: argparse.Namespace) -> Any:
    """Decode a batch, each row with the seed of its own prompt; returns the sampler's `APDOutput`."""
    from apd.probability import mix_seed

    tokenizer: Any = sampler.tokenizer
    texts = [prompt.text for prompt in prompts]
    if arguments.chat:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
            for text in texts
        ]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=not arguments.chat)
    sampling = {name: value for name in _SAMPLING if (value := getattr(arguments, name)) is not None}
    return sampler.generate(
        **inputs,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=arguments.do_sample,
        seed=[mix_seed(arguments.seed, prompt.index) for prompt in prompts],
        return_dict_in_generate=True,
        **sampling,
    )


def _text(sampler: "APDSampler", tokens: Sequence[int]) -> str:
    tokenizer: Any = sampler.tokenizer
    return str(tokenizer.decode(tokens, skip_special_tokens=True))


def _answer(sampler: "APDSampler", arguments: argparse.Namespace) -> None:
    from apd.display import legend, mark, pieces, wants_colour
    from apd.jsonl import Prompt

    output = _decode(sampler, [Prompt(0, arguments.prompt)], arguments)
    trace = output.trace[0]
    if arguments.show_steps:
        colour = wants_colour(sys.stdout, arguments.color)
        print(legend(colour=colour), file=sys.stderr)
        print(mark(pieces(trace.tokens, trace.steps, partial(_text, sampler)), colour=colour))
    else:
        print(_text(sampler, trace.tokens).strip())
    tokens, drafted, verified = (
        int(count[0]) for count in (output.new_tokens, output.drafter_forwards, output.verifier_forwards)
    )
    print(
        f"{tokens} tokens, {drafted} drafter forwards ({tokens / drafted:.1f} tokens each), {verified} verifier forwards",
        file=sys.stderr,
    )


def _answer_file(arguments: argparse.Namespace, config: APDConfig) -> None:
    from tqdm import tqdm

    from apd.jsonl import append

    run = _fingerprint(arguments, config)
    done, todo = _left(arguments, run)
    if not todo:
        print(f"nothing left to do: {arguments.output} holds {done} results", file=sys.stderr)
        return
    sampler = _load(arguments, config)
    written = 0
    with tqdm(total=done + len(todo), initial=done, unit="prompt", disable=None) as bar:
        for start in range(0, len(todo), arguments.batch_size):
            batch = todo[start : start + arguments.batch_size]
            for prompts, output in _decode_each(sampler, batch, arguments):
                append(arguments.output, _results(sampler, prompts, output, arguments, run))
                written += len(prompts)
            bar.update(len(batch))
    if not written:
        raise ValueError("every prompt was skipped")


def _left(arguments: argparse.Namespace, run: str) -> "tuple[int, list[Prompt]]":
    """How many prompts the output already answers, and those that it does not."""
    from apd.jsonl import BadLine, Prompt, finished, read_prompts

    done = finished(arguments.output)
    todo: list[Prompt] = []
    for item in read_prompts(arguments.input):
        if isinstance(item, BadLine):
            if arguments.on_error == "stop":
                raise item
            _report_skipped(item)
        elif item.index not in done:
            todo.append(item)
        elif done[item.index].get("prompt") != item.text or done[item.index].get("run") != run:
            raise ValueError(
                f"{arguments.output} holds results of another run: line {item.index + 1} of {arguments.input} was "
                "decoded with another prompt or other settings. Choose another --output, or repeat the settings."
            )
    return len(done), todo


def _decode_each(
    sampler: "APDSampler", prompts: "Sequence[Prompt]", arguments: argparse.Namespace
) -> "Iterator[tuple[Sequence[Prompt], Any]]":
    """Decode a batch; if that is refused, decode its prompts one by one and name or skip the culprits."""
    try:
        output = _decode(sampler, prompts, arguments)
    except (ValueError, TypeError, FloatingPointError) as error:
        if len(prompts) > 1:
            for prompt in prompts:
                yield from _decode_each(sampler, [prompt], arguments)
            return
        complaint = f"{arguments.input}, line {prompts[0].index + 1}: {error}"
        if arguments.on_error == "stop":
            raise ValueError(complaint) from error
        _report_skipped(complaint)
    else:
        yield prompts, output


def _report_skipped(complaint: object) -> None:
    from tqdm import tqdm

    tqdm.write(f"apd: skipped: {complaint}", file=sys.stderr)


def _results(
    sampler: "APDSampler", prompts: "Sequence[Prompt]", output: Any, arguments: argparse.Namespace, run: str
) -> list[dict[str, Any]]:
    stops = _stop_token_ids(sampler)
    return [
        {
            "index": prompt.index,
            "prompt": prompt.text,
            "text": _text(sampler, trace.tokens).strip(),
            "new_tokens": new_tokens,
            "drafter_forwards": drafter_forwards,
            "verifier_forwards": verifier_forwards,
            "tokens_per_forward": round(new_tokens / drafter_forwards, 3),
            "finish": "stop" if new_tokens < arguments.max_new_tokens or trace.tokens[-1] in stops else "length",
            "run": run,
        }
        for prompt, trace, new_tokens, drafter_forwards, verifier_forwards in zip(
            prompts,
            output.trace,
            output.new_tokens.tolist(),
            output.drafter_forwards.tolist(),
            output.verifier_forwards.tolist(),
            strict=True,
        )
    ]


def _stop_token_ids(sampler: "APDSampler") -> list[int]:
    """The ids that end a row, as `generate` resolves them: the model's, else the tokenizer's."""
    tokenizer: Any = sampler.tokenizer
    config = getattr(getattr(sampler.drafter, "model", None), "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    if ids is None:
        ids = tokenizer.eos_token_id
    return ids if isinstance(ids, list) else [ids]


def _fingerprint(arguments: argparse.Namespace, config: APDConfig) -> str:
    """Eight hex digits for all that decides an answer beside the prompt, so that two runs never mix in a file."""
    ignored = {"run", "prompt", "input", "output", "batch_size", "on_error", "color", "show_steps"}
    settings = {name: value for name, value in vars(arguments).items() if name not in ignored} | asdict(config)
    return f"{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}"
