"""Tuples in pickles are measured like the objects that Python loads from them."""

import io
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eve_ds import limits
from eve_ds.export.pickle_size import check_pickle

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
)  # protocol 0 writes bytes as a call with a tuple
hashable = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=20)
objects = st.recursive(
    hashable,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(hashable, inner),
    max_leaves=20,
)


def largest_tuple(tree):
    """Number of parts of the largest tuple; parts of lists and dictionaries in it do not count."""

    def size(node):
        return 1 + sum(map(size, node)) if isinstance(node, tuple) else 1

    inner = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    keys = tree if isinstance(tree, dict) else ()
    return max([size(tree), *map(largest_tuple, inner), *map(largest_tuple, keys)])


@settings(max_examples=60)
@given(objects, st.sampled_from([0, 1, 2, 3, 4]))
def test_the_largest_tuple_decides(tree, protocol):
    data, most = pickle.dumps(tree, protocol), largest_tuple(tree)
    for cap in (most, most - 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "TUPLE_ITEMS", cap)
            if cap == most:
                check_pickle(io.BytesIO(data))
            else:
                with pytest.raises(ValueError, match="a tuple of more than"):
                    check_pickle(io.BytesIO(data))


def test_files_of_torch_pass_with_optimizers_and_shared_tuples():
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(100)))
    optimizer = torch.optim.AdamW([{"params": [weight]} for weight in model.parameters()], betas=(0.9, 0.95))
    model(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    check_pickle(io.BytesIO(pickle.dumps(whole, 2)))


@pytest.mark.parametrize("levels", [30, 300, 10_000])
def test_shared_tuples_are_measured_in_linear_time(levels):
    with pytest.raises(ValueError, match="a tuple of more than 100,000 items"):
        check_pickle(io.BytesIO(b"\x80\x02})" + b"q\x00h\x00\x86" * levels + b"K\x01s."))


@pytest.mark.parametrize("data", [b"", b"\x80\x02", b"h\x07.", b"t.", b"\x86.", b"s.", b"\xff", b"\x80\x02)q\x00"])
def test_a_damaged_pickle_is_one_line(data):
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        check_pickle(io.BytesIO(data))
