"""What the page says about exact Shuffle: every R below 1 is right, and all of them are the same."""

import csv
from itertools import groupby

import pytest

from benchmarks.parallelbench.knobs import draw, points, write


@pytest.mark.slow
def test_on_exact_shuffle_every_weight_below_one_is_right_and_the_same(tmp_path):
    found = list(points(rows=8))
    setting = lambda p: (p.correction, p.acceptance_threshold, p.window_size)  # noqa: E731
    for _, group in groupby(found, setting):
        below = [point for point in group if point.mixture_weight < 1]
        assert {point.accuracy for point in below} == {1.0}
        assert len({point.tokens_per_forward for point in below}) == 1
    assert any(point.accuracy < 0.2 for point in found if point.mixture_weight == 1)

    write(found, tmp_path)
    draw(found, tmp_path)
    with (tmp_path / "shuffle-knobs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found)
    assert (tmp_path / "shuffle-knobs.png").stat().st_size > 1000
