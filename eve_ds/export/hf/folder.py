"""Write an export as a folder that `AutoModel` and `AutoProcessor` of transformers load."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

from eve_ds.checkpoint.files import CheckpointError
from eve_ds.checkpoint.manifest import CONFIG, read_json
from eve_ds.checkpoint.output_folder import check_output_folder, not_empty, replacing
from eve_ds.config import Config
from eve_ds.export.hf.config import EveConfig
from eve_ds.export.hf.image_processor import EveImageProcessor
from eve_ds.export.hf.model import EveModel
from eve_ds.export.hf.processor import EveProcessor
from eve_ds.export.plain import MAX_SHARD_BYTES, REPORT, WEIGHTS_PATTERN, ExportError, load
from eve_ds.export.provenance import describe_objectives
from eve_ds.printable import markdown

CARD = "README.md"
_OWN = re.compile(
    rf"{WEIGHTS_PATTERN}|README\.md|config\.json|processor_config\.json|tokenizer\.json|tokenizer_config\.json"
)
"""Names of files that an export for transformers can contain."""


def export_hf(
    source: Path | str, out: Path | str, dtype: torch.dtype = torch.float32, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write the export in the folder `source` as a transformers model to the folder `out`.

    A killed call leaves no incomplete `out`.

    Args:
        source: folder that :func:`eve_ds.export.load` reads.
        out: folder for weights, config, tokenizer, processor and model card. It is new or empty, or contains only an
            earlier result of this function, which is replaced.
        dtype: data type of the weights.
        max_shard_bytes: largest file of weights, in bytes; more weights are split into several files with an index.

    Raises:
        ExportError: `source` is not an export, or `out` has other contents.
        OSError: writing failed.
    """
    source, out = Path(source), Path(out)
    check_out(out)
    eve, config, tokenizer = load(source)
    with torch.device("meta"):
        model = EveModel(EveConfig(**config.model.model_dump(mode="json")))
    model.load_state_dict({name: weight.to(dtype) for name, weight in eve.state_dict().items()}, assign=True)
    tokenizer.model_max_length = config.model.text_length
    processor = EveProcessor(EveImageProcessor(config.model.image_size), tokenizer)
    with replacing(out) as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_bytes)
        for file in folder.glob("*.safetensors"):
            shutil.copymode(folder / CONFIG, file)  # safetensors makes files readable by their owner only
        processor.save_pretrained(folder)
        (folder / CARD).write_text(_card(config, source, dtype), encoding="utf-8")


def check_out(out: Path) -> None:
    """Refuse a folder that has other contents than an earlier result of :func:`export_hf`.

    Raises:
        ExportError: see above.
    """
    names = check_output_folder(out, ExportError, _OWN.fullmatch)
    if names and not _is_eve(out / CONFIG):
        raise ExportError(f"{not_empty(out, names)}; it is no EVE for transformers")


def _is_eve(config: Path) -> bool:
    try:
        return read_json(config).get("model_type") == EveConfig.model_type
    except CheckpointError:
        return False


def _card(config: Config, source: Path, dtype: torch.dtype) -> str:
    """Return the model card, with the origin of the weights if the folder has a report of an export or of a start."""
    history, origin = "pre-trained with eve_ds on these objectives", ""
    if (source / REPORT).is_file():
        report = read_json(source / REPORT)
        checksum = f"sha256 {markdown(str(report.get('sha256')))}"
        if "step" in report:
            origin = f"\nWeights of step {markdown(str(report['step']))}, from a plain export with {checksum}.\n"
        else:
            history = "not trained with eve_ds yet, with heads for these objectives"
            source_of = markdown(str(report.get("source")))
            origin = f"\nInitial weights, converted from {source_of}, from a folder with {checksum}.\n"
    return f"""---
library_name: transformers
tags: [eve, vision-language, mixture-of-experts]
---
# {markdown(config.name)}

EVE (Chen et al., AAAI 2024), {history}:

{describe_objectives(config)}

Data type of the weights: {str(dtype).removeprefix("torch.")}.
{origin}
```python
import eve_ds.export.hf
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
```
"""
