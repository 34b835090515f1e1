"""For every test: nothing can be downloaded, one torch thread, tests marked `gpu` are skipped without a GPU, and what
transformers logs to be deprecated is an error."""

import logging
import os
from collections.abc import Iterator

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("APD_NUM_THREADS", "1")  # the command line reads it too, in subprocesses

import pytest
import torch

torch.set_num_threads(int(os.environ["APD_NUM_THREADS"]))


class Deprecations(logging.Handler):
    """What transformers has called deprecated; it logs most of it, and each only once in a process."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            self.messages.append(record.getMessage())


deprecations = Deprecations()
logging.getLogger("transformers").addHandler(deprecations)


@pytest.fixture(autouse=True)
def nothing_is_deprecated() -> Iterator[None]:
    yield
    messages, deprecations.messages = deprecations.messages, []
    assert not messages


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    has_gpu = torch.cuda.is_available()
    # Not `item.keywords`: these hold the names of folders too, and one is called gpu.
    for item in items:
        if item.get_closest_marker("compat"):
            item.add_marker(pytest.mark.filterwarnings("error::DeprecationWarning", "error::FutureWarning"))
        if item.get_closest_marker("gpu") and not has_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def untraced() -> Iterator[None]:
    """What is given to `torch.compile` runs as it is."""
    with torch.compiler.set_stance("force_eager"):
        yield
