"""EVE as transformers classes: `AutoModel` and `AutoProcessor` load the folders that `export_hf` writes.

    import eve_ds.export.hf
    model = AutoModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

Importing this module registers the classes. Weight files have the tensor names of :mod:`eve_ds.export.plain`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoProcessor,
    BaseImageProcessor,
    BatchFeature,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.modeling_utils import LoadStateDictConfig, load_state_dict
from transformers.utils import ModelOutput
from transformers.utils.loading_report import LoadStateDictInfo

from eve_ds.checkpoint.files import CheckpointError
from eve_ds.checkpoint.manifest import CONFIG
from eve_ds.checkpoint.output_folder import check_output_folder, not_empty
from eve_ds.config import Config, ModelConfig, parse_config
from eve_ds.data.image_file import open_image
from eve_ds.data.transforms import normalize, resize
from eve_ds.export.plain import REPORT, WEIGHTS, ExportError, check_weights, load, replacing
from eve_ds.export.provenance import describe_objectives
from eve_ds.model.eve import EVE

CARD = "README.md"
FILES = {CARD, CONFIG, WEIGHTS, "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
"""Files that `export_hf` writes."""


class EveConfig(PreTrainedConfig):  # noqa: PLW1641, mutable and unhashable like every config of transformers
    """Configuration with the fields and defaults of :class:`eve_ds.config.ModelConfig` as attributes.

    `moe` and `pixel_decoder` are dictionaries.

    Raises:
        ConfigError: a name is neither a field nor known to transformers, or a value breaks a rule.
    """

    model_type = "eve"
    # transformers makes this class a dataclass, whose own comparison would ignore the fields.
    __eq__ = PreTrainedConfig.__eq__

    def __post_init__(self, **kwargs: Any) -> None:
        """Validate the fields; `kwargs` are arguments that are not attributes of every transformers config."""
        inherited = {name: kwargs.pop(name) for name in list(kwargs) if _is_of_every_config(name)}
        super().__post_init__(**inherited, **_validated(kwargs).model_dump(mode="json"))

    def to_model_config(self) -> ModelConfig:
        """Return the configuration for EVE.

        Raises:
            ConfigError: an attribute was set to a value that breaks a rule.
        """
        return _validated({name: getattr(self, name) for name in ModelConfig.model_fields})


def _is_of_every_config(name: str) -> bool:
    """Whether every transformers config has the name, such as `dtype`, or `attn_implementation` with an underscore."""
    return hasattr(PreTrainedConfig, name) or hasattr(PreTrainedConfig, f"_{name}")


def _validated(fields: dict[str, Any]) -> ModelConfig:
    return parse_config({"model": fields}, EveConfig.__name__).model


@dataclass
class EveModelOutput(ModelOutput):
    """Encoded samples and requested predictions; S = image tokens (class token first), then text tokens."""

    last_hidden_state: Tensor | None = None
    """(B, S, D) states of tokens; zero for padding."""
    attention_mask: Tensor | None = None
    """(B, S) bool; True: a real token."""
    image_embedding: Tensor | None = None
    """(B, D) state of the class token; zero for a sample without an image; None without images."""
    text_embedding: Tensor | None = None
    """(B, D) state of [CLS]; None without text."""
    pixel_predictions: Tensor | None = None
    """(B, N_masked, P * P * 3) predictions in the form of `pixel_target` of the config."""
    token_logits: Tensor | None = None
    """(M, V) logits of masked tokens."""


class EveModel(PreTrainedModel):
    """EVE with backbone and the heads of its pre-training objectives; other heads are None.

    A model created from a config has the same random initialization as :class:`eve_ds.model.eve.EVE`.
    """

    config_class = EveConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: EveConfig) -> None:
        super().__init__(config)
        eve = EVE(config.to_model_config())
        # The parts of EVE instead of EVE itself, so that names have no additional prefix: a state dict of this model, a
        # file that it saved, a plain export and a checkpoint of a run use the same names. No weights are tied: the text
        # head has no matrix, `forward` multiplies by the word embedding, and the matrix exists once.
        self.backbone, self.pixel_decoder, self.text_head = eve.backbone, eve.pixel_decoder, eve.text_head
        self.matching = eve.matching
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: EVE has initialized its weights."""

    def forward(
        self,
        pixel_values: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
        visible_patch_ids: Tensor | None = None,
        visible_patch_mask: Tensor | None = None,
        masked_patch_ids: Tensor | None = None,
        masked_token_ids: Tensor | None = None,
    ) -> EveModelOutput:
        """Encode images (B, 3, H, W), text (B, L) int64, or pairs; predict masked parts for which there is a head.

        Arguments and errors are those of :meth:`eve_ds.model.eve.EVE.predict`; masks can also be integers.
        """
        encoded = self.backbone(
            pixel_values, input_ids, attention_mask, image_mask, visible_patch_ids, visible_patch_mask
        )
        states = encoded.stream.padded()
        text = states[:, encoded.num_image_tokens :]  # (B, L, D)
        pixels = tokens = None
        if self.pixel_decoder is not None and masked_patch_ids is not None and visible_patch_ids is not None:
            pixels = self.pixel_decoder(encoded.stream, visible_patch_ids, masked_patch_ids)
        if self.text_head is not None and masked_token_ids is not None:
            hidden = self.text_head(text.flatten(0, 1)[masked_token_ids])
            tokens = F.linear(hidden, self.backbone.text_embedding.word.weight, self.text_head.bias)
        return EveModelOutput(
            last_hidden_state=states,
            attention_mask=encoded.stream.layout.mask,
            image_embedding=None if pixel_values is None else states[:, 0],
            text_embedding=None if input_ids is None else text[:, 0],
            pixel_predictions=pixels,
            token_logits=tokens,
        )

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) to embeddings (B, D)."""
        return self(pixel_values).image_embedding

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Encode token IDs (B, L) int64 with an optional mask (B, L) to embeddings (B, D)."""
        return self(input_ids=input_ids, attention_mask=attention_mask).text_embedding

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: LoadStateDictConfig,
        expected_keys: list[str] | None = None,
    ) -> tuple[LoadStateDictInfo, dict[Any, Any]]:
        """Load the weights in `from_pretrained`; until this step the model is on the meta device.

        The method of transformers is not usable: it sets one parameter for each name of the state dict, but a stacked
        parameter has a name for every expert. It also initializes missing weights at random and ignores unknown ones.

        Raises:
            ExportError: the weights are not those of the config.
            ValueError: `device_map` or quantization was requested.
        """
        if load_config.device_map is not None or load_config.is_quantized:
            raise ValueError("EveModel loads only unquantized on the CPU: leave out device_map and quantization_config")
        if state_dict is None:
            state_dict = {name: w for file in checkpoint_files or [] for name, w in load_state_dict(file).items()}
        where = str(load_config.pretrained_model_name_or_path)
        try:
            check_weights(state_dict, model.config.to_model_config(), where)
        except CheckpointError as error:
            raise ExportError(f"{where} cannot be loaded: {error}") from None
        # Copied for the reason given in `eve_ds.export.plain.load`.
        weights = {name: weight.to(model.dtype, copy=True) for name, weight in state_dict.items()}
        model.load_state_dict(weights, assign=True)
        nothing = LoadStateDictInfo(
            missing_keys=set(),
            unexpected_keys=set(),
            mismatched_keys=set(),
            error_msgs=[],
            conversion_errors={},
            skipped_pp_keys=set(),
        )
        return nothing, {}


