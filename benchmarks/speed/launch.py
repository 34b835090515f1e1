"""Host time of launching a compiled pass, on any machine: a minute, no GPU.

    python -m benchmarks.speed launch

Models with the depth of Dream-7B and Qwen2.5-0.5B and a negligible width, behind apd's compiled passes. The backend
returns a stored output, so only host time remains:

    inputs     the tokens of all slots in one tensor, the edges of their spans in another
    graph      dynamo: guards, the graph's inputs, its epilogue; launching a real graph comes on top
    copy       copying the rows' hidden states

Guards on modules can be dropped if the models are final, see docs/speed.md; "no guards" measures the
remainder. An eager pass launches every operation. Launches run one after another, with warm caches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from apd.models.span import Span
from benchmarks.speed.options import prepared
from benchmarks.speed.pairs import SHAPES, Loading, Pair, Shape, compiled, random_pair
from benchmarks.speed.table import machine, rounded

#: The guards that are kept, `None` for all; an eager pass has none.
WAYS: dict[str, Any] = {
    "compiled": None,
    "no guards on modules": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
    "no guards": lambda guards: [False] * len(guards),
    "plain": None,
}
#: The parts between consecutive marks of a compiled pass; an eager one has the first part only.
PARTS = {"whole": (0, -1), "inputs": (0, 1), "graph": (1, 2), "copy": (2, 3)}
COLUMNS, BLOCK = 256, 20  # of the canvas; launches of a repetition
SPAN = Span.of_rows([128 - 15], [128 + 100], [0], torch.device("cpu"))  # a prompt of 128 tokens, W = 16, M = 100


class Ready:
    """A backend whose graphs compute once and return the stored output from then on."""

    def __call__(self, module: Callable[..., Any], example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found: list[Any] = []

        def run(*inputs: Any) -> Any:
            if not found:
                found.append(module(*inputs))
            return found[0]

        return run


def launcher(pair: Pair, role: str, way: str) -> Callable[[], list[float]]:
    """A function that launches a pass and returns the µs of its parts."""
    options = {} if WAYS[way] is None else {"options": {"guard_filter_fn": WAYS[way]}}
    # One backend each: without guards dynamo would reuse any graph of the same backend.
    sampler = (pair if way == "plain" else compiled(pair, backend=Ready(), **options)).sampler
    tokens, marks = torch.zeros(1, COLUMNS, dtype=torch.int64), list[float]()
    state = SimpleNamespace(tokens=tokens, rows=tokens[:, 0], width=COLUMNS)  # the attributes that passes read
    passes = getattr(sampler, role).passes(state, is_cached=True)
    passes(tokens, Span.of_rows([0], SPAN.ends, [0], tokens.device))  # reads the prompt, which is not compiled

    def marked(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            marks.append(time.perf_counter())
            output = function(*args)
            marks.append(time.perf_counter())
            return output

        return call

    def launch() -> list[float]:
        marks.clear()
        whole(tokens, SPAN)
        return [1e6 * (marks[end] - marks[start]) for start, end in edges]

    whole, edges = marked(passes), list(PARTS.values())[: 1 if way == "plain" else None]
    if way != "plain":
        passes.compiled.forward_slots = marked(passes.compiled.forward_slots)
    return launch


@torch.no_grad()
def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed launch", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--layers", type=int, default=28, metavar="N", help="at most (default %(default)s)")
    parser.add_argument("--repetitions", type=int, default=20, metavar="N", help=f"{BLOCK} launches each")
    parser.set_defaults(device="cpu", threads=1)
    options = parser.parse_args(arguments)
    prepared(options)
    tiny, dream = SHAPES["tiny"], SHAPES["dream-7b"]
    of_both = ((tiny.drafter, dream.drafter), (tiny.verifier, dream.verifier))
    deep = (a | {"num_hidden_layers": min(b["num_hidden_layers"], options.layers)} for a, b in of_both)
    pair = random_pair("narrow", Shape(*deep, 1, 1), Loading())
    launchers = {(role, way): launcher(pair, role, way) for role in pair.models for way in WAYS}
    found: dict[tuple[str, str], list[list[float]]] = {case: [] for case in launchers}
    for _ in range(options.repetitions):
        for case, launch in launchers.items():
            found[case] += [launch() for _ in range(BLOCK + 2)][2:]  # the first launch compiles, the second warms up
    print(f"host µs, medians ± distance of the quartiles of {BLOCK * options.repetitions} launches", end="\n\n")
    print("one row's pass".ljust(42) + "".join(part.rjust(15) for part in PARTS))
    records = []
    for (role, way), took in found.items():
        layers = pair.models[role].config.num_hidden_layers
        quartiles = [statistics.quantiles(values, n=4, method="inclusive") for values in zip(*took, strict=True)]
        cells = (f"{middle:.1f} ± {high - low:.1f}".rjust(15) for low, middle, high in quartiles)
        print(f"{role}, {layers} layers, {way}".ljust(42) + "".join(cells))
        us = {part: [rounded(value) for value in values] for part, values in zip(PARTS, quartiles, strict=False)}
        records.append({"role": role, "layers": layers, "way": way, "us": us})
    print("", json.dumps({**machine("cpu"), "launches": records}), sep="\n")
    return 0
