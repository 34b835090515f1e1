"""The command `apd`: a demo on the embedded pair, and generation from any supported pair."""

import argparse
import json
import os
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from apd import __version__
from apd.config import KNOBS, APDConfig, Form
from apd.generation.text import check_text, whole_text

if TYPE_CHECKING:
    from accelerate import PartialState  # type: ignore[import-untyped]

    from apd import APDSampler, Generated
    from apd.cli.results import Prompt

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
  accelerate launch --num-processes 8 -m apd generate --input prompts.jsonl ...
      the same over 8 GPUs

'apd COMMAND --help' lists every option."""

_GENERATE_DESCRIPTION = """\
Answer one prompt, or every line of a file.

--input holds one {"prompt": "..."} per line. --output gets one line per prompt, in the order
of the input: index (of the input's line, from 0), prompt, text, new_tokens, drafter_forwards,
verifier_forwards, tokens_per_forward, finish ("stop" or "length"), and run, a fingerprint
of the settings. Until the end, answers stand in OUTPUT.part-*; after an interruption the same
command continues. As a file, - is standard input or output; answers go there in order, and
nothing is continued. Started by `accelerate launch` or `torchrun`, every process decodes its
share. With --do-sample, prompt i has the seed mix(SEED, i): its answer depends neither on its
batch nor on the number of processes nor on interruptions."""

_SAMPLING = {"temperature": (0, float("inf")), "top_k": (0, float("inf")), "top_p": (0, 1), "min_p": (0, 1)}
_LOADING = ("dtype", "device_map", "attn_implementation", "revision")
_STANDARD = "-"  # as a file: standard input or standard output


class UsageError(ValueError):
    """The command line cannot be meant as it stands: exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 (the run failed), 2 (wrong usage) or 130 (interrupted)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["lm-eval"]:  # the harness parses the rest
        arguments = argparse.Namespace(run=_lm_eval, rest=argv[1:])
    else:
        arguments = _parser().parse_args(argv)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
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
        return _complain("interrupted; with --output FILE, the same command continues", 130)
    return 0


def _complain(error: object, code: int) -> int:
    print(f"apd: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line, as for errors, without the file and line of ours that Python would add."""
    print(f"apd: warning: {message}", file=sys.stderr)


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
    source.add_argument("--input", type=_file, metavar="FILE", help="JSONL file of prompts, or -; needs --output")
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
    what.add_argument("--chat", action="store_true", help="put each prompt through the tokenizer's chat template")
    what.add_argument("--show-steps", action="store_true", help="with --prompt: mark the tokens by committing step")
    _add_colour(what)

    models = generate.add_argument_group("models", "directories or hub names; without --drafter, the embedded pair")
    models.add_argument("--drafter", metavar="PATH", help="masked-diffusion LM (Dream, DiffuCoder, LLaDA, ...)")
    models.add_argument(
        "--verifier", metavar="PATH", help="small causal LM of the same vocabulary; not needed at R = 1"
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
    sampling.add_argument(
        "--stop-string",
        action="append",
        metavar="TEXT",
        help="end an answer with this text, which stays in it; may be given several times",
    )
    sampling.add_argument(
        "--strategy",
        type=_strategy,
        metavar="SPEC",
        help="for comparison, decode in another way, such as left-to-right, confidence:2, threshold:0.9 or "
        "blocks:8/confidence:2; an unknown name lists all",
    )
    generate.set_defaults(run=_generate)

    commands.add_parser("lm-eval", add_help=False, help="lm-eval's own command line with `apd` among its models")
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
    group = parser.add_argument_group("knobs", "how a step decides what to commit; 'none' stands for no limit")
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
        group.add_argument(*letters, _flag(name), **options)


def _read(form: Form, text: str) -> Any:
    try:
        return form.read(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _file(text: str) -> Path | str:
    return text if text == _STANDARD else Path(text)


def _strategy(text: str) -> str:
    """A strategy's short name in full: equal strategies have equal names."""
    from apd.strategies.registry import parse

    try:
        return parse(text).spec
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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
    from apd.cli.demo import run
    from apd.show.terminal import wants_colour

    sampler = APDSampler.from_embedded(**asdict(config))
    colour = wants_colour(sys.stdout, arguments.color)
    animate = colour and sys.stdout.isatty() and not arguments.no_animation  # plain text has no escape codes at all
    run(sampler, sys.stdout, colour=colour, animate=animate)


def _generate(arguments: argparse.Namespace) -> None:
    config = _config(arguments)
    _check_usage(arguments, config)
    with _processes(arguments) as processes:
        _prepare(embedded=arguments.drafter is None)
        if arguments.input is not None:
            _check_files(arguments, processes.num_processes)
            if arguments.output == _STANDARD:
                _answer_to_stdout(arguments, config, processes)
            else:
                _answer_file(arguments, config, processes)
        elif processes.num_processes > 1:
            raise UsageError(f"--prompt takes one process, got {processes.num_processes}. Use --input and --output.")
        else:
            _answer(_load(arguments, config), arguments)


@contextmanager
def _processes(arguments: argparse.Namespace) -> "Iterator[PartialState]":
    """What a launcher has started, a single process without one. Names the device of a pair that has none given."""
    from apd.generation.processes import join

    state = join(on_cpu=arguments.drafter is None or arguments.device_map == "cpu")
    if arguments.drafter is not None and arguments.device_map in (None, state.device.type):
        arguments.device_map = str(state.device)
    try:
        yield state
    finally:
        state.destroy_process_group()


def _check_usage(arguments: argparse.Namespace, config: APDConfig) -> None:
    given = vars(arguments)
    if (arguments.input is None) != (arguments.output is None):
        raise UsageError("--input and --output go together: prompts are read from one file, results go to the other.")
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
    if not all(arguments.stop_string or ()):
        raise UsageError("--stop-string must not be empty. Leave it out.")
    try:
        check_text(arguments.prompt or "", "--prompt")
        for stop in arguments.stop_string or ():
            check_text(stop, "--stop-string")
    except ValueError as error:
        raise UsageError(error) from None
    from apd.generation.arguments import check_order
    from apd.strategies.registry import apd_of, settle

    try:
        knobs = {name: given[name] for name in KNOBS if name in given}
        chosen, config = settle(arguments.strategy, APDConfig(), knobs)
        strategy = chosen or apd_of(config)
        check_order(strategy, config)
    except ValueError as error:
        raise UsageError(error) from None
    if arguments.drafter is not None and arguments.verifier is None and strategy.needs_verifier:
        raise UsageError("--drafter needs --verifier, or -R 1 to trust the drafter alone.")
    if arguments.drafter is None:
        homeless = [_flag(name) for name in ("verifier", *_LOADING) if given[name] is not None]
        if homeless:
            raise UsageError(f"{', '.join(homeless)} without --drafter: the embedded pair is complete. Add --drafter.")


def _check_files(arguments: argparse.Namespace, num_processes: int) -> None:
    """Refuse files that cannot be meant before a model is loaded; links of the output are followed."""
    from apd.cli.results import output_file

    source, output = arguments.input, arguments.output
    if num_processes > 1:
        if output == _STANDARD:
            raise UsageError(f"--output - takes one process, got {num_processes}. Name a file.")
        if source == _STANDARD or (source.exists() and not source.is_file()):
            raise UsageError(
                f"--input must be a regular file where {num_processes} processes read it, got {source}. Write it to one."
            )
    if output != _STANDARD:
        arguments.output = output = output_file(output)
        if source != _STANDARD and output.exists() and output.samefile(source):
            raise UsageError(f"--output must be another file than --input, got {output} for both.")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _lm_eval(arguments: argparse.Namespace) -> None:
    _prepare(embedded=any("pair=embedded" in argument for argument in arguments.rest))
    from apd.integrations.lm_eval import main

    main(arguments.rest)


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


def _answers(
    sampler: "APDSampler",
    prompts: "Sequence[Prompt]",
    arguments: argparse.Namespace,
    on_error: Callable[[int, Exception], None],
) -> "Iterator[Generated]":
    """Decode prompts, each with the seed of its own index; for a file every answer as soon as it is there."""
    sampling = {name: value for name in _SAMPLING if (value := getattr(arguments, name)) is not None}
    if arguments.stop_string is not None:  # None would override those in the drafter's generation config
        sampling["stop_strings"] = arguments.stop_string
    return sampler.generate_many(
        [[{"role": "user", "content": prompt.text}] if arguments.chat else prompt.text for prompt in prompts],
        indices=[prompt.index for prompt in prompts],
        batch_size=arguments.batch_size,
        ordered=arguments.output == _STANDARD,
        seed=arguments.seed,
        on_error=on_error,
        strategy=arguments.strategy,
        max_new_tokens=arguments.max_new_tokens,
        do_sample=arguments.do_sample,
        **sampling,
    )


def _answer(sampler: "APDSampler", arguments: argparse.Namespace) -> None:
    from apd.cli.results import Prompt
    from apd.show.terminal import legend, mark, pieces, wants_colour

    def refuse(index: int, error: Exception) -> None:
        raise error

    answer = next(_answers(sampler, [Prompt(0, arguments.prompt)], arguments, refuse))
    if arguments.show_steps:
        colour = wants_colour(sys.stdout, arguments.color)
        print(legend(colour=colour), file=sys.stderr)
        decode = partial(whole_text, sampler.tokenizer, skip_special_tokens=True)
        print(mark(pieces(answer.tokens, answer.trace.steps, decode), colour=colour))
    else:
        print(str(answer.text).strip())
    print(
        f"{len(answer.tokens)} tokens, {answer.drafter_forwards} drafter forwards "
        f"({answer.tokens_per_forward:.1f} tokens each), {answer.verifier_forwards} verifier forwards",
        file=sys.stderr,
    )


def _answer_file(arguments: argparse.Namespace, config: APDConfig, processes: "PartialState") -> None:
    """Decode this process's share of what is left, then let the first process merge all shares.

    1. The first process takes over what an interrupted run has left, while the others wait.
    2. Every process finds out for itself what is left; the i-th of n takes every n-th prompt, from the i-th on.
    3. It decodes them into its own part file.
    4. When all are done, the first process merges the parts into the output.
    """
    from apd.cli.results import Part, indices, merge, part_path, take_over
    from apd.generation.processes import meet

    output, run = arguments.output, _fingerprint(arguments, config)
    paths = [part_path(output, process) for process in range(processes.num_processes)]
    with ExitStack() as stack:
        # 1. Take over what an interrupted run has left.
        if processes.is_main_process:
            part = stack.enter_context(Part(paths[0]))
            prompts, num_bad = _read_prompts(arguments, report=True)
            take_over(part, output, partial(_check_result, prompts={p.index: p.text for p in prompts}, run=run))
        meet()
        if not processes.is_main_process:
            if not paths[0].exists():
                raise FileNotFoundError(f"{paths[0]} is not there: all processes must see the same files.")
            part = stack.enter_context(Part(paths[processes.process_index]))
            prompts, num_bad = _read_prompts(arguments, report=False)

        # 2. The share of this process.
        done = indices(output)
        todo = [prompt for prompt in prompts if prompt.index not in done]
        if done and not todo and processes.is_main_process:
            print(f"nothing left to do: {output} holds {len(done)} results", file=sys.stderr)
        share = todo[processes.process_index :: processes.num_processes]

        # 3. Decode it.
        if share:
            _answer_share(share, part.write, arguments, config, processes, run)

        # 4. Merge.
        meet()
        if processes.is_main_process:
            num_results = merge(output, paths)
            for path in paths[1:]:
                path.unlink()
            part.delete()
            if not num_results:
                _check_nothing(arguments, len(todo) + num_bad)
                output.touch()


def _answer_to_stdout(arguments: argparse.Namespace, config: APDConfig, processes: "PartialState") -> None:
    """Decode all prompts and write each answer as soon as all before it are written."""
    from apd.cli.results import as_line

    prompts, num_bad = _read_prompts(arguments, report=True)
    num_results = 0

    def write(row: dict[str, Any]) -> None:
        nonlocal num_results
        num_results += 1
        sys.stdout.buffer.write(as_line(row))
        sys.stdout.flush()

    if prompts:
        _answer_share(prompts, write, arguments, config, processes, _fingerprint(arguments, config))
    if not num_results:
        _check_nothing(arguments, len(prompts) + num_bad)


def _check_nothing(arguments: argparse.Namespace, num_skipped: int) -> None:
    """Say why a run has no results: an error unless there was nothing to answer."""
    if num_skipped:
        raise ValueError(
            f"every prompt was skipped, all {num_skipped} of {_name(arguments.input)}: nothing is written"
        )
    print(f"{_name(arguments.input)} holds no prompts: the output is empty", file=sys.stderr)


def _read_prompts(arguments: argparse.Namespace, *, report: bool) -> "tuple[list[Prompt], int]":
    """The prompts of the input, and how many lines hold none."""
    from apd.cli.results import BadLine, read_prompts

    prompts, num_bad = [], 0
    is_standard = arguments.input == _STANDARD
    with nullcontext(sys.stdin.buffer) if is_standard else arguments.input.open("rb") as file:
        for item in read_prompts(file, _name(arguments.input)):
            if not isinstance(item, BadLine):
                prompts.append(item)
                continue
            if arguments.on_error == "stop":
                raise item
            num_bad += 1
            if report:
                _report_skipped(item)
    return prompts, num_bad


def _name(source: Path | str) -> str:
    return "standard input" if source == _STANDARD else str(source)


def _check_result(path: Path, row: dict[str, Any], *, prompts: dict[int, str], run: str) -> None:
    index = row["index"]
    if row.get("run") != run or prompts.get(index, row.get("prompt")) != row.get("prompt"):
        raise ValueError(
            f"{path} holds results of another run: line {index + 1} of the input was decoded with another prompt or "
            "other settings. Choose another --output, or repeat the settings."
        )


def _answer_share(
    share: "Sequence[Prompt]",
    write: Callable[[dict[str, Any]], None],
    arguments: argparse.Namespace,
    config: APDConfig,
    processes: "PartialState",
    run: str,
) -> None:
    """Decode prompts and write the results. The bar, on the first process only, counts this process's share."""
    from tqdm import tqdm

    def refused(index: int, error: Exception) -> None:
        complaint = f"{_name(arguments.input)}, line {index + 1}: {error}"
        if arguments.on_error == "stop":
            raise ValueError(complaint) from error
        _report_skipped(complaint)
        bar.update()

    sampler = _load(arguments, config)
    texts = {prompt.index: prompt.text for prompt in share}
    of_many = f"process 1 of {processes.num_processes}" if processes.num_processes > 1 else None
    is_hidden = not processes.is_main_process or (arguments.output == _STANDARD and sys.stdout.isatty())
    # None: only in a terminal
    with tqdm(total=len(share), desc=of_many, unit="prompt", disable=True if is_hidden else None) as bar:
        try:
            for answer in _answers(sampler, share, arguments, refused):
                write(_result(answer, texts[answer.index], run))
                bar.update()
        except FloatingPointError as error:
            raise FloatingPointError(f"{_name(arguments.input)}: {error} Row i is line i + 1.") from error


def _report_skipped(complaint: object) -> None:
    from tqdm import tqdm

    tqdm.write(f"apd: skipped: {complaint}", file=sys.stderr)


def _result(answer: "Generated", prompt: str, run: str) -> dict[str, Any]:
    return {
        "index": answer.index,
        "prompt": prompt,
        "text": answer.text,
        "new_tokens": len(answer.tokens),
        "drafter_forwards": answer.drafter_forwards,
        "verifier_forwards": answer.verifier_forwards,
        "tokens_per_forward": round(answer.tokens_per_forward, 3),
        "finish": answer.finish,
        "run": run,
    }


def _fingerprint(arguments: argparse.Namespace, config: APDConfig) -> str:
    """Eight hex digits for all that decides an answer beside the prompt, so that two runs never mix in a file."""
    ignored = {"run", "prompt", "input", "output", "batch_size", "on_error", "color", "show_steps"}
    settings = {name: value for name, value in vars(arguments).items() if name not in ignored} | asdict(config)
    settings["device_map"] = str(arguments.device_map).split(":")[0]  # which of several GPUs does not matter
    return f"{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}"
