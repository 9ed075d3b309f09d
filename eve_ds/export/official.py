"""Names of the released EVE backbone, to and from ours.

The released files prefix everything with `backbone.`, as we do. Shapes of EVE-Base are in
`tests/export/test_official.py`. Spelling mistakes of the original (`pre_layrnorm`, `mlp_imag`) are theirs.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

PREFIX = "backbone."
POSITION_BUFFERS = {"backbone.position_ids_vision", "backbone.position_ids_text"}
"""Counts from 0; fine-tuning code makes them anew, so that not every file has them."""

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
_VISION, _TEXT = "mlp_moe.moe.vision_embed", "mlp_moe.moe.text_embed"
_MODALITIES = "moe.router.modality_embedding"
_STEM_BACK, _BLOCK_BACK = ({ours: theirs for theirs, ours in table.items()} for table in (_STEM, _BLOCK))


def from_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Backbone state dict under the released names -> the same under ours, with the prefix `backbone.` or without.

    The two modality embeddings of a router become the rows of one tensor, position buffers are left out. Tensors are
    not copied, and names that the table does not have stay as they are.
    """
    ours = {}
    for name, tensor in state.items():
        stem = name.removeprefix(PREFIX)
        prefix = name.removesuffix(stem)
        if PREFIX + stem in POSITION_BUFFERS or stem.endswith(_TEXT):
            continue
        if stem.endswith(_VISION):
            modalities = torch.stack([tensor, state[name.removesuffix(_VISION) + _TEXT]])
            ours[prefix + _blocks(stem).removesuffix(_VISION) + _MODALITIES] = modalities
        else:
            ours[prefix + _rename(_blocks(stem), _STEM, _BLOCK)] = tensor
    return ours


def to_official(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of :class:`eve_ds.model.eve.EVE` -> the backbone under the released names, prefix included.

    The inverse of :func:`from_official`: 510 tensors for EVE-Base, the two int64 position buffers among them. Pixel
    decoder and text head have no place in a released file and are left out. Tensors are not copied. A router without
    modality embedding gets zeros, which say the same.

    The released code routes differently from our default profile (see :mod:`eve_ds.model.moe`): its experts see the
    modality embedding, and capacity drops at evaluation. A model trained under `profile: official` computes the same
    there as here, any other something close to it.
    """
    official = {}
    for name, tensor in state.items():
        if not name.startswith(PREFIX):
            continue
        stem = name.removeprefix(PREFIX)
        if (
            stem.endswith("moe.router.weight")
            and name.replace("router.weight", "router.modality_embedding") not in state
        ):
            nothing = torch.zeros(tensor.shape[1], dtype=tensor.dtype, device=tensor.device)
            layer = PREFIX + _layers(stem).removesuffix("moe.router.weight")
            official[layer + _VISION], official[layer + _TEXT] = nothing, nothing.clone()
        if stem.endswith(_MODALITIES):
            layer = PREFIX + _layers(stem).removesuffix(_MODALITIES)
            official[layer + _VISION], official[layer + _TEXT] = tensor.unbind()
        else:
            official[PREFIX + _layers(_rename(stem, _STEM_BACK, _BLOCK_BACK))] = tensor
    for kind, shape in (("vision", (1, -1)), ("text", (-1,))):
        position = official[f"{PREFIX}pos_embed_{kind}"]
        official[f"{PREFIX}position_ids_{kind}"] = torch.arange(len(position), device=position.device).view(shape)
    return official


def write_official(state: dict[str, Tensor], file: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the backbone of an EVE state dict as a file that the released fine-tuning code loads.

    `torch.save` of the flat dictionary of :func:`to_official`, floating-point tensors in `dtype`. The released
    `load_pretrain_beit` takes what is under the key `model` if there is one, otherwise the dictionary itself. A killed
    write leaves no half-written `file`.

    Raises:
        OSError: writing failed.
    """
    converted = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in to_official(state).items()
    }
    hidden = file.with_name(f".{file.name}.writing")
    try:
        with hidden.open("wb") as opened:
            torch.save(converted, opened)
        os.replace(hidden, file)
    finally:
        hidden.unlink(missing_ok=True)


def _blocks(name: str) -> str:
    return re.sub(r"^encoder\.layers\.(?=\d)", "blocks.", name)


def _layers(name: str) -> str:
    return re.sub(r"^blocks\.(?=\d)", "encoder.layers.", name)


def _rename(name: str, stem: dict[str, str], block: dict[str, str]) -> str:
    """Replace the first matching prefix of a name, after `blocks.N.` if it has that."""
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    if match is None:
        return _replace_prefix(name, stem)
    return match[1] + _replace_prefix(match[2], block)


def _replace_prefix(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name
