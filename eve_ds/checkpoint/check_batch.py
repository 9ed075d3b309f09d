"""A few samples with the outputs of the model, stored in a checkpoint to verify what is read from it later."""

from __future__ import annotations

from typing import Any, cast

import torch
from deepspeed import DeepSpeedEngine
from safetensors.torch import save
from torch import Tensor
from torch.func import functional_call

from eve_ds.distributed import rank_zero
from eve_ds.model.with_losses import plain_model


@torch.no_grad()
def check_batch(engine: DeepSpeedEngine, inputs: dict[str, Any], is_shown: bool) -> bytes | None:
    """Inputs and outputs of a forward in evaluation mode, as a safetensors file; collective, None except on rank 0.

    Args:
        engine: engine of the model.
        inputs: inputs of this rank.
        is_shown: whether they are those of rank 0, as on its tensor-parallel ranks.
    """
    training = engine.module.training
    engine.module.eval()
    outputs = _outputs(engine, inputs if is_shown else emptied(inputs))
    engine.module.train(training)
    if not rank_zero():
        return None
    named = {f"input.{name}": value for name, value in inputs.items()}
    named |= {f"output.{name}": value for name, value in outputs.items()}
    tensors = {name: value.contiguous() for name, value in named.items() if value is not None}
    return save(tensors, {"device": engine.device.type})


def _outputs(engine: DeepSpeedEngine, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs of the model by name; a collective, also because a vocabulary may be spread over ranks.

    At ZeRO 0 to 2 copies of the weights are used: in DeepSpeed's flat buffers weights lie at arbitrary addresses, and
    the alignment of the operands affects the rounding of matrix products. ZeRO 3 gathers weights for a call only, so
    there the outputs can differ by rounding from those of a reader of the weights.
    """
    if engine.zero_optimization_stage() == 3:
        return cast(dict[str, Tensor], engine(call=lambda model: model(**inputs).tensors()))
    model = plain_model(engine.module)
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    return functional_call(model, weights, kwargs=inputs).tensors()


def emptied(inputs: dict[str, Any]) -> dict[str, Any]:
    """Samples without any token to route, so that experts see only rank 0's tokens, as when the weights are read later.

    Additional rows in a matrix product would change the rounding of our rows.
    """
    emptied = inputs | {"layouts": None}
    if (pixel_values := inputs["pixel_values"]) is not None:
        emptied["image_mask"] = torch.zeros(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
    if (input_ids := inputs["input_ids"]) is not None:
        emptied["attention_mask"] = torch.zeros_like(input_ids, dtype=torch.bool)
    if (shown_words := inputs["image_view_text_mask"]) is not None:
        emptied["image_view_text_mask"] = torch.zeros_like(shown_words)
    if (masked_token_ids := inputs["masked_token_ids"]) is not None:
        emptied["masked_token_ids"] = masked_token_ids[:0]
    return emptied
