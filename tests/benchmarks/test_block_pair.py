"""The comparison of a block-causal drafter with the full one: its tables follow from the answers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from paths import ROOT

from apd.included import DRAFTER_DIR
from apd.included.tasks import TASKS
from benchmarks.block_pair import main

KINDS = ("full", "block")


@pytest.fixture
def drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A tiny one with random weights, in the format that `examples/train_pair.py` writes."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    from training import included
    from training.export import export
    from training.networks import build_network

    tokenizer = included.build_tokenizer()
    torch.manual_seed(0)
    recipe = replace(included.DRAFTER, layers=2, width=24, heads=2, hidden=32)
    network = build_network(recipe, tokenizer, is_causal=False)
    export(network, tokenizer, tmp_path / "drafter", True, 8)
    return str(tmp_path / "drafter")


@pytest.mark.slow
def test_an_exact_cache_computes_fewer_columns_for_the_same_answers(
    drafter: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--count", "1", "--alone", "2", "--repetitions", "1", "--quiet", "--out", str(tmp_path / "tables.md")]
    chosen = ["--by-task", "left-to-right:4", "apd:R=0.5", "--cached", "left-to-right:4", "one-step"]
    assert main(["--drafter", drafter, *few, *chosen]) == 0
    written = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert written.split() == capsys.readouterr().out.split()
    rows = [line.strip("| ").split(" | ") for line in written.splitlines() if line.startswith("| ")]
    assert [cells[0] for cells in rows if len(cells) == 3] == ["task", "---", *TASKS, "**all**"] * 2
    assert [cells[1] for cells in rows if cells[-1] == "refused"] == ["kv_window=16", "kv_window=4"]
    rows = [cells for cells in rows if cells[2] == "`left-to-right:4`"]
    caches = {tuple(cells[:2]): [float(cell.split()[0]) for cell in cells[3:]] for cells in rows if cells[0] in KINDS}
    assert len(caches) == 5
    bare, kept = (caches["block", cache] for cache in ("no cache", "exact cache"))
    assert bare[0] == kept[0] == 100 and bare[1:3] == kept[1:3] and bare[2] > 2
    assert kept[3] < bare[3] / 2 and caches["full", "kv_window=4"][3] < caches["full", "no cache"][3]


def test_a_drafter_with_full_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="block-causal"):
        main(["--drafter", str(DRAFTER_DIR), "--count", "1"])