PixelSource = bytes | Image.Image | NDArray[np.uint8]
"""Encoded image, opened Pillow image, or (H, W, 3) uint8 array."""


class EveImageProcessor(BaseImageProcessor):
    """Image processor with exactly the evaluation transform of :mod:`eve_ds.data.transforms`.

    Args:
        image_size: height and width of the result, in pixels.
        kwargs: further arguments of the base class.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012, declared like this by transformers

    def __init__(self, image_size: int = 224, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size

    def preprocess(
        self, images: PixelSource | Sequence[PixelSource], return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """Convert one image or several to `pixel_values` (B, 3, image_size, image_size) float32 in -1..1.

        Raises:
            ValueError: an array is not (H, W, 3) uint8, or an image cannot be decoded.
        """
        several: Sequence[Any] = images if isinstance(images, list | tuple) else [images]
        pixels = [self._resize(_opened(image)) for image in several]
        return BatchFeature({"pixel_values": normalize(np.stack(pixels))}, tensor_type=return_tensors)

    def _resize(self, image: Image.Image) -> NDArray[np.uint8]:
        return resize(image, (0, 0, *image.size), self.image_size)


def _opened(image: PixelSource) -> Image.Image:
    if isinstance(image, bytes):
        return open_image(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image of shape {image.shape} and dtype {image.dtype} must be (H, W, 3) uint8")
        return Image.fromarray(image)
    if isinstance(image, JpegImageFile) and image.tile and image.fp:
        # Not decoded yet. `resize` decodes it at a smaller size, as in training, which would change the caller's image.
        image.fp.seek(0)
        return open_image(image.fp.read())
    return image


class EveProcessor(ProcessorMixin):
    """Processor that converts images and captions to the inputs of :class:`EveModel`.

    Args:
        image_processor: processor of images.
        tokenizer: tokenizer of captions; its `model_max_length` limits the tokens of a caption, including [CLS] and
            [SEP].
    """

    def __init__(self, image_processor: EveImageProcessor, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: PixelSource | Sequence[PixelSource] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Return the inputs of the model for images, captions, or equal numbers of both.

        Returns:
            `pixel_values` (B, 3, H, W) float32; `input_ids` (B, L) int64 and `attention_mask` (B, L) bool. L is the
            length of the longest caption, at most `model_max_length` of the tokenizer. The values are those of
            training.

        Raises:
            ValueError: neither images nor captions, different numbers of both, or an image that cannot be used.
        """
        inputs: dict[str, Tensor] = {}
        if images is not None:
            inputs |= self.image_processor(images)
        if text is not None:
            inputs |= self._encode([text] if isinstance(text, str) else list(text))
        sizes = {name: len(tensor) for name, tensor in inputs.items()}
        if not inputs or len(set(sizes.values())) > 1:
            raise ValueError(f"pass images, captions, or equal numbers of both; these are {sizes or 'neither'}")
        return BatchFeature(inputs, tensor_type=return_tensors)

    def _encode(self, captions: list[str]) -> dict[str, Tensor]:
        """Encode captions as [CLS] caption [SEP], like :mod:`eve_ds.data.collate`, whatever the tokenizer would add."""
        tokenizer = self.tokenizer
        encoded = tokenizer(captions, add_special_tokens=False, padding=False, truncation=False, verbose=False)
        cut = [ids[: tokenizer.model_max_length - 2] for ids in encoded["input_ids"]]
        rows = [torch.tensor([tokenizer.cls_token_id, *ids, tokenizer.sep_token_id]) for ids in cut]
        masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id),
            "attention_mask": pad_sequence(masks, batch_first=True),
        }


