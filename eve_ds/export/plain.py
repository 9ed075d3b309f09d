"""Plain weights: out of a checkpoint into a folder, and from there into a model; neither step knows DeepSpeed.

`export` writes model.safetensors (fp32), config.json, tokenizer/ and export.json (what was written and how it was
checked). It reads them back and compares the model's outputs with those that the engine recorded at the save.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from eve_ds.config import Config, ConfigError, ModelConfig, parse_config
from eve_ds.data.tokenizer import load_tokenizer
from eve_ds.export.deepspeed_files import CheckpointError, Topology, listed, read_weights
from eve_ds.model.eve import EVE
from eve_ds.model.naming import expert_id

WEIGHTS, CONFIG, TOKENIZER, REPORT = "model.safetensors", "config.json", "tokenizer", "export.json"
OFFICIAL = "eve_official.pth"
"""Beside them where it was asked for; see :func:`eve_ds.export.official.write_official`."""
CHECK_BATCH = "check_batch.safetensors"
TOLERANCES = {"fp32": 1e-6, "bf16": 2e-2, "fp16": 5e-3}
"""Of the norm of a difference in outputs to the norm of the outputs: the order of sums in fp32; a few units of the last
place of bf16 (2^-8) and fp16 (2^-11)."""
TOLERANCE_ACROSS_DEVICES = 1e-4
"""The same for fp32 outputs recorded on an accelerator, whose kernels sum and round differently."""


class ExportError(ValueError):
    """An export that cannot be written, or a folder that is not one; the message says what to do."""


@dataclass(frozen=True)
class OutputCheck:
    """Outputs of the exported model against those that the engine recorded, computed in the precision of training."""

    precision: str
    outputs: dict[str, list[int]]
    """Name -> shape."""
    max_abs_diff: float
    relative: float
    """Largest over the outputs of |difference| / |recorded|, as Euclidean norms."""
    tolerance: float


@dataclass(frozen=True)
class ExportReport:
    """What was written; export.json holds the same."""

    checkpoint: str
    step: int
    weights: str
    """Where they are from."""
    tensors: int
    parameters: int
    experts: dict[str, int]
    """Layer -> experts found in it."""
    bytes: int
    """Of model.safetensors."""
    sha256: str
    check: OutputCheck | None
    """None where the checkpoint holds no recorded outputs."""


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder that `path` is, or the newest one of the run that it is.

    Raises:
        CheckpointError: neither of them, a run without a checkpoint, or a torn one.
    """
    if (path / "state.json").is_file():
        return path
    root = path / "checkpoints"
    if not root.is_dir():
        problem = "is neither a run (no folder checkpoints) nor a checkpoint (no state.json)"
        raise CheckpointError(f"{path} {problem if path.exists() else 'does not exist'}: name a run or a checkpoint")
    pointer = root / "latest"
    if not pointer.is_file():
        raise CheckpointError(f"{path} holds no finished checkpoint ({pointer} is missing): train until one is saved")
    folder = root / pointer.read_text(encoding="utf-8").strip()
    if not (folder / "state.json").is_file():
        raise CheckpointError(f"{folder}, the newest of {path}, is torn, it lacks state.json: name another checkpoint")
    return folder


