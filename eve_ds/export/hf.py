"""EVE as transformers classes: `AutoModel` and `AutoProcessor` load a folder that `export_hf` has written.

    import eve_ds.export.hf
    model = AutoModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)

Importing this module registers the classes. A file of weights has the names of :mod:`eve_ds.export.plain`.
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
from eve_ds.data.transforms import normalize, open_image, resize
from eve_ds.export.plain import REPORT, WEIGHTS, ExportError, check_weights, load, replacing
from eve_ds.model.eve import EVE

CARD = "README.md"
FILES = {CARD, CONFIG, WEIGHTS, "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
"""What `export_hf` writes."""


class EveConfig(PreTrainedConfig):  # noqa: PLW1641, as mutable and unhashable as every config of transformers
    """The fields of :class:`eve_ds.config.ModelConfig`, with its defaults, as attributes; `moe` and `pixel_decoder` are
    dictionaries.

    Raises:
        ConfigError: a name that is neither a field nor known to transformers, or a value against a rule.
    """

    model_type = "eve"
    # transformers makes a dataclass of this, whose own comparison would see none of the fields.
    __eq__ = PreTrainedConfig.__eq__

    def __post_init__(self, **kwargs: Any) -> None:
        """Called with whatever is not an attribute of every transformers config."""
        inherited = {name: kwargs.pop(name) for name in list(kwargs) if _is_of_every_config(name)}
        super().__post_init__(**inherited, **_validated(kwargs).model_dump(mode="json"))

    def to_model_config(self) -> ModelConfig:
        """The same as EVE takes it; raises :class:`ConfigError` where an attribute was set against a rule."""
        return _validated({name: getattr(self, name) for name in ModelConfig.model_fields})


def _is_of_every_config(name: str) -> bool:
    """Such as `dtype`, or `attn_implementation`, which is kept under `_attn_implementation`."""
    return hasattr(PreTrainedConfig, name) or hasattr(PreTrainedConfig, f"_{name}")


def _validated(fields: dict[str, Any]) -> ModelConfig:
    return parse_config({"model": fields}, EveConfig.__name__).model


@dataclass
class EveModelOutput(ModelOutput):
    """Encoded samples, S = image tokens (class token first), then text tokens; and what was asked to be predicted."""

    last_hidden_state: Tensor | None = None
    """(B, S, D), zero where no token is."""
    attention_mask: Tensor | None = None
    """(B, S) bool, True = a real token."""
    image_embedding: Tensor | None = None
    """(B, D) state of the class token, zero for a sample without an image; None without images."""
    text_embedding: Tensor | None = None
    """(B, D) state of [CLS]; None without text."""
    pixel_predictions: Tensor | None = None
    """(B, N_masked, P * P * 3), as `pixel_target` of the config says."""
    token_logits: Tensor | None = None
    """(M, V)."""


class EveModel(PreTrainedModel):
    """EVE with everything that it was pre-trained with: backbone, and the heads of its objectives; others are None.

    A model made from a config is drawn as :class:`eve_ds.model.eve.EVE` is.
    """

    config_class = EveConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: EveConfig) -> None:
        super().__init__(config)
        eve = EVE(config.to_model_config())
        # Its parts and not EVE itself, so that names need no prefix: a state dict of this model, a file that it saved,
        # a plain export and a run's checkpoint all name a weight alike. Nothing is tied: the text head has no matrix of
        # its own, `forward` multiplies by the word embedding, and both exist once.
        self.backbone, self.pixel_decoder, self.text_head = eve.backbone, eve.pixel_decoder, eve.text_head
        self.matching = eve.matching
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """EVE has drawn them."""

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
        """Encode images (B, 3, H, W), text (B, L) int64, or pairs, and predict what is masked and there is a head for.

        Arguments and errors are those of :meth:`eve_ds.model.eve.EVE.predict`; masks may be integers too.
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
        """(B, 3, H, W) -> (B, D)."""
        return self(pixel_values).image_embedding

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """(B, L) int64, (B, L) -> (B, D)."""
        return self(input_ids=input_ids, attention_mask=attention_mask).text_embedding

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: dict[str, Tensor] | None,
        checkpoint_files: list[str] | None,
        load_config: LoadStateDictConfig,
        expected_keys: list[str] | None = None,
    ) -> tuple[LoadStateDictInfo, dict[Any, Any]]:
        """The step of `from_pretrained` that fills the model, until now on the meta device; may raise ExportError.

        That of transformers sets a parameter by each name of the state dict, where a stacked one has a name for every
        expert; it draws at random what the files lack, and passes over what the model lacks.
        """
        if load_config.device_map is not None or load_config.is_quantized:
            raise ValueError("EveModel is loaded as it is, on the CPU: leave out device_map and quantization_config")
        if state_dict is None:
            state_dict = {name: w for file in checkpoint_files or [] for name, w in load_state_dict(file).items()}
        where = str(load_config.pretrained_model_name_or_path)
        try:
            check_weights(state_dict, model.config.to_model_config(), where)
        except CheckpointError as error:
            raise ExportError(f"{where} cannot be loaded: {error}") from None
        # Copied for the same reason as in `eve_ds.export.load`.
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
"""An encoded image, one that Pillow has opened, or (H, W, 3) uint8."""


