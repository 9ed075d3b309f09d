"""Replace the layers of a built model by tensor-parallel ones that hold this rank's part of the same weights.

Every rank builds the model and gives it its weights, drawn or read, before a layer is cut. A rank therefore starts with
the weights that a single process would have. Layers are cut one at a time, and the whole one is dropped.
"""

from __future__ import annotations

from functools import partial
from typing import cast

import torch
from torch import nn

from eve_ds.model.attention import CrossAttention, SelfAttention
from eve_ds.model.eve import EVE
from eve_ds.model.experts import Experts
from eve_ds.model.feed_forward import FeedForward
from eve_ds.model.moe import plain_names_of
from eve_ds.model.shards import Shard, cut_of, mark, shard_of
from eve_ds.parallel.exchange.sharded_experts import ShardedExperts
from eve_ds.parallel.tensor.layers import ColumnLinear, RowLinear, SplitExperts
from eve_ds.parallel.tensor.vocabulary import ShardedVocabulary, WordEmbedding
from eve_ds.topology import Topology

COLUMNS, ROWS = ("qkv", "query", "key_value", "fc1"), ("proj", "fc2")
"""Names of the linear layers that are cut by their outputs and by their inputs."""


def split_model(model: nn.Module, topology: Topology, split_experts: bool) -> None:
    """Cut attention, feed-forward networks, pixel decoder and, in pre-training, the vocabulary; in place.

    A task keeps its vocabulary whole, since some heads read the embedding itself. Norms, patch projection, router,
    positions, heads of tasks and the projections around decoders stay whole.

    Args:
        model: model with the experts of this rank, :class:`EVE` or a task's.
        topology: place of this rank; the groups of :func:`eve_ds.parallel.tensor.mpu.create_groups` exist.
        split_experts: whether the ranks share every expert; False: each holds its experts whole.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, SelfAttention | CrossAttention | FeedForward):
            _split_linear_layers(module, name, topology)
        if isinstance(module, SelfAttention | CrossAttention):
            module.num_heads //= topology.tp_size
        if isinstance(module, SelfAttention):
            for bias in ("q_bias", "v_bias"):
                _cut_parameter(module, module, bias, f"{name}.{bias}", topology)
        elif isinstance(module, ShardedExperts) and split_experts:
            _split_experts(model, module, name, topology)
    if isinstance(model, EVE):
        _split_vocabulary(model, topology)


def _split_linear_layers(module: nn.Module, name: str, topology: Topology) -> None:
    for child, layer in list(module.named_children()):
        if child in COLUMNS + ROWS and isinstance(layer, nn.Linear):
            cls = ColumnLinear if child in COLUMNS else RowLinear
            parallel = cls(layer.in_features, layer.out_features, bias=layer.bias is not None)
            for own, _ in layer.named_parameters():
                _cut_parameter(layer, parallel, own, f"{name}.{child}.{own}", topology)
            module.set_submodule(child, parallel)


def _split_experts(model: nn.Module, module: ShardedExperts, name: str, topology: Topology) -> None:
    path = "experts.deepspeed_experts"
    experts = cast(Experts, module.get_submodule(path))
    split = SplitExperts(experts, topology.tp_size)
    for own, _ in experts.named_parameters():
        plain = plain_names_of(model, f"{name}.{path}.{own}")[0]
        _cut_parameter(experts, split, own, plain, topology)
    module.set_submodule(path, split)


def _split_vocabulary(model: EVE, topology: Topology) -> None:
    text = model.backbone.text_embedding
    word = WordEmbedding(text.word.num_embeddings, text.word.embedding_dim, topology.tp_size)
    _cut_parameter(text.word, word, "weight", "backbone.text_embedding.word.weight", topology)
    text.set_submodule("word", word)
    if model.text_head is not None:
        _cut_parameter(model.text_head, model.text_head, "bias", "text_head.bias", topology)
    model.vocabulary_of = partial(ShardedVocabulary.of, shard=cast(Shard, shard_of(word.weight)))


@torch.no_grad()
def _cut_parameter(source: nn.Module, target: nn.Module, own: str, name: str, topology: Topology) -> None:
    """Give `target` this rank's part of a parameter of `source`, with its marks, or all of it if no rule cuts it.

    Args:
        source: module with the whole parameter.
        target: module that gets the part; may be `source`.
        own: name of the parameter in both modules.
        name: its plain name; of its first expert, if it stacks several.
        topology: place of this rank.
    """
    whole = source.get_parameter(own)
    cut = cut_of(name)
    if cut is None:
        target.register_parameter(own, whole)
        return
    stacked = isinstance(target, SplitExperts)
    shard = Shard(whole.shape[1:] if stacked else whole.shape, cut, topology.tensor_rank, topology.tp_size)
    part = nn.Parameter(shard.take(whole), requires_grad=whole.requires_grad)
    part.__dict__.update(whole.__dict__)  # DeepSpeed's marks on parameters of experts
    mark(part, shard)
    target.register_parameter(own, part)