def export(source: Path, out: Path) -> ExportReport:
    """Write the weights, config and tokenizer of a run or checkpoint into the folder `out`.

    `out` is new or empty, or holds an earlier export of the same run, which is replaced. A killed export leaves no
    half-written `out`.

    Raises:
        CheckpointError: `source` cannot be read, or does not hold exactly the weights that its config asks for.
        ExportError: `out` holds something else, or the outputs of what was written differ from the recorded ones.
        OSError: writing failed.
    """
    checkpoint = find_checkpoint(source)
    config = _read_config(checkpoint)
    step, topology = _read_state(checkpoint)
    _check_out(out, config)
    weights, origin = read_weights(checkpoint, config, topology)
    check_weights(weights, config.model, str(checkpoint))
    with replacing(out) as folder:
        metadata = {"format": "pt", "step": str(step)}
        save_file({name: weights[name].contiguous() for name in sorted(weights)}, folder / WEIGHTS, metadata)
        (folder / CONFIG).write_text(config.model_dump_json(indent=2), encoding="utf-8")
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets nobody else read it
        _copy_tokenizer(checkpoint / TOKENIZER, folder / TOKENIZER)
        report = ExportReport(
            checkpoint=checkpoint.name,
            step=step,
            weights=origin,
            tensors=len(weights),
            parameters=sum(weight.numel() for weight in weights.values()),
            experts=experts_per_layer(weights),
            bytes=(folder / WEIGHTS).stat().st_size,
            sha256=sha256(folder / WEIGHTS),
            check=_check_outputs(folder, checkpoint, config.train.precision),
        )
        (folder / REPORT).write_text(json.dumps(asdict(report), indent=2), encoding="utf-8")
    return report


def load(folder: Path | str) -> tuple[EVE, Config, PreTrainedTokenizerFast]:
    """Model (fp32, on CPU, in evaluation mode), config and tokenizer of an export.

    Raises:
        ExportError: the folder is not an export, or its weights are not those of its config.
    """
    folder = Path(folder)
    missing = [name for name in (WEIGHTS, CONFIG, TOKENIZER) if not (folder / name).exists()]
    if missing:
        raise ExportError(f"{folder} is not an export, it lacks {listed(missing)}: write one with launcher/convert.py")
    try:
        weights = load_file(folder / WEIGHTS)
        config = _read_config(folder)
        check_weights(weights, config.model, str(folder / WEIGHTS))
        tokenizer = load_tokenizer(folder / TOKENIZER)
    except (SafetensorError, CheckpointError, ConfigError) as error:
        raise ExportError(f"{folder} cannot be loaded: {error}") from None
    with torch.device("meta"):
        model = EVE(config.model)
    # Copied, since in the file they lie at any address, and products of matrices are rounded by how their operands are
    # aligned: the same weights should give the same outputs wherever they come from.
    model.load_state_dict({name: weight.clone() for name, weight in weights.items()}, assign=True)
    return model.eval(), config, tokenizer


