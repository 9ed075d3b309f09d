"""Bytes that one micro-batch keeps and sends, from a forward pass of the model itself on the meta device.

Tensors on that device have shapes and no values, so a pass takes a fraction of a second for any size. The batch comes
from the collator of training, with captions of `model.text_length` tokens, which no batch exceeds. Routing has the
shapes that it has in training; experts that get more tokens than others make some ranks need more than is counted here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from eve_ds.config import Config
from eve_ds.data.batch import Batch, Sample
from eve_ds.data.collate import Collator
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.model.attention import CrossAttention, SelfAttention
from eve_ds.model.eve import EVE
from eve_ds.model.with_losses import weighted_sum
from eve_ds.objectives.pretraining import count, pretraining_losses
from eve_ds.objectives.registry import objectives_of
from eve_ds.ops.masked_loss import CUDA_CHUNK_BYTES
from eve_ds.planner.exchanged_tensors import ExchangedTensors
from eve_ds.planner.kept_tensors import KeptTensors, kept_by_losses
from eve_ds.planner.parameters import Cutting, model_on_meta
from eve_ds.planner.shape import DTYPES
from eve_ds.planner.traffic import Passes


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
    exchanged = ExchangedTensors(model, cutting)
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
