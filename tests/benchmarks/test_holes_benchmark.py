"""The tables of holes: what they print follows from the answers."""

import pytest

from benchmarks.holes import main


def test_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    strategies = ["left-to-right:1", "checked", "apd:R=1"]
    assert main(["--count", "1", "--range", "1", "--strategies", *strategies]) == 0
    out = capsys.readouterr().out
    lines = {line.split(" | ")[0].strip("|` "): line.strip("| ").split(" | ")[1:] for line in out.splitlines()}
    assert out.startswith("11 holes of ")
    one, checked, apd = ([float(cell) for cell in lines[spec]] for spec in strategies)
    assert one[1:4] == [100, 1, 1] and one[5] == 0
    assert checked[:2] == [one[0], 100] and checked[2] > 1.5 and checked[3] > 1 and checked[5] > 0
    assert apd[2] > checked[2] and apd[3] == 1 and apd[5] == 0
    holes, *shares = (float(cell) for cell in lines["all"])
    assert holes == 11 and shares[-1] == one[0] and shares[2] > shares[0]