class EveImageProcessor(BaseImageProcessor):
    """Whole images to the model's pixels, exactly as :mod:`eve_ds.data.transforms` makes them for evaluation.

    Args:
        image_size: pixels of a side of the result.
        kwargs: what transformers keeps beside it.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012, as transformers declares it

    def __init__(self, image_size: int = 224, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size

    def preprocess(
        self, images: PixelSource | Sequence[PixelSource], return_tensors: str | None = "pt"
    ) -> BatchFeature:
        """`pixel_values` (B, 3, image_size, image_size) float32, -1 to 1, of one image or several.

        Raises:
            ValueError: an array that is not (H, W, 3) uint8, or an image that cannot be decoded.
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
        # Not decoded yet: `resize` decodes it smaller, as in training, which would change the caller's image.
        image.fp.seek(0)
        return open_image(image.fp.read())
    return image


class EveProcessor(ProcessorMixin):
    """Images and captions to the inputs of :class:`EveModel`.

    Args:
        image_processor: for images.
        tokenizer: for captions; its `model_max_length` is the most tokens of one, [CLS] and [SEP] included.
    """

    def __init__(self, image_processor: EveImageProcessor, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(image_processor, tokenizer)

    def __call__(
        self,
        images: PixelSource | Sequence[PixelSource] | None = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """Inputs of the model for images, captions, or as many of both.

        Returns:
            `pixel_values` (B, 3, H, W) float32; `input_ids` (B, L) int64 and `attention_mask` (B, L) bool, where L is
            the longest caption, cut to the tokenizer's `model_max_length`. They equal those of training.

        Raises:
            ValueError: neither images nor captions, not as many of both, or an image that cannot be used.
        """
        inputs: dict[str, Tensor] = {}
        if images is not None:
            inputs |= self.image_processor(images)
        if text is not None:
            inputs |= self._encode([text] if isinstance(text, str) else list(text))
        sizes = {name: len(tensor) for name, tensor in inputs.items()}
        if not inputs or len(set(sizes.values())) > 1:
            raise ValueError(f"give images, captions, or as many of both; these are {sizes or 'neither'}")
        return BatchFeature(inputs, tensor_type=return_tensors)

    def _encode(self, captions: list[str]) -> dict[str, Tensor]:
        """[CLS] caption [SEP] as :mod:`eve_ds.data.collate` writes it, whatever else this tokenizer would add."""
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
    """Write the export in the folder `source` as a transformers model into the folder `out`.

    `out` is new or empty, or holds nothing but an earlier result of this function, which is replaced. A killed call
    leaves no half-written `out`.

    Args:
        source: a folder that :func:`eve_ds.export.load` reads.
        out: gets weights, config, tokenizer and processor, and a model card.
        dtype: of the weights.

    Raises:
        ExportError: `source` is not an export, or `out` holds something else.
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
        model.save_pretrained(folder, max_shard_size="1000GB")  # one file, so that its name is known
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)  # safetensors lets nobody else read it
        processor.save_pretrained(folder)
        (folder / CARD).write_text(_card(config, source, dtype), encoding="utf-8")


def _check_out(out: Path) -> None:
    names = check_output_folder(out, ExportError, FILES.__contains__)
    mark = f'"model_type": "{EveConfig.model_type}"'  # as transformers writes it
    if names and (CONFIG not in names or mark not in (out / CONFIG).read_text(encoding="utf-8")):
        raise ExportError(f"{not_empty(out, names)}; it is no EVE for transformers")


def _card(config: Config, source: Path, dtype: torch.dtype) -> str:
    """Model card; where the weights are from if the export says so."""
    origin = ""
    if (source / REPORT).is_file():
        report = json.loads((source / REPORT).read_text(encoding="utf-8"))
        origin = f"\nWeights of step {report['step']}, from a plain export with sha256 `{report['sha256']}`.\n"
    return f"""---
library_name: transformers
tags: [eve, vision-language, mixture-of-experts]
---
# {config.name}

EVE (Chen et al., AAAI 2024), pre-trained with eve_ds; {str(dtype).removeprefix("torch.")}.
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
