"""Bytes that one micro-batch keeps and sends, from a forward pass of the model itself on the meta device.

Tensors on that device have shapes and no values, so a pass takes a fraction of a second for any size. The batch comes
from the collator of training, with captions of `model.text_length` tokens, which no batch exceeds. Routing has the
shapes that it has in training; experts that get more tokens than others make some ranks need more than is counted here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from eve_ds.config import Config
from eve_ds.data.batch import Batch, Sample
from eve_ds.data.collate import Collator
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.model.attention import CrossAttention, SelfAttention
from eve_ds.model.eve import EVE, Block
from eve_ds.model.experts import Experts
from eve_ds.model.with_losses import weighted_sum
from eve_ds.objectives.pretraining import count, pretraining_losses
from eve_ds.objectives.registry import objectives_of
from eve_ds.ops.masked_loss import CUDA_CHUNK_BYTES
from eve_ds.planner.parameters import Cutting, model_on_meta
from eve_ds.planner.traffic import Passes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Forward(NamedTuple):
    """Bytes of one micro-batch of one rank."""

    outside: int
    """Kept outside of the blocks: by embeddings, decoders, heads and losses."""
    blocks: int
    """Kept by all blocks of the backbone."""
    block_inputs: int
    """Inputs of the blocks that are not kept outside as well."""
    largest_block: int
    """Kept by the block that keeps most."""
    logits: int
    """Logits of all masked words, of which a GPU holds one chunk of at most `CUDA_CHUNK_BYTES` at a time."""
    passes: Passes
    """Tensors that ranks exchange."""

    @property
    def kept(self) -> int:
        """Most bytes of the forward pass."""
        return self.outside + self.blocks + min(self.logits, CUDA_CHUNK_BYTES)

    @property
    def checkpointed(self) -> int:
        """Most bytes with `train.activation_checkpointing`, which computes one block after another again."""
        return self.outside + self.block_inputs + self.largest_block + min(self.logits, CUDA_CHUNK_BYTES)


def forward_of(config: Config, micro_batch: int, precision: str = "bf16", cutting: Cutting | None = None) -> Forward:
    """Run the forward pass and the losses of one micro-batch on the meta device.

    Args:
        config: model, masks and sources.
        micro_batch: number of samples.
        precision: data type of weights and activations.
        cutting: tensor-parallel ranks, of which one is counted; None: one rank.
    """
    cutting = cutting or Cutting()
    batch = longest_batch(config, micro_batch)
    model = model_on_meta(config.model).to(DTYPES[precision]).train()
    model.pack_views = config.train.pack_views
    hold_shards(model, cutting)
    kept = KeptTensors(model)
    exchanged = Exchanged(model, cutting)
    model.backbone.checkpoint_blocks(kept.run_block)
    with FusedAttention(), kept.recorded():
        loss = training_loss(model, config, batch.to("meta"))
    return Forward(
        kept.outside + kept_by_losses(loss),
        kept.blocks,
        kept.block_inputs,
        kept.largest_block,
        _logit_bytes(model, batch),
        exchanged.passes(len(batch.layouts or {}), _word_states(model, batch)),
    )


def longest_batch(config: Config, size: int) -> Batch:
    """Batch of `size` samples whose captions have `model.text_length` tokens, on the host."""
    kinds = {source.modalities for source in config.data.sources}
    has_images, has_captions = kinds != {"text"}, kinds != {"image"}
    image = np.zeros((config.model.image_size, config.model.image_size, 3), np.uint8) if has_images else None
    caption = "red " * config.model.text_length if has_captions else None
    collate = Collator(
        config,
        load_tokenizer("scenes"),  # its ids are below those of any vocabulary in use
        objectives_of(config.model),
        has_images=has_images,
        has_captions=has_captions,
    )
    return collate([Sample(str(number), 0, image, caption) for number in range(size)])


def training_loss(model: EVE, config: Config, batch: Batch) -> Tensor:
    """Weighted sum of the loss terms of one micro-batch, () fp32."""
    output = model(**batch.model_inputs())
    counts: Mapping[str, float] = dict.fromkeys(count(Batch(keys=[]), config.model), 1.0)
    terms = pretraining_losses(output, batch.targets(), counts, config.model)
    return weighted_sum(terms, config.loss.weights)


def hold_shards(model: EVE, cutting: Cutting) -> None:
    """Replace the parameters of a plain model on the meta device by one tensor-parallel rank's parts."""
    for name, parameter in list(model.named_parameters()):
        module, _, own = name.rpartition(".")
        shape = cutting.shape(name, parameter.shape)
        setattr(model.get_submodule(module), own, nn.Parameter(parameter.new_empty(shape)))
    for part in model.modules():
        if isinstance(part, SelfAttention | CrossAttention):
            part.num_heads //= cutting.tp_size


