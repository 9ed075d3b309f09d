"""Steps of an exchange in one process: what they allocate, and what they leave where it is."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from eve_ds.parallel.exchange.sharded_experts import _cut, _joined, _parts
from eve_ds.parallel.exchange.sizes import Sizes
from eve_ds.parallel.exchange.steps import Reorder, Send, Trip, transposed, undone


def to_itself(out, rows, *sizes, **options):
    """Stand-in for an all-to-all in a group of one."""
    out.copy_(rows)
    return SimpleNamespace(wait=lambda: None)


@pytest.fixture
def group_of_one(monkeypatch):
    monkeypatch.setattr(dist, "all_to_all_single", to_itself)


def test_transposed_blocks_are_reordered_and_the_step_is_undone():
    rows = torch.arange(12).unsqueeze(1)
    (step,) = transposed([[1, 0, 2], [3, 4, 0]])  # blocks 0 | | 1 2 and 3 4 5 | 6 7 8 9 |
    step = step._replace(rows_before=12)
    ours = step.run(rows)
    assert ours.flatten().tolist() == [0, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    (back,) = undone([step])
    assert back.run(ours).flatten().tolist() == [*range(10), 0, 0]


def test_blocks_of_one_row_or_column_stay_where_they_are():
    assert transposed([[1, 2, 3]]) == transposed([[1], [2], [3]]) == []


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("rest", [0, 2])
def test_a_buffer_is_not_filled_with_zeros_but_for_the_rows_that_nobody_sends(rest):
    rows, written = torch.ones(3, 4), []
    send = Send(None, [3], [3], 3, 3 + rest)
    empty = torch.Tensor.new_empty

    def dirty(tensor, *shape):
        written.append(empty(tensor, *shape).fill_(torch.nan))
        return written[-1]

    with mock.patch.object(torch.Tensor, "new_empty", dirty), mock.patch.object(torch.Tensor, "new_zeros", None):
        out = send.run(rows)
    assert out is written[0]
    assert torch.equal(out, torch.cat([rows, torch.zeros(rest, 4)]))


@pytest.mark.usefixtures("group_of_one")
def test_a_trip_back_gives_the_rows_and_zeros_behind_them():
    rows = torch.arange(8.0).view(4, 2)
    steps = [Reorder([1, 2], [1, 0], 4, 3), Send(None, [3], [3], 3, 3)]
    trip = Trip(steps)
    trip.start(rows)
    there = trip.arrive()
    assert torch.equal(there, rows[[1, 2, 0]])
    trip.start(there, back=True)
    assert torch.equal(trip.arrive(), torch.cat([rows[:3], torch.zeros(1, 2)]))


@pytest.mark.parametrize("num_parts", [1, 2, 3])
def test_parts_of_the_experts_are_cut_and_joined(num_parts):
    sizes = Sizes([[1, 2, 0], [0, 3, 1]], [[0] * 3] * 2, (), torch.zeros(3))
    rows = torch.arange(9.0).unsqueeze(1).requires_grad_()  # 7 rows of experts, and 2 of none
    parts = _parts(3, num_parts)
    cut = _cut(rows, sizes, parts)
    joined = _joined([own[: len(own)] for own in cut], sizes, parts, 9)
    if num_parts == 3:
        assert [own.flatten().tolist() for own in cut] == [[0], [1, 2, 3, 4, 5], [6]]
    kept = 9 if num_parts == 1 else 7
    assert torch.equal(joined[:kept], rows[:kept])
    assert not joined[kept:].any()
    joined.sum().backward()
    assert rows.grad.flatten().tolist() == [1.0] * kept + [0.0] * (9 - kept)
