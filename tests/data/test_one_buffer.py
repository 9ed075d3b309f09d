"""Objects that travel in one buffer: equal values, dtypes and shapes, and one storage."""

import pickle
from typing import NamedTuple

import pytest
import torch

from eve_ds.data.one_buffer import ALIGNMENT, OneBuffer


class Content(NamedTuple):
    name: str
    tensors: dict[str, torch.Tensor]
    nested: list[object]


def sent(content):
    return pickle.loads(pickle.dumps(OneBuffer(content)))


DTYPES = [torch.uint8, torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(), (0,), (3, 0, 2), (1,), (5, 7)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_type_and_shape_arrive(dtype):
    tensors = {str(shape): torch.randint(0, 2, shape).to(dtype) for shape in SHAPES}
    found = sent(Content("a", tensors, [None, 3]))
    assert (found.name, found.nested, list(found.tensors)) == ("a", [None, 3], list(tensors))
    for name, expected in tensors.items():
        assert found.tensors[name].dtype == dtype
        torch.testing.assert_close(found.tensors[name], expected, rtol=0, atol=0)


def test_tensors_arrive_contiguous_in_one_storage_at_aligned_places():
    images = torch.arange(24, dtype=torch.uint8).view(2, 3, 4)
    content = [images.permute(2, 0, 1), images[:, 1], {"same": images, "again": images}]
    first, second, third = sent(content)
    assert torch.equal(first, content[0])
    assert torch.equal(second, content[1])
    assert torch.equal(third["same"], images)
    assert torch.equal(third["again"], images)
    tensors = [first, second, third["same"]]
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert all(tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0 for tensor in tensors)


def test_an_object_without_tensors_arrives():
    assert sent({"step": 3}) == {"step": 3}
