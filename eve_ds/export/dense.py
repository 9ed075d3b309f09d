"""Read published dense image Transformers: names of their tensors, sizes, and missing parts.

ViT, BEiT   Folders of Hugging Face: config.json describes model.safetensors or pytorch_model.bin.
BEiTv2      File of the authors (microsoft/unilm, folder beit2), pre-trained or fine-tuned; folder of timm, whose
            config.json names an architecture such as beitv2_base_patch16_224, or only the file in it. All of these use
            the names of the authors, and sizes are read from the tensors. Activation, epsilon of LayerNorms and
            normalization of pixels are those of the published code.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from eve_ds import limits
from eve_ds.export.weight_files import WeightFileError, read_tensors
from eve_ds.printable import excerpt
from eve_ds.reading import read_json
from eve_ds.storage import cause

FILES = ("model.safetensors", "pytorch_model.bin")
"""Weight files that are read from a folder; the first one present is used."""
KINDS = {"vit": "vit.", "beit": "beit."}
"""model_type -> prefix of tensor names in models with a head."""
ARCHITECTURES = "beitv2_"
"""Prefix of timm's names for BEiTv2."""
SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "patch_size")
"""Sizes that must be equal in checkpoint and model; keys of :class:`eve_ds.config.ModelConfig`."""


class Names(NamedTuple):
    """Names of the modules and tensors of a checkpoint; the names from `norm1` on follow the prefix of a layer."""

    projection: str
    class_token: str
    position: str
    norm: str
    layer: str
    """Prefix of a layer, with {} for its index."""
    norm1: str
    norm2: str
    qkv: tuple[str, ...]
    """Weights of queries, keys and values: three tensors, or one stacked tensor."""
    q_bias: str
    v_bias: str
    proj: str
    fc1: str
    fc2: str
    gamma: tuple[str, str]


_HUGGING_FACE = Names(
    projection="embeddings.patch_embeddings.projection",
    class_token="embeddings.cls_token",
    position="embeddings.position_embeddings",
    norm="layernorm",
    layer="encoder.layer.{}.",
    norm1="layernorm_before",
    norm2="layernorm_after",
    qkv=tuple(f"attention.attention.{part}.weight" for part in ("query", "key", "value")),
    q_bias="attention.attention.query.bias",
    v_bias="attention.attention.value.bias",
    proj="attention.output.dense",
    fc1="intermediate.dense",
    fc2="output.dense",
    gamma=("lambda_1", "lambda_2"),
)
_BEIT2 = Names(
    projection="patch_embed.proj",
    class_token="cls_token",
    position="pos_embed",
    norm="norm",
    layer="blocks.{}.",
    norm1="norm1",
    norm2="norm2",
    qkv=("attn.qkv.weight",),
    q_bias="attn.q_bias",
    v_bias="attn.v_bias",
    proj="attn.proj",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
    gamma=("gamma_1", "gamma_2"),
)
_HUGGING_FACE_LEFT_OUT = {
    "": r".*attention\.key\.bias",  # exact, see eve_ds.export.upcycle
    "not taken from the checkpoint": r".*",
}
_BIAS_TABLE = r"(blocks\.\d+\.attn|rel_pos_bias)\.relative_position_bias_table"
_BEIT2_LEFT_OUT = {
    "not taken, relative position biases": rf"{_BIAS_TABLE}|(blocks\.\d+\.attn|rel_pos_bias)\.relative_position_index",
    "not taken, token of masked patches": r"mask_token",
    "not taken, heads": r"(lm_head|cls_pt_lm_head|head|fc_norm)\.(weight|bias)",
    "not taken, second decoder of the class token": r"(cls_pt_layers\.\d+|cls_pt_norm)\..+",
}


class Dense(NamedTuple):
    """Dense checkpoint that an EVE can be initialized from."""

    source: Path
    """Folder or file."""
    kind: str
    """Kind of the checkpoint with its article, for messages."""
    names: Names
    """Names of its modules and tensors."""
    tensors: dict[str, Tensor]
    """Tensors in the precision of the file, by names without the prefix of a model with a head."""
    sizes: dict[str, Any]
    """`num_hidden_layers` and those of SIZES that the checkpoint determines, by the keys of our config."""
    has_position: bool
    """Whether the checkpoint has a position table."""
    has_norm: bool
    """Whether the last layer is followed by a LayerNorm of every token."""
    has_bias: bool
    """Whether queries and values have a bias."""
    has_scale: bool
    """Whether the checkpoint has LayerScale."""
    activation: str
    """Activation of the feed-forward networks."""
    eps: float
    """Epsilon of the LayerNorms."""
    left_out: dict[str, str]
    """Text of a note on unused tensors (empty: no note, because nothing is lost) -> pattern of their names."""
    notes: tuple[str, ...] = ()
    """Further differences of the model from the checkpoint, as sentences."""


def read_dense(source: Path) -> Dense:
    """Read a folder of Hugging Face or timm, or a file of BEiTv2; see :func:`read_tensors` for pickles.

    Raises:
        WeightFileError: the source cannot be read, is of another kind, or lacks tensors that determine its sizes.
    """
    if not source.is_dir():
        return _beit2(source, read_tensors(source))
    about = _read_config(source)
    tensors = read_tensors(_weight_file(source))
    return _hugging_face(source, about, tensors) if about.get("model_type") in KINDS else _beit2(source, tensors)


