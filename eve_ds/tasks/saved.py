"""Fine-tuned models on disk, and the weights that fine-tuning starts from.

A fine-tuned model is a folder like an export: model.safetensors with `backbone.*` and `head.*`, config.json with the
section `task`, tokenizer/, task.json (origin of the weights) and the files of the task, such as answers.json of VQA.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import CheckpointError, listed, shape_problem
from eve_ds.checkpoint.manifest import CONFIG, TOKENIZER
from eve_ds.checkpoint.output_folder import replacing
from eve_ds.checkpoint.weights import export_files, find_checkpoint, weight_reader
from eve_ds.config import Config, ConfigError, ModelConfig, parse_written_config
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.export import ExportError, WeightFileError
from eve_ds.export.importing import IMAGE_POSITIONS, TEXT_POSITIONS, fit_positions, read_backbone
from eve_ds.export.plain import check_tensors, sha256, write_weights
from eve_ds.export.weight_files import read_tensors
from eve_ds.model.eve import model_shapes
from eve_ds.tasks.registry import saved_task
from eve_ds.tasks.task import Task

PROVENANCE = "task.json"
"""Name of the file with the origin of the weights."""
BACKBONE = "backbone."
"""Prefix of the names of the backbone's tensors."""
MAX_FILE_BYTES = 5 * 10**9
"""Size at which weights are split into several files."""


class TaskModel(NamedTuple):
    """A fine-tuned model that was loaded."""

    task: Task
    model: nn.Module
    """fp32, on the CPU, in evaluation mode."""
    config: Config
    tokenizer: PreTrainedTokenizerFast
    sha256: str
    """SHA-256 of the files of weights."""


def task_shapes(task: Task) -> dict[str, torch.Size]:
    """Names and shapes of the tensors of a task's model; no memory is allocated."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in task.model().state_dict().items()}


def save_task_model(
    out: Path,
    task: Task,
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    weights: dict[str, Tensor],
    provenance: dict[str, Any],
) -> None:
    """Write the folder of a fine-tuned model, replacing an earlier one; a killed call leaves the earlier one, or none.

    Args:
        out: the folder.
        task: task of the model.
        config: configuration with `task`.
        tokenizer: tokenizer of the model.
        weights: all tensors of the task's model by name.
        provenance: origin of the weights, as JSON types, for task.json.

    Raises:
        CheckpointError: the weights do not fit the task's model, or are not finite.
        OSError: writing failed.
    """
    check_tensors(weights, task_shapes(task), str(out))
    with replacing(out) as folder:
        files = write_weights(folder, weights, torch.float32, MAX_FILE_BYTES, {"format": "pt"})
        (folder / CONFIG).write_text(config.model_dump_json(indent=2), encoding="utf-8")
        for file in files:
            shutil.copymode(folder / CONFIG, file)  # safetensors makes files unreadable for others
        tokenizer.save_pretrained(folder / TOKENIZER)
        task.save(folder)
        (folder / PROVENANCE).write_text(json.dumps(provenance, indent=1, default=str), encoding="utf-8")


def load_task_model(folder: Path | str) -> TaskModel:
    """Read a folder that :func:`save_task_model` wrote.

    Raises:
        ExportError: the folder is no fine-tuned model, such as a pre-trained one, or is damaged.
    """
    folder = Path(folder)
    try:
        files = sorted(set(export_files(folder).values()))
        if not files or not (folder / CONFIG).is_file():
            raise ExportError(f"{folder} is no saved model, it lacks model.safetensors or config.json")
        config = parse_written_config(manifest.read_json(folder / CONFIG), str(folder / CONFIG))
        if config.task is None:
            raise ExportError(f"{folder} is a pre-trained model without a task: fine-tune it with launcher/finetune.py")
        task = saved_task(config, folder)
        weights: dict[str, Tensor] = {}
        for file in files:
            weights |= read_tensors(file)
        check_tensors(weights, task_shapes(task), str(folder))
        tokenizer = load_tokenizer(folder / TOKENIZER)
    except (CheckpointError, ConfigError, WeightFileError, OSError) as error:
        raise ExportError(f"{folder} cannot be loaded: {error}") from None
    with torch.device("meta"):
        model = task.model()
    # Copied for the reason given in eve_ds.export.plain.load: equal weights must give equal outputs.
    model.load_state_dict({name: weight.float().clone() for name, weight in weights.items()}, assign=True)
    return TaskModel(task, model.eval(), config, tokenizer, sha256(*files))


class Start(NamedTuple):
    """Configuration and tokenizer of a model to fine-tune."""

    config: Config
    tokenizer: str
    """Path of the folder."""


def read_start(init: Path) -> Start:
    """Configuration and tokenizer of an export, a fine-tuned model, a checkpoint or a run.

    Raises:
        ConfigError: `init` is none of these, or cannot be read.
    """
    try:
        folder = init if (init / TOKENIZER).is_dir() else find_checkpoint(init)
        config = parse_written_config(manifest.read_json(folder / CONFIG), str(folder / CONFIG))
    except CheckpointError as error:
        raise ConfigError(f"--init {error}") from None
    return Start(config, str(folder / TOKENIZER))


def start_weights(init: Path, config: ModelConfig) -> Callable[[str], Tensor]:
    """Reader of backbone tensors by name, with position tables fitted to the model.

    Args:
        init: file of released weights, export, fine-tuned model, checkpoint or run.
        config: configuration of the model that is fine-tuned.

    Raises:
        ConfigError: weights that cannot be read or do not fit; names the first tensors that do not fit.
    """
    try:
        if init.is_file():
            return read_backbone(init, config)[0].__getitem__
        read = weight_reader(init, _source_shapes(init))
        shapes = {name: shape for name, shape in model_shapes(config).items() if name.startswith(BACKBONE)}
        tables = {name: read(name).float() for name in (IMAGE_POSITIONS, TEXT_POSITIONS)}
        fit_positions(tables, config, str(init))
        source = _source_shapes(init) | {name: table.shape for name, table in tables.items()}
    except (CheckpointError, WeightFileError) as error:
        raise ConfigError(f"--init {error}") from None
    wrong = [
        shape_problem(name, source.get(name, torch.Size()), shape)
        for name, shape in shapes.items()
        if source.get(name) != shape
    ]
    if wrong:
        raise ConfigError(
            f"--init {init} has {listed(set(wrong))}: leave out what you set of `model`, but for image_size and "
            "text_positions"
        )
    return lambda name: tables[name] if name in tables else read(name)


def start_head_weights(init: Path, names: dict[str, str]) -> dict[str, Tensor]:
    """Tensors of a task's head that `init` holds, by their names in the task's model; may be empty.

    Args:
        init: as for :func:`start_weights`.
        names: prefix of names in the task's model -> their prefix in a pre-trained model.

    Raises:
        ConfigError: weights that cannot be read.
    """
    if init.is_file():  # released weights are those of the backbone
        return {}
    try:
        shapes = _source_shapes(init)
        read = weight_reader(init, shapes)
    except CheckpointError as error:
        raise ConfigError(f"--init {error}") from None
    fine_tuned = read_start(init).config.task is not None
    prefixes = {own: own for own in names} if fine_tuned else names
    return {
        own + name.removeprefix(there): read(name)
        for own, there in prefixes.items()
        for name in shapes
        if name.startswith(there)
    }


def _source_shapes(init: Path) -> dict[str, torch.Size]:
    start = read_start(init)
    if start.config.task is None:
        return model_shapes(start.config.model)
    return task_shapes(saved_task(start.config, init))
