"""Shards of tensors: every element in exactly one of them, at the place that the table of cuts says."""

import pytest
import torch
from tiny import tiny_config

from eve_ds.model.eve import model_shapes
from eve_ds.model.shards import Cut, Runs, Shard, cut_of

SHAPES = model_shapes(tiny_config("model.vocab_size=61", "model.objectives=[mim,mlm,itc,itm]").model)
PARTS_HELD_WHOLE = (
    *("norm", "attention.proj.bias", "fc2.bias", "router", "position", "modality", "token", "gamma"),
    *("image_embedding.projection", "pixel_decoder.pixels", "text_head.dense", "matching"),
)


def shards(shape, cut, size):
    return [Shard(torch.Size(shape), cut, rank, size) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 4])
def test_shards_of_every_tensor_of_the_model_hold_each_element_once(size):
    for name, shape in SHAPES.items():
        cut = cut_of(name)
        if cut is None:
            continue
        whole = torch.arange(shape.numel()).view(shape)
        parts = [shard.runs.view(whole.flatten()) for shard in shards(shape, cut, size)]
        assert torch.cat([part.flatten() for part in parts]).sort().values.equal(whole.flatten()), name
        sizes = {part.numel() for part in parts}
        assert len(sizes) == 1 or shape[0] == 61, name


def test_shards_are_those_of_chunks():
    qkv = torch.randn(12, 5)
    q, k, v = qkv.chunk(3)
    assert shards((12, 5), Cut(0, 3), 2)[1].take(qkv).equal(torch.cat([q[2:], k[2:], v[2:]]))
    assert shards((12, 6), Cut(1), 3)[1].take(torch.cat([qkv, qkv[:, :1]], dim=1)).equal(qkv[:, 2:4])
    experts = torch.randn(4, 6, 8)
    assert shards((6, 8), Cut(1), 2)[0].take(experts).equal(experts[:, :, :4])
    assert shards((6, 8), Cut(0), 2)[1].take(experts).equal(experts[:, 3:])


@pytest.mark.parametrize(("kind", "blocks"), [("qkv.weight", 3), ("key_value.weight", 2), ("key_value.bias", 2)])
def test_a_rank_holds_queries_keys_and_values_of_the_same_heads(kind, blocks):
    names = [name for name in SHAPES if name.endswith(f".{kind}")]
    assert names
    for name in names:
        whole = torch.arange(SHAPES[name].numel()).view(SHAPES[name])
        for rank, shard in enumerate(shards(whole.shape, cut_of(name), 2)):
            of_rank = [block.chunk(2)[rank] for block in whole.chunk(blocks)]
            assert shard.take(whole).equal(torch.cat(of_rank)), name


def test_last_shards_of_a_vocabulary_end_in_zeros():
    words = torch.randn(5, 3)
    taken = [shard.take(words) for shard in shards((5, 3), Cut(0), 4)]
    assert torch.cat(taken).equal(torch.cat([words, torch.zeros(3, 3)]))
    assert [shard.runs.numel for shard in shards((5, 3), Cut(0), 4)] == [6, 6, 3, 0]


def test_table_leaves_nothing_whole_by_oversight():
    whole = {name for name in SHAPES if cut_of(name) is None}
    assert [name for name in whole if not any(part in name for part in PARTS_HELD_WHOLE)] == []


def test_a_range_of_runs_is_at_most_three_pieces():
    runs = Runs(offset=2, run=4, stride=10, number=5)
    flat = torch.arange(60)
    held = runs.view(flat).flatten()
    for start in range(20):
        for stop in range(start + 1, 21):
            pieces = runs.parts(start, stop)
            assert len(pieces) <= 3
            found = torch.empty(stop - start, dtype=torch.int64)
            for piece, first in pieces:
                found[first : first + piece.numel] = piece.view(flat).flatten()
            assert found.equal(held[start:stop])
