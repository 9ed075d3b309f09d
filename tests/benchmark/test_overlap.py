"""Prediction of the benchmark of overlap, against timetables by hand."""

import pytest

from eve_ds.benchmark.overlap import BACKWARD, FORWARD, MESSAGE, _pipeline, predicted


@pytest.mark.parametrize(
    ("computed", "message", "parts", "expected"),
    [
        (6, 1, 1, 8),  # come 0-1, compute 1-7, go 7-8
        (3, 1, 2, 8),  # come 0-1 and 1-2, compute 1-4 and 4-7, go 4-5 and 7-8
        (1, 3, 2, 12),  # come 0-3 and 3-6, compute 3-4 and 6-7, go 6-9 and 9-12
        (2, 2, 2, 8),  # come 0-2 and 2-4, compute 2-4 and 4-6, go 4-6 and 6-8
    ],
)
def test_parts_are_computed_while_others_travel(computed, message, parts, expected):
    assert _pipeline(computed, message, parts) == expected


def test_one_part_hides_nothing():
    assert predicted(0.5, 0.03, 1) == pytest.approx(0.5 + FORWARD + BACKWARD + 4 * (MESSAGE + 0.03))
