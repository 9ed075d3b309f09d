"""Names of the released EVE backbone, to and from ours.

The released files prefix everything with `backbone.`; see the table in `tests/test_official.py` for the shapes.
Spelling mistakes of the original (`pre_layrnorm`, `mlp_imag`) are theirs.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

_STEM = {
    "class_embedding_vision": "image_embedding.class_token",
    "type_embed_vision": "image_embedding.modality",
    "pos_embed_vision": "image_embedding.position",
    "patch_embed": "image_embedding.projection",
    "word_embedding": "text_embedding.word",
    "layer_norm_text": "text_embedding.norm",
    "type_embed_text": "text_embedding.modality",
    "pos_embed_text": "text_embedding.position",
    "pre_layrnorm": "pre_norm",
    "norm": "norm",
}
_BLOCK = {
    "attn": "attention",
    "norm2_imag": "ffn.norm_image",
    "norm2_text": "ffn.norm_text",
    "mlp_imag": "ffn.image",
    "mlp_text": "ffn.text",
    "norm2_vl": "norm2",
    "mlp_moe.moe.gate.wg": "moe.router",
    "mlp_moe.moe.experts.experts": "moe.experts",
}
_BUFFERS = {"position_ids_vision", "position_ids_text"}
_VISION, _TEXT = "mlp_moe.moe.vision_embed", "mlp_moe.moe.text_embed"


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Backbone state dict under the released names (without the prefix) -> the same under ours.

    The two modality embeddings of a router become the rows of one tensor, position buffers are left out.
    """
    ours = {}
    for name, tensor in state.items():
        if name in _BUFFERS or name.endswith(_TEXT):
            continue
        if name.endswith(_VISION):
            block = name.removesuffix(_VISION)
            modality = torch.stack([tensor, state[block + _TEXT]])
            ours[_rename_block(block.removesuffix(".")) + ".moe.router.modality_embedding"] = modality
        else:
            ours[_rename(name)] = tensor
    return ours


def _rename(name: str) -> str:
    match = re.fullmatch(r"(encoder\.layers\.\d+)\.(.+)", name)
    if match is None:
        return _replace_prefix(name, _STEM)
    return f"{_rename_block(match[1])}.{_replace_prefix(match[2], _BLOCK)}"


def _rename_block(block: str) -> str:
    return block.replace("encoder.layers.", "blocks.")


def _replace_prefix(name: str, table: dict[str, str]) -> str:
    for theirs, ours in table.items():
        if name == theirs or name.startswith(theirs + "."):
            return ours + name.removeprefix(theirs)
    return name
