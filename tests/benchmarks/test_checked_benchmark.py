"""The table of checked decoding: what it prints follows from the answers."""

import pytest

from benchmarks.checked.__main__ import main


@pytest.mark.slow
def test_the_table_says_how_many_answers_are_equal_and_what_a_pass_computes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    specs = ["left-to-right:1", "checked:proposer=drafter", "one-step"]
    assert main(["--count", "1", "--temperature", "0", "--quiet", "--alone", "2", "--strategies", *specs]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    equal, _, tokens, canvases, columns = (float(cell) for cell in lines["left-to-right:1"][:5])
    assert (equal, tokens, canvases) == (100, 1, 1)
    checked = [float(cell) for cell in lines["checked:proposer=drafter"][:7]]
    assert checked[0] == 100 and checked[2] > 2 and checked[3] > 1 and checked[5] == 0
    assert checked[4] > columns / 4 and checked[6] > 0
    assert float(lines["one-step"][0]) < 100


def test_an_unknown_strategy_is_refused_before_anything_is_decoded() -> None:
    with pytest.raises(ValueError, match="Did you mean"):
        main(["--strategies", "left-to-rigth:1"])
