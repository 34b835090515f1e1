"""Train the included pair, or a small pair of your own.

A drafter and a verifier with one vocabulary, on an ordinary CPU. Your own, on
lines of {"prompt": ..., "answer": ...}; without --data the included pair once
more, into ./pair, in 70 minutes on one core:

    python examples/train_pair.py --data lines.jsonl --minutes 20
    python examples/train_pair.py
    python examples/train_pair.py --table   # measure it, or the pair in --out
    python examples/train_pair.py --quick   # seconds; the table has zeros
    python examples/train_pair.py --attention block   # block-causal drafter

The last one takes 50 minutes on one loaded core. After an interruption the
same command continues from the last checkpoint, at most two minutes old.
Nothing is written into the package unless `--into-package` is given. How: both
models are small Qwen2 networks, see `training/included.py` and
`training/own.py`; what they read in a step is in `training/batches.py`, the
loop in `training/networks.py`.
"""

import argparse
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from training import included, own
from training.batches import RowSource
from training.export import export
from training.networks import Recipe, build_network, train

from apd.included import BLOCK_DRAFTER_DIR

WORTH_COMPILING = 2.0  # minutes of a network's training; compiling takes about as long
TINY = {"layers": 1, "width": 24, "heads": 2, "hidden": 32, "rows": 4, "causal_steps": 3}


@dataclass(frozen=True)
class Job:
    """What is trained on, and how.

    Args:
        tokenizer: of both networks.
        source: draws the rows.
        is_content: `v` bool, see `training.batches.mask_rows`.
        recipes: of the networks, by name.
        minutes: to train each for, by name; `None` for the steps of its recipe.
        print_tables: measures the pair in two directories.
        kind: a word that tells its checkpoints from others.
    """

    tokenizer: Any
    source: RowSource
    is_content: Tensor
    recipes: dict[str, Recipe]
    minutes: dict[str, float | None]
    print_tables: Callable[[Path, Path, int], None]
    kind: str


def included_job(arguments: argparse.Namespace) -> Job:
    tokenizer = included.build_tokenizer()
    drafter = included.BLOCK_DRAFTER if arguments.attention == "block" else included.DRAFTER
    return Job(
        tokenizer=tokenizer,
        source=included.row_source(tokenizer, arguments.seed),
        is_content=included.content(),
        recipes={"drafter": drafter, "verifier": included.VERIFIER},
        minutes={"drafter": None, "verifier": None},
        print_tables=included.print_tables,
        kind=f"block{arguments.block_size}" if arguments.attention == "block" else "full",
    )


def own_job(arguments: argparse.Namespace) -> Job:
    lines = own.read(arguments.data)
    tokenizer = own.build_tokenizer(lines, arguments.vocabulary)
    source = own.row_source(lines, tokenizer, arguments.seed)
    held_out = sum(line.is_held_out for line in lines)
    print(
        f"{len(lines) - held_out} lines to train on, {held_out} held out; {len(tokenizer)} tokens; "
        f"{source.shape.canvas} new tokens hold every answer",
        flush=True,
    )
    minutes = {"drafter": 0.8 * arguments.minutes, "verifier": 0.2 * arguments.minutes}
    settings = f"{arguments.vocabulary} {arguments.minutes}".encode()

    def print_tables(drafter: Path, verifier: Path, count: int) -> None:
        own.print_tables(lines, drafter, verifier, source.shape.canvas, count)
        print(f"\napd generate --drafter {drafter} --verifier {verifier} --prompt ...")

    return Job(
        tokenizer=tokenizer,
        source=source,
        is_content=own.content(tokenizer),
        recipes={"drafter": own.DRAFTER, "verifier": own.VERIFIER},
        minutes={name: None if arguments.quick else number for name, number in minutes.items()},
        print_tables=print_tables,
        kind=f"{zlib.crc32(arguments.data.read_bytes(), zlib.crc32(settings)):08x}",
    )


