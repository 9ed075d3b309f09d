"""Check weights of a transformers model before they are loaded, and read those of earlier exports.

Earlier versions named each expert, `moe.experts.3.fc1.weight`, as plain exports do. Libraries that place tensors one by
one need the names of the parameters, which hold the experts of a layer stacked: `moe.experts.fc1_weight`.
"""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import LoadStateDictConfig, load_state_dict
from transformers.utils.loading_report import LoadStateDictInfo

from eve_ds.checkpoint.files import listed, shape_problem, tensor_problems
from eve_ds.export.plain import ExportError
from eve_ds.model.eve import model_shapes
from eve_ds.model.moe import plain_names_of
from eve_ds.model.naming import expert_id, is_stacked


def stacked_weights(
    model: PreTrainedModel,
    state_dict: dict[str, Tensor] | None,
    files: list[str] | None,
    load_config: LoadStateDictConfig,
) -> dict[str, Tensor] | None:
    """Return weights with stacked experts, or `state_dict` unchanged if the weights do not name each expert.

    Args:
        model: model on the meta device.
        state_dict: weights, or None for those of `files`.
        files: files of weights.
        load_config: arguments of `from_pretrained`.

    Raises:
        ExportError: weights that name each expert are not those of the model, or are to go to the disk.
    """
    where = str(load_config.pretrained_model_name_or_path)
    if all(expert_id(name) is None for name in (_names(files or []) if state_dict is None else state_dict)):
        return state_dict
    if "disk" in (load_config.device_map or {}).values():
        raise ExportError(
            f"{where} names each expert, as earlier versions did, and cannot be offloaded to the disk: load it without "
            "device_map, and save it again by save_pretrained"
        )
    each = _read(files or []) if state_dict is None else state_dict
    found = {name: tensor.shape for name, tensor in each.items()}
    _refuse(tensor_problems(found, model_shapes(model.config.to_model_config())), where)
    return {name: _stacked(model, name, parameter, each) for name, parameter in model.named_parameters()}


def _stacked(model: nn.Module, name: str, parameter: nn.Parameter, each: dict[str, Tensor]) -> Tensor:
    if not is_stacked(name):
        return each[name]
    return torch.stack([each[part] for part in plain_names_of(model, name)])


def _names(files: list[str]) -> list[str]:
    """Read the names of tensors from the headers of safetensors files, or from whole files of other kinds."""
    names: list[str] = []
    for file in files:
        if file.endswith(".safetensors"):
            with safe_open(file, "pt") as opened:
                names += opened.keys()
        else:
            names += load_state_dict(file)
    return names


def _read(files: list[str]) -> dict[str, Tensor]:
    return {name: tensor for file in files for name, tensor in load_state_dict(file).items()}


def finish_loading(model: nn.Module, loaded: LoadStateDictInfo, where: str) -> None:
    """Check what was loaded, and move it out of the files; weights on the disk stay there, unread.

    Raises:
        ExportError: a tensor is missing, unknown to the model, of another shape, or not finite.
    """
    other = [
        shape_problem(name, torch.Size(found), torch.Size(expected))
        for name, found, expected in sorted(loaded.mismatched_keys)
    ]
    parts = (
        ("lacks", sorted(loaded.missing_keys)),
        ("holds", [f"{name}, unknown to the model" for name in sorted(loaded.unexpected_keys)]),
        ("has", other),
    )
    _refuse([f"{what} {listed(names)}" for what, names in parts if names], where)
    broken = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        parameter.data = parameter.data.clone()  # for the reason given in `eve_ds.export.plain.load`
        if not bool(parameter.isfinite().all()):
            broken.append(name)
    if broken:
        raise ExportError(f"{where} cannot be loaded: {listed(broken)} not finite (NaN or infinity)")


def _refuse(problems: list[str], where: str) -> None:
    if problems:
        raise ExportError(
            f"{where} cannot be loaded: it {'; '.join(problems)}: config.json is not the one of these weights"
        )