def _read_config(folder: Path) -> dict[str, Any]:
    """Read config.json and check that it describes a supported kind."""
    file = folder / "config.json"
    try:
        about = read_json(file)
    except OSError as error:
        raise WeightFileError(
            f"{file} cannot be read ({cause(error)}): name a folder of save_pretrained or timm, or a file of BEiTv2"
        ) from None
    except ValueError as error:
        raise WeightFileError(f"{file} is not JSON ({error})") from None
    kind, architecture = (about.get(key) if isinstance(about, dict) else None for key in ("model_type", "architecture"))
    if str(kind) in KINDS or (kind is None and str(architecture).startswith(ARCHITECTURES)):
        return about
    found = f"architecture {excerpt(repr(architecture))}" if kind is None and architecture else _kind(kind)
    raise WeightFileError(f"{file} has {found}: only {', '.join(KINDS)} and timm's {ARCHITECTURES}... are read")


def _kind(kind: Any) -> str:
    return f"model_type {excerpt(repr(kind))}"


def _weight_file(folder: Path) -> Path:
    found = [folder / name for name in FILES if (folder / name).is_file()]
    if not found:
        raise WeightFileError(f"{folder} holds neither {' nor '.join(FILES)}: only checkpoints of one file are read")
    return found[0]


def _hugging_face(folder: Path, about: dict[str, Any], tensors: dict[str, Tensor]) -> Dense:
    kind = about["model_type"]
    tensors = {name.removeprefix(KINDS[kind]): tensor for name, tensor in tensors.items()}
    is_beit = kind == "beit"
    return Dense(
        source=folder,
        kind=f"a {kind} of its config.json",
        names=_HUGGING_FACE,
        tensors=tensors,
        sizes={key: _number(folder, about, key, None, int) for key in SIZES}
        | {"num_hidden_layers": _layers(folder, _number(folder, about, "num_hidden_layers", 0, int))},
        has_position=not is_beit or bool(about.get("use_absolute_position_embeddings")),
        has_norm=not is_beit or "layernorm.weight" in tensors,
        has_bias=is_beit or about.get("qkv_bias", True),
        has_scale=is_beit and _number(folder, about, "layer_scale_init_value", 0.1, float) > 0,
        activation=excerpt(str(about.get("hidden_act", "gelu"))),
        eps=_number(folder, about, "layer_norm_eps", 1e-12, float),
        left_out=_HUGGING_FACE_LEFT_OUT,
    )


def _beit2(source: Path, tensors: dict[str, Tensor]) -> Dense:
    return Dense(
        source=source,
        kind="a BEiTv2",
        names=_BEIT2,
        tensors=tensors,
        sizes=_beit2_sizes(source, tensors),
        has_position="pos_embed" in tensors,
        # Classifiers have fc_norm instead, on the average of patches; it is part of their head.
        has_norm="norm.weight" in tensors or "fc_norm.weight" not in tensors,
        has_bias=True,
        has_scale=True,
        activation="gelu",
        eps=1e-6,
        left_out=_BEIT2_LEFT_OUT,
        notes=("the checkpoint was trained on pixels with ImageNet's mean and deviation, the model has .5 and .5",),
    )


def _beit2_sizes(source: Path, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Return the sizes that shapes determine; only the bias tables (distances, heads) determine the number of heads."""
    layers = [int(found[1]) for name in tensors if (found := re.match(r"blocks\.([0-9]{1,9})\.", name))]
    sizes = {
        "hidden_size": _extent(source, tensors, "cls_token", "1, 1, width"),
        "intermediate_size": _extent(source, tensors, "blocks.0.mlp.fc1.weight", "feed-forward width, width", axis=0),
        "patch_size": _extent(source, tensors, "patch_embed.proj.weight", "width, 3, patch, patch"),
        "num_hidden_layers": _layers(source, 1 + max(layers)),
    }
    tables = sorted(name for name in tensors if re.fullmatch(_BIAS_TABLE, name))
    if tables:
        sizes["num_attention_heads"] = _extent(source, tensors, tables[0], "distances, heads")
    return sizes


def _number(folder: Path, about: dict[str, Any], key: str, absent: Any, kind: type[int] | type[float]) -> Any:
    """Value of a key of config.json; null counts as absent."""
    value = about.get(key)
    if value is None:
        return absent
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not math.isfinite(float(value)):
        what = "a whole number" if kind is int else "a number"
        raise WeightFileError(f"{folder / 'config.json'} has {key} {excerpt(repr(value))}, which must be {what}")
    return value


def _layers(source: Path, number: int) -> int:
    if number > limits.LAYERS:
        raise WeightFileError(f"{source} has {number:,} layers, more than the {limits.LAYERS:,} that are read")
    return number


def _extent(source: Path, tensors: dict[str, Tensor], name: str, shape: str, axis: int = -1) -> int:
    """Return the length of one axis of a tensor, after a check that it has as many axes as `shape` names."""
    if name not in tensors:
        raise WeightFileError(f"{source} lacks {name}, which a BEiTv2 has: take it as its authors or timm publish it")
    found = tuple(tensors[name].shape)
    if len(found) != len(shape.split(", ")):
        raise WeightFileError(
            f"{source} has {name} {found}, which is ({shape}) in a BEiTv2: take it as its authors or timm publish it"
        )
    return found[axis]
