"""Activations that the planner counts on the meta device, against what autograd keeps in a real forward pass."""

import pytest
import torch
from tiny import tiny_config

from eve_ds.model.eve import EVE
from eve_ds.planner.forward import forward_of, longest_batch, training_loss

SIZE = 6
TOLERANCE = {"fp32": 0.0, "bf16": 0.02}
"""Relative. LayerNorm in bf16 keeps mean and deviation in bf16 on a CPU, and in fp32 elsewhere."""
CONFIGS = {
    "two views": [],
    "one view": ["model.objectives=[joint]"],
    "contrast": ["model.objectives=[mim,mlm,itc,itm]"],
    "self-attending decoder": ["model.pixel_decoder.kind=self", "model.pixel_decoder.num_layers=2"],
    "top 1, one pass per view": ["model.moe.top_k=1", "train.pack_views=false"],
    "capacity": ["model.moe.routing=capacity"],
    "official": ["model.profile=official"],
    "dropped paths": ["model.drop_path_rate=0.2", "model.text_dropout=0.1"],
    "masks of the paper": ["masking.image_view_share=1", "masking.predicted_patch_share=1"],
    "one network for all": ["model.deep_ffn=shared"],
}


def kept_on_cpu(config, precision, checkpointing):
    """Bytes of the storages that autograd keeps, and of the gradients that the loss of the words has formed."""
    model = EVE(config.model).to(precision).train()
    model.pack_views = config.train.pack_views
    if checkpointing:
        model.backbone.checkpoint_blocks()
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = training_loss(model, config, longest_batch(config, SIZE))
    formed = config.model.hidden_size * (config.model.vocab_size + num_masked(config)) * loss_bytes(precision)
    formed += 4 * config.model.vocab_size
    held = sum(size for address, size in storages.items() if address not in parameters)
    loss.backward()  # the graph must live until here
    return held + (formed if config.model.predicts_words else 0)


def num_masked(config):
    return len(longest_batch(config, SIZE).masked_token_ids)


def loss_bytes(precision):
    return torch.empty((), dtype=precision).element_size()


@pytest.mark.parametrize(("name", "precision"), [*((name, "fp32") for name in CONFIGS), ("two views", "bf16")])
def test_counted_activations_are_those_of_a_real_pass(name, precision):
    config = tiny_config("masking.text_to_image_share=0", *CONFIGS[name])
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    counted, tolerance = forward_of(config, SIZE, precision), TOLERANCE[precision]
    real = kept_on_cpu(config, dtype, checkpointing=False)
    assert counted.outside + counted.blocks == pytest.approx(real, rel=tolerance)
    real = kept_on_cpu(config, dtype, checkpointing=True)
    assert counted.outside + counted.block_inputs == pytest.approx(real, rel=tolerance)
    assert counted.largest_block < counted.blocks