def train_one(name: str, job: Job, arguments: argparse.Namespace, folder: Path, checkpoints: Path) -> None:
    block_size = arguments.block_size if arguments.attention == "block" and name == "drafter" else None
    recipe = job.recipes[name]
    if arguments.quick:
        recipe = replace(recipe, **TINY, masked_steps=3 * (name == "drafter"))
    torch.manual_seed(arguments.seed)
    network = build_network(recipe, job.tokenizer, is_causal=name == "verifier")
    network.to("cuda" if torch.cuda.is_available() else "cpu")
    if block_size and not arguments.quick:
        network.load_state_dict(load_file(included.PACKAGE_DIR / "drafter" / "model.safetensors"))
    checkpoints.mkdir(parents=True, exist_ok=True)
    minutes = job.minutes[name]
    started = time.perf_counter(), time.process_time()
    train(
        network,
        recipe,
        job.source,
        checkpoints / f"{name}-{job.kind}-{arguments.seed}{'-quick' * arguments.quick}.safetensors",
        is_content=job.is_content,
        mask=job.tokenizer.mask_token_id,
        title=name,
        minutes=minutes,
        block_size=block_size,
        is_compiled=not arguments.quick and (minutes is None or minutes >= WORTH_COMPILING),
    )
    ended = time.perf_counter(), time.process_time()
    wall, cpu = ((now - then) / 60 for now, then in zip(ended, started, strict=True))
    print(f"{name}: {wall:.1f} minutes, {cpu:.1f} CPU minutes in this run", flush=True)
    is_drafter = name == "drafter"
    new_tokens = job.source.shape.canvas if is_drafter else None
    export(network, job.tokenizer, folder, is_drafter, block_size, new_tokens)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="FILE.jsonl", help="train a pair of your own on these lines")
    parser.add_argument(
        "--minutes",
        type=float,
        help="of training, with --data; both models together, compiling, from 2 minutes a network, comes on top (default 10)",
    )
    parser.add_argument("--vocabulary", type=int, help="tokens of the vocabulary, with --data (default 512)")
    parser.add_argument(
        "--out", type=Path, help="folder of the pair (default ./pair; with --table: the included pair)"
    )
    parser.add_argument("--into-package", action="store_true", help="replace the included pair")
    parser.add_argument(
        "--checkpoints", type=Path, help="their folder, delete it to start over (default OUT/checkpoints)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--attention", choices=("full", "block"), default="full", help="of the included pair's drafter"
    )
    parser.add_argument(
        "--block-size", type=int, default=8, help="tokens per block, for --attention block (default 8)"
    )
    parser.add_argument("--only", choices=("drafter", "verifier"), help="train one of the two, e.g. in two processes")
    parser.add_argument("--table", action="store_true", help="measure what is in --out and stop")
    parser.add_argument(
        "--count", type=int, default=100, help="held-out instances of each task, or lines, in the table"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of tiny networks; a table of zeros is expected"
    )
    arguments = parser.parse_args()
    check(arguments, parser)
    return arguments


def check(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Refuse wrong arguments, and fill in those that depend on others."""
    longest_block = included.SHAPE.canvas
    if not 1 <= arguments.block_size <= longest_block:
        parser.error(f"--block-size must be 1 to {longest_block}, got {arguments.block_size}.")
    if arguments.into_package and (arguments.out or arguments.data or arguments.quick):
        parser.error("--into-package goes without --out, --data and --quick: it replaces the included pair.")
    if arguments.data is None and (arguments.minutes is not None or arguments.vocabulary is not None):
        parser.error("--minutes and --vocabulary go with --data: the included pair has fixed ones. Add --data.")
    if arguments.data is not None and (arguments.attention == "block" or arguments.only):
        parser.error("--data goes without --attention block and --only. Leave them out.")
    if arguments.data is not None and arguments.table and arguments.out is None:
        parser.error("--table with --data measures the pair in --out, got none. Add --out.")
    arguments.minutes = 10.0 if arguments.minutes is None else arguments.minutes
    arguments.vocabulary = 512 if arguments.vocabulary is None else arguments.vocabulary
    if not arguments.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {arguments.minutes}.")
    if arguments.vocabulary < own.LEAST_VOCABULARY:
        parser.error(f"--vocabulary must be at least {own.LEAST_VOCABULARY}, got {arguments.vocabulary}.")
    place = arguments.out or Path("pair")
    arguments.checkpoints = arguments.checkpoints or place / "checkpoints"
    is_included = arguments.into_package or (arguments.table and arguments.out is None)
    arguments.out = included.PACKAGE_DIR if is_included else place


def main() -> None:
    arguments = parse()
    torch.set_num_threads(int(os.environ.get("APD_NUM_THREADS", "1")))
    try:
        job = own_job(arguments) if arguments.data else included_job(arguments)
    except (ValueError, OSError) as error:
        raise SystemExit(f"train_pair.py: error: {error}") from None
    names = ["drafter"] if arguments.attention == "block" else ["drafter", "verifier"]
    is_block = arguments.attention == "block"
    folders = {
        "drafter": arguments.out / (BLOCK_DRAFTER_DIR.name if is_block else "drafter"),
        "verifier": arguments.out / "verifier",
    }
    if not arguments.table:
        for name in names:
            if arguments.only in (None, name):
                train_one(name, job, arguments, folders[name], arguments.checkpoints)
    if arguments.only is None or arguments.table:
        if arguments.quick:
            print("A few steps of tiny networks teach nothing: zeros are expected below.")
        job.print_tables(folders["drafter"], folders["verifier"], 4 if arguments.quick else arguments.count)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("interrupted; the same command continues from the last checkpoint") from None
