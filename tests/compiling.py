"""A compiled sampler whose graphs run as they are and are counted."""

import torch
from pairs import trace_sampler

from apd import APDSampler
from apd.decoding.step import PLAIN


class Counting:
    """A backend that runs the graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.Graph] = []

    @property
    def count(self) -> int:
        return len(self.graphs)

    def __call__(self, module, example_inputs):
        self.graphs.append(module.graph)
        return module.forward


def compiled(*, between: bool = True) -> tuple[APDSampler, Counting]:
    """The traced pair with models of its own, compiled; `between=False` compiles the passes alone."""
    torch._dynamo.reset()
    backend = Counting()
    sampler = trace_sampler.__wrapped__().compile(backend=backend, fullgraph=True)
    if not between:
        sampler.kernels = PLAIN
    return sampler, backend
