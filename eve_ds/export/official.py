"""Conversion between the tensor names of the released EVE backbone and ours.

The released files use the prefix `backbone.` for all names, as we do. Shapes of EVE-Base are in
`tests/export/test_official.py`. Misspelled names (`pre_layrnorm`, `mlp_imag`) are those of the original.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch
from torch import Tensor

PREFIX = "backbone."
POSITION_BUFFERS = {"backbone.position_ids_vision", "backbone.position_ids_text"}
"""Buffers with counts from 0. Fine-tuning code creates them, so not every file has them."""

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
    """Convert a backbone state dict from released names, with or without the prefix `backbone.`, to our names.

    The two modality embeddings of a router become the rows of one tensor; position buffers are omitted. Tensors are not
    copied. Unknown names are not changed.
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
    """Convert a state dict of :class:`eve_ds.model.eve.EVE` to the backbone with released names and prefix.

    Inverse of :func:`from_official`. EVE-Base has 510 tensors, including two int64 position buffers. Pixel decoder and
    text head are omitted, because released files do not contain them. Tensors are not copied. A router without modality
    embedding gets embeddings of zeros, which are equivalent.

    The released code routes differently from our default profile (see :mod:`eve_ds.model.moe`): its experts see the
    modality embedding, and it drops tokens beyond the capacity in evaluation. A model trained with `profile: official`
    has the same outputs in the released code; the outputs of other models are only similar.
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

    The file is a `torch.save` of the flat dictionary of :func:`to_official`, with floating-point tensors in `dtype`.
    The released `load_pretrain_beit` reads the value under the key `model` if that exists, otherwise the dictionary
    itself. A killed write leaves no incomplete `file`.

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
