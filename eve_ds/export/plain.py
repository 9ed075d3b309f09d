"""Export plain weights from a checkpoint to a folder, and load them into a model, both without DeepSpeed.

`export` writes model.safetensors, config.json, tokenizer/, export.json (report of the export and its check) and
README.md (model card). It then loads the folder and compares outputs of the model with outputs that the engine recorded
when it saved the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from eve_ds.checkpoint import manifest
from eve_ds.checkpoint.files import CheckpointError, listed, tensor_problems
from eve_ds.checkpoint.manifest import CHECK_BATCH, CONFIG, TOKENIZER
from eve_ds.checkpoint.output_folder import check_output_folder, not_empty, replacing
from eve_ds.checkpoint.weights import INDEX, WEIGHTS, checkpoint_reader, export_files, find_checkpoint
from eve_ds.config import Config, ConfigError, ModelConfig, parse_written_config
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.export.official import write_official
from eve_ds.export.provenance import ExportReport, OutputCheck, last_evaluation, model_card
from eve_ds.export.weight_files import WeightFileError, read_tensors
from eve_ds.model.eve import EVE, model_shapes
from eve_ds.model.naming import expert_id
from eve_ds.printable import excerpt
from eve_ds.storage import cause

REPORT, CARD = "export.json", "README.md"
OFFICIAL = "eve_official.pth"
"""Optional file in the folder of an export; see :func:`eve_ds.export.official.write_official`."""
WEIGHTS_PATTERN = r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"
"""Pattern of the names of files with weights, whole or in parts, and of their index."""
MAX_SHARD_BYTES = 5 * 10**9
"""Largest file of weights, unless the caller says otherwise."""
_OWN = re.compile(rf"{WEIGHTS_PATTERN}|config\.json|tokenizer|export\.json|README\.md|eve_official\.pth")
"""Names of files and folders that an export can contain."""
TOLERANCES = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 5e-3}
"""Precision -> largest ratio ||difference|| / ||outputs||. Reasons: the order of summation in fp32; a few units in the
last place of bf16 (2^-8) and fp16 (2^-11)."""
TOLERANCE_ACROSS_DEVICES = 1e-4
"""Same ratio for fp32 outputs that were recorded on an accelerator, whose kernels sum and round differently."""
TOLERANCE_ACROSS_SHARDS = 1e-5
"""Same ratio for fp32 outputs that tensor-parallel ranks recorded: two sums of every layer add parts of the ranks, in
another order than one process. That makes 2e-7 to 3e-7 with 3 or 4 layers, and errors of layers add up."""


class ExportError(ValueError):
    """Raised if an export cannot be written, or a folder is not an export; the message says what to do."""


def export(
    source: Path,
    out: Path,
    dtype: torch.dtype = torch.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    must_check: bool = False,
    official: bool = False,
) -> ExportReport:
    """Write weights, config and tokenizer of a run or checkpoint to the folder `out`.

    A killed export leaves no incomplete `out`.

    Args:
        source: folder of a run or checkpoint.
        out: folder that is new, empty, or an earlier export of the same run, which is replaced.
        dtype: data type of the file; fp32 master weights are rounded to it.
        max_shard_bytes: largest file of weights, in bytes; more weights are split into several files with an index.
        must_check: refuse a checkpoint without recorded outputs, because its export cannot be checked.
        official: also write the backbone with the names of the released code, as :data:`OFFICIAL`.

    Returns:
        Report of the export.

    Raises:
        CheckpointError: `source` cannot be read, or its weights are not those of its config.
        ExportError: `out` has other contents, the released code cannot hold the model, or outputs of the exported
            model differ from the recorded ones.
        OSError: writing failed.
    """
    checkpoint = find_checkpoint(source)
    config = _read_config(checkpoint)
    if official:
        _require_released_form(config.model)
    state = manifest.read_state(checkpoint)
    _check_out(out, config)
    if must_check and not (checkpoint / CHECK_BATCH).is_file():
        raise CheckpointError(f"{checkpoint} has no recorded outputs ({CHECK_BATCH}) to compare with")
    weights = read_weights(checkpoint, config.model)
    check_weights(weights, config.model, str(checkpoint))
    if twins := _equal_experts(weights):
        raise CheckpointError(f"{checkpoint}: {listed(twins)}, so they were not initialized or trained separately")
    with replacing(out) as folder:
        metadata = {"format": "pt", "step": str(state["step"])}
        files = write_weights(folder, weights, dtype, max_shard_bytes, metadata)
        (folder / CONFIG).write_text(config.model_dump_json(indent=2), encoding="utf-8")
        for file in files:
            shutil.copymode(folder / CONFIG, file)  # safetensors makes files readable by their owner only
        shutil.copytree(checkpoint / TOKENIZER, folder / TOKENIZER)
        report = ExportReport(
            checkpoint=checkpoint.name,
            step=int(state["step"]),
            dtype=str(dtype).removeprefix("torch."),
            tensors=len(weights),
            parameters=sum(weight.numel() for weight in weights.values()),
            experts=experts_per_layer(weights),
            bytes=sum(file.stat().st_size for file in files),
            sha256=sha256(*files),
            check=_check_outputs(folder, checkpoint, config, dtype),
        )
        (folder / REPORT).write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
        evaluation = None
        if checkpoint.parent.name == manifest.FOLDER:  # the checkpoint is in the folder of its run
            evaluation = last_evaluation(checkpoint.parent.parent, report.step)
        (folder / CARD).write_text(model_card(report, config, state, evaluation), encoding="utf-8")
        if official:
            write_official(weights, folder / OFFICIAL, dtype)
    return report


def _require_released_form(config: ModelConfig) -> None:
    if config.deep_ffn == "shared":
        raise ExportError(
            "--format official: the released code has no place for model.deep_ffn 'shared': leave --format out"
        )


def write_weights(
    folder: Path, weights: dict[str, Tensor], dtype: torch.dtype, max_shard_bytes: int, metadata: dict[str, str]
) -> list[Path]:
    """Write model.safetensors, or numbered parts and an index; return the files with tensors."""
    rounded = {name: weights[name].to(dtype).contiguous() for name in sorted(weights)}
    plan = split_torch_state_dict_into_shards(
        rounded, max_shard_size=max_shard_bytes, filename_pattern=WEIGHTS.replace(".", "{suffix}.", 1)
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: rounded[name] for name in names}, folder / file, metadata)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return [folder / file for file in plan.filename_to_tensors]


def read_weights(checkpoint: Path, config: ModelConfig) -> dict[str, Tensor]:
    """Read the fp32 master weights of a verified checkpoint, in the shapes of the model.

    Raises:
        CheckpointError: tensors are missing, unknown to the model, or of other sizes.
    """
    shapes = model_shapes(config)
    read = checkpoint_reader(checkpoint, shapes)
    return {name: read(name).float() for name in shapes}


def load(folder: Path | str) -> tuple[EVE, Config, PreTrainedTokenizerFast]:
    """Load the model (fp32, on the CPU, in evaluation mode), config and tokenizer of an export.

    Raises:
        ExportError: the folder is not an export, or its weights are not those of its config.
    """
    folder = Path(folder)
    try:
        files = export_files(folder)
        missing = [name for name in (CONFIG, TOKENIZER) if not (folder / name).exists()]
        missing += [WEIGHTS] if not files else [file.name for file in set(files.values()) if not file.is_file()]
        if missing:
            raise ExportError(
                f"{folder} is not an export, it lacks {listed(missing)}: write one with launcher/convert.py"
            )
        weights: dict[str, Tensor] = {}
        for file in sorted(set(files.values())):
            weights |= read_tensors(file)
        config = _read_config(folder)
        check_weights(weights, config.model, str(folder))
        tokenizer = load_tokenizer(folder / TOKENIZER)
    except (CheckpointError, ConfigError, WeightFileError) as error:
        raise ExportError(f"{folder} cannot be loaded: {error}") from None
    with torch.device("meta"):
        model = EVE(config.model)
    model.pack_views = config.train.pack_views
    # Copied, because tensors of a file can have any alignment, and the alignment of operands affects the rounding of
    # matrix products. The same weights must give the same outputs, wherever they come from.
    model.load_state_dict({name: weight.float().clone() for name, weight in weights.items()}, assign=True)
    return model.eval(), config, tokenizer


def check_weights(weights: dict[str, Tensor], config: ModelConfig, where: str) -> None:
    """Check that names and shapes are exactly those of the model, and that all values are finite.

    Raises:
        CheckpointError: the check failed; the message names the first tensors with problems.
    """
    check_tensors(weights, model_shapes(config), where)


def check_tensors(weights: dict[str, Tensor], shapes: dict[str, torch.Size], where: str) -> None:
    """Check tensors like :func:`check_weights`, for any model with the given names and shapes.

    Raises:
        CheckpointError: the check failed; the message names the first tensors with problems.
    """
    problems = tensor_problems({name: weight.shape for name, weight in weights.items()}, shapes)
    if problems:
        raise CheckpointError(f"{where} {'; '.join(problems)}: config.json is not the one of these weights")
    broken = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
    if broken:
        raise CheckpointError(f"{where}: {listed(broken)} not finite (NaN or infinity): take an earlier checkpoint")


def _check_outputs(folder: Path, checkpoint: Path, config: Config, dtype: torch.dtype) -> OutputCheck | None:
    """Run the exported model on the samples whose outputs the engine recorded.

    Returns:
        The comparison; None if the checkpoint has no recorded outputs.

    Raises:
        ExportError: the outputs differ by more than the tolerance.
    """
    if not (checkpoint / CHECK_BATCH).is_file():
        return None
    precision = config.train.precision
    inputs, recorded, device = _read_check_batch(checkpoint / CHECK_BATCH)
    if not recorded:  # nothing was masked in those samples
        return None
    model, *_ = load(folder)
    try:
        with torch.no_grad():
            computed = model.to(_DTYPES[precision])(**inputs).tensors()
    except (TypeError, ValueError, IndexError, RuntimeError) as error:  # inputs of another model, or of none
        problem = f"holds no inputs of this model ({excerpt(cause(error))})"
        raise CheckpointError(f"{checkpoint / CHECK_BATCH} {problem}: take another checkpoint of the run") from None
    if problems := tensor_problems({name: t.shape for name, t in recorded.items()}, _shapes_of(computed, recorded)):
        raise CheckpointError(f"{checkpoint / CHECK_BATCH} {'; '.join(problems)}: take another checkpoint of the run")
    differences = {name: computed[name].double() - expected.double() for name, expected in recorded.items()}
    relative = torch.stack([differences[name].norm() / recorded[name].double().norm() for name in recorded])
    largest = torch.stack([difference.abs().max() for difference in differences.values()])
    check = OutputCheck(
        precision=precision,
        outputs={name: list(tensor.shape) for name, tensor in recorded.items()},
        max_abs_diff=float(largest.max()),  # NaN if any is: Python's max would lose it
        relative=float(relative.max()),
        tolerance=max(
            TOLERANCES[precision],
            0.0 if device == "cpu" else TOLERANCE_ACROSS_DEVICES,
            0.0 if config.parallel.tp_size == 1 else TOLERANCE_ACROSS_SHARDS,
            0.0 if dtype == torch.float32 else TOLERANCES["bf16"],
        ),
    )
    if not check.relative <= check.tolerance:
        raise ExportError(
            f"outputs of the weights of {checkpoint} differ by {check.relative:.1e} (relative) from the outputs "
            f"recorded when it was saved, more than {check.tolerance:.0e} in {precision}; nothing was written"
        )
    return check


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _read_check_batch(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Read inputs of EVE.forward, recorded non-empty outputs, and the device type that computed them."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, not a mapping
            device = (opened.metadata() or {}).get("device", "cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): take another checkpoint of the run") from None
    inputs = {name.removeprefix("input."): t for name, t in tensors.items() if name.startswith("input.")}
    outputs = {name.removeprefix("output."): t for name, t in tensors.items() if name.startswith("output.")}
    return inputs, {name: tensor for name, tensor in outputs.items() if tensor.numel()}, device


def _shapes_of(computed: dict[str, Tensor], names: Iterable[str]) -> dict[str, torch.Size]:
    return {name: computed[name].shape for name in names if name in computed}


def _read_config(folder: Path) -> Config:
    return parse_written_config(manifest.read_json(folder / CONFIG), str(folder / CONFIG))


def _check_out(out: Path, config: Config) -> None:
    names = check_output_folder(out, ExportError, _OWN.fullmatch)
    if not names:
        return
    if REPORT not in names:
        raise ExportError(not_empty(out, names))
    try:
        same = _identity(_read_config(out)) == _identity(config)
    except (CheckpointError, ConfigError):
        same = False
    if not same:
        raise ExportError(f"--out {out} holds the export of another run: name a new or empty folder")


def _identity(config: Config) -> tuple[Any, ...]:
    """Return the settings that do not change within a run."""
    return config.model, config.masking, config.data, config.loss, config.train.seed, config.train.output_dir


def _equal_experts(weights: dict[str, Tensor]) -> list[str]:
    """Describe the pairs of experts of one layer whose first matrices are equal."""
    seen: dict[tuple[str, bytes], str] = {}
    found = []
    for name in sorted(weights):
        expert = expert_id(name)
        if expert is None or not name.endswith(".fc1.weight"):
            continue
        layer = name.partition(".moe.")[0].rpartition(".")[2]
        digest = hashlib.sha256(weights[name].float().contiguous().numpy().tobytes()).digest()
        twin = seen.setdefault((layer, digest), str(expert))
        if twin != str(expert):
            found.append(f"experts {twin} and {expert} of layer {layer} are equal")
    return found


def experts_per_layer(weights: dict[str, Tensor]) -> dict[str, int]:
    """Return layer -> number of different experts, according to the names."""
    experts = {(name.partition(".moe.")[0], expert_id(name)) for name in weights if expert_id(name) is not None}
    counts = Counter(block.rpartition(".")[2] for block, _ in experts)
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def sha256(*paths: Path) -> str:
    """Return the hexadecimal SHA-256 of the concatenation of files."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()
