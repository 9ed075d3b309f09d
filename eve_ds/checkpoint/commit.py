"""Save a run so that a checkpoint appears whole or not at all, and go on from the newest one.

All ranks write into a hidden folder; after a barrier rank 0 renames it and then replaces `latest`. A killed save leaves
only a hidden folder, which the next save removes.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from safetensors.torch import save_file
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedTokenizerFast

from eve_ds.config import Config, ConfigError
from eve_ds.distributed import get_logger, rank_zero

FOLDER = "checkpoints"
LATEST = "latest"
CHECK_BATCH = "check_batch.safetensors"


def save(
    engine: DeepSpeedEngine,
    run: Path,
    *,
    step: int,
    state: dict[str, Any],
    position: dict[str, Any],
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    check_inputs: dict[str, Tensor | None],
) -> Path:
    """Write `run/checkpoints/step-NNNNNNNN`; collective, returns the folder.

    Args:
        engine: model and optimiser.
        run: output folder of the run.
        step: optimiser steps taken.
        state: JSON-able numbers of the run, equal on every rank.
        position: JSON-able position of this rank's data loader.
        config, tokenizer: travel with the checkpoint.
        check_inputs: a few samples of this rank, as the model takes them; those of rank 0 are stored with the model's
            outputs, so that whoever reads the weights can tell whether they are the same model.
    """
    root = run / FOLDER
    name = f"step-{step:08d}"
    hidden = f".saving-{name}"
    if rank_zero():
        for leftover in root.glob(".saving-*"):
            shutil.rmtree(leftover)
        (root / hidden).mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(root), tag=hidden, save_latest=False)
    _write_check_batch(engine.module, check_inputs, root / hidden / CHECK_BATCH)
    _write_json(root / hidden / f"position_rank_{dist.get_rank():05d}.json", position)
    if rank_zero():
        topology = {
            "world_size": dist.get_world_size(),
            "ep_size": config.parallel.ep_size,
            "zero_stage": engine.zero_optimization_stage(),
        }
        _write_json(root / hidden / "state.json", {"step": step, "topology": topology, **state})
        (root / hidden / "config.json").write_text(config.model_dump_json(indent=2), encoding="utf-8")
        tokenizer.save_pretrained(root / hidden / "tokenizer")
    dist.barrier()
    if rank_zero():
        for script in root.glob("*.py"):  # DeepSpeed's converters, which fail on a checkpoint with experts
            script.unlink()
        _publish(root, hidden, name)
        get_logger().info("saved %s", root / name)
    dist.barrier()
    return root / name


def find_latest(run: Path) -> Path | None:
    """The newest committed checkpoint of a run, or None."""
    pointer = run / FOLDER / LATEST
    if not pointer.is_file():
        return None
    folder = run / FOLDER / pointer.read_text(encoding="utf-8").strip()
    if not (folder / "state.json").is_file():
        raise ConfigError(
            f"{pointer} names {folder.name}, which is missing or torn: write the name of a whole one into it"
        )
    return folder


def check(checkpoint: Path, config: Config, zero_stage: int) -> dict[str, Any]:
    """The state that a checkpoint was saved with, if this run can go on from it.

    Raises:
        ConfigError: no checkpoint there, or one of another model, world size, ep_size or ZeRO stage.
    """
    state = _read_json(checkpoint / "state.json")
    model = _read_json(checkpoint / "config.json")["model"]
    if model != config.model.model_dump(mode="json"):
        raise ConfigError(f"{checkpoint} holds another model than this run's: name a checkpoint of this run")
    now = {"world_size": dist.get_world_size(), "ep_size": config.parallel.ep_size, "zero_stage": zero_stage}
    if state["topology"] != now:
        raise ConfigError(
            f"{checkpoint} was written with {_topology(state['topology'])}, this run has {_topology(now)}: "
            "resume with the same, or export plain weights and start from those"
        )
    return state


def load(engine: DeepSpeedEngine, checkpoint: Path, config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Load weights and optimiser of the same topology; returns (state, position of this rank).

    Raises:
        ConfigError: see :func:`check`.
    """
    state = check(checkpoint, config, engine.zero_optimization_stage())
    engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    return state, _read_json(checkpoint / f"position_rank_{dist.get_rank():05d}.json")


def _topology(topology: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in topology.items())


@torch.no_grad()
def _write_check_batch(model: torch.nn.Module, inputs: dict[str, Tensor | None], file: Path) -> None:
    """Store inputs and outputs of one forward in evaluation mode; collective, since experts are spread over ranks.

    Weights are copied for that forward: in DeepSpeed's flat buffers they lie at any address, and products of matrices
    are rounded by how their operands are aligned.
    """
    training = model.training
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    output = functional_call(model.eval(), weights, kwargs=inputs if rank_zero() else _emptied(inputs))
    model.train(training)
    if not rank_zero():
        return
    outputs = {"pixel_predictions": output.pixel_predictions}
    if output.token_hidden is not None:
        outputs["token_logits"] = output.token_logits()
    named = {f"input.{name}": value for name, value in inputs.items()}
    named |= {f"output.{name}": value for name, value in outputs.items()}
    tensors = {name: value.contiguous() for name, value in named.items() if value is not None}
    save_file(tensors, file, {"device": output.vocabulary_weight.device.type})


def _emptied(inputs: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Samples that hold nothing to route: experts then see rank 0's tokens alone, as where the weights are read.

    A product of matrices with other rows beside ours is rounded in another way.
    """
    emptied = dict(inputs)
    if (pixel_values := inputs["pixel_values"]) is not None:
        emptied["image_mask"] = torch.zeros(len(pixel_values), dtype=torch.bool, device=pixel_values.device)
    if (input_ids := inputs["input_ids"]) is not None:
        emptied["attention_mask"] = torch.zeros_like(input_ids, dtype=torch.bool)
    if (masked_token_ids := inputs["masked_token_ids"]) is not None:
        emptied["masked_token_ids"] = masked_token_ids[:0]
    return emptied


def _publish(root: Path, hidden: str, name: str) -> None:
    if (root / name).exists():  # the same step saved again, after going back to an earlier one
        (root / name).rename(root / f".saving-replaced-{name}")
    (root / hidden).rename(root / name)
    pointer = root / f".{LATEST}"
    pointer.write_text(name + "\n", encoding="utf-8")
    os.replace(pointer, root / LATEST)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path.parent} is not a whole checkpoint: {path.name} cannot be read ({error})") from None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")
