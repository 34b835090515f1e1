"""The measurement of frozen keys: its numbers mean what they say."""

import csv

import pytest

from apd import APDSampler, LeftToRight
from benchmarks.speed import stale


def test_exact_settings_have_no_distance_and_refreshing_costs_columns() -> None:
    sampler = APDSampler.from_included()
    exact, always, rare, never = (
        stale.measure(sampler, "shuffle", 4, LeftToRight(2), stale.Setting(None, *knobs))
        for knobs in ((None, None), (1, 1), (1, 4), (1, None))
    )
    assert exact.kl == pytest.approx(0, abs=1e-5) and always.kl == pytest.approx(0, abs=1e-5)
    assert (always.columns, always.accuracy) == (exact.columns, exact.accuracy)
    assert 0.001 < rare.kl < never.kl
    assert never.context < rare.context < exact.context < exact.columns


@pytest.mark.slow
def test_a_run_writes_what_it_prints(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(stale, "KV_WINDOWS", (1,))
    monkeypatch.setattr(stale, "REFRESHES", (None, 4))
    monkeypatch.setattr(stale, "WINDOW_SIZES", ("auto",))
    assert stale.main(["--out", str(tmp_path), "--count", "1", "--tokens-per-step", "8"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4
    with (tmp_path / "stale.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 * 12 and rows[-1]["task"] == "all" and float(rows[-1]["kl"]) < 1e-5
    assert (tmp_path / "stale.png").stat().st_size > 1000