def check_weights(weights: dict[str, Tensor], config: ModelConfig, where: str) -> None:
    """Names and shapes must be those of the model, nothing missing, nothing surplus, every number finite.

    Raises:
        CheckpointError: naming the first tensors that are not.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in EVE(config).state_dict().items()}
    found = {name: tuple(weight.shape) for name, weight in weights.items()}
    problems = [f"lacks {listed(missing)}"] if (missing := expected.keys() - found) else []
    problems += [f"holds {listed(surplus)}, unknown to the model"] if (surplus := found.keys() - expected) else []
    shapes = {
        f"{name} {found[name]} where the config asks for {shape}"
        for name, shape in expected.items()
        if found.get(name, shape) != shape
    }
    problems += [f"has {listed(shapes)}"] if shapes else []
    if problems:
        raise CheckpointError(f"{where} {'; '.join(problems)}: config.json is not the one of these weights")
    broken = [name for name, weight in weights.items() if not bool(weight.isfinite().all())]
    if broken:
        raise CheckpointError(f"{where}: {listed(broken)} not finite (NaN or infinity): take an earlier checkpoint")


def _check_outputs(folder: Path, checkpoint: Path, precision: str) -> OutputCheck | None:
    """Run the exported model on the samples that the engine ran at the save."""
    if not (checkpoint / CHECK_BATCH).is_file():
        return None
    inputs, recorded, device = _read_check_batch(checkpoint / CHECK_BATCH)
    model, *_ = load(folder)
    with torch.no_grad():
        output = model.to(_DTYPES[precision])(**inputs)
        tokens = None if output.token_hidden is None else output.token_logits()
    computed = {"pixel_predictions": output.pixel_predictions, "token_logits": tokens}
    differences = {name: computed[name].double() - expected.double() for name, expected in recorded.items()}
    relative = [float(differences[name].norm() / recorded[name].double().norm()) for name in recorded]
    check = OutputCheck(
        precision=precision,
        outputs={name: list(tensor.shape) for name, tensor in recorded.items()},
        max_abs_diff=max(float(difference.abs().max()) for difference in differences.values()),
        relative=max(relative),
        tolerance=max(TOLERANCES[precision], 0.0 if device == "cpu" else TOLERANCE_ACROSS_DEVICES),
    )
    if not check.relative <= check.tolerance:
        raise ExportError(
            f"outputs of the weights of {checkpoint} differ by {check.relative:.1e} (relative) from those that were "
            f"recorded when it was saved, more than {check.tolerance:.0e} in {precision}; nothing was written"
        )
    return check


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def _read_check_batch(file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Inputs of EVE.forward, recorded outputs that have any elements, and the type of device they are from."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no mapping
            device = opened.metadata()["device"]
    except SafetensorError as error:
        raise CheckpointError(f"{file} cannot be read ({error}): take another checkpoint of the run") from None
    inputs = {name.removeprefix("input."): t for name, t in tensors.items() if name.startswith("input.")}
    outputs = {name.removeprefix("output."): t for name, t in tensors.items() if name.startswith("output.")}
    return inputs, {name: tensor for name, tensor in outputs.items() if tensor.numel()}, device


def _read_config(folder: Path) -> Config:
    return parse_config(_read_json(folder / CONFIG), str(folder / CONFIG))


def _read_state(checkpoint: Path) -> tuple[int, Topology]:
    state = _read_json(checkpoint / "state.json")
    try:
        return int(state["step"]), Topology(**state["topology"])
    except (KeyError, TypeError):
        raise CheckpointError(f"{checkpoint / 'state.json'} names no step and topology: take another one") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} is torn, it lacks {path.name}: take another checkpoint") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}): take another checkpoint") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must be a JSON object, not a {type(value).__name__}: take another checkpoint")
    return value


def _copy_tokenizer(source: Path, target: Path) -> None:
    if not (source / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{source.parent} is torn, it lacks {source.name}/tokenizer.json: take another checkpoint"
        )
    shutil.copytree(source, target)


def _check_out(out: Path, config: Config) -> None:
    if out.exists() and not out.is_dir():
        raise ExportError(f"--out {out} is a file: name a new or empty folder")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if not names:
        return
    foreign = names - {WEIGHTS, CONFIG, TOKENIZER, REPORT, OFFICIAL}
    if foreign or REPORT not in names:
        raise ExportError(f"--out {out} is not empty, it holds {listed(foreign or names)}: name a new or empty folder")
    try:
        same = _identity(_read_config(out)) == _identity(config)
    except (CheckpointError, ConfigError):
        same = False
    if not same:
        raise ExportError(f"--out {out} holds the export of another run: name a new or empty folder")


def _identity(config: Config) -> tuple[Any, ...]:
    """What does not change within a run."""
    return config.model, config.masking, config.data, config.loss, config.train.seed, config.train.output_dir


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that takes its place at the end, or vanishes on an error."""
    out = out.absolute()
    hidden, earlier = (out.with_name(f".{out.name}.{what}") for what in ("writing", "earlier"))
    for leftover in (hidden, earlier):  # of a killed export
        shutil.rmtree(leftover, ignore_errors=True)
    hidden.mkdir(parents=True)
    try:
        yield hidden
        if out.exists():
            os.rename(out, earlier)
        os.rename(hidden, out)
        shutil.rmtree(earlier, ignore_errors=True)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def experts_per_layer(weights: dict[str, Tensor]) -> dict[str, int]:
    """Layer -> number of different experts among the names."""
    experts = {(name.partition(".moe.")[0], expert_id(name)) for name in weights if expert_id(name) is not None}
    counts = Counter(block.rpartition(".")[2] for block, _ in experts)
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
