"""`apd estimate`: memory and least time of a decode, from config.json alone."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from apd.cli.options import add_knobs
from apd.cli.usage import UsageError, config_of, dtype_of
from apd.config import APDConfig

if TYPE_CHECKING:
    from apd.inspection.costs import Costs

_ABOUT = """\
Say how much memory a decode needs, and how long a pass takes at least. Only
config.json is read: no weights, no tokenizer, no GPU. Times are lower bounds,
the longer of reading weights, keys and values at --memory-bandwidth and of
matrix products at --tflops; everything else counts as free.
docs/cost.md has the formulas."""

_PER_STEP = (1, 2, 4, 8)


def add_estimate(commands: Any, formatter: type[argparse.HelpFormatter]) -> argparse.ArgumentParser:
    """Add the command `estimate` and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "estimate",
        usage="apd estimate --drafter CONFIG [--verifier CONFIG] [options]",
        help="how much memory and time a decode needs, from config.json",
        description=_ABOUT,
        formatter_class=formatter,
    )
    models = parser.add_argument_group("models", "a directory, a config.json or a hub name")
    models.add_argument("--drafter", metavar="CONFIG", help="default: the included pair")
    models.add_argument("--verifier", metavar="CONFIG", help="'self': the drafter's own weights, read causally")
    models.add_argument("--spec", metavar="NAME", help="family of the drafter (default: as config.json says)")
    models.add_argument("--block-size", type=int, metavar="N", help="tokens that the drafter drafts at once")
    models.add_argument(
        "--dtype", metavar="NAME", help="of both models, such as bfloat16 (default: as config.json says)"
    )
    what = parser.add_argument_group("what is decoded")
    what.add_argument("--batch-size", type=int, default=1, metavar="N", help="rows (default 1)")
    what.add_argument("--prompt-length", type=int, default=256, metavar="N", help="tokens of a prompt (default 256)")
    what.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="tokens of an answer (default 256)")
    what.add_argument("--strategy", metavar="SPEC", help="as in `apd generate`; default: adaptive parallel decoding")
    device = parser.add_argument_group("device", "both from its data sheet; without them no times are printed")
    device.add_argument("--memory-bandwidth", type=float, metavar="GB/S", help="such as 768 for an RTX A5000")
    device.add_argument("--tflops", type=float, metavar="N", help="dense, in the dtype; such as 111 for an RTX A5000")
    add_knobs(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run the command with parsed arguments.

    Raises:
        UsageError: options that contradict each other or are out of range.
        ValueError, OSError: a config that cannot be read.
    """
    rates = arguments.memory_bandwidth, arguments.tflops
    if (rates[0] is None) != (rates[1] is None):
        raise UsageError(
            "--memory-bandwidth and --tflops go together: a pass takes the longer of reading and computing."
        )
    if any(rate is not None and not rate > 0 for rate in rates):
        raise UsageError(f"--memory-bandwidth and --tflops must be more than 0, got {rates[0]} and {rates[1]}.")
    print("\n".join(_lines(_costs(arguments, config_of(arguments)), arguments)))


def _costs(arguments: argparse.Namespace, config: APDConfig) -> Costs:
    from apd.included import DRAFTER_DIR, VERIFIER_DIR
    from apd.inspection.costs import COPIES, Load, estimate
    from apd.strategies import Checked
    from apd.strategies.registry import apd_of, settle

    drafter, verifier = arguments.drafter, arguments.verifier
    if drafter is None:
        if verifier is not None:
            raise UsageError("--verifier without --drafter: the included pair is complete. Add --drafter.")
        drafter, verifier = str(DRAFTER_DIR), str(VERIFIER_DIR)
    dtype = None if arguments.dtype is None else dtype_of(arguments.dtype)
    knobs = {name: value for name, value in vars(arguments).items() if name in vars(config)}
    try:
        chosen, config = settle(arguments.strategy, APDConfig(), knobs)
    except ValueError as error:
        raise UsageError(error) from None
    strategy = chosen or apd_of(config)
    if not strategy.needs_drafter:
        raise UsageError(f"--strategy must run the drafter, got {arguments.strategy}, which runs the verifier alone.")
    if strategy.needs_verifier and verifier is None:
        raise UsageError("--drafter needs --verifier, or -R 1 to trust the drafter alone.")
    try:
        tokens = arguments.max_new_tokens
        load = Load(arguments.batch_size, arguments.prompt_length, tokens, config, *_drafted(strategy, tokens))
    except ValueError as error:
        raise UsageError(error) from None
    kind = str(config.acceptance) if strategy.needs_verifier and not isinstance(strategy, Checked) else "alone"
    return estimate(
        drafter,
        verifier if strategy.needs_verifier else None,
        load,
        spec=arguments.spec,
        block_size=arguments.block_size,
        dtype=dtype,
        copies=COPIES[kind],
    )


def _drafted(strategy: Any, masks: int) -> tuple[int, int | None]:
    """Of a row with so many masks: its canvases in a pass, and the masks of each whose logits are computed (`None`: all)."""
    from apd.strategies import Checked, LeftToRight

    canvases, asked, reference = 1, 0, strategy
    if isinstance(strategy, Checked):
        canvases, reference = strategy.most_canvases(masks), strategy.reference
        asked = (
            strategy.most_checked + 1 if strategy.certainty < 1 else 0
        )  # it asks what each canvas says of all guesses
    if not isinstance(reference, LeftToRight):
        return canvases, None
    number = reference.tokens_per_step
    return canvases, max(asked, number if isinstance(number, int) else max(number))


def _lines(costs: Costs, arguments: argparse.Namespace) -> list[str]:
    load, has_times = costs.load, arguments.tflops is not None
    is_checked = load.canvases > 1
    bandwidth, rate = (1e9 * (arguments.memory_bandwidth or 0), 1e12 * (arguments.tflops or 0))
    lines = [
        f"{role:<9} {size.name}, {size.parameters:,} weights of {size.item} bytes"
        for role, size in costs.sizes.items()
    ]
    lines += [f"{role:<9} {remark}" for role, size in costs.sizes.items() for remark in size.remarks]
    memory = costs.memory()
    kinds = sorted({kind for kinds in memory.values() for kind in kinds}, key=_ORDER.index)
    lines += [
        "",
        f"{load.rows} row{'s' * (load.rows > 1)}, prompts of {load.prompt} tokens, answers of {load.new_tokens}",
        "",
        _row("memory", [*memory, "both"]),
    ]
    totals = dict.fromkeys(memory, 0)
    for kind in kinds:
        found = [memory[role].get(kind, 0) for role in memory]
        totals = {role: totals[role] + number for role, number in zip(memory, found, strict=True)}
        lines.append(_row(kind, [f"{_short(number)}B" for number in (*found, sum(found))]))
    lines.append(_row("total", [f"{_short(number)}B" for number in (*totals.values(), sum(totals.values()))]))

    lines += ["", _row("a pass", ["columns", "operations", "bytes read", *(["ms, least"] * has_times)])]
    shown = {"first": 0, "in the middle": load.new_tokens // 2}
    for when, committed in list(shown.items())[: load.new_tokens]:  # an answer of one token has one pass
        for role, each in costs.passes(committed, 1).items():
            size, canvases = costs.sizes[role], each.rows // load.rows
            cells = [f"{each.columns}", _short(each.operations(size)), f"{_short(each.bytes_read(size))}B"]
            if has_times:
                cells.append(f"{1000 * each.seconds(size, bandwidth, rate):.2f}")
            what = f", {canvases} canvases" if canvases > 1 else ", per guess" if is_checked else ""
            lines.append(_row(f"{role}, {when}{what}", cells))
    if has_times and not is_checked:
        lines += ["", _row("an answer, seconds, least", [f"{n} per step" for n in _PER_STEP])]
        choices = {"both": tuple(costs.sizes), "drafter alone": ("drafter",)}
        for name, roles in list(choices.items())[len(costs.sizes) == 1 :]:
            seconds = [costs.answer_seconds(n, bandwidth, rate, roles=roles) for n in _PER_STEP]
            lines.append(_row(name, [f"{number:.3f}" for number in seconds]))
    elif has_times:
        lines += ["", "How many passes checked decoding takes depends on the guesses: measure it."]
    return lines


_ORDER = ("weights", "keys and values", "logits, about", "activations, about")


def _row(name: str, cells: list[str]) -> str:
    return f"{name:<38}" + "".join(f"{cell:>13}" for cell in cells)


def _short(number: float) -> str:
    """Three digits and a prefix: `15.2 G`."""
    power = 0
    while power < 4 and number >= 999.5 * 1000**power:
        power += 1
    return f"{number / 1000**power:.3g} {('', 'k', 'M', 'G', 'T')[power]}"