class FusedAttention(TorchFunctionMode):
    """Attention that keeps queries, keys, values, result and a sum per query, as fused kernels of every device do.

    On the meta device torch would take the one that keeps all probabilities.
    """

    def __torch_function__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        """Call `function`, or the fused attention in its place."""
        options = options or {}
        if function is not F.scaled_dot_product_attention:
            return function(*arguments, **options)
        query, key, value = arguments
        mask = options.get("attn_mask")
        mask = None if mask is None else mask.to(query.dtype)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, attn_mask=mask)[0]


class KeptTensors:
    """Storages that autograd keeps in a forward pass, other than those of parameters, by the block that keeps them.

    A storage counts once, where it is kept first.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._sizes: list[dict[int, int]] = [{}]
        """Address of a storage -> its bytes: outside of the blocks, then by block."""
        self._inputs: dict[int, int] = {}
        self._current = 0

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Record what is kept until the context ends; the graph must live as long."""
        with saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield

    def run_block(self, block: Block, *arguments: Any) -> Any:
        """Run a block and record what it keeps; a function for :meth:`eve_ds.model.eve.Backbone.checkpoint_blocks`."""
        self._inputs |= {
            argument.untyped_storage()._cdata: argument.untyped_storage().nbytes()
            for argument in arguments
            if isinstance(argument, Tensor)
        }
        self._sizes.append({})
        self._current = len(self._sizes) - 1
        try:
            return block(*arguments)
        finally:
            self._current = 0

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._parameters and not any(storage._cdata in sizes for sizes in self._sizes):
            self._sizes[self._current][storage._cdata] = storage.nbytes()
        return tensor

    @property
    def outside(self) -> int:
        """Bytes kept outside of the blocks."""
        return sum(self._sizes[0].values())

    @property
    def blocks(self) -> int:
        """Bytes kept by the blocks."""
        return sum(self._of_blocks)

    @property
    def largest_block(self) -> int:
        """Bytes kept by the block that keeps most."""
        return max(self._of_blocks, default=0)

    @property
    def block_inputs(self) -> int:
        """Bytes of the blocks' inputs that are not kept outside as well."""
        return sum(size for address, size in self._inputs.items() if address not in self._sizes[0])

    @property
    def _of_blocks(self) -> list[int]:
        return [sum(sizes.values()) for sizes in self._sizes[1:]]


def kept_by_losses(loss: Tensor) -> int:
    """Bytes of gradients that the loss of the masked words forms in the forward pass, in the graph below `loss`."""
    found, seen, waiting = 0, set(), [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += sum(gradient.nbytes for gradient in getattr(node, "gradients", None) or ())
        waiting += [below for below, _ in node.next_functions]
    return found


def _word_states(model: EVE, batch: Batch) -> int:
    """Bytes of the states of the masked words."""
    if batch.masked_token_ids is None or model.text_head is None:
        return 0
    return len(batch.masked_token_ids) * model.text_head.dense.weight[0].nbytes


def _logit_bytes(model: EVE, batch: Batch) -> int:
    """See :attr:`Forward.logits`."""
    if batch.masked_token_ids is None or model.text_head is None:
        return 0
    weight = model.backbone.text_embedding.word.weight
    return len(batch.masked_token_ids) * len(weight) * weight.element_size()


class Exchanged:
    """Bytes of tensors that ranks would exchange in one micro-batch, by hooks on the layers of a plain model.

    Of layers that tensor parallelism cuts, those by rows sum their outputs in the forward pass, and those by columns
    the gradients of their inputs in the backward pass; split experts do both.
    """

    def __init__(self, model: EVE, cutting: Cutting) -> None:
        self._splits_experts = cutting.split_experts
        self._rows, self._calls = 0, 0
        self._forward = {True: 0, False: 0}
        """Bytes of sums in the forward pass: inside the blocks of the backbone, and outside."""
        self._backward = 0
        for name, module in model.named_modules():
            if isinstance(module, Experts):
                module.register_forward_hook(self._experts)
            elif isinstance(module, nn.Linear | nn.Embedding):
                cut = cutting.find(f"{name}.weight")
                if cut is not None:
                    by_rows = isinstance(module, nn.Embedding) or cut.dim == 1
                    inside = name.startswith("backbone.blocks.")
                    module.register_forward_hook(partial(self._linear, by_rows=by_rows, inside=inside))

    def _experts(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._calls += 1
        self._rows += output.nbytes
        if self._splits_experts:
            self._forward[True] += output.nbytes
            self._backward += output.nbytes

    def _linear(
        self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, *, by_rows: bool, inside: bool
    ) -> None:
        if by_rows:
            self._forward[inside] += output.nbytes
        else:
            self._backward += inputs[0].nbytes

    def passes(self, num_views: int, words: int) -> Passes:
        """Sums over the layers.

        Args:
            num_views: number of views that are balanced separately.
            words: bytes of the states of the masked words, whose gradient is summed too.
        """
        return Passes(
            self._rows, self._calls, num_views, self._forward[True], self._forward[False] + words, self._backward
        )
