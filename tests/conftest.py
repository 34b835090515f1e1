"""For every test: nothing can be downloaded, one torch thread, and tests marked `gpu` are skipped without a GPU."""

import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("APD_NUM_THREADS", "1")  # the command line reads it too, in subprocesses

import pytest
import torch

torch.set_num_threads(int(os.environ["APD_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def untraced() -> Iterator[None]:
    """What is given to `torch.compile` runs as it is."""
    with torch.compiler.set_stance("force_eager"):
        yield