def export_hf(source: Path | str, out: Path | str, dtype: torch.dtype = torch.float32) -> None:
    """Write the export in the folder `source` as a transformers model to the folder `out`.

    A killed call leaves no incomplete `out`.

    Args:
        source: folder that :func:`eve_ds.export.load` reads.
        out: folder for weights, config, tokenizer, processor and model card. It is new or empty, or contains only an
            earlier result of this function, which is replaced.
        dtype: data type of the weights.

    Raises:
        ExportError: `source` is not an export, or `out` has other contents.
        OSError: writing failed.
    """
    source, out = Path(source), Path(out)
    _check_out(out)
    eve, config, tokenizer = load(source)
    with torch.device("meta"):
        model = EveModel(EveConfig(**config.model.model_dump(mode="json")))
    model.load_state_dict({name: weight.to(dtype) for name, weight in eve.state_dict().items()}, assign=True)
    tokenizer.model_max_length = config.model.text_length
    processor = EveProcessor(EveImageProcessor(config.model.image_size), tokenizer)
    with replacing(out) as folder:
        model.save_pretrained(folder, max_shard_size="1000GB")  # a single file, so that its name is known
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors makes files readable by their owner only
        processor.save_pretrained(folder)
        (folder / CARD).write_text(_card(config, source, dtype), encoding="utf-8")


def _check_out(out: Path) -> None:
    names = check_output_folder(out, ExportError, FILES.__contains__)
    mark = f'"model_type": "{EveConfig.model_type}"'  # as transformers writes it
    if names and (CONFIG not in names or mark not in (out / CONFIG).read_text(encoding="utf-8")):
        raise ExportError(f"{not_empty(out, names)}; it is no EVE for transformers")


def _card(config: Config, source: Path, dtype: torch.dtype) -> str:
    """Return the model card, with the origin of the weights if the folder has a report of an export or of a start."""
    history, origin = "pre-trained with eve_ds on these objectives", ""
    if (source / REPORT).is_file():
        report = json.loads((source / REPORT).read_text(encoding="utf-8"))
        checksum = f"sha256 `{report['sha256']}`"
        if "step" in report:
            origin = f"\nWeights of step {report['step']}, from a plain export with {checksum}.\n"
        else:
            history = "not trained with eve_ds yet, with heads for these objectives"
            origin = f"\nInitial weights, converted from `{report['source']}`, from a folder with {checksum}.\n"
    return f"""---
library_name: transformers
tags: [eve, vision-language, mixture-of-experts]
---
# {config.name}

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


AutoConfig.register(EveConfig.model_type, EveConfig)
AutoModel.register(EveConfig, EveModel)
AutoImageProcessor.register(EveConfig, slow_image_processor_class=EveImageProcessor)
AutoProcessor.register(EveConfig, EveProcessor)
